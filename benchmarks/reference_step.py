"""A training step written the reference library's way beside ours: time and peak memory, each in a process of its own.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/reference_step.py [--lengths 256,512] [--ours 2048,4096] [--json FILE]

The reference's way: two copies of the model, eager attention in every layer whose weights are all handed out
(output_attentions), the loss from n × n × d weighted values (matt_fast/loss/eager.py), a dense gradient of the whole
embedding and AdamW over all of it. Ours is `train`. Both: SmolLM2-135M in float32, target layer 10 of 30, objective
"aim", one chunk of the standard library, a tokenizer of 24,000 tokens trained on it (or --tokenizer).

Seconds are of processor time, so that other work on the machine does not count: the best of the steps after the first
(of one step, where there is only one). Memory is the high-water mark of the process's resident memory above what it was
before the model was loaded. `--json` keeps what was found for RESULTS.md, with a profile of our step (bench_step.py) at
the lengths of `--profile`: `make bench-steps`.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import machine
import report
import torch
from accelerate import Accelerator
from pytest_benchmark.utils import get_commit_info
from torch import nn

from matt_fast import TrainingOptions, aim_loss
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.batches import Batch, collate
from matt_fast.data.chunks import make_chunks, sides_of
from matt_fast.data.documents import read_documents
from matt_fast.initializers import initial_rows
from matt_fast.model.capture import capture
from matt_fast.model.layers import decoder_layers
from matt_fast.model.teacher import Teacher
from matt_fast.recipe import export
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training import objectives
from matt_fast.training.loop import freeze, train
from matt_fast.training.student import make_student

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import code_text
import quickstart

LAYERS, CPU = 10, torch.device("cpu")
GIB = 1 << 30


def text_batch(vocabulary: VocabularyPair, length: int) -> Batch:
    text = "\n".join(read_documents(code_text.write_corpus()[0]))[: 16 * length]
    sides = sides_of(vocabulary, length)
    return collate([[next(make_chunks([text], *sides, Counter()))]], Counter())


def reference_steps(
    source: Teacher, vocabulary: VocabularyPair, batch: Batch, steps: int
) -> tuple[list[float], list[float]]:
    """(seconds, losses) of each step."""
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
    seconds, losses = [], []
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
        losses.append(loss.item())
    return seconds, losses


def our_steps(
    source: Teacher, vocabulary: VocabularyPair, batch: Batch, steps: int, **options
) -> tuple[list[float], list[float]]:
    model = source.load(torch.float32, LAYERS)
    start = initial_rows(model, vocabulary, "mean", 0)
    model = model.get_decoder()
    freeze(model)
    student = make_student(model, vocabulary, start, freeze_shared=True, objectives=())
    del start
    ends = [time.process_time()]
    options = TrainingOptions(objective="aim", steps=steps, lr=1e-3, **options)
    progress, _ = train(
        model, model, student, iter([batch] * steps), LAYERS, options, Accelerator(cpu=True),
        lambda progress: ends.append(time.process_time()),
    )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(ends)], progress.losses


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
        seconds, losses = reference_steps(source, vocabulary, batch, steps)
    else:
        shares(spent)
        options = {"checkpointing": True} if way == "ours, checkpointing" else {}
        seconds, losses = our_steps(source, vocabulary, batch, steps, **options)
    parts = {name: value / sum(seconds) for name, value in spent.items()}
    found = {"seconds": seconds, "loss": losses[0], "peak": peak_memory(CPU) - before, "parts": parts}
    print(json.dumps(found | {"tokens": [batch.teacher_ids.shape[1], batch.student_ids.shape[1]]}))


def save_tokenizer(folder: str) -> str:
    """24,000 tokens, learned from the standard library."""
    from bench_objectives import tokenizer_of

    tokenizer_of(list(read_documents(code_text.write_corpus()[0]))).save_pretrained(folder)
    return folder


@functools.cache
def run(way: str, tokenizer: str, length: int, steps: int) -> dict:
    """What `measure` prints in a process of its own."""
    return last_line([__file__, "--measure", json.dumps([way, tokenizer, length, steps])])


def profile(length: int) -> dict:
    """The parts of our step at this length."""
    return last_line([str(Path(__file__).with_name("bench_step.py")), "--batch=1", f"--tokens={length}", "--profile"])


def last_line(command: list[str]) -> dict:
    output = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def write_json(path: Path, commit: dict, steps: list[dict], profiles: list[dict]) -> None:
    content = {
        "machine_info": machine.describe(),
        "commit_info": commit,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": steps,
        "profiles": profiles,
    }
    report.write(path, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="256,512,768,1024", help="for both ways")
    parser.add_argument("--ours", default="2048,4096,8192,16384", help="for ours alone")
    parser.add_argument("--profile", default="512,4096", help="lengths of the profile, with --json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(*json.loads(given.measure))
    with tempfile.TemporaryDirectory() as work:
        tokenizer = given.tokenizer
        if tokenizer is None:
            tokenizer = save_tokenizer(work)

        lengths, further, profiled = (
            [int(x) for x in names.split(",") if x] for names in (given.lengths, given.ours, given.profile)
        )
        found, commit = [], get_commit_info()
        print(report.STEP_HEAD)
        for length in lengths + further:
            steps = 3 if length <= 1024 else 2 if length <= 4096 else 1
            ours = run("ours", tokenizer, length, steps)
            reference = run("reference", tokenizer, length, steps) if length in lengths else None
            found.append({"length": length, "steps": steps, "ours": ours, "reference": reference})
            print(report.step_row(found[-1]), flush=True)
            parts = ", ".join(f"{name} {share:.0%}" for name, share in ours["parts"].items())
            print(f"  our step at {length:,}: {parts}", file=sys.stderr, flush=True)
        if given.json is not None:
            write_json(given.json, commit, found, [profile(length) for length in profiled])


if __name__ == "__main__":
    main()
