"""Builds the wheel and the sdist, installs the wheel in empty environments, and runs it in each.

`make release-check` runs all cases below, `make release-check ONLY=3.11-oldest` those named. Each case that ran writes
its line in docs/versions.md. A version of torch is about 6 GB, which uv downloads once and keeps; one environment at a
time is on the disk. Pythons are found by uv: on the PATH, pyenv's, or its own.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
# A case: its Python, how uv picks versions, and what is pinned besides.
CASES = {
    "3.11-oldest": ("3.11", "lowest-direct", ()),
    "3.11-newest": ("3.11", "highest", ()),
    "3.12-newest": ("3.12", "highest", ()),
    "3.13-newest": ("3.13", "highest", ()),
    "kernels-alone": ("3.12", "highest", ()),
}
COLUMNS = ("python", "torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "numpy", "triton")
HEAD = f"""# Versions that were run

Written by `make release-check` (`scripts/release_check.py`), which installs the wheel in an empty environment, removes
Triton, and runs `scripts/installed.py` there, outside the repository: every public name, `matt-fast doctor`, two tiny
transfers, one with healing, `plan`, `evaluate`, `tokenizer extend`, and loading and generating with transformers alone.
"oldest" has the lowest versions that pyproject.toml claims, "newest" what the index had on that day. "kernels-alone"
has torch, Triton and NumPy only. All ran on a CPU, on Linux, x86-64.

| case | {" | ".join(COLUMNS)} |
|---|{"---|" * len(COLUMNS)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], choices=[*CASES, []])
    parser.add_argument("--uv", default=shutil.which("uv") or str(Path(sys.executable).with_name("uv")))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="matt-fast-release-") as folder:
        wheel, sdist = build(Path(folder))
        check_wheel(wheel)
        check_sdist(sdist)
        print(f"{wheel.name}, {sdist.name}: contents as they should be", flush=True)
        for case in arguments.only or CASES:
            ran = run_case(arguments.uv, case, wheel, Path(folder))
            write_down(case, ran)
            print(f"{case}: {' '.join(f'{name} {ran[name]}' for name in COLUMNS if name in ran)}", flush=True)


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel, built from the sdist, and the sdist."""
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
    (wheel,), (sdist,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    """Exactly the two packages, typed, and the licence."""
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name for name in names if ".dist-info/" not in name}
    wanted = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("matt_fast/**/*.py")}
    wanted |= {file.relative_to(ROOT / "kernels").as_posix() for file in ROOT.glob("kernels/**/*.py")}
    wanted |= {"matt_fast/py.typed", "matt_kernels/py.typed"}
    assert packages == wanted, f"{wheel.name}: {sorted(packages ^ wanted)}"
    assert any(re.fullmatch(r"matt_fast-[^/]+\.dist-info/licenses/LICENSE", name) for name in names)


def check_sdist(sdist: Path) -> None:
    """All that a wheel is built from, the licence and the changelog, and no tests."""
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for needed in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "matt_fast/py.typed"):
        assert needed in names, f"{sdist.name}: {needed} is missing"
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def run_case(uv: str, case: str, wheel: Path, folder: Path) -> dict[str, str]:
    """The versions that the case ran with. The environment is deleted."""
    version, resolution, pins = CASES[case]
    environment, work = folder / case, folder / f"{case}-work"
    python = environment / "bin" / "python"
    work.mkdir()
    call(uv, "venv", "--quiet", "--python", version, environment)
    install = (uv, "pip", "install", "--quiet", "--python", python)
    if case == "kernels-alone":
        call(*install, "torch", "triton", "numpy")
        call(*install, "--no-deps", wheel)
        script = "kernels_alone.py"
    else:
        # With pyproject.toml its dependencies are direct ones, whose lowest versions are wanted.
        call(*install, "--resolution", resolution, "--requirements", ROOT / "pyproject.toml", wheel, *pins)
        call(uv, "pip", "uninstall", "--quiet", "--python", python, "triton")
        script = "installed.py"
        shutil.copy(ROOT / "tests" / "tiny.py", work)
    shutil.copy(ROOT / "scripts" / script, work)
    printed = call(python, script, cwd=work)
    shutil.rmtree(environment)
    return json.loads(printed.splitlines()[-1])


def write_down(case: str, ran: dict[str, str]) -> None:
    """The case's line in docs/versions.md; lines of other cases stay."""
    old = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    lines = {line.split("|")[1].strip(): line for line in old if line.startswith("| ") and "| case" not in line}
    lines[case] = f"| {case} | {' | '.join(ran.get(name, '') for name in COLUMNS)} |"
    table = "".join(f"{lines[name]}\n" for name in CASES if name in lines)
    PAGE.write_text(HEAD + table, encoding="utf-8")


def call(*command: object, cwd: Path | None = None) -> str:
    """What a command printed; where it fails, its words, and the end.

    It sees nothing of this checkout, and no settings of the machine's pip.
    """
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=clean)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
