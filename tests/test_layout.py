"""The rooms of the package, the one direction in which they import each other, and how long their parts are."""

import ast
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import matt_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "matt_fast"

# From the bottom up: a room imports from floors below its own, and from nowhere else.
FLOORS = (
    ("support", "matt_kernels"),
    ("alignment", "loss", "runs"),
    ("model",),
    ("data", "initializers", "evaluation"),
    ("training", "modeling", "tokenizers", "show"),
    ("planning", "report"),
    ("recipe",),
    ("cli",),
    ("reference",),
)
# What users' scripts import: a name that is new comes here too, and none goes.
PUBLIC = {
    "matt_fast": """
        AIMLoss AttentionInputs GPTNeoXForAIM Gemma3ForAIM HealingOptions LlamaForAIM MATT MATTConfig MATTOutput
        MistralForAIM PartlyFrozenEmbeddings PreTrainedModelForAIM Qwen3ForAIM TrainingOptions TransferResult
        __version__ aim_impl aim_loss aim_star_impl align_segments align_segments_batch apply capture_attention
        compare_initializers doctor evaluate initialize layer_config match_tokens plan sweep_layers transfer
    """,
    "matt_fast.config": "MATTConfig",
    "matt_fast.modeling": "AIMOutput Gemma3ForAIM PartlyFrozenEmbeddings PreTrainedModelForAIM",
    "matt_fast.modeling.gemma3": "Gemma3TextScaledPartlyFrozenWordEmbedding",
    "matt_fast.segments": "SPECIAL align_segments align_segments_batch",
    "matt_fast.tokenizers": "check extend merge prune train",
    "matt_fast.training.aim_impl": "aim_impl aim_star_impl get_aim_impl get_aim_star_states get_aim_states",
    "matt_fast.vocabulary": "VocabularyPair match_tokens spell_tokens token_bytes vocabulary_rows",
}
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


@pytest.mark.parametrize("module", list(PUBLIC))
def test_public_names_are_where_they_were(module):
    found = import_module(module)
    assert not [name for name in PUBLIC[module].split() if not hasattr(found, name)]


def test_every_name_of_the_package_is_listed():
    assert {"__version__", *matt_fast.__all__} == set(PUBLIC["matt_fast"].split())


def test_a_wheel_has_every_room():
    """setuptools is given a list, since kernels/ must not become a package (see pyproject.toml)."""
    folders = [file.parent for file in (*ROOT.glob("matt_fast/**/__init__.py"), *ROOT.glob("kernels/**/__init__.py"))]
    wanted = [".".join(x.relative_to(ROOT).parts).removeprefix("kernels.") for x in folders]
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(wanted)
    without = [file for file in PACKAGE.rglob("*.py") if not (file.parent / "__init__.py").exists()]
    assert not without, "Python files in folders that are no packages"


def test_the_layouts_page_names_every_room():
    layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    assert not [room for room in FLOOR_OF if f"{room}/" not in layout]


def test_every_file_says_what_it_is_for():
    for file in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_what_names_one_thing_stands_in_one_place():
    """Names of files, marks in them, and ids that stand for nothing: two could come to differ."""
    places: dict[tuple, set] = {}
    for file in PACKAGE.rglob("*.py"):
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign):
                (target,), value = statement.targets, statement.value
                several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                for name, part in zip(target.elts, value.elts, strict=True) if several else [(target, value)]:
                    text = isinstance(part, ast.Constant) and isinstance(part.value, str | bytes)
                    if text or isinstance(part, ast.UnaryOp):
                        named = () if text else (ast.unparse(name),)
                        places.setdefault((ast.unparse(part), *named), set()).add(file.name)
    assert not {value: files for value, files in places.items() if len(files) > 1}


def test_files_and_functions_are_short():
    """No file above 400 lines, no function above 80 unless its docstring says why in a line "Long because"."""
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                assert "Long because" in (ast.get_docstring(node) or ""), f"{file}: {node.name}"
