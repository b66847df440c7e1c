"""The report: under which conditions, times and memory, correctness, compiled kernels."""

import contextlib
import platform
import subprocess
import time
from pathlib import Path

import torch
import triton
from gpu_bench.correctness import QUANTITIES
from gpu_bench.inputs import Shape

INTRODUCTION = """Forward and backward with all three gradients of the student. n counts student tokens; the teacher
reads the same segments (real ones of German text) in about 1.2 times as many tokens. Times: CUDA events around one
step, L2 flushed before each, median and 10th to 90th percentile; launches are included, and the plan unless it is
given. Memory: peak of torch's allocator above what inputs take. "flash" is torch's scaled_dot_product_attention (for
fp32 its memory-efficient kernel) on the student's q, k, v, causal: the yardstick, not the same job.
"""
CHECKED = """Relative errors (norms over key heads; up to n = 512 root mean squares over draws) against float64. Passed:
value, dQ, dK and dV each within twice the error that the eager formula has in the same dtype ("eager here": on the same
inputs; otherwise at the longest n where it fits); a value may always be off by eps / 64, anything by 2.4e-7. Reference:
the eager formula in float64 by key head where it fits, else the torch engine in float64. Beyond n = 4096 the first and
the last key head are compared, of runs on all.
"""


def conditions(options) -> list[str]:
    def git(*arguments):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(Path(__file__).parent), *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        return None

    commit = options.commit or git("rev-parse", "HEAD") or "unknown"
    if not options.commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += ", with changes"
    device = "CPU, Triton's interpreter"
    if not options.dry_run:
        device = torch.cuda.get_device_name()
        properties = torch.cuda.get_device_properties(0)
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        device += f" ({properties.total_memory / 2**30:.0f} GiB, compute capability {capability})"
    versions = f"torch {torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"
    versions += f", Triton {triton.__version__}, Python {platform.python_version()}"
    heads = f"{options.heads} query heads, {options.kv_heads} key heads, batch 1, causal"
    return [f"Device: {device}", versions, f"Commit {commit}, {time.strftime('%Y-%m-%d %H:%M')} UTC", heads]


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x).replace("|", "/") for x in line) + " |" for line in lines) + "\n"


def check_rows(records: list[dict]) -> list[list]:
    rows = []
    for record in records:
        for x in record.get("checks", []):
            errors = [x.get("error"), "", "", ""]
            if "errors" in x:
                errors = [f"{y:.1e} / {z:.1e}" for y, z in zip(x["errors"], x["eager"], strict=True)]
            verdict = "passed" if x["passed"] else "FAILED"
            noise = "unrelated sides" if x["noise"] is None else f"noise {x['noise']:g}"
            rows.append([Shape(**x["shape"]), noise, x["engine"], *errors, x["reference"], x["source"], verdict])
        if record["task"]["step"] == "check" and "checks" not in record:
            reason = record.get("refused") or record["error"]
            rows.append([Shape(**record["task"]["shape"]), "", "", reason, "", "", "", "", "", "FAILED"])
    return rows


def time_rows(records: list[dict]) -> list[list]:
    timed = {(str(Shape(**x["task"]["shape"])), x["task"]["step"]): x for x in records if x["task"]["step"] != "check"}
    rows = []
    for (shape, step), x in timed.items():
        if "median" not in x:
            rows.append([shape, step, x.get("refused") or f"failed: {x['error']}", "", "", ""])
        elif x["median"] is None:
            rows.append([shape, step, "ran", "", "", ""])
        else:
            flash = timed.get((shape, "flash"), {}).get("median")
            ratio = f"{x['median'] / flash:.2f}" if flash else ""
            spread = f"{x['low']:.3f} to {x['high']:.3f}"
            rows.append([shape, step, f"{x['median']:.3f}", spread, ratio, f"{x['peak']:.1f}"])
    return rows


def kernel_rows(records: list[dict]) -> list[list]:
    rows = {}
    for record in records:
        found = record.get("kernels", [])
        if isinstance(found, str):
            rows[found] = [found, "", "", "", "", "", ""]
            continue
        for x in found:
            dim = f"{record['task']['shape']['head_dim']}, {record['task']['shape']['dtype']}"
            rows.setdefault(tuple(x.values()), [*x.values(), dim])
    return list(rows.values())


def report(records: list[dict], options, about: list[str]) -> str:
    title = "# DRY RUN: no times, nothing measured\n" if options.dry_run else "# The loss on a GPU, measured\n"
    head = [
        "shape",
        "sides",
        "engine",
        *(f"{x}: error / eager's" for x in QUANTITIES),
        "reference",
        "limits",
        "verdict",
    ]
    parts = [title, "\n".join(f"* {x}" for x in about) + "\n"]
    parts += ["## Time and memory\n", INTRODUCTION]
    columns = ["shape", "engine", "median ms", "10 % to 90 %", "over flash", "peak MiB"]
    parts += [table(columns, time_rows(records)), "## Correctness\n", CHECKED, table(head, check_rows(records))]
    columns = ["kernel", "registers", "spilled", "shared memory", "warps", "stages", "first seen at head_dim, dtype"]
    parts += ["## Compiled kernels\n", table(columns, kernel_rows(records))]
    return "\n".join(parts)
