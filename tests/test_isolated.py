"""Transfers in processes of their own: scripts without a guard, processes that are killed, what cannot be pickled."""

import subprocess
import sys

import psutil
import pytest
import torch
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model

from matt_fast import TrainingOptions, transfer
from matt_fast.recipe.isolated import transfer_apart

SCRIPT = """
import sys
import torch
from matt_fast import TrainingOptions
from matt_fast.recipe.isolated import transfer_apart

print("the script runs", flush=True)
scale = 0.25

def rows_alike(embeddings, rows, matches, subtokens):
    return scale * torch.ones(rows, embeddings.shape[1])

given = dict(zip(["model", "tokenizer", "data", "eval_data", "output"], sys.argv[1:]))
given |= {"training": TrainingOptions(steps=1), "max_length": 48, "init": rows_alike, "n_layers": 2}
found = transfer_apart(given, {}).evaluations
print(*[found[name].bits_per_byte for name in ("initialised", "trained")])
"""

ENDLESS = """
import sys
import psutil
from matt_fast import TrainingOptions
from matt_fast.recipe.isolated import transfer_apart

def tell(progress):
    if progress.step == 1:
        print("children", *[child.pid for child in psutil.Process().children()], flush=True)

given = dict(zip(["model", "tokenizer", "data", "output"], sys.argv[1:]))
transfer_apart({**given, "training": TrainingOptions(steps=1_000_000), "max_length": 48}, {"on_step": tell})
"""


@pytest.fixture
def arguments(tmp_path):
    save_tiny_model(tmp_path / "teacher")
    new_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "corpus.jsonl"
    data.write_text(jsonl(TEXTS))
    paths = {"model": tmp_path / "teacher", "tokenizer": tmp_path / "tokenizer", "data": data}
    return {**paths, "output": tmp_path / "output", "max_length": 48}


def command(text: str, arguments: dict) -> list[str]:
    """A script's command line."""
    script = arguments["output"].with_name("script.py")
    script.write_text(text)
    return [sys.executable, str(script), *(str(arguments[name]) for name in ("model", "tokenizer", "data", "output"))]


def test_a_script_needs_no_guard(arguments):
    """Nor one that sweeps, which does this for each depth (test_sweep.py)."""
    held_out = arguments["data"].with_name("held-out.jsonl")
    held_out.write_text("".join(reversed(arguments["data"].read_text().splitlines(keepends=True))))
    *given, output = command(SCRIPT, arguments)
    done = subprocess.run([*given, str(held_out), output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the script runs") == 1
    arguments |= {"output": arguments["output"].with_name("alone"), "training": TrainingOptions(steps=1)}
    alike = lambda embeddings, rows, *given: torch.full((rows, embeddings.shape[1]), 0.25)  # noqa: E731
    alone = transfer(**arguments, eval_data=held_out, init=alike, n_layers=2).evaluations
    wanted = [alone[name].bits_per_byte for name in ("initialised", "trained")]
    assert list(map(float, done.stdout.splitlines()[-1].split())) == pytest.approx(wanted, rel=1e-6)


def test_the_process_ends_with_the_one_that_started_it(arguments):
    script = subprocess.Popen(command(ENDLESS, arguments), stdout=subprocess.PIPE, text=True)
    line = next(line for line in script.stdout if line.startswith("children"))
    (child,) = [psutil.Process(int(pid)) for pid in line.split()[1:]]
    script.kill()
    script.communicate()
    _, alive = psutil.wait_procs([child], timeout=60)
    assert [child.status() for child in alive] in ([], [psutil.STATUS_ZOMBIE])


def test_a_process_that_was_killed_is_told(arguments):
    def kill(progress):
        if progress.step == 2:
            (child,) = psutil.Process().children()
            child.kill()

    arguments["training"] = TrainingOptions(steps=1_000_000)
    with pytest.raises(RuntimeError, match=r"the process of a transfer was killed \(SIGKILL\)"):
        transfer_apart(arguments, {"on_step": kill})


def test_what_cannot_be_pickled_is_told(arguments):
    endless = (None for _ in TEXTS)
    with pytest.raises(TypeError, match=r"arguments: wanted what dill can pickle for another process, got .*generator"):
        transfer_apart(arguments | {"init": lambda *given: next(endless)}, {})
