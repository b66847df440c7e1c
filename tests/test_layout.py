"""The rooms of the package, and the one direction in which they import each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "matt_fast"

# From the bottom up: a room imports from floors below its own, and from nowhere else.
FLOORS = (
    ("support", "matt_kernels"),
    ("alignment", "loss"),
    ("model", "evaluation"),
    ("data", "initializers"),
    ("training", "modeling"),
    ("recipe",),
    ("planning",),
    ("cli",),
    ("reference",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "matt_fast" and rest:
                found.add(rest[0])
            elif first == "matt_kernels":
                found.add(first)
    return found


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == FLOOR_OF.keys() - {"matt_kernels"}


@pytest.mark.parametrize("room", sorted(FLOOR_OF.keys() - {"matt_kernels"}))
def test_imports_go_down(room):
    for file in (PACKAGE / room).rglob("*.py"):
        upwards = {other for other in imports(file) - {room} if FLOOR_OF[other] >= FLOOR_OF[room]}
        assert not upwards, f"{file.relative_to(PACKAGE)} imports from {upwards}"
