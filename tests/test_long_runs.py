"""What goes wrong only in long runs: what piles up, disks that fill, signals at bad moments, plans that change."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from killing import digests
from killing import prepare as small_job
from tiny import TEXTS, jsonl

import matt_fast.recipe.checks
import matt_fast.recipe.finish
from matt_fast import HealingOptions, TrainingOptions, transfer
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe import watching
from matt_fast.recipe.export import unmoved
from matt_fast.runs.folder import Run
from matt_fast.runs.record import read_record
from matt_fast.support import locks, stopping
from matt_fast.training import loop
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.course import TOGETHER, rising
from matt_fast.training.metrics import Metrics
from matt_fast.training.sides import Student
from matt_fast.training.state import Progress, TrainingState

OPTIONS = TrainingOptions(objective="ntp", steps=8, lr=1e-2)


class Stop(Exception):
    """What a test throws into a run."""


def stop_at(step: int, then=lambda: None):
    def on_step(progress):
        if progress.step == step:
            then()
            raise Stop

    return on_step


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_job(tmp_path_factory.mktemp("files")) | {"training": OPTIONS, "data_workers": 0, "completions": 0}


@pytest.fixture
def job(files, tmp_path):
    """Arguments of a small transfer that is validated behind every step, with a checkpoint behind every fourth."""
    return files | {"output": tmp_path / "output", "validate_every": 1}  # a checkpoint behind every fourth step


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The output of such a transfer that nothing happened to."""
    output = tmp_path_factory.mktemp("alone") / "output"
    transfer(**files | {"output": output, "validate_every": 1})
    return output


def best_of(output: Path) -> list[str]:
    return sorted(x.name for x in (output / "run" / "best").iterdir())


def test_the_best_weights_do_not_pile_up_and_each_checkpoint_keeps_its_own(job, alone, monkeypatch):
    bits = iter([9.0, 8.0, 7.0, 6.0, 5.0, 4.5, 4.0, 3.0])  # each validation is the best so far
    most = []

    def measured(watcher, state):
        most.append(len(best_of(job["output"])) if state.progress.step > 1 else 0)
        return [next(bits)]

    with monkeypatch.context() as patched:
        patched.setattr(watching.RunWatcher, "_bits", measured)
        with pytest.raises(Stop):
            transfer(**job | {"checkpoint_every": 3}, on_step=stop_at(8))
    assert best_of(job["output"]) == [f"step-{step:09}.safetensors" for step in (3, 6, 7)]
    assert max(most) == 2
    (job["output"] / "run" / "checkpoints" / "step-000000006" / "state.safetensors").write_bytes(b"torn")
    result = transfer(**job, resume=True)  # goes on behind step 3, whose best rows are there
    assert result.best_step == 3


def test_a_signal_breaks_a_validation_off_and_it_is_made_when_the_run_goes_on(job, alone):
    """Whoever stops a run waits for seconds, and a validation may take minutes."""
    pieces, said = [], []

    def on_progress(what, done, total):
        if what == "pieces" and (job["output"] / "run" / "metrics.jsonl").exists():
            pieces.append(done)
            if len(pieces) in (5, 6):  # of the third validation; then of the one that is made at first
                os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            transfer(**job | {"checkpoint_every": 100}, resume="auto", on_progress=on_progress)
        assert stopped.value.code == 143
        (state,) = (job["output"] / "run" / "checkpoints").glob("*/state.json")
        more = json.loads(state.read_text())["more"]
        assert (state.parent.name, len(more["curve"]), more["pending"]) == ("step-000000003", 2, True)
    assert len(pieces) == 6
    result = transfer(**job | {"checkpoint_every": 100}, resume=True, on_message=said.append)
    assert "Goes on behind step 3." in said
    expected = json.loads((alone / "run" / "result.json").read_text())
    assert [list(x) for x in result.validation] == expected["validation"]
    assert digests(job["output"]) == digests(alone)


def test_the_number_of_steps_can_change_until_that_training_is_over(job):
    plain = job | {"validate_every": None, "eval_data": None, "checkpoint_every": 2}
    healing = HealingOptions("lora", steps=4, rank=2)
    with pytest.raises(Stop):
        transfer(**plain | {"healing": healing}, on_step=stop_at(5))
    said = []
    ends = plain | {"healing": healing, "training": replace(OPTIONS, steps=4), "on_message": said.append}
    steps = []

    def on_step(progress):
        steps.append(progress.step)
        if steps == [1, 2, 3]:
            raise Stop

    with pytest.raises(Stop):
        transfer(**ends, resume=True, on_step=on_step)  # no step of rows: what is trained is enough
    plan = "the learning rate rises and falls by the new number."
    assert f"steps: 8 before, 4 from here on, of which 4 are done; {plan}" in said
    for change, message in (
        ({"training": replace(OPTIONS, steps=9)}, "steps: was 4, now 9, but that training is over"),
        ({"healing": replace(healing, steps=1)}, "heal_steps: was 4, now 1, but 2 are done"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(**ends | change, resume=True)
    done = transfer(**ends | {"healing": replace(healing, steps=3)}, resume=True)
    assert (len(done.progress.losses), len(done.healing.progress.losses)) == (4, 3)


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(job, monkeypatch):
    write, full, said = Checkpoints.write, [2, 4, 6], []

    def write_or_not(self, state, *more):
        if state.progress.step in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, state, *more)

    monkeypatch.setattr(Checkpoints, "write", write_or_not)
    plain = job | {"validate_every": None, "eval_data": None, "checkpoint_every": 2, "on_message": said.append}
    with pytest.raises(OSError, match="No space left"):  # three times in a row
        transfer(**plain)
    full.remove(4)
    assert transfer(**plain, resume=True).progress.step == 8
    told = [line.partition(" behind step ")[2][0] for line in said if "there is no checkpoint" in line]
    assert told == ["2", "4", "2", "6"]


def test_best_weights_that_a_full_disk_has_no_room_for_do_not_end_a_run(job, monkeypatch):
    figures = [4.0, 2.0, 3.0, 5.0]  # of validations behind steps 2, 4, 6 and 8; there is room again behind the second
    monkeypatch.setattr(watching.RunWatcher, "_bits", lambda self, state: [figures[state.progress.step // 2 - 1]])
    save, full, said = watching.save_file, [4], []

    def save_or_not(tensors, path):
        if any(f"step-{step:09}" in str(path) for step in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(watching, "save_file", save_or_not)
    given = job | {"validate_every": 2, "patience": None, "on_message": said.append}
    found = transfer(**given)
    assert (found.validation, found.best_step) == ([(2, 4.0), (4, 2.0), (6, 3.0), (8, 5.0)], 6)
    (line,) = [x for x in said if "are not kept" in x]
    assert "No space left" in line
    assert (
        "the weights of step 4, the best so far, are not kept; until better ones are measured, those of step 2" in line
    )
    assert "the best at step 6 with 3.0000 bits per byte" in (found.output / "README.md").read_text()
    full[:] = [2, 4, 6, 8]
    none = transfer(**given | {"output": job["output"].with_name("none")})
    assert none.best_step is None
    plain = transfer(**job | {"validate_every": None, "output": job["output"].with_name("plain")})
    weights = [(x.output / "model.safetensors").read_bytes() for x in (none, plain)]
    assert weights[0] == weights[1]
    for page in ("README.md", "report.html"):
        assert re.search("of none of which the weights|validations none was kept", (none.output / page).read_text())


def test_what_killed_writes_left_is_removed(job):
    job |= {"validate_every": None, "eval_data": None}
    with pytest.raises(Stop):
        transfer(**job, on_step=stop_at(5))
    left = [job["output"] / "run" / x / ".part-step-000000007" for x in ("best", "healing/checkpoints", "healing/best")]
    for folder in left:
        folder.mkdir(parents=True)
    transfer(**job, resume=True, on_step=lambda progress: left.append(Path(str(left[0].exists()))))
    assert left[3:] == [Path("False")] * 4
    assert not any(x.exists() for x in left[:3])


def test_a_run_that_is_killed_as_it_writes_its_page_writes_it_when_it_goes_on_with_other_libraries(job, monkeypatch):
    short, said = job["output"].with_name("short.txt"), []
    short.write_text("alpha return")

    def killed(*given):
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(matt_fast.recipe.finish, "write_report", killed)
        with pytest.raises(Stop):
            transfer(**job | {"validate_every": None, "eval_data": short}, on_message=said.append)
    few = "Warning: eval_data: 12 characters are too few to measure on: chance decides on its bits per byte"
    assert said.count(few) == 1
    state = job["output"] / "run" / "state.json"
    known = json.loads(state.read_text())
    known["seconds"]["training"] = 0.0  # as of a process that began behind the last step
    state.write_text(json.dumps(known))
    now = matt_fast.recipe.checks.libraries() | {"torch": "9.9"}
    monkeypatch.setattr(matt_fast.recipe.checks, "libraries", lambda: now)
    result = transfer(**job | {"validate_every": None, "eval_data": short}, resume=True, on_message=said.append)
    assert said.count(few) == 1
    assert (job["output"] / "report.html").exists()
    assert result.seconds["training"] == result.progress.seconds > 0
    (line,) = (line for line in said if "the run began with" in line)
    assert f"torch {torch.__version__}, now 9.9: the result may have other bits" in line


def test_a_last_step_that_no_loss_tells_of_is_looked_at(job):
    """The loss of each step is of the rows before it."""
    options = replace(OPTIONS, objective="token-distillation", steps=1, lr=3e38, max_grad_norm=None, decay_steps=0)
    plain = job | {"validate_every": None, "eval_data": None}
    with pytest.raises(FloatingPointError, match="the last step, 1, made numbers that are not finite in float32"):
        transfer(**plain | {"training": replace(options, lr=1e39), "resume": False})


def test_a_loss_that_rises_slowly_is_told():
    falling = list(np.linspace(4.0, 1.0, 5 * TOGETHER))
    assert rising(falling[:TOGETHER]) is rising(falling) is None
    assert rising([*falling, *[1.9] * TOGETHER]) is None
    assert rising([1.0, *[3.5] * (TOGETHER - 1)]).endswith("steps up to 100 is 3.48 on average, and was 1 at the start")
    holes = [x if i % 3 else 0.0 for i, x in enumerate([*falling, *[3.0] * TOGETHER])]
    lowest = np.mean([x for x in holes[4 * TOGETHER : 5 * TOGETHER] if x])
    assert rising(holes) == (
        f"the loss of the last 100 steps up to 600 is 3 on average, and was {lowest:.3g} up to step 500"
    )


@pytest.mark.parametrize(("dtype", "moved"), [(torch.bfloat16, 1), (torch.float32, 2)])
def test_rows_that_move_less_than_the_stored_dtype_tells_are_counted(dtype, moved):
    """Tokens 5 to 8 are new: one moves by 1%, one by a thousandth of that, one not at all, and one was never seen."""
    start = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    now = start * torch.tensor([*[1.0] * 5, 1.01, 1.00001, 1.0, 1.0])[:, None]
    tables = [SimpleNamespace(input=x, output=None) for x in (start, now.to(dtype))]
    seen = torch.tensor([9] * 8 + [0])
    assert unmoved(SimpleNamespace(new={5, 6, 7, 8}), *tables, seen, dtype) == (3 - moved, 3)


def test_signals_of_terminals_and_schedulers_end_work_in_order_unless_they_are_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping.stopping():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(SystemExit) as left:
                os.kill(os.getpid(), signal.SIGUSR1)
        assert left.value.code == 128 + signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_is_one_until_a_person_presses_again(monkeypatch):
    """Of a job that is cancelled torchrun and its workers get SIGTERM, and torchrun passes it on."""
    with stopping.stopping() as stop:
        stop.patient = True
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.requested == signal.SIGTERM
        monkeypatch.setattr(stopping, "AGAIN", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)  # the scheduler's last word: the checkpoint is being written
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_work_goes_on_where_nobody_reads_what_it_says(capfd):
    code = (
        "import sys\nfrom matt_fast.cli.lasting import lasting_output\nwith lasting_output():\n"
        "    for number in range(3):\n        print('line', number, flush=True)\nprint('done', file=sys.stderr)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=True)
    os.close(writer)
    assert done.stderr == "stdout cannot be written any more (Broken pipe); the work goes on.\ndone\n"


def test_who_is_at_work_on_a_run_is_seen_from_outside(job):
    code = (
        "import sys; from pathlib import Path; from matt_fast.runs.record import read_record\n"
        "from matt_fast.report.sentences import progress_line, status_line\nrecord = read_record(Path(sys.argv[1]))\n"
        "print(record.at_work, progress_line(record), 'is at work' in status_line(record), sep='|')"
    )
    seen = []

    def look(progress):
        if progress.step == 5:
            command = [sys.executable, "-c", code, str(job["output"])]
            seen.extend(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("|"))

    transfer(**job | {"validate_every": None, "eval_data": None}, on_step=look)
    who, where, told = seen
    assert who == f"process {os.getpid()} on {socket.gethostname()}"
    assert re.fullmatch(r"rows alone, step 5 of 8, loss [\d.]+; \d+ s left at its speed so far", where)
    assert told == "True"
    assert read_record(job["output"]).at_work is None


def without_memory(monkeypatch, step: int, times: int) -> None:
    """Let the device have no memory for a step, behind its first batch's gradients."""
    real, failed = loop.losses, []

    def losses(*given, **named):
        state = watchers[-1].state
        seen.append(state.progress.step)
        if state.progress.step == step - 1 and len(failed) < times and seen.count(step - 1) % 2 == 0:
            failed.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*given, **named)

    seen, watchers, began = [], [], watching.RunWatcher.began
    monkeypatch.setattr(watching.RunWatcher, "began", lambda self, *x: watchers.append(self) or began(self, *x))
    monkeypatch.setattr(loop, "losses", losses)


@pytest.mark.parametrize("healing", [None, HealingOptions("lora", steps=8, objective="ntp")], ids=["rows", "layers"])
def test_a_step_without_memory_is_made_once_more(files, tmp_path, monkeypatch, healing):
    given = files | {"training": replace(OPTIONS, accumulation=2, steps=8 if healing is None else 0)}
    given |= {"healing": healing, "checkpoint_every": 2}
    said = []
    whole = transfer(**given, output=tmp_path / "whole")
    with monkeypatch.context() as patched:
        without_memory(patched, step=4, times=1)
        parts = transfer(**given, output=tmp_path / "parts", on_message=said.append)
    assert sum("no memory left in step 4" in x for x in said) == 1
    trained, undisturbed = (x.progress if healing is None else x.healing.progress for x in (parts, whole))
    assert trained.flops == undisturbed.flops > 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")

    with monkeypatch.context() as patched:
        without_memory(patched, step=4, times=2)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            transfer(**given, output=tmp_path / "less")
    notes = " ".join(raised.value.__notes__)
    more = "batch_size 1 with accumulation 4"
    assert f"Less memory: checkpointing or {more}, with which a run that has begun can go on too, a shorter" in notes
    assert "--resume" in notes
    given["training"] = replace(given["training"], checkpointing=True)
    said.clear()
    less = transfer(**given, output=tmp_path / "less", resume=True, on_message=said.append)
    assert "Goes on behind step 2." in said
    assert any(x.startswith("checkpointing: False before, True from here on") for x in said)
    assert less.progress.losses == pytest.approx(whole.progress.losses, rel=1e-5)


@pytest.mark.parametrize("healing", [None, HealingOptions("lora", steps=8, objective="ntp")], ids=["rows", "layers"])
def test_a_run_goes_on_with_smaller_batches_of_the_same_rows(files, tmp_path, monkeypatch, healing):
    """All texts have as many tokens, so that a mean over two batches is that over one of both."""
    first, *words = sorted(set(TEXTS[0].split()))
    orders = (np.random.default_rng(i).permutation(words) for i in range(40))
    data = tmp_path / "data.jsonl"
    data.write_text(jsonl(" ".join([first, *order]) for order in orders))
    given = files | {"data": data, "batch_size": 4, "checkpoint_every": 3, "healing": healing, "eval_data": None}
    given["training"] = replace(OPTIONS, steps=8 if healing is None else 0)
    read: dict[str, list] = {}

    def count(state, batches):
        pairs = (pair for x in batches for pair in zip(x.student_ids, x.student_documents, strict=True))
        read.setdefault(place, []).append((len(batches), [ids[documents >= 0].tolist() for ids, documents in pairs]))
        counted(state, batches)

    counted, said = loop._count, []
    monkeypatch.setattr(loop, "_count", count)
    place = "whole"
    whole = transfer(**given, output=tmp_path / "whole")
    place = "begun"
    with pytest.raises(Stop):
        transfer(**given, output=tmp_path / "begun", on_step=stop_at(5))
    smaller = given | {"batch_size": 1, "training": replace(given["training"], accumulation=4)}
    with pytest.raises(ValueError, match="batch_size: was 4, now 1, which makes updates of 1 rows that had 4"):
        transfer(**given | {"batch_size": 1}, output=tmp_path / "begun", resume=True)
    place = "smaller"
    result = transfer(**smaller, output=tmp_path / "begun", resume=True, on_message=said.append)
    assert said[0].startswith("batch_size x accumulation: 4 x 1 before, 1 x 4 from here on: updates have the same rows")
    assert "Goes on behind step 3." in said
    assert [rows for _, rows in read["smaller"]] == [rows for _, rows in read["whole"][3:]]
    assert {count for count, _ in read["smaller"]} == {4}
    losses, expected = ((x.progress if healing is None else x.healing.progress).losses for x in (result, whole))
    assert len(expected) == 8
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gone", [["run.json"], ["run.json", "state.json"]], ids=["known", "unknown"])
def test_parts_of_a_run_without_what_it_is_are_left_alone(files, tmp_path, gone):
    """Neither taken for those of a run with other options, nor removed."""
    output = tmp_path / "output"
    with pytest.raises(Stop):
        transfer(**files, output=output, on_step=stop_at(5))
    for name in gone:
        (output / "run" / name).unlink()
    there = sorted(output.rglob("*"))
    other = files | {"training": replace(OPTIONS, lr=1.0)}
    for resume in (False, True, "auto"):
        with pytest.raises(FileExistsError, match=r"has parts of a run without its run/run\.json"):
            transfer(**other, output=output, resume=resume)
    assert sorted(output.rglob("*")) == there


def test_a_full_disk_does_not_end_a_run_that_has_something_to_say(files, tmp_path, monkeypatch):
    said, update = [], Run.update

    def full(run, name, **values):
        if "messages" in values and "no memory" in str(values):
            raise OSError(errno.ENOSPC, "No space left on device", name)
        update(run, name, **values)

    monkeypatch.setattr(Run, "update", full)
    without_memory(monkeypatch, step=4, times=1)
    given = files | {"training": replace(OPTIONS, accumulation=2), "output": tmp_path / "output", "eval_data": None}
    transfer(**given, on_message=said.append)
    assert sum("no memory left in step 4" in x for x in said) == 1


def test_metrics_go_on_when_a_network_file_system_comes_back(tmp_path):
    """A handle that it forgot stays forgotten."""
    metrics = Metrics(tmp_path / "metrics.jsonl", Accelerator(cpu=True))
    metrics.log(Progress(step=1, loss=1.0))
    os.close(metrics._file.fileno())
    with pytest.warns(UserWarning, match="is not written, training goes on without it"):
        metrics.log(Progress(step=2, loss=1.0))
    metrics.log(Progress(step=3, loss=1.0))
    metrics.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 3]


def test_a_checkpoint_that_cannot_be_removed_ends_no_run_and_one_that_is_damaged_goes(tmp_path, monkeypatch):
    table = EmbeddingTable(torch.zeros(4, 3), torch.tensor([0, 1, -1, -1]), torch.zeros(4, 3))
    state, checkpoints, accelerator = TrainingState.begin(Student(table), OPTIONS), Checkpoints(tmp_path), None
    accelerator = Accelerator(cpu=True)

    def write(step):
        state.progress.step = step
        checkpoints.write(state, accelerator)
        return [int(x.name[5:]) for x in checkpoints.steps()]

    def busy(*given, **named):
        raise OSError(errno.EBUSY, "Device or resource busy")

    assert [write(step) for step in (1, 2)][-1] == [1, 2]
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        assert write(4) == [1, 2, 4]
    assert write(5) == [4, 5]
    (tmp_path / "step-000000005" / "state.json").write_text("")
    with pytest.warns(UserWarning, match="step-000000005"):
        checkpoints.read(state, accelerator)
    assert state.progress.step == 4
    assert write(4) == [4]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    wanted = r"output: wanted a file system with locks, .*lock' refuses: .*No locks available"
    with pytest.raises(OSError, match=wanted), locks.locked(tmp_path / "lock"):
        pass
