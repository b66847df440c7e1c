"""metrics.jsonl and the trackers, of a run that is stopped and goes on."""

import importlib.machinery
import json
import math
import os
import resource
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import new_tokenizer, save_tiny_model

from matt_fast import transfer
from matt_fast.support.installing import packages_line
from matt_fast.training.metrics import Metrics
from matt_fast.training.trackers import accelerator_options, trackers_for

HERE = Path()


def progress(step: int, **changed) -> SimpleNamespace:
    """What the loop hands over after a step: 7 tokens in each, 2 of 10 padding, half a second of which 1/4 waiting."""
    values = {
        "step": step,
        "loss": 2 / step,
        "parts": {"aim": 1 / step, "boundary-head": 3.0},
        "lr": step / 100,
        "gradient_norm": 0.5,
        "tokens": 7 * step,
        "padding": 0.2,
        "waiting": 0.25,
        "flops": 1000 * step,
        "epoch": step // 4,
        "seconds": step / 2,
    }
    return SimpleNamespace(**values | changed)


def accelerator(track: str | None = None, folder: Path = HERE) -> Accelerator:
    return Accelerator(cpu=True, **accelerator_options(track, folder))


def read(path: Path) -> list[dict]:
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard" / "matt-fast"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_a_line_has_what_the_step_was(tmp_path):
    with Metrics(tmp_path / "run" / "metrics.jsonl", accelerator()) as metrics:
        metrics.log(progress(1), new_tokens_seen_share=0.1)
        metrics.log(progress(2, seconds=0.75), new_tokens_seen_share=0.2)
        metrics.log_validation(2, 1.75)
        metrics.log(progress(3, seconds=0.75, gradient_norm=math.inf))
    first, second, validation, third = read(tmp_path / "run" / "metrics.jsonl")
    with open("/proc/self/status") as file:
        most = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    assert 0.5 * most < first.pop("peak_memory") <= most
    assert first == {
        "step": 1, "loss": 2.0, "aim": 1.0, "boundary-head": 3.0, "lr": 0.01, "gradient_norm": 0.5, "tokens": 7,
        "tokens_per_second": 14.0, "padding": 0.2, "waiting": 0.25, "flops": 1000, "epoch": 0, "seconds": 0.5,
        "new_tokens_seen_share": 0.1,
    }  # fmt: skip
    assert second["tokens_per_second"] == 28.0
    assert validation == {"step": 2, "bits_per_byte": 1.75}
    assert third["gradient_norm"] is third["tokens_per_second"] is None  # not NaN, which is no JSON


@pytest.mark.parametrize("torn", ["", '{"step": 6, "loss": 0.3', '{"step": 6, "loss": 0.3}'])
def test_a_run_that_goes_on_has_the_file_of_one_that_was_never_stopped(tmp_path, torn):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"

    def train(path, first, last, step):
        metrics = Metrics(path, accelerator(), step=step)
        for number in range(first, last + 1):
            metrics.log(progress(number))
            if number % 3 == 0:
                metrics.log_validation(number, 1 / number)
        return metrics

    train(whole, 1, 8, 0).close()
    train(stopped, 1, 5, 0)
    with stopped.open("a") as file:
        file.write(torn)
    metrics = Metrics(stopped, accelerator(), step=3)
    metrics.log_validation(3, 1 / 3)  # made again, written down once
    metrics.close()
    train(stopped, 4, 8, 3).close()
    for path in (whole, stopped):
        lines = read(path)
        for line in lines:
            line.pop("peak_memory", None)
        path.write_text(json.dumps(lines))
    assert stopped.read_text() == whole.read_text()
    train(stopped, 1, 2, 0).close()  # stopped before its first checkpoint
    assert [line["step"] for line in read(stopped)] == [1, 2]


def test_no_whole_line_is_lost_where_the_process_is_killed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, accelerator())
    child = os.fork()
    if child == 0:
        try:
            for step in range(1, 51):
                metrics.log(progress(step))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [line["step"] for line in read(path)] == list(range(1, 51))


def test_a_full_disk_is_reported_once_and_lines_stay_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, accelerator())
    metrics.log(progress(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True, action="always") as warned:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 60, limits[1]))  # a part of a line fits
        try:
            metrics.log(progress(2))
            metrics.log(progress(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        metrics.log(progress(4))
    assert [str(x.message).partition(":")[0] for x in warned] == [f"{path} is not written, training goes on without it"]
    metrics.close()
    assert [line["step"] for line in read(path)] == [1, 4]


def test_a_file_that_cannot_be_made_is_reported_once(tmp_path):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings(record=True, action="always") as warned:
        metrics = Metrics(tmp_path / "file" / "metrics.jsonl", accelerator())
        metrics.log(progress(1))
        metrics.close()
    (only,) = warned
    assert "metrics.jsonl is not written, training goes on without it: [Errno " in str(only.message)


def test_tensorboard_has_every_step_once(tmp_path):
    folder = tmp_path / "run"
    options = {"name": "mine", "config": {"model": Path("x"), "training": {"lr": 0.1, "steps": None}}}
    metrics = Metrics(folder / "metrics.jsonl", accelerator("tensorboard", folder), **options)
    for step in range(1, 6):
        metrics.log(progress(step))
    metrics = Metrics(folder / "metrics.jsonl", accelerator("tensorboard", folder), **options, step=3)
    for step in range(4, 8):
        metrics.log(progress(step, seconds=step * 2.0, gradient_norm=math.nan if step == 6 else 0.5))
    metrics.log_validation(7, 1.5)
    metrics.close()
    assert scalars(folder, "loss") == [(step, 2 / step) for step in range(1, 8)]
    assert scalars(folder, "boundary-head") == [(step, 3.0) for step in range(1, 8)]
    assert scalars(folder, "tokens_per_second")[-1] == (7, 3.5)
    assert [step for step, _ in scalars(folder, "gradient_norm")] == [1, 2, 3, 4, 5, 7]
    assert scalars(folder, "bits_per_byte") == [(7, 1.5)]
    (settings,) = (folder / "tensorboard").rglob("hparams.yml")  # once
    assert settings.read_text() == "model: x\ntraining.lr: 0.1\ntraining.steps: null\n"


class Tracked(types.ModuleType):
    """A module in the place of wandb or trackio, that writes down what it is told."""

    def __init__(self, name: str, told: list):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.config = SimpleNamespace(update=lambda values, **_: told.append(("config", values)))
        self.init = lambda **options: told.append(("init", options)) or self
        self.log = lambda values, step, **_: told.append((step, values))
        self.finish = lambda **_: told.append(("finish", {}))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_same_run_goes_on_and_is_told_each_step_once(tmp_path, monkeypatch, name):
    told = []
    monkeypatch.setitem(sys.modules, name, Tracked(name, told))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType(name)])
    for step, steps in ((0, range(1, 6)), (3, range(4, 8))):
        metrics = Metrics(
            tmp_path / "metrics.jsonl", accelerator(name, tmp_path), name="mine", config={"lr": 0.1}, step=step
        )
        for number in steps:
            metrics.log(progress(number))
        if step:
            metrics.close()
    first, second = (values for what, values in told if what == "init")
    assert first == second
    assert (first["project"], first["resume"]) == ("matt-fast", "allow")
    run_id = (tmp_path / "tracker_id").read_text()
    assert first["name"] == ("mine" if name == "wandb" else f"mine-{run_id}")
    if name == "wandb":
        assert (first["id"], first["dir"]) == (run_id, str(tmp_path))
    assert [what for what, _ in told if isinstance(what, int)] == [1, 2, 3, 4, 5, 6, 7]
    assert ("config", {"lr": 0.1}) in told
    assert told[-1][0] == "finish"
    other = tmp_path / "other"
    Metrics(other / "metrics.jsonl", accelerator(name, other), name="mine").close()
    *_, third = (values for what, values in told if what == "init")
    assert third["name"] != first["name"] or third["id"] != first["id"]


def test_a_tracker_that_fails_does_not_end_training(tmp_path, monkeypatch):
    told = []
    broken = Tracked("wandb", told)
    broken.log = lambda *_, **__: 1 / 0
    broken.finish = broken.log
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setattr(
        "accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB, LoggerType.TENSORBOARD]
    )
    metrics = Metrics(tmp_path / "metrics.jsonl", accelerator("wandb, tensorboard", tmp_path))
    with pytest.warns(UserWarning, match=r"track: wandb failed at step 1 and gets no more: ZeroDivisionError"):
        metrics.log(progress(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.log(progress(2))
        metrics.close()
    assert scalars(tmp_path, "loss") == [(1, 2.0), (2, 1.0)]
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_only_the_main_process_writes(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", SimpleNamespace(is_main_process=False, trackers=[]))
    metrics.log(progress(1))
    metrics.log_validation(1, 2.0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_login_that_wandb_lacks_is_told_before_there_is_work(tmp_path, monkeypatch):
    def login():
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", fake := Tracked("wandb", []))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB])
    fake.login = login
    save_tiny_model(tmp_path / "model")
    new_tokenizer().save_pretrained(tmp_path / "new")
    (tmp_path / "text.txt").write_text("text")
    given, stages = [tmp_path / x for x in ("model", "new", "text.txt", "output")], []
    with pytest.raises(ValueError, match=r"track: wanted a login at wandb, .* got none: No API key configured"):
        transfer(*given, track="wandb", on_stage=stages.append, device="cpu")
    assert (stages, (tmp_path / "output").exists()) == ([], False)


def test_track_is_checked_before_anything_slow():
    assert trackers_for(None) == []
    assert trackers_for("tensorboard") == ["tensorboard"]
    for wrong in ("tensorbord", "", "tensorboard,", "all"):
        with pytest.raises(ValueError, match="track: wanted one or more of tensorboard, wandb, trackio") as error:
            trackers_for(wrong)
        assert str(error.value).endswith(f"got {wrong!r}")
    with pytest.raises(ValueError, match="track: wanted each name once, got 'tensorboard,tensorboard'"):
        trackers_for("tensorboard,tensorboard")
    script = (
        "import sys; sys.modules['wandb'] = None\n"
        "from matt_fast.training.trackers import trackers_for\n"
        "try: trackers_for('tensorboard,wandb')\n"
        "except ImportError as error: print(error)\n"
        "print('torch' in sys.modules, 'accelerate' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    line = packages_line("wandb")
    assert done.stdout == f"track: 'wandb' needs a package that is not installed: {line}\nFalse False\n"
