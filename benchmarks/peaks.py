"""What a step adds to the memory in use, at its peak: measured in a process that does nothing else."""

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable

import torch

from matt_fast.support.memory import peak_memory, reset_peak_memory


def added_mebibytes(step: Callable[[], object], device: str = "cpu") -> float:
    """The peak of one call above what was in use before it; the caller has warmed up."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed would hide what the step takes
    device = torch.device(device)
    reset_peak_memory(device)
    before = peak_memory(device)
    step()
    return (peak_memory(device) - before) / 2**20


def in_own_process(script: str, argument: str) -> float:
    """The number that `python script argument` prints last."""
    output = subprocess.run([sys.executable, script, argument], capture_output=True, text=True)
    if output.returncode:
        raise RuntimeError(f"{script} {argument}: {output.stderr.strip()}")
    return float(output.stdout.splitlines()[-1])
