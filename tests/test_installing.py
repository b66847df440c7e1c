"""What messages tell people to install, the names of the package that the type checker sees, and what imports need."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import matt_fast
from matt_fast.support import installing
from matt_fast.support.installing import install_line, packages_line

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What the extras bring: the packages as they are imported.
OF_EXTRAS = (
    "bitsandbytes", "bpe_continue", "deepfocus", "fasttext", "fasttext_pybind", "gguf", "hypothesis", "lightning",
    "liger_kernel", "matplotlib", "mistral_common", "sentencepiece", "sklearn", "tensorboard", "triton",
)  # fmt: skip


class Installed:
    """The metadata of an installed matt-fast, as importlib.metadata gives it."""

    requires = ("torch>=2.9", "matplotlib>=3.8; extra == 'plot'", "triton>=3; os_name == 'none' and extra == 'plot'")

    def __init__(self, installer, *extras):
        self.metadata = self
        self.installer, self.extras = installer, extras

    def get_all(self, key):
        return list(self.extras) if key == "Provides-Extra" else None

    def read_text(self, name):
        return {"INSTALLER": self.installer}.get(name)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A function that makes this an environment with an installer, a pip that the shell finds, and VIRTUAL_ENV."""
    folder = tmp_path / "my env" / "bin"
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "prefix", str(folder.parent))

    def make(installer, pip_is_found=False, activated=False):
        found = folder / "pip" if pip_is_found else tmp_path / "elsewhere" / "pip"
        found.parent.mkdir(parents=True, exist_ok=True)
        found.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(found.parent))
        monkeypatch.setenv("VIRTUAL_ENV", str(folder.parent if activated else tmp_path))
        monkeypatch.setattr(installing, "distribution", lambda name: Installed(installer, "plot"))
        return f"'{folder / 'python'}'"

    return make


def test_the_line_is_for_the_environment_that_runs(environment, monkeypatch):
    environment("pip\n", pip_is_found=True)
    assert install_line("plot") == "pip install 'matplotlib>=3.8'"
    assert packages_line("wandb") == "pip install wandb"
    python = environment("pip\n")
    assert install_line("plot") == f"{python} -m pip install 'matplotlib>=3.8'"
    python = environment("uv\n")
    assert install_line("plot") == f"uv pip install --python {python} 'matplotlib>=3.8'"
    environment("uv\n", activated=True)
    assert install_line("plot") == "uv pip install 'matplotlib>=3.8'"
    assert install_line("later") == "install matt-fast again, with its extra 'later'"

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installing, "distribution", missing)
    assert install_line("plot") == "install matt-fast again, with its extra 'plot'"


def test_every_message_asks_for_the_line():
    """Text that says how to install is right for one way of installing only; extras that are named exist."""
    for file in (ROOT / "matt_fast").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name != "installing.py":
            assert not re.search(r"pip install|matt-fast\[", text), file
        assert {*re.findall(r"install_line\(['\"](\w+)", text)} <= EXTRAS.keys(), file


def test_the_type_checker_sees_the_names_that_are_loaded_lazily():
    """`if TYPE_CHECKING:` imports each name of `_WHERE` from the same module."""
    for file in (ROOT / "matt_fast").rglob("__init__.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
        if "_WHERE" not in values:
            continue
        block = next(x for x in tree.body if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING")
        seen = {name.name: line.module for line in block.body for name in line.names}
        assert seen == ast.literal_eval(values["_WHERE"]), file


def run_without(packages, script, **environment):
    """stdout of a Python process for which these packages are not installed."""
    hide = (
        "import sys\n"
        "class Hiding:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, *rest):\n"
        f"        return None if name.split('.')[0] in {set(packages)!r} else self.finder.find_spec(name, *rest)\n"
        "sys.meta_path[:] = map(Hiding, sys.meta_path)\n"
    )
    environment = os.environ | environment
    done = subprocess.run([sys.executable, "-c", hide + script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_needs_no_extra():
    script = (
        "import matt_fast\n"
        "for name in matt_fast.__all__: getattr(matt_fast, name)\n"
        "from matt_fast.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: print('exit', end.code)\n"
    )
    told = run_without(OF_EXTRAS, script)
    assert "transfer" in told
    assert told.endswith("exit 0\n")


def test_the_kernels_need_torch_and_triton_only(tmp_path):
    """A loss with gradients is the eager formula's, a step of rows torch's AdamW's, with nothing else of matt-fast."""
    others = {re.match(r"[\w-]+", need)[0].replace("-", "_") for need in PROJECT["dependencies"]}
    others = {*others, "yaml", "matt_fast"} - {"torch", "numpy"}  # Triton's interpreter runs on NumPy
    torch.manual_seed(0)
    teacher, student = (tuple(torch.randn(1, 2, n, 16) for _ in "qkv") for n in (7, 5))
    segments = torch.tensor([[0, 0, 1, 2, 2, 2, 3]]), torch.tensor([[0, 1, 1, 2, 3]])
    rows, gradient = torch.randn(5, 3), torch.randn(2, 3)
    torch.save((teacher, student, segments, rows, gradient), tmp_path / "given.pt")
    script = (
        "import torch, matt_kernels\n"
        f"given, got = {str(tmp_path / 'given.pt')!r}, {str(tmp_path / 'got.pt')!r}\n"
        "teacher, student, segments, rows, gradient = torch.load(given)\n"
        "student = [x.requires_grad_() for x in student]\n"
        "loss = matt_kernels.aim_loss(teacher, student, *segments)\n"
        "gradients = torch.autograd.grad(loss, student)\n"
        "moments, counts, slots = torch.zeros(2, 5, 3), torch.zeros(5, dtype=torch.int64), torch.tensor([3, 1])\n"
        "matt_kernels.adamw_rows(rows, *moments, counts, slots, gradient, lr=0.1)\n"
        "torch.save((loss.detach(), gradients, rows), got)\n"
        "print(*sorted(matt_kernels.__all__))\n"
    )
    told = run_without(others, script, TRITON_INTERPRET="1")
    assert told.split() == ["AimPlan", "adamw_rows", "aim_loss", "aim_plan", "autotune", "tile_widths"]
    loss, gradients, updated = torch.load(tmp_path / "got.pt")
    exact = [x.double().requires_grad_() for x in student]
    wanted = matt_fast.aim_loss(tuple(x.double() for x in teacher), tuple(exact), *segments, backend="eager")
    torch.testing.assert_close(loss, wanted.detach().float())
    torch.testing.assert_close(gradients, tuple(x.float() for x in torch.autograd.grad(wanted, exact)))
    moved = torch.nn.Parameter(rows[[3, 1]])
    moved.grad = gradient
    torch.optim.AdamW([moved], lr=0.1, weight_decay=0).step()
    rows[[3, 1]] = moved.detach()
    torch.testing.assert_close(updated, rows)


def test_versions_are_said_once():
    assert matt_fast.__version__ == PROJECT["version"]
