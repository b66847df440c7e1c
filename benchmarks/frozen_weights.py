"""What the frozen weights take as they are, quantised and offloaded, in memory, time and what is learned.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/frozen_weights.py

SmolLM2-135M with the quickstart's tokenizer and text on a CPU. Memory: a step on full rows in a process of its own,
PyTorch's allocations at their peak beside what `plan` says, as in bench_plan.py; offloaded float32 weights are read in
place from the mapped file, and no allocation. Learned: 20 steps of AIM, then bits per byte of the written model, whose
frozen layers are the original ones in every case.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from bench_plan import full_batch

from matt_fast import TrainingOptions, transfer
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.documents import read_documents
from matt_fast.evaluation.bits_per_byte import evaluate
from matt_fast.initializers import initial_rows
from matt_fast.model.precision import DTYPES
from matt_fast.model.teacher import Teacher
from matt_fast.planning.plan import plan
from matt_fast.training.frozen import load_frozen
from matt_fast.training.loop import freeze, train
from matt_fast.training.student import make_student

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import code_text
import quickstart

MIB = 1 << 20
CPU = torch.device("cpu")
LENGTH, BATCH, STEPS, PIECES = 256, 4, 20, 5
# precision, options of training
SETTINGS = [
    ("no", {}),
    ("bf16", {}),
    ("no", {"quantization": "8bit"}),
    ("no", {"quantization": "4bit"}),
    ("no", {"checkpointing": True}),
    ("no", {"checkpointing": True, "quantization": "4bit"}),
    ("no", {"checkpointing": True, "offload": "disk"}),
]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """All that a model keeps in memory, with what bitsandbytes keeps beside its parameters."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(module, "state", None)
        found += [x for x in (getattr(state, "CB", None), getattr(state, "SCB", None)) if x is not None]
        weight = getattr(module, "weight", None)
        found += [x for x in (getattr(weight, "CB", None), getattr(weight, "SCB", None)) if x is not None]
        state = getattr(weight, "quant_state", None)
        found += [] if state is None else [state.absmax, state.code]
    return [x for x in found if x.device.type != "meta"]


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def measure(folder: str, tokenizer: str, precision: str, options: dict) -> None:
    """Print the bytes of the weights, the allocator's peak in a step, and the seconds of the faster of two more."""
    options = TrainingOptions(objective="aim", steps=1, backend="torch", **options)
    source, accelerator = Teacher(folder), Accelerator(cpu=True)
    n_layers = round(source.depth / 3)
    model = load_frozen(source, DTYPES[precision], n_layers, options, CPU)
    rows = len(model.get_input_embeddings().weight)
    vocabulary = VocabularyPair(source.load_tokenizer(), source.load_tokenizer(tokenizer), rows)
    start = initial_rows(model, vocabulary, "mean", 0)
    model = source.trunk(model)
    freeze(model)
    student = make_student(model, vocabulary, start, freeze_shared=True, objectives=())
    del start
    batch = full_batch(vocabulary, LENGTH, BATCH, 0)
    table = student.input
    tensors = [*weights(model), table.trainable, table.frozen_from, table.slot, table.trainable_ids]
    tensors += [batch.teacher_ids, batch.student_ids, batch.distinct_ids, *vars(batch.places).values()]
    static, frozen = size_of(tensors), size_of(weights(model))
    step = lambda: train(model, model, student, iter([batch]), n_layers, options, accelerator)[0]  # noqa: E731
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = np.array([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())])
    seconds = min(step().seconds for _ in range(2))
    if options.offload is not None:  # of the file, mapped anew for each tensor, the allocator sees all each time
        sizes = sizes[abs(sizes) < 0.9 * Path(folder, "model.safetensors").stat().st_size]
    print(json.dumps([frozen, static + int(np.cumsum(sizes).max()), seconds]))


def learn(folder: str, tokenizer: str, precision: str, options: dict) -> None:
    """Print the mean loss of the last five steps and bits per byte after them."""
    data, held_out, _ = code_text.write_corpus()
    training = TrainingOptions(objective="aim", steps=STEPS, lr=1e-3, **options)
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "output"
        done = transfer(
            folder, tokenizer, data, output, max_length=LENGTH, batch_size=BATCH, precision=precision, training=training
        )
        written = Teacher(output)
        documents = read_documents(held_out)
        found = evaluate(written.load(torch.float32), written.load_tokenizer(), documents, max_pieces=PIECES)
    print(json.dumps([sum(done.progress.losses[-5:]) / 5, found.bits_per_byte]))


def apart(what: str, arguments: list) -> list:
    command = [sys.executable, __file__, f"--{what}", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--learn", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for what, function in (("measure", measure), ("learn", learn)):
        if getattr(given, what):
            return function(*json.loads(getattr(given, what)))
    folder = str(quickstart.fetch_model())
    with tempfile.TemporaryDirectory() as work:
        code_text.extend_tokenizer(folder, code_text.write_corpus()[2]).save_pretrained(work)
        titles = "frozen weights | MiB of them | plan | step, MiB | plan | s | AIM loss | bits per byte"
        print(f"| {titles} |\n|---|---|---|---|---|---|---|---|", flush=True)
        for precision, options in SETTINGS:
            training = TrainingOptions(objective="aim", **options)
            predicted = plan(
                folder, work, length=LENGTH, batch_size=BATCH, precision=precision, device="cpu", training=training
            ).step
            frozen, peak, seconds = apart("measure", [folder, work, precision, options])
            learned = ["", ""]  # checkpointing and offload change no bit: tests/test_frozen.py
            if not options.get("checkpointing"):
                loss, bits = apart("learn", [folder, work, precision, options])
                learned = [f"{loss:.6f}", f"{bits:.4f}"]
            name = ", ".join(["float32" if precision == "no" else precision, *(f"{x}" for x in options.values())])
            name = name.replace("True", "checkpointing")
            memory = [frozen, predicted.parts["frozen weights"], peak, predicted.peak]
            cells = [name, *(f"{x / MIB:,.0f}" for x in memory), f"{seconds:.1f}", *learned]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
