"""What each of several processes takes with whole copies of the layers and with layers spread over them (`--shard`).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_processes.py [--layers 12] [--processes 1 2 4]

A Llama with random float32 weights, most of them in its layers; full batches of random ids, token-distillation at the
last layer, every row of the new vocabulary its own. "Step" is what PyTorch's allocator has handed out at most (weights
and rows that were there, plus the highest sum of torch.profiler's record), "process" the high-water mark of resident
memory above what the imports took, of the main process and of the one of the others that has most: while the model is
loaded and spread, and in training. It has the pages of the model's file too, which processes share. Sent are bytes of a
step, see `traffic.py`. Processor seconds do not count what other work does beside. malloc gives back what is freed
(MALLOC_MMAP_THRESHOLD_=65536), so that the layers that come and go leave no holes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from traffic import Traffic
from transformers import AutoModelForCausalLM, LlamaConfig

from matt_fast import TrainingOptions
from matt_fast.data.batches import Batch, Chunk, collate
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.teacher import Teacher
from matt_fast.planning.plan import plan_step
from matt_fast.planning.simulation import Vocabulary
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training.loop import freeze, train
from matt_fast.training.sharding import shard_layers
from matt_fast.training.sides import Student
from matt_fast.training.state import Progress

VOCABULARY, ROWS, LENGTH, BATCH, STEPS = 4000, 4000, 64, 2, 4
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
CPU, RESIDENT = torch.device("cpu"), ("loading", "process")


def full_batch(seed: int) -> Batch:
    """Both sides full; the new tokens are all there are, drawn at random."""
    draw = np.random.default_rng(seed)
    sides = draw.integers(VOCABULARY, size=(BATCH, LENGTH)), draw.integers(ROWS, size=(BATCH, LENGTH))
    segments = np.arange(LENGTH) * 2 // 3
    return collate([[Chunk(*ids, segments, segments)] for ids in zip(*sides, strict=True)], Counter())


def measure(folder: str, shard: bool) -> None:
    """Train some steps in this process; the main one prints what was measured, in bytes and seconds."""
    accelerator, source = Accelerator(cpu=True), Teacher(folder)
    before = peak_memory(CPU)
    others = shard and not accelerator.is_main_process
    model = source.outline(torch.float32) if others else source.load(torch.float32)
    model = source.trunk(model)
    freeze(model)
    if shard:
        shard_layers(model, accelerator)
    loading = peak_memory(CPU) - before
    start = torch.randn(ROWS, SIZES["hidden_size"]) * 0.02
    table = EmbeddingTable(model.get_input_embeddings().weight, torch.full((ROWS,), -1), start)
    del start
    batches = [full_batch(accelerator.process_index + 100 * step) for step in range(2 * STEPS)]
    run = [model, model, Student(table)]
    options = TrainingOptions(steps=STEPS, backend="torch")
    clock: list[tuple[float, float]] = []

    def on_step(progress: Progress) -> None:
        clock.append((time.perf_counter(), time.process_time()))

    with Traffic() as traffic:
        reset_peak_memory(CPU)
        train(*run, iter(batches[:STEPS]), source.depth, options, accelerator, on_step)
    process = peak_memory(CPU) - before
    wall, processor = (float(np.diff(times).mean()) for times in zip(*clock, strict=True))
    static = [*model.parameters(), *model.buffers(), table.trainable, table.slot, table.frozen_from]
    static = [getattr(x, "_local_tensor", x) for x in static]
    static = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in static}.values())
    with torch.profiler.profile(profile_memory=True) as profiler:
        train(*run, iter(batches[STEPS:]), source.depth, TrainingOptions(steps=1), accelerator)
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = np.array([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())])
    step = static + int(np.cumsum(sizes).max())
    sent = sum(traffic.sent.values()) / STEPS
    figures = gather_object([{"step": step, "loading": loading, "process": process, "sent": sent}])
    if accelerator.is_main_process:
        step, sent = (max(x[name] for x in figures) for name in ("step", "sent"))
        resident = [max(x[name] for x in some) for some in (figures[:1], figures[1:] or figures) for name in RESIDENT]
        print(json.dumps([step, sent, wall, processor, *resident]))


def planned(folder: Path, processes: int, shard: bool) -> tuple[int, int]:
    """(bytes at the peak, bytes sent) of each process, as `matt-fast plan --processes` has them."""
    given = {"length": LENGTH, "batch_size": BATCH, "n_layers": None, "precision": "no", "device": "cpu"}
    source = Teacher(folder)
    given["n_layers"] = source.depth
    found = plan_step(source, Vocabulary(ROWS, ROWS), TrainingOptions(), **given, processes=processes)
    if processes == 1:
        return found.step.peak, 0
    layout = found.layouts[shard]
    return layout.step.peak, layout.sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--measure", nargs=2)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure[0], chosen.measure[1] == "sharded")
        return
    mebi = lambda size: f"{size / (1 << 20):,.0f}"  # noqa: E731
    with tempfile.TemporaryDirectory() as work:
        config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, num_hidden_layers=chosen.layers, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config)
        layers = sum(x.nbytes for x in model.model.layers.parameters())
        model.save_pretrained(work)
        del model
        print(f"{chosen.layers} layers of {mebi(layers)} MiB in all, {BATCH} x {LENGTH} tokens in each process\n")
        print("| layout | processes | step, MiB | planned | first process, MiB: loading | training | others: loading "
              "| training | sent, MiB | planned | tokens a second | processor seconds a step |")  # fmt: skip
        print("|---|" + "---:|" * 11)
        for processes in chosen.processes:
            for layout in ("whole", "sharded")[: 1 if processes == 1 else 2]:
                launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                command = [sys.executable, *launch, __file__, "--measure", work, layout]
                malloc = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(command, capture_output=True, text=True, env=malloc)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                step, sent, wall, processor, *resident = json.loads(done.stdout.splitlines()[-1])
                peak, planned_sent = planned(Path(work), processes, layout == "sharded")
                figures = [mebi(x) for x in (step, peak, *resident)]
                figures += [f"{x / (1 << 20):,.1f}" for x in (sent, planned_sent)]
                speed = f"{processes * BATCH * LENGTH / wall:,.0f}", f"{processor:.2f}"
                print("|", " | ".join([layout, str(processes), *figures, *speed]), "|", flush=True)


if __name__ == "__main__":
    main()
