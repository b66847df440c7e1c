"""The GPU benchmark's dry run: every path on a CPU, in a process of its own, on torch, triton and numpy alone."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
HEAVY = "accelerate", "datasets", "rich", "safetensors", "tokenizers", "transformers", "typer"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)


def test_dry_run(tmp_path):
    output = tmp_path / "report.md"
    few = "--variants", "aim", "--metrics", "mse", "--lengths", "24", "36"
    run(str(SCRIPT), "--dry-run", *few, "--output", str(output))
    text = output.read_text()
    assert text.startswith("# DRY RUN")
    times, checks = text.split("## Correctness")
    rows = [[y.strip() for y in x.split("|")[1:-1]] for x in times.splitlines() if x.startswith("| n=")]
    steps = {step: result for _, step, result, *_ in rows}
    assert {"triton", "triton, plan given", "torch", "eager", "compiled eager", "flash", "raise", "die"} == set(steps)
    assert steps["raise"] == "failed: RuntimeError: raised on purpose"
    assert "the process ended with status 9" in steps["die"]
    # what came after the failures still ran, and a dry run shows no time
    assert {steps[x] for x in ("eager", "compiled eager", "flash")} == {"ran"}
    assert all(row[3:] == ["", "", ""] for row in rows)
    # two lengths, two noises, two engines
    assert sum(x.startswith("| n=") for x in checks.splitlines()) == 8


def test_nothing_is_timed_without_a_check(tmp_path):
    output = tmp_path / "report.md"
    run(str(SCRIPT), "--dry-run", "--steps", "triton", "torch", "--lengths", "24", "--output", str(output))
    assert output.read_text().count("not timed: correctness not established") == 8


def test_imports_nothing_else():
    code = f"import sys, runpy; runpy.run_path({str(SCRIPT)!r}); print([x for x in {HEAVY!r} if x in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"
