"""Runs that are killed and go on: `python tests/killing.py [KILLS [SEED]]` kills many and prints a table.

Each run is a process of its own, forked from one that has imported everything, so that a moment drawn from the time of
an undisturbed run falls on work and not on imports. It is killed by SIGKILL, goes on, is killed again, and so on until
it ends; then every file of the model must have the bits of the run that was left alone. `python tests/killing.py
signals` stops runs by signals that they can answer.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model

from matt_fast import HealingOptions, TrainingOptions
from matt_fast.recipe.transfer import transfer

STEPS = 24
TRAINING = {"steps": STEPS, "lr": 1e-2}
CASES = {
    "aim": {"training": TrainingOptions(objective="aim", **TRAINING)},
    "token-distillation+boundary-head, 2 workers": {
        "training": TrainingOptions(objective="token-distillation+boundary-head", **TRAINING),
        "data_workers": 2,
    },
    "ntp, validated": {
        "training": TrainingOptions(objective="ntp", **TRAINING),
        "validate_every": 5,
    },
    "packing": {"training": TrainingOptions(packing=True, **TRAINING)},
    "data cache": {"training": TrainingOptions(**TRAINING), "data_cache": "cache"},
    "data cache, packing, accumulation": {
        "training": TrainingOptions(packing=True, accumulation=2, **TRAINING),
        "data_cache": "cache",
    },
    "accumulation, epochs": {"training": TrainingOptions(accumulation=2, **TRAINING), "epochs": 3},
    "dense moments": {"training": TrainingOptions(moments="dense", **TRAINING)},
    "healing, validated": {
        "training": TrainingOptions(objective="ntp", **TRAINING),
        "healing": HealingOptions("lora", steps=STEPS, rank=2),
        "validate_every": 5,
    },
}


def prepare(folder: Path) -> dict:
    """The arguments of a small transfer whose files are in `folder`."""
    save_tiny_model(folder / "teacher")
    new_tokenizer().save_pretrained(folder / "tokenizer")
    for name, texts in (("corpus", TEXTS * 3), ("held-out", [text[::-1] for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text(jsonl(texts))
    return {
        "model": folder / "teacher",
        "tokenizer": folder / "tokenizer",
        "data": folder / "corpus.jsonl",
        "eval_data": folder / "held-out.jsonl",
        "eval_pieces": 2,
        "max_length": 48,
        "batch_size": 2,
        "checkpoint_every": 4,
        "device": "cpu",
    }


def start(arguments: dict, log: Path) -> int:
    """A process that runs a transfer; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)

        def on_stage(stage: str) -> None:
            with (log.parent / "stages").open("a") as file:
                file.write(f"{time.monotonic()} {stage}\n")

        transfer(**arguments, on_stage=on_stage)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(process: int, seconds: float | None = None) -> int | None:
    """The exit status of a process (negative: the signal that killed it); None if it still runs after so long."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(process, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def digests(folder: Path) -> dict[str, str]:
    """What a person would compare of two models: their files, but for the card and the page, which tell the time."""
    files = [x for x in folder.iterdir() if x.is_file() and x.name not in ("README.md", "report.html")]
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in files}


def stages_of(folder: Path) -> list[tuple[str, float]]:
    """(stage, when it began) of the process that ran last."""
    lines = (folder / "stages").read_text().splitlines() if (folder / "stages").exists() else []
    return [(stage, float(moment)) for moment, stage in (line.split(" ", 1) for line in lines)]


def left_alone(arguments: dict, folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """The files of a run that nobody kills, and the seconds of its stages."""
    status = wait(start(arguments | {"output": folder / "alone"}, folder / "alone.log"))
    assert status == 0, (folder / "alone.log").read_text()
    begun = [*stages_of(folder), ("end", time.monotonic())]
    (folder / "stages").unlink()
    return digests(folder / "alone"), {name: b - a for (name, a), (_, b) in itertools.pairwise(begun)}


def killed(arguments: dict, folder: Path, seconds: dict[str, float], targets: list[str], draw: random.Random):
    """The files of a run that is killed in each of these stages, at a moment drawn from it, and where it was killed."""
    output, log, hit = folder / "killed", folder / "killed.log", []
    targets = list(targets)
    while True:
        (folder / "stages").unlink(missing_ok=True)
        resume = (output / "run" / "run.json").exists()
        process = start(arguments | {"output": output, "resume": resume}, log)
        status = None
        if targets:
            target = targets.pop(0)
            while status is None and target not in dict(stages_of(folder)):
                status = wait(process, 0.002)
            if status is None:
                status = wait(process, draw.uniform(0, seconds[target]))
        else:
            status = wait(process)
        if status is None:
            children = psutil.Process(process).children(recursive=True)
            hit.append(stages_of(folder)[-1][0])
            kill(process)
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive, f"still there after the kill: {alive}"
            continue
        assert status == 0, log.read_text()
        if not targets:
            return digests(output), hit


def stopped(arguments: dict, folder: Path, number: int, stage: str, whom: str = "run") -> dict:
    """Send a signal to a run, or to the processes that work for it, in a stage, and see what it leaves."""
    output, log = folder / "stopped", folder / "stopped.log"
    process = start(arguments | {"output": output}, log)
    run = psutil.Process(process)
    while stage not in dict(stages_of(folder)):
        assert wait(process, 0.002) is None, log.read_text()
    while not run.children() or (stage == "training" and not list(output.glob("run/checkpoints/step-*"))):
        assert wait(process, 0.002) is None, log.read_text()
    children = run.children(recursive=True)
    for receiver in [run] if whom == "run" else children:
        receiver.send_signal(number)
    status = wait(process)
    _, alive = psutil.wait_procs(children, timeout=20)
    said = log.read_text()
    finished = status == 0
    if not finished:
        go_on = arguments | {"output": output, "resume": (output / "run" / "run.json").exists()}
        assert wait(start(go_on, folder / "resumed.log")) == 0, (folder / "resumed.log").read_text()
    left = [x.name for place in (folder, folder / "cache") if place.exists() for x in place.glob(".*")]
    return {"status": status, "said": said, "alive": len(alive), "left": left, "files": digests(output)}


def main(kills: int = 20, seed: int = 0) -> None:
    draw, in_all, same = random.Random(seed), Counter(), 0
    folder = Path(tempfile.mkdtemp(prefix="matt-fast-killing-"))
    arguments = prepare(folder)
    for name, case in itertools.cycle(CASES.items()):
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        case = arguments | {k: place / v if k == "data_cache" else v for k, v in case.items()}
        expected, seconds = left_alone(case, place)
        shutil.rmtree(place / "cache", ignore_errors=True)
        targets = sorted(draw.sample(list(seconds), 3), key=list(seconds).index)
        got, hit = killed(case, place, seconds, [*targets, "training"], draw)
        same += (got == expected) * len(hit)
        in_all.update(hit)
        print(f"{name:44} {'same bits' if got == expected else 'OTHER BITS'}   killed in {', '.join(hit)}", flush=True)
        if in_all.total() >= kills:
            break
    print(f"{same} of {in_all.total()} kills led to the same bits; by stage: {dict(in_all)}")
    shutil.rmtree(folder)


def signals() -> None:
    """Stop runs in order, and print what they leave as JSON."""
    folder = Path(tempfile.mkdtemp(prefix="matt-fast-signals-"))
    arguments = {name: value for name, value in prepare(folder).items() if "eval" not in name}
    arguments["data"].write_text(arguments["data"].read_text() * 30)
    arguments |= {"training": TrainingOptions(objective="aim", packing=True, **TRAINING | {"steps": 60})}
    found, alone = {}, {}
    for name, number, stage, whom in (
        ("SIGTERM in training", signal.SIGTERM, "training", "run"),
        ("SIGINT in training", signal.SIGINT, "training", "run"),
        ("SIGTERM in data", signal.SIGTERM, "data", "run"),
        ("worker in training", signal.SIGKILL, "training", "worker"),
    ):
        place = folder / "case"
        place.mkdir()
        cached = stage == "data"
        case = arguments | ({"data_cache": place / "cache"} if cached else {})
        if cached not in alone:
            alone[cached], _ = left_alone(case, place)
            shutil.rmtree(place / "cache", ignore_errors=True)
        result = stopped(case, place, number, stage, whom)
        found[name] = result | {"same": result.pop("files") == alone[cached]}
        shutil.rmtree(place)
    print(json.dumps(found))
    shutil.rmtree(folder)


if __name__ == "__main__":
    signals() if sys.argv[1:] == ["signals"] else main(*map(int, sys.argv[1:]))
