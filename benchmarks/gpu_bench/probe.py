"""A first look at the kernels on a GPU: device time by kernel, host time, graph replay, same bits, other tile shapes.

    python3 benchmarks/gpu_bench/probe.py --length 4096 --head-dims 128 64 --minutes 3
    python3 benchmarks/gpu_bench/probe.py --dry-run     every part on a CPU, tiny and without times

Needs torch, triton, typer and rich. Prints, and writes probe.json into $OUT (else here). A part that fails prints its
error, and the others go on. Candidates are compiled beside the GPU, in processes of their own, into Triton's cache.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
for place in ("benchmarks", "kernels", "."):
    sys.path.insert(0, str(ROOT / place))
DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

# block_m, warps, stages
CANDIDATES = {
    "rows": [(64, 4, 2), (64, 4, 3), (64, 4, 1), (128, 8, 1), (128, 8, 2), (128, 8, 3), (64, 8, 2)],
    "columns": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 1), (128, 8, 2), (64, 8, 2), (32, 4, 2), (32, 2, 2)],
    "softmax": [(64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3), (128, 4, 2)],
    "factors": [(64, 2, 1), (64, 4, 1), (64, 2, 2)],
}
SHARES = 7  # among which processes divide what ships, so that the GPU waits for a few kernels and not for all
KERNELS = {"rows": "aim_rows_kernel", "columns": "aim_columns_kernel", "softmax": "softmax_kernel"}
KERNELS["factors"] = "aim_factors_kernel"


def with_launch(config, kernel: str, shape: tuple[int, int, int]):
    block_m, warps, stages = shape
    return replace(config, **{kernel: replace(getattr(config, kernel), block_m=block_m, warps=warps, stages=stages)})


# Compiling in other processes


def forget_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def compile_one(head_dim: int, kernel: str | None, shape, target: str, metric: str = "mse") -> tuple[float, str | None]:
    """(seconds, error) of one candidate, or, where `kernel` is None, of a share of all kernels as they ship."""
    from unittest import mock

    import kernel_report
    import triton
    from matt_kernels import configs
    from triton.compiler import ASTSource

    shipped, began = configs.choose_config, time.perf_counter()

    def chosen(problem):
        return shipped(problem) if kernel is None else with_launch(shipped(problem), kernel, shape)

    try:
        with mock.patch.object(configs, "choose_config", chosen):
            jobs = kernel_report.record_launches(kernel_report.Case("bfloat16", head_dim), target)
        if kernel is None:  # those of other tiles too, which decide.py runs
            jobs = [x for x in jobs if x.loss.startswith(metric)][shape::SHARES]
        else:
            jobs = [x for x in jobs if x.loss == "mse" and x.kernel == KERNELS[kernel]]
        for job in jobs:
            source = ASTSource(kernel_report.kernel_of(job), job.signature, job.constants, job.attributes)
            triton.compile(source, target=kernel_report.gpu_target(target), options=job.options)
    except Exception as error:
        return time.perf_counter() - began, f"{type(error).__name__}: {str(error)[:120]}"
    return time.perf_counter() - began, None


# Measuring


def graph_of(step):
    """A callable that replays one step: device work alone."""
    import torch

    if DRY:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def device_ms(call, runs: int = 20) -> float | None:
    """Median of CUDA events around a call."""
    import torch

    if DRY:
        call()
        return None
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def host_and_all_ms(call, runs: int) -> dict[str, float] | None:
    """Until the last of `runs` calls has returned, and until the device is done; of one call."""
    import torch

    if DRY:
        call()
        return None
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(runs):
        call()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return {"host ms": 1e3 * host / runs, "back to back ms": 1e3 * (time.perf_counter() - began) / runs}


def by_kernel(step, runs: int = 5) -> dict[str, float]:
    """Device microseconds of a step by kernel, with how often each is launched."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            step()
        if not DRY:
            torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda x: -x.self_device_time_total)
    return {f"{x.key[:70]}, {x.count / runs:g} times": x.self_device_time_total / runs for x in rows[:20]}


class Probe:
    """The parts for one head dimension; what each finds goes into `found`."""

    def __init__(self, options, head_dim: int, waiting: dict):
        import matt_kernels
        import torch
        from gpu_bench.inputs import Shape, make_inputs
        from gpu_bench.steps import plan_of

        self.head_dim, self.options, self.waiting = head_dim, options, waiting
        device = "cpu" if DRY else "cuda"
        shape = Shape(options.length, head_dim, options.heads, options.kv_heads, "bf16", "aim", "mse")
        teacher, self.student, *segments = make_inputs(shape, None, device)
        for x in self.student:
            x.requires_grad_()
        ids = [x.to(device) for x in segments]
        self.make_plan = lambda: plan_of(shape, (teacher, self.student, *segments), ids)
        # As in training: made on the CPU, moved.
        self.plan = plan_of(shape, (teacher, self.student, *segments), segments).to(device)

        def step():
            return torch.autograd.grad(matt_kernels.aim_loss(teacher, self.student, plan=self.plan), self.student)

        self.step = step

    def compile(self):
        found = [self.waiting[self.head_dim, None, x].get(timeout=180) for x in range(SHARES)]
        self.step()  # compiles what the pool has not
        return {"seconds": max(x for x, _ in found), "errors": [x for _, x in found if x]}

    def kernels(self):
        return by_kernel(self.step)

    def host(self):
        beside = sum(not compiled.ready() for compiled in self.waiting.values())
        found = host_and_all_ms(self.step, 20) or {}
        return {**found, "graph ms": device_ms(graph_of(self.step)), "compilations beside": beside}

    def plan_on_the_device(self):
        return host_and_all_ms(self.make_plan, 5)

    def attention(self):
        from gpu_bench.steps import attention_step
        from torch.nn.attention import SDPBackend

        found = {}
        backends = [SDPBackend.MATH] if DRY else [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        for backend in backends:
            attend = attention_step(backend, self.student)
            try:
                found[backend.name] = {"ms": device_ms(attend), "graph ms": device_ms(graph_of(attend))}
            except RuntimeError as error:
                found[backend.name] = str(error)[:100]
        return found

    def bits(self, runs: int = 10):
        import torch

        first = self.step()
        flush = None if DRY else torch.empty(2**28, dtype=torch.int8, device="cuda")
        differ = 0
        for _ in range(1 if DRY else runs):
            if flush is not None:
                flush.zero_()
            differ += any(not torch.equal(x, y) for x, y in zip(first, self.step(), strict=True))
        return {"runs that differ": differ, "finite": all(bool(x.isfinite().all()) for x in first)}

    def shapes(self):
        """Each kernel's candidates one after the other, the best so far of the others kept."""
        from matt_kernels import ops

        query, _, value = self.student
        lopsided = self.plan.widths[0] > self.plan.widths[1]
        key = ops.problem_of(query, value, "aim", "mse", lopsided=lopsided)
        best = ops.config_for(query, value, "aim", "mse", lopsided=lopsided)
        found = {"as shipped": device_ms(graph_of(self.step))}
        shortest = found["as shipped"] or 0.0
        for (head_dim, kernel, shape), compiled in self.waiting.items():
            if head_dim != self.head_dim or kernel is None:
                continue
            if time.monotonic() > self.options.deadline:
                found["not run"] = "the minutes were over"
                break
            config = with_launch(best, kernel, shape)
            try:
                _, error = compiled.get(timeout=max(1.0, self.options.deadline - time.monotonic()))
                ops.TUNED[key] = config
                taken = error or device_ms(graph_of(self.step), 10)
            except Exception as problem:
                taken = f"{type(problem).__name__}: {str(problem)[:100]}"
            found[f"{kernel} {shape}"] = taken
            print(f"    {kernel} {shape}: {taken}", flush=True)
            if isinstance(taken, float) and taken < shortest:
                shortest, best = taken, config
        ops.TUNED[key] = best
        return found | {"best": {x: str(getattr(best, x)) for x in CANDIDATES}, "best ms": shortest}


# Times of the host come last: until then other processes compile, and take its cores.
PARTS = ("compile", "kernels", "attention", "bits", "shapes", "host", "plan_on_the_device")


def check_gpu() -> None:
    """End where there is no GPU to measure, before anything is compiled."""
    import torch

    if not DRY and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --dry-run tries every part on a CPU")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--length", type=int, default=40 if DRY else 4096)
    add("--head-dims", type=int, nargs="+", default=[64] if DRY else [128, 64])
    add("--heads", type=int, default=2 if DRY else 32)
    add("--kv-heads", type=int, default=1 if DRY else 8)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--minutes", type=float, default=3)
    add("--processes", type=int, default=1 if DRY else 14)
    add("--dry-run", action="store_true")
    options = parser.parse_args()
    check_gpu()
    options.deadline = time.monotonic() + 60 * options.minutes
    return options


def main() -> None:
    options, found = parse(), {}
    pool = multiprocessing.get_context("spawn").Pool(options.processes, forget_interpreter)
    jobs = [(x, None, y) for x in options.head_dims for y in range(SHARES) if "compile" in options.parts]
    for head_dim in options.head_dims if "shapes" in options.parts else ():
        candidates = [(head_dim, kernel, x) for kernel, shapes in CANDIDATES.items() for x in shapes]
        jobs += candidates[:1] if DRY else candidates
    target = "sm_90"
    waiting = {job: pool.apply_async(compile_one, (*job, target)) for job in jobs}
    output = Path(os.environ.get("OUT", "."), "probe.json")

    @contextlib.contextmanager
    def going_on(name: str):
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
            traceback.print_exc(limit=4, file=sys.stdout)
        if name in found:
            print(f"{name}: {json.dumps(found[name], indent=1)} ({time.perf_counter() - began:.1f} s)", flush=True)
        output.write_text(json.dumps(found, indent=1))

    for head_dim in options.head_dims:
        probe = None
        with going_on(f"d={head_dim}"):
            probe = Probe(options, head_dim, waiting)
        for part in options.parts if probe else ():
            name = f"d={head_dim} {part.replace('_', ' ')}"
            with going_on(name):
                found[name] = getattr(probe, part)()
    pool.terminate()
    failed = sum(isinstance(x, str) for x in found.values())
    print(f"{len(found)} parts, {failed} failed; {output}", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
