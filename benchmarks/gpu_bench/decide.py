"""Which kernels shall ship: those that do, or those of columns grouped by the shape of their segment (grouped/)?

    python3 benchmarks/gpu_bench/decide.py               8 minutes of one H100 or H200, bfloat16, both metrics
    python3 benchmarks/gpu_bench/decide.py --dry-run     every part on a CPU, tiny and without times

First correctness against the plain formula in float64, then forward and backward of flash attention, cuDNN's, what
ships and the grouped kernels by graph replay, then other tile shapes and plans made on the device. Every line is
printed, and written to decide.json in $OUT (else here), as soon as it is known. Needs torch, triton, typer and rich.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

from probe import DRY, SHARES, check_gpu, compile_one, device_ms, forget_interpreter, graph_of, host_and_all_ms

METRICS = "mse", "cosine"
# What the loss may take at most, in times of flash attention, from 4,096 tokens on.
GOALS = {("mse", 64): 1.8, ("mse", 128): 1.5, ("cosine", 64): 2.2, ("cosine", 128): 2.2}


def shape_of(options, metric: str, head_dim: int, length: int):
    from gpu_bench.inputs import Shape

    return Shape(length, head_dim, options.heads, options.kv_heads, "bf16", "aim", metric)


def errors(shape, device: str) -> dict:
    """Relative errors of value, dQ, dK and dV over all key heads; passed: at most twice those that the plain formula
    has in bfloat16. With all heads, as they are timed: for another number of them Triton would compile again."""
    import torch
    from gpu_bench.correctness import by_group, limits_of, relative_errors
    from gpu_bench.engines import results
    from gpu_bench.grouped.comparison import steps
    from gpu_bench.inputs import make_inputs, pair_count

    inputs, groups = make_inputs(shape, None, device), range(shape.kv_heads)
    exact = by_group("eager", shape, inputs, torch.float64, groups)
    mean = torch.stack([x[0] for x in exact]).mean()

    def relative(value, gradients):
        heads = (shape.group, 1, 1)
        parts = [[x[:, y * z : (y + 1) * z] for x, z in zip(gradients, heads, strict=True)] for y in groups]
        of_groups = [[x[0], *(z.double() for z in y)] for x, y in zip(exact, parts, strict=True)]
        return [float((value.double() - mean).abs() / mean), *relative_errors(of_groups, exact)[1:]]

    plain = by_group("eager", shape, inputs, inputs[1][0].dtype, groups)
    found = {"plain": relative_errors(plain, exact)}
    value, *gradients = results("triton", shape, inputs)
    found["shipped"] = relative(value, gradients)
    _, grouped = steps(shape, inputs)
    value, *gradients = grouped()
    # As results has gradients: times a power of two.
    multiplier = 2.0 ** round(math.log2(pair_count(shape, inputs[3])))
    found["grouped"] = relative(value, [x.double() * multiplier for x in gradients])
    limits = limits_of(shape, found["plain"])
    for name in ("shipped", "grouped"):
        found[f"{name} passed"] = all(x <= y for x, y in zip(found[name], limits, strict=True))
    return found


def times(shape, device: str) -> dict:
    """Milliseconds; differences of the grouped kernels' results from those of what ships, and whether they are the same
    bits again."""
    import torch
    from gpu_bench.grouped.comparison import steps
    from gpu_bench.inputs import make_inputs
    from gpu_bench.steps import attention_step
    from torch.nn.attention import SDPBackend

    inputs = make_inputs(shape, None, device)
    shipped, grouped = steps(shape, inputs)
    found = {}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    every = {x: attention_step(SDPBackend.MATH if DRY else y, inputs[1]) for x, y in backends.items()}
    for name, step in {**every, "shipped": shipped, "grouped": grouped}.items():
        try:
            found[name] = device_ms(graph_of(step), 20 if shape.length < 10_000 else 7)
        except Exception as problem:
            found[name] = f"{type(problem).__name__}: {str(problem)[:100]}"
    results = grouped()
    pairs = zip(results, shipped(), strict=True)
    found["differences"] = [float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs]
    found["same bits"] = all(torch.equal(x, y) for x, y in zip(results, grouped(), strict=True))
    return found


def verdict(metric: str, head_dim: int, length: int, found: dict) -> str:
    flash, shipped, grouped = (found[x] for x in ("flash", "shipped", "grouped"))
    if not all(isinstance(x, float) for x in (flash, shipped, grouped)):
        return "no verdict"
    winner = "grouped" if grouped < shipped else "shipped"
    goal = "" if length < 4096 else f", goal {GOALS[metric, head_dim]}"
    return (
        f"{winner}: grouped / shipped {grouped / shipped:.2f}; over flash {shipped / flash:.2f} shipped, "
        f"{grouped / flash:.2f} grouped{goal}"
    )


def shapes(shape, device: str, deadline: float) -> dict:
    from gpu_bench.grouped.comparison import Printed, best_launches, steps
    from gpu_bench.grouped.loss import launches_for
    from gpu_bench.inputs import make_inputs

    found = Printed()
    _, grouped = steps(shape, make_inputs(shape, None, device))
    until = time.monotonic() if DRY else deadline
    best_launches(grouped, lambda x: device_ms(graph_of(x), 10), found, launches_for(shape.head_dim), until)
    return found


def plans(shape, device: str) -> dict:
    """Of a plan made on the device: milliseconds, both ways."""
    import matt_kernels
    from gpu_bench.grouped.device_layout import make_device_layout
    from gpu_bench.inputs import segments_of

    ids = [x.to(device) for x in segments_of(shape, None)]
    shipped = host_and_all_ms(lambda: matt_kernels.aim_plan(*ids, widths=(32, 32)), 5)
    return {"shipped": shipped, "grouped": host_and_all_ms(lambda: make_device_layout(*ids, metric=shape.metric), 5)}


def start_compiling(pool, options) -> list:
    """What the GPU waits for first comes first."""
    from gpu_bench.grouped.comparison import candidates, compile_candidate

    sizes = options.lengths[0], options.heads, options.kv_heads
    both = list(itertools.product(options.metrics, options.head_dims))
    found = []
    for metric, head_dim in both:
        found += [pool.apply_async(compile_candidate, (head_dim, *sizes, x, None, metric)) for x in ("columns", "rows")]
        found += [pool.apply_async(compile_one, (head_dim, None, x, "sm_90", metric)) for x in range(SHARES)]
    for (metric, head_dim), (kernel, launch) in itertools.product(both, candidates()):
        pool.apply_async(compile_candidate, (head_dim, *sizes, kernel, launch, metric))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[40] if DRY else [4096, 1024, 16384])
    add("--head-dims", type=int, nargs="+", default=[16] if DRY else [128, 64])
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    add("--heads", type=int, default=2 if DRY else 32)
    add("--kv-heads", type=int, default=1 if DRY else 8)
    add("--minutes", type=float, default=7.5)
    add("--processes", type=int, default=14)
    add("--dry-run", action="store_true")
    options = parser.parse_args()
    check_gpu()
    return options


def main() -> None:
    options, found, failed = parse(), {}, 0
    deadline = time.monotonic() + 60 * options.minutes
    device, output = "cpu" if DRY else "cuda", Path(os.environ.get("OUT", "."), "decide.json")

    def noted(name: str, part, *arguments) -> dict | None:
        nonlocal failed
        began = time.monotonic()
        if began > deadline:
            found[name] = "not run: the minutes were over"
        else:
            try:
                found[name] = part(*arguments)
            except Exception as error:
                failed += 1
                found[name] = f"{type(error).__name__}: {str(error)[:200]}"
                traceback.print_exc(limit=4, file=sys.stdout)
        print(f"{name}: {json.dumps(found[name])} ({time.monotonic() - began:.1f} s)", flush=True)
        output.write_text(json.dumps(found, indent=1))
        return found[name] if isinstance(found[name], dict) else None

    both, pool = list(itertools.product(options.metrics, options.head_dims)), None
    if not DRY:
        pool = multiprocessing.get_context("spawn").Pool(options.processes, forget_interpreter)
        waited = start_compiling(pool, options)
        noted("compiled", lambda: {"tasks": len([x.get(timeout=180) for x in waited])})
    for metric, head_dim in both:
        length = min(1024, *options.lengths)
        name = f"errors {metric} d={head_dim} n={length}"
        noted(name, errors, shape_of(options, metric, head_dim, length), device)
    lines = []
    for length, (metric, head_dim) in itertools.product(options.lengths, both):
        name = f"{metric} d={head_dim} n={length}"
        ms = noted(f"ms {name}", times, shape_of(options, metric, head_dim, length), device)
        if ms is not None:
            lines.append(f"{name}: {verdict(metric, head_dim, length, ms)}")
            print(f"    {lines[-1]}", flush=True)
    for metric, head_dim in both:
        shape = shape_of(options, metric, head_dim, options.lengths[0])
        noted(f"shapes {metric} d={head_dim}", shapes, shape, device, deadline)
    noted("plans made on the device", plans, shape_of(options, "mse", options.head_dims[0], options.lengths[0]), device)
    if pool is not None:
        pool.terminate()
    print("\n".join([*lines, f"{failed} failed; {output}"]), flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
