"""A training step written the reference library's way beside ours: time and peak memory, each in a process of its own.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/reference_step.py [--lengths 256,512,1024] [--ours 2048,4096]

The reference's way: two copies of the model, eager attention in every layer whose weights are all handed out
(output_attentions), the loss from n × n × d weighted values (matt_fast/loss/eager.py), a dense gradient of the whole
embedding and AdamW over all of it. Ours is `train`. Both: SmolLM2-135M in float32, target layer 10 of 30, objective
"aim", one chunk of the standard library, a tokenizer of 24,000 tokens trained on it (or --tokenizer).

Seconds are of processor time, so that other work on the machine does not count: the best of the steps after the first
(of one step, where there is only one). Memory is the high-water mark
of the process's resident memory above what it was before the model was loaded.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from matt_fast import TrainingOptions, aim_loss, export, objectives
from matt_fast.batches import Batch, collate
from matt_fast.capture import capture, decoder_layers
from matt_fast.data import Side, make_chunks, read_documents
from matt_fast.initializers import initial_rows
from matt_fast.memory import peak_memory, reset_peak_memory
from matt_fast.recipe import make_student
from matt_fast.teacher import Teacher
from matt_fast.training import freeze, train
from matt_fast.vocabulary import VocabularyPair

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart

LAYERS, CPU = 10, torch.device("cpu")
GIB = 1 << 30


def text_batch(vocabulary: VocabularyPair, length: int) -> Batch:
    text = "\n".join(read_documents(quickstart.write_corpus()[0]))[: 16 * length]
    sides = (
        Side("teacher", vocabulary.teacher, vocabulary.teacher_rows, length),
        Side("student", vocabulary.student, vocabulary.rows, length),
    )
    return collate([[next(make_chunks([text], *sides, Counter()))]], Counter())


def reference_steps(source: Teacher, vocabulary: VocabularyPair, batch: Batch, steps: int) -> list[float]:
    models = [source.load(torch.float32, LAYERS) for _ in range(2)]
    export.replace_vocabulary(models[1], initial_rows(models[0], vocabulary, "mean", 0))
    models = [model.get_decoder() for model in models]
    weights: list[torch.Tensor] = []
    for model in models:
        freeze(model)
        for layer in decoder_layers(model):
            layer.self_attn.register_forward_hook(lambda module, given, output: weights.append(output[1]))
    table = models[1].get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=1e-3, weight_decay=0.0)
    options = {"attention": [LAYERS - 1], "attn_implementation": "eager"}
    seconds = []
    for _ in range(steps):
        begin = time.process_time()
        weights.clear()
        with torch.no_grad():
            teacher = capture(models[0], **options, input_ids=batch.teacher_ids).attention[LAYERS - 1]
        student = capture(models[1], **options, input_ids=batch.student_ids).attention[LAYERS - 1]
        segments = batch.teacher_segments, batch.student_segments
        loss = aim_loss(teacher.states, student.states, *segments, scale=student.scale, backend="eager")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([table], 1.0)
        optimizer.step()
        seconds.append(time.process_time() - begin)
    return seconds


def our_steps(source: Teacher, vocabulary: VocabularyPair, batch: Batch, steps: int, **options) -> list[float]:
    model = source.load(torch.float32, LAYERS)
    start = initial_rows(model, vocabulary, "mean", 0)
    model = model.get_decoder()
    freeze(model)
    student = make_student(model, vocabulary, start, freeze_shared=True, with_head=False)
    del start
    ends = [time.process_time()]
    options = TrainingOptions(objective="aim", steps=steps, lr=1e-3, **options)
    train(
        model, model, student, iter([batch] * steps), LAYERS, options, Accelerator(cpu=True),
        lambda progress: ends.append(time.process_time()),
    )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(ends)]


def shares(spent: dict[str, float]) -> None:
    """Time what a step of ours does, part by part, into `spent`."""

    def timed(name, function):
        def call(*arguments, **options):
            begin = time.process_time()
            result = function(*arguments, **options)
            spent[name] = spent.get(name, 0.0) + time.process_time() - begin
            return result

        return call

    for name in ("teacher_pass", "student_pass", "losses_of"):
        setattr(objectives, name, timed(name.replace("_", " "), getattr(objectives, name)))
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)


def measure(way: str, tokenizer: str, length: int, steps: int) -> None:
    source = Teacher(quickstart.fetch_model())
    vocabulary = VocabularyPair(source.load_tokenizer(), source.load_tokenizer(tokenizer), 49152)
    batch = text_batch(vocabulary, length)
    reset_peak_memory(CPU)
    before, spent = peak_memory(CPU), {}
    if way == "reference":
        seconds = reference_steps(source, vocabulary, batch, steps)
    else:
        shares(spent)
        options = {"checkpointing": True} if way == "ours, checkpointing" else {}
        seconds = our_steps(source, vocabulary, batch, steps, **options)
    parts = {name: value / sum(seconds) for name, value in spent.items()}
    found = {"seconds": min(seconds[1:] or seconds), "peak": peak_memory(CPU) - before, "parts": parts}
    print(json.dumps(found | {"tokens": [batch.teacher_ids.shape[1], batch.student_ids.shape[1]]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="256,512,768,1024", help="for both ways")
    parser.add_argument("--ours", default="2048,4096,8192,16384", help="for ours alone")
    parser.add_argument("--tokenizer")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(*json.loads(given.measure))
    with tempfile.TemporaryDirectory() as work:
        tokenizer = given.tokenizer
        if tokenizer is None:
            from bench_objectives import tokenizer_of

            tokenizer = work
            tokenizer_of(list(read_documents(quickstart.write_corpus()[0]))).save_pretrained(tokenizer)

        def run(way: str, length: int) -> dict:
            steps = 3 if length <= 1024 else 2 if length <= 4096 else 1
            command = [sys.executable, __file__, "--measure", json.dumps([way, tokenizer, length, steps])]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return json.loads(output.splitlines()[-1])

        print("| tokens, teacher and student | reference, s | ours, s | ratio | reference, MiB | ours, MiB | ratio |")
        print("|---|---|---|---|---|---|---|")
        lengths = [int(x) for x in given.lengths.split(",") if x]
        for length in lengths + [int(x) for x in given.ours.split(",") if x]:
            ours = run("ours", length)
            row = [" and ".join(f"{x:,}" for x in ours["tokens"])]
            reference = run("reference", length) if length in lengths else None
            for name, unit, digits in (("seconds", 1, 2), ("peak", 1 << 20, 0)):
                mine = ours[name] / unit
                row += ["" if reference is None else f"{reference[name] / unit:,.{digits}f}", f"{mine:,.{digits}f}"]
                row.append("" if reference is None else f"{reference[name] / ours[name]:.1f}")
            print(f"| {' | '.join(row)} |", flush=True)
            parts = ", ".join(f"{name} {share:.0%}" for name, share in ours["parts"].items())
            print(f"  our step at {length:,}: {parts}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
