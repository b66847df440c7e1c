"""Time and memory of a step, and what its kernels compiled to."""

import gc
import sys
import time

import numpy as np
import torch
from gpu_bench.failures import short


def measure(step, seconds: float = 1.0) -> dict:
    """Median and spread of CUDA event times around one step, L2 flushed before each, and what it adds to memory."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    once = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(max(5, min(100, int(seconds / once)))):
        cache.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    low, median, high = np.percentile(times, [10, 50, 90]).tolist()
    return {"median": median, "low": low, "high": high, "runs": len(times), "peak": peak}


def fake_measure(step) -> dict:
    step()
    return {"median": None}


def compiled_kernels() -> list[dict]:
    """Registers, spills and shared memory of every kernel compiled so far, where this Triton shows them."""
    found = []
    modules = [x for name, x in sys.modules.items() if name.startswith("matt_kernels.")]
    functions = {id(y): y for x in modules for name, y in vars(x).items() if name.endswith("_kernel")}
    for function in functions.values():
        for caches in getattr(function, "device_caches", {}).values():
            for kernel in caches[0].values():
                record = {"kernel": kernel.name, "registers": kernel.n_regs, "spills": kernel.n_spills}
                metadata = kernel.metadata
                record |= {"shared": metadata.shared, "warps": metadata.num_warps, "stages": metadata.num_stages}
                found.append(record)
    return found


def look_at_kernels() -> list[dict] | str:
    try:
        return compiled_kernels()
    except Exception as error:  # another Triton keeps them elsewhere
        return f"not available: {short(error)}"
