"""The share of a training step that is neither teacher forward nor student forward and backward; packing; waiting.

OMP_NUM_THREADS and the machine as they are; the model is the one that `make quickstart` fetches:

    .venv/bin/python benchmarks/bench_step.py --tokens 256 --batch 4 [--packing] [--short]

The rest is the AIM loss and its gradient (the torch engine computes both in its forward pass), gathering and updating
rows, and waiting for data. With --short the modules are cut at their blank lines into documents of a few lines. With
--profile torch's profiler runs along, and the last line is JSON: the share of each part and of the dearest operators.

Under pytest a step is timed beside one written the reference library's way (reference_step.py), on the same text.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import reference_step
import torch
from accelerate import Accelerator

from matt_fast import TrainingOptions
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side
from matt_fast.data.stream import AlignedBatches
from matt_fast.initializers import initial_rows
from matt_fast.model.teacher import Teacher
from matt_fast.training import loop as training
from matt_fast.training import objectives, sides
from matt_fast.training.student import make_student

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import code_text
import quickstart

WARMUP, STEPS = 3, 12
PROFILED = 3  # steps of a profile beyond 1,024 tokens


PARTS = {
    "teacher forward": (objectives, "teacher_pass"),
    "student forward": (objectives, "student_pass"),
    "loss": (objectives, "losses_of"),
    "backward": (torch.Tensor, "backward"),
    "gather rows": (sides.Student, "rows"),
    "update rows": (training, "_update"),
}


def name_parts() -> None:
    """Give each part of a step its name in the profiler."""
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, torch.profiler.record_function(name)(getattr(owner, attribute)))


def profiled(run, batches, steps: int) -> dict:
    """Parts and operators as shares of the time of the steps after the warm-up."""
    begin = 0.0
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def named():
        for _ in range(steps):
            with torch.profiler.record_function("wait for data"):
                batch = next(batches)
            yield batch

    def on_step(progress) -> None:
        nonlocal begin
        if progress.step == WARMUP:
            profiler.start()
            begin = time.perf_counter()

    name_parts()
    run(named(), on_step=on_step)
    seconds = time.perf_counter() - begin
    profiler.stop()
    events = profiler.key_averages()
    parts = {x.key: x.cpu_time_total / 1e6 / seconds for x in events if x.key in (*PARTS, "wait for data")}
    parts["everything else"] = 1 - sum(parts.values())
    operators = sorted((x for x in events if x.key.startswith("aten::")), key=lambda x: -x.self_cpu_time_total)
    shares = {x.key: x.self_cpu_time_total / 1e6 / seconds for x in operators[:8]}
    return {"steps": steps - WARMUP, "seconds": seconds, "parts": parts, "operators": shares}


elapsed = 0.0


def clock_of_the_child() -> float:
    return elapsed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return reference_step.save_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.benchmark(group="training step", timer=clock_of_the_child)
@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("way", ["ours", "reference"])
def test_step(benchmark, tokenizer, way, length):
    """Steps run in a process of their own, for their peak, and are timed there; here these times are read off."""
    ways = {x: reference_step.run(x, tokenizer, length, 4 if length < 1000 else 2) for x in ("ours", "reference")}
    assert ways["ours"]["loss"] == pytest.approx(ways["reference"]["loss"], rel=1e-4)
    found = ways[way]
    teacher, student = found["tokens"]
    benchmark.extra_info |= {
        "engine": way,
        "n": teacher,
        "student tokens": student,
        "model": "SmolLM2-135M, 10 of 30 layers",
        "dtype": "float32",
        "objective": "aim",
        "threads": 1,
        "clock": "processor time",
        "peak MiB": found["peak"] / 2**20,
    }
    _, *seconds = found["seconds"]
    left = iter(seconds)

    def pass_time():
        global elapsed
        elapsed += next(left)

    benchmark.pedantic(pass_time, rounds=len(seconds))


def main(tokens: int, batch: int, objective: str, packing: bool, short: bool, profile: bool) -> None:
    folder = quickstart.fetch_model()
    corpus, _, texts = code_text.write_corpus()
    if short:
        pieces = [piece for text in texts for piece in text.split("\n\n")]
        corpus = Path(tempfile.mkdtemp(), "short.jsonl")
        corpus.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    source = Teacher(folder)
    n_layers = round(source.depth / 3)
    trunk = source.load(torch.float32, n_layers)
    rows = len(trunk.get_input_embeddings().weight)
    vocabulary = VocabularyPair(source.load_tokenizer(), code_text.extend_tokenizer(folder, texts), rows)
    start = initial_rows(trunk, vocabulary, "mean", 0)
    trunk = trunk.get_decoder()
    training.freeze(trunk)
    student = make_student(trunk, vocabulary, start, freeze_shared=True, objectives=())
    sides = Side("teacher", vocabulary.teacher, rows, tokens), Side("student", vocabulary.student, 1 << 30, tokens)
    stream = AlignedBatches(corpus, *sides, batch_size=batch, seed=0, packing=packing)

    spent = {"forward": 0.0, "backward": 0.0}

    def timed(name, function):
        def call(*arguments, **options):
            begin = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] += time.perf_counter() - begin
            return result

        return call

    objectives.capture = timed("forward", objectives.capture)
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)
    before = dict(spent, total=0.0)

    def on_step(progress):
        now = dict(spent, total=progress.seconds)
        step = {name: now[name] - before[name] for name in now}
        before.update(now)
        if progress.step > WARMUP:
            shares.append(1 - (step["forward"] + step["backward"]) / step["total"])
            timed_tokens.append(progress.tokens)
            waits.append(progress.seconds_waiting)
            ends.append(progress.seconds)

    shares, timed_tokens, waits, ends = [], [], [], []
    steps = WARMUP + (STEPS if tokens <= 1024 or not profile else PROFILED)
    options = TrainingOptions(objective=objective, steps=steps)
    run = partial(training.train, trunk, trunk, student, n_layers=n_layers, options=options, accelerator=Accelerator())
    if profile:
        return print(json.dumps(profiled(run, stream.in_background(), steps) | {"tokens": tokens}))
    progress, _ = run(stream.in_background(), on_step=on_step)
    print(
        f"{tokens} tokens x {batch}, {n_layers} layers, {torch.get_num_threads()} threads, "
        f"{len(progress.losses)} steps; rest of a step: median {statistics.median(shares):.1%}, "
        f"{min(shares):.1%} to {max(shares):.1%}"
    )
    seconds = ends[-1] - ends[0]
    print(
        f"{(timed_tokens[-1] - timed_tokens[0]) / seconds:,.0f} tokens/s, {progress.padding:.1%} of the rows padding, "
        f"{(waits[-1] - waits[0]) / seconds:.2%} of the time waiting for data"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--objective", default="aim")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--profile", action="store_true")
    main(**vars(parser.parse_args()))
