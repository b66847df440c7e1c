"""The loss on a GPU: correctness first, then time and memory by engine, beside flash attention at the student's shape.

    python3 benchmarks/bench_gpu.py                writes GPU.md anew after every result: into $OUT, else benchmarks/
    python3 benchmarks/bench_gpu.py --minutes 9    what fits into that; the rest is listed as not run
    python3 benchmarks/bench_gpu.py --dry-run      every path at tiny sizes on a CPU, no times, into a temporary file

Needs torch, triton and numpy, nothing of this repository installed. Steps run in a worker process: an engine that
raises, runs out of memory, hangs or breaks the CUDA context is recorded as failed, and the rest goes on. An engine that
failed a shape's correctness is not timed at that shape.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu_bench.inputs import DTYPES, Shape
from gpu_bench.tables import conditions, report
from gpu_bench.worker import supervise, work
from report import write

STEPS = ("check", "triton", "triton, plan given", "flash", "torch", "eager", "compiled eager")
SLOW = "torch", "eager", "compiled eager"  # of all shapes in the end: one of them may take as long as all the rest


def tasks_of(options) -> list[dict]:
    tasks = []
    choices = itertools.product(options.variants, options.metrics, options.dtypes, sorted(options.lengths))
    for variant, metric, dtype, length in choices:
        for head_dim in options.head_dims:
            shape = Shape(length, head_dim, options.heads, options.kv_heads, dtype, variant, metric)
            tasks += [{"shape": asdict(shape), "step": x} for x in options.steps]
    tasks.sort(key=lambda x: x["step"] in SLOW)
    if options.dry_run:
        tasks[2:2] = [{"shape": tasks[0]["shape"], "step": x} for x in ("raise", "die")]
    return tasks


def parse(arguments: list[str]) -> argparse.Namespace:
    dry = "--dry-run" in arguments
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    lengths = [24, 60] if dry else [2**x for x in range(8, 17)]
    add("--lengths", type=int, nargs="+", default=lengths)
    add("--head-dims", type=int, nargs="+", default=[16] if dry else [64, 128, 256])
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32"] if dry else ["bf16"])
    add("--variants", nargs="+", choices=["aim", "aim_star"], default=["aim", "aim_star"] if dry else ["aim"])
    add("--metrics", nargs="+", choices=["mse", "cosine"], default=["mse", "cosine"] if dry else ["mse"])
    add("--heads", type=int, default=4 if dry else 32)
    add("--kv-heads", type=int, default=2 if dry else 8)
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    add("--minutes", type=float, default=60, help="steps not begun by then are left out")
    add("--step-seconds", type=float, default=600, help="a step that takes longer is stopped")
    add("--output", type=Path)
    add("--commit", help="where no git is at hand")
    add("--dry-run", action="store_true")
    add("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output is None and not options.work:
        options.output = Path(os.environ.get("OUT", Path(__file__).parent), "GPU.md")
        if dry:
            options.output = Path(tempfile.mkdtemp(prefix="bench-gpu-"), "DRY_RUN.md")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.work:
        return work(json.loads(options.work.read_text()))
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --dry-run tries every path on a CPU")
    about, records = conditions(options), []
    tasks = tasks_of(options)

    def on_result(record: dict) -> None:
        records.append(record)
        write(options.output, report(records, options, about))
        task = record["task"]
        found = record.get("median", record.get("refused") or record.get("error") or "done")
        if "checks" in record:
            found = ", ".join(f"{x['engine']} {'passed' if x['passed'] else 'FAILED'}" for x in record["checks"])
        print(f"{len(records)}/{len(tasks)} {Shape(**task['shape'])} {task['step']}: {found}", flush=True)

    supervise(tasks, options, on_result)
    checks = (x.get("checks", [{"passed": False}]) for x in records if x["task"]["step"] == "check")
    verdicts = Counter(x["passed"] for found in checks for x in found)
    print(f"correctness: {verdicts[True]} passed, {verdicts[False]} FAILED; {options.output}")


if __name__ == "__main__":
    main()
