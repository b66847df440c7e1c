"""A run on disk: stopped anywhere it goes on to the same bits, and what it refuses to go on with."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import digests
from killing import prepare as small_job
from safetensors.torch import load_file

from matt_fast import TrainingOptions, transfer
from matt_fast.recipe.result import TransferResult

OPTIONS = TrainingOptions(objective="aim", steps=10, lr=1e-2)


class Stop(Exception):
    """What a test throws into a run."""


def stop_at(step: int):
    def on_step(progress):
        if progress.step == step:
            raise Stop

    return on_step


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_job(tmp_path_factory.mktemp("files"))


@pytest.fixture
def job(files, tmp_path):
    """Arguments of a small transfer, with a checkpoint behind every other step, and no evaluation."""
    given = {name: value for name, value in files.items() if "eval" not in name}
    return given | {"output": tmp_path / "output", "training": OPTIONS, "checkpoint_every": 2}


def script(*arguments: str) -> str:
    """What killing.py prints, run in a process that has started no thread yet."""
    path = Path(__file__).with_name("killing.py")
    return subprocess.run(
        [sys.executable, path, *arguments], capture_output=True, text=True, timeout=900, check=True
    ).stdout


def test_killed_in_any_stage_a_run_goes_on_to_the_same_bits():
    """`python tests/killing.py` does more of it; tests/restarts.py kills one of two processes."""
    lines = script("5", "1").splitlines()
    assert all("same bits" in line for line in lines), lines
    assert len(lines) > 1


def test_signals_end_a_run_in_order():
    for what, found in json.loads(script("signals").splitlines()[-1]).items():
        assert found.pop("same"), what
        status = {"SIGTERM": 143, "SIGINT": 130, "worker": 0}[what.split()[0]]
        assert (found["status"], found["alive"], found["left"]) == (status, 0, []), (what, found)
        if status and "training" in what:
            assert "To go on from there: matt-fast transfer --resume" in found["said"]
        if not status:
            assert "was killed and is started again" in found["said"]


def test_data_that_changes_under_a_run_is_told(job, tmp_path):
    texts, said = tmp_path / "texts.jsonl", []
    shutil.copy(job["data"], texts)

    def on_step(progress):
        if progress.step == 1:
            with texts.open("a") as file:
                file.write('{"text": "one more"}\n')

    training = replace(OPTIONS, steps=2)
    transfer(**job | {"data": texts, "training": training}, on_step=on_step, on_message=said.append)
    (line,) = (line for line in said if line.startswith("Warning: the data changed"))
    assert f"{str(texts)!r} has changed. The result is not that of the data as it was" in line


def test_an_error_in_training_leaves_a_run_that_goes_on(job):
    expected = transfer(**job | {"output": job["output"].with_name("alone")})
    with pytest.raises(Stop) as stopped:
        transfer(**job, on_step=stop_at(7))
    assert f"matt-fast transfer --resume {job['output']}" in "".join(stopped.value.__notes__)
    assert not (job["output"] / "config.json").exists()
    steps = []
    found = transfer(**job, resume="auto", on_step=lambda progress: steps.append(progress.step))
    assert steps == [7, 8, 9, 10]
    assert found.progress.losses == expected.progress.losses
    assert (found.progress.tokens, found.progress.skipped) == (expected.progress.tokens, expected.progress.skipped)
    assert (found.seen, found.trainable, found.new) == (expected.seen, expected.trainable, expected.new)
    assert digests(job["output"]) == digests(expected.output)
    lines = [(x / "run" / "metrics.jsonl").read_text().splitlines() for x in (job["output"], expected.output)]
    figures = [[{k: json.loads(line)[k] for k in ("step", "loss", "tokens", "lr")} for line in part] for part in lines]
    assert figures[0] == figures[1]


def test_a_finished_run_keeps_its_figures_and_little_else(job):
    first = transfer(**job, resume="auto")  # nothing there yet: it begins
    kept = {x.name for x in (job["output"] / "run").iterdir()}
    assert kept == {
        "lock", "run.json", "run.yaml", "sample.txt", "state.json", "metrics.jsonl", "curves.png", "result.json"
    }  # fmt: skip
    again = transfer(**job, resume=True)
    assert transfer(**job, resume="auto").progress == again.progress
    assert isinstance(again, TransferResult)
    for name in ("progress", "shared", "new", "seen", "n_layers", "evaluations"):
        assert getattr(again, name) == getattr(first, name), name
    with pytest.raises(FileExistsError, match="holds a finished run"):
        transfer(**job)
    with pytest.raises(ValueError, match="is finished and cannot go on with steps: was 10, now 20; give") as found:
        transfer(**job | {"training": replace(OPTIONS, steps=20)}, resume=True)
    assert not getattr(found.value, "__notes__", [])  # nothing to go on from


def test_what_a_run_does_not_go_on_with(job, tmp_path):
    with pytest.raises(ValueError, match="resume: wanted a folder with a run in it, got"):
        transfer(**job, resume=True)
    with pytest.raises(ValueError, match="resume: wanted True, False or 'auto', got 'always'"):
        transfer(**job, resume="always")
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(5))
    with pytest.raises(FileExistsError, match="not finished; go on with it: matt-fast transfer --resume"):
        transfer(**job)
    for change, message in (
        ({"training": replace(OPTIONS, lr=1e-3)}, "lr: was 0.01, now 0.001"),
        ({"training": replace(OPTIONS, steps=3)}, "steps: was 10, now 3, but 4 are done"),
        ({"max_length": 47, "seed": 3}, "max_length: was 48, now 47; seed: was 0, now 3"),
        ({"init": "zero"}, "init: was 'mean', now 'zero'"),
    ):
        with pytest.raises(ValueError, match=f"resume: wanted what the run in .* began with, got {message}"):
            transfer(**job | change, resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text(job["data"].read_text().replace("alpha", "omega"))
    with pytest.raises(ValueError, match="the files that the run began with: data: content"):
        transfer(**job | {"data": other}, resume=True)
    about = job["output"] / "run" / "run.json"
    known = about.read_text()
    about.write_text(known.replace('"version": "', '"version": "9.'))
    with pytest.raises(ValueError, match=r"resume: the run began with matt-fast 9\."):
        transfer(**job, resume=True)
    about.write_text(known.replace('"text_order": 4', '"text_order": 3'))
    with pytest.raises(ValueError, match="text_order: was 3, now 4"):
        transfer(**job, resume=True)
    about.write_text(known.replace('"updates": 2', '"other": 2'))
    with pytest.raises(ValueError, match="updates: was None, now 2"):
        transfer(**job, resume=True)
    about.write_text(known)
    for name, text in (("state.json", b"[1"), ("run.json", b"\xff")):
        file = job["output"] / "run" / name
        was = file.read_bytes()
        file.write_bytes(text)
        with pytest.raises(ValueError, match=f"output: wanted a JSON object in '.*{name}', got something else"):
            transfer(**job, resume=True)
        file.write_bytes(was)
    shutil.copy(job["data"], tmp_path / "moved.jsonl")  # the same text, elsewhere
    more = transfer(**job | {"data": tmp_path / "moved.jsonl", "training": replace(OPTIONS, steps=12)}, resume=True)
    assert len(more.progress.losses) == 12


def test_files_that_change_while_it_trains_are_not_mixed(job, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(job["model"], teacher)
    weights = (teacher / "model.safetensors").read_bytes()

    def on_step(progress):
        (teacher / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\x80?")

    with pytest.raises(ValueError, match=r"the run began with: model: model\.safetensors") as refused:
        transfer(**job | {"model": teacher}, on_step=on_step)
    assert "--resume" in "".join(refused.value.__notes__)
    assert (job["output"] / "run" / "trained" / "rows.safetensors").exists()
    assert not (job["output"] / "config.json").exists()
    (teacher / "model.safetensors").write_bytes(weights)
    steps = []
    transfer(**job | {"model": teacher}, resume=True, on_step=lambda progress: steps.append(progress.step))
    assert steps == []  # the trained rows were there
    assert (job["output"] / "config.json").exists()


def test_a_run_that_diverges_says_so_and_can_go_on_with_another_rate(job):
    options = replace(OPTIONS, objective="token-distillation", steps=40, lr=1e6)
    wild = job | {"training": options, "checkpoint_every": 1}
    with pytest.raises(FloatingPointError, match=r"times its start|not finite") as stopped:
        transfer(**wild)
    assert "--resume" in "".join(stopped.value.__notes__)
    assert not (job["output"] / "config.json").exists()
    transfer(**wild | {"training": replace(options, lr=1e-3)}, resume=True)
    assert (job["output"] / "config.json").exists()


def test_a_damaged_checkpoint_is_left_for_the_one_before(job):
    alone = transfer(**job | {"output": job["output"].with_name("alone")})
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(9))
    *_, before, last = sorted((job["output"] / "run" / "checkpoints").iterdir())
    assert [x.name for x in (before, last)] == ["step-000000006", "step-000000008"]
    (last / "state.safetensors").write_bytes((last / "state.safetensors").read_bytes()[:100])
    steps = []
    transfer(**job, resume=True, on_step=lambda progress: steps.append(progress.step))
    assert steps == [7, 8, 9, 10]
    assert digests(job["output"]) == digests(alone.output)


def test_the_output_is_reserved(job):
    """A second process that wants the same output is refused while the first works in it."""
    code = "import sys; from matt_fast.runs.folder import reserved\nwith reserved({!r}, {}): pass"
    refused = []

    def on_step(progress):
        command = [sys.executable, "-c", code.format(str(job["output"]), True)]
        if progress.step == 1:
            refused.append(subprocess.run(command, capture_output=True, text=True, check=False))

    transfer(**job, on_step=on_step)
    assert refused[0].returncode == 1
    assert "is being written by process" in refused[0].stderr


@pytest.mark.parametrize("kind", ["symlink", "empty", "dot"])
def test_outputs_of_every_kind(job, tmp_path, monkeypatch, kind):
    real = tmp_path / "real"
    real.mkdir()
    output = {"symlink": tmp_path / "link", "empty": real, "dot": Path()}[kind]
    if kind == "symlink":
        output.symlink_to(real)
    monkeypatch.chdir(real)
    transfer(**job | {"output": output, "training": replace(OPTIONS, steps=1)})
    assert (real / "config.json").exists()
    mode = (real / "model.safetensors").stat().st_mode & 0o777
    (tmp_path / "plain").touch()
    assert mode == (tmp_path / "plain").stat().st_mode & 0o777


def test_validation_keeps_the_best_rows(files, job):
    """Steps at a rate that spoils what the first ones gained: the result has the rows of the best validation."""
    held_out = {name: value for name, value in files.items() if "eval" in name}
    options = replace(OPTIONS, objective="ntp", steps=30, lr=0.5, decay_steps=0, max_grad_norm=None)
    job |= held_out | {"training": options, "validate_every": 3, "patience": 4}
    result = transfer(**job)
    steps, bits = zip(*result.validation, strict=True)
    assert list(steps) == list(range(3, 3 * len(steps) + 1, 3))
    best = min(range(len(bits)), key=bits.__getitem__)
    assert result.best_step == steps[best]
    assert len(steps) == min(best + 1 + 4, 10)
    assert result.progress.step == steps[-1]
    assert result.evaluations["trained"].bits_per_byte == pytest.approx(bits[best], rel=1e-6)
    lines = map(json.loads, (job["output"] / "run" / "metrics.jsonl").read_text().splitlines())
    assert [x["bits_per_byte"] for x in lines if "bits_per_byte" in x] == pytest.approx(bits)
    alone = transfer(
        **job | {"output": job["output"].with_name("alone"), "training": replace(options, steps=steps[best])}
    )
    rows = [load_file(x / "model.safetensors")["model.embed_tokens.weight"] for x in (job["output"], alone.output)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("patience", [None, 2])
def test_rows_that_only_get_worse_give_back_the_start_and_it_is_said(files, job, patience):
    held_out = {name: value for name, value in files.items() if "eval" in name}
    options = replace(OPTIONS, objective="ntp", lr=5.0, max_grad_norm=None)
    job |= held_out | {"validate_every": 2, "patience": patience}
    said = []
    with pytest.raises(Stop):
        transfer(**job | {"training": options}, on_step=stop_at(4))
    result = transfer(**job | {"training": options}, resume=True, on_message=said.append)
    start = transfer(**job | {"training": replace(OPTIONS, steps=0), "output": job["output"].with_name("start")})
    assert result.best_step == 0
    assert min(bits for _, bits in result.validation) > result.evaluations["initialised"].bits_per_byte
    rows = [load_file(x.output / "model.safetensors")["model.embed_tokens.weight"] for x in (result, start)]
    assert torch.equal(*rows)
    assert any("was better than the start of this training: that is the result" in x for x in said)
    assert not any("training moved the rows" in x for x in said)
    assert result.progress.step == (10 if patience is None else 4)
    assert "the result is what this training began with" in (result.output / "README.md").read_text()


def test_training_that_is_ended_by_fewer_steps_is_measured_there(files, job):
    """Else the start, which is worse, would be the best that was measured."""
    held_out = {name: value for name, value in files.items() if "eval" in name}
    job |= held_out | {"validate_every": 8, "training": replace(OPTIONS, objective="ntp")}
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(5))
    result = transfer(**job | {"training": replace(job["training"], steps=4)}, resume=True)
    assert [step for step, _ in result.validation] == [result.best_step] == [4]
    assert result.evaluations["trained"].bits_per_byte < result.evaluations["initialised"].bits_per_byte


def test_epochs_are_passes_over_the_data(job):
    """Every chunk that the data has is trained on as often."""
    few = job["output"].with_name("few.jsonl")
    few.write_text("".join(job["data"].read_text().splitlines(keepends=True)[:9]))
    job |= {"data": few, "checkpoint_every": 100}
    seen = transfer(**job | {"epochs": 1, "batch_size": 1}).progress
    twice = transfer(**job | {"output": job["output"].with_name("twice"), "epochs": 2, "batch_size": 1}).progress
    assert len(twice.losses) == 2 * len(seen.losses)
    assert twice.tokens == 2 * seen.tokens > 0
    assert (seen.epoch, twice.epoch) == (0, 1)


def test_wrong_checkpoints_intervals_and_rates_are_named(job):
    for change, message in (
        ({"checkpoint_every": "10x"}, "checkpoint_every: wanted a number of steps, or a time such as 30s"),
        ({"validate_every": 5}, "validate_every: wanted eval_data with it"),
        ({"epochs": 0.0}, "epochs: wanted a number above 0"),
        ({"track": "comet"}, "track: wanted one"),
        ({"device": "gpu"}, "device: wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(**job | change)
    assert not job["output"].exists()
