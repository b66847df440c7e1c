"""Several processes: what torchrun starts again goes on, and an error of one is told by all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from matt_fast import compare_initializers, sweep_layers
from matt_fast.recipe.processes import timeout
from matt_fast.recipe.work import make_accelerator
from matt_fast.support import files

CASES = ("left_alone", "lost", "other_files", "broken_disk")


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What restarts.py prints, run in a process that has started no thread yet."""
    command = [sys.executable, Path(__file__).with_name("restarts.py"), *CASES]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout.splitlines()
    return {case["case"]: case for case in map(json.loads, lines)}


def test_two_processes_do_what_one_does_with_accumulation(found):
    alone = found["left_alone"]
    assert alone["status"] == 0
    two, one = alone["losses"]
    assert two == pytest.approx(one, rel=1e-4)
    assert len({*one}) == len(one) == 16
    assert alone["differs"] < 1e-5


def test_a_killed_worker_and_a_lost_machine_come_back_and_the_run_goes_on_to_the_same_bits(found):
    case = found["lost"]
    assert (case["status"], case["others"], case["same"]) == ([0, 0], True, True)


def test_other_files_on_a_machine_are_named_on_each_before_anything_is_written(found):
    case = found["other_files"]
    assert (case["status"], case["there"]) == ([1, 1], False)
    first, second = case["words"]
    assert first == second
    assert first.startswith(
        "Error: processes: wanted the same on all machines, got another data file .jsonl for process 1"
    )
    assert first.count("another ") == 2
    assert "; torch 9.9 for process 1 on " in first
    assert "another tokenizer file tokenizer.json for process 1" in first


def test_a_broken_disk_of_the_main_process_ends_all_and_leaves_nothing_half_written(found):
    case = found["broken_disk"]
    assert (case["status"], case["left"], case["run"]) == ([1, 1], [], True)
    main, other = case["words"]
    assert main.startswith("Error: [Errno 5] Input/output error: 'state.safetensors'\nTo go on from there: ")
    assert "Error: process 0 on " in other
    assert "Input/output error" in other


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("MATT_FAST_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"MATT_FAST_TIMEOUT: wanted seconds .* got '{text}'"):
        timeout()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, tmp_path):
    """Each would write the whole run."""
    Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"device: 2 processes were started, .* wanted device 'cpu' \(--device cpu\)"):
        make_accelerator(None, "auto")
    given = [tmp_path / x for x in ("model", "tokenizer", "data", "output", "held-out")]
    with pytest.raises(ValueError, match="layer: wanted a sweep in one process, got 2 that a launcher started"):
        sweep_layers(*given)
    with pytest.raises(ValueError, match="inits: wanted a comparison in one process, got 2"):
        compare_initializers(*given[:3], ["mean"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make_accelerator("cpu", "auto").num_processes == 1


def test_what_another_machine_wrote_is_waited_for(monkeypatch, tmp_path):
    """A network file system shows it late."""
    path, looks = tmp_path / "rows", []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            path.mkdir()

    monkeypatch.setattr(files.time, "sleep", sleep)
    files.wait_to_see(path)
    assert len(looks) == 3
    monkeypatch.setattr(files, "LATE", -1.0)
    with pytest.raises(FileNotFoundError, match="was written by another process, but is not seen here"):
        files.wait_to_see(tmp_path / "never")
