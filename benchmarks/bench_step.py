"""The share of a training step that is neither teacher forward nor student forward and backward; packing; waiting.

OMP_NUM_THREADS and the machine as they are; the model is the one that `make quickstart` fetches:

    .venv/bin/python benchmarks/bench_step.py --tokens 256 --batch 4 [--packing] [--short]

The rest is the AIM loss and its gradient (the torch engine computes both in its forward pass), gathering and updating
rows, and waiting for data. With --short the modules are cut at their blank lines into documents of a few lines.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from matt_fast import TrainingOptions, objectives, training
from matt_fast.data import Side
from matt_fast.initializers import initial_rows
from matt_fast.recipe import make_student
from matt_fast.stream import AlignedBatches
from matt_fast.teacher import Teacher
from matt_fast.vocabulary import VocabularyPair

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart

WARMUP, STEPS = 3, 12


def main(tokens: int, batch: int, objective: str, packing: bool, short: bool) -> None:
    folder = quickstart.fetch_model()
    corpus, _, texts = quickstart.write_corpus()
    if short:
        pieces = [piece for text in texts for piece in text.split("\n\n")]
        corpus = Path(tempfile.mkdtemp(), "short.jsonl")
        corpus.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    source = Teacher(folder)
    n_layers = round(source.depth / 3)
    trunk = source.load(torch.float32, n_layers)
    rows = len(trunk.get_input_embeddings().weight)
    vocabulary = VocabularyPair(source.load_tokenizer(), quickstart.extend_tokenizer(folder, texts), rows)
    start = initial_rows(trunk, vocabulary, "mean", 0)
    trunk = trunk.get_decoder()
    training.freeze(trunk)
    student = make_student(trunk, vocabulary, start, freeze_shared=True, with_head=False)
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
    options = TrainingOptions(objective=objective, steps=WARMUP + STEPS)
    progress, _ = training.train(
        trunk, trunk, student, stream.in_background(), n_layers, options, Accelerator(), on_step
    )
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
    main(**vars(parser.parse_args()))
