"""The conditions of a measurement: machine, versions, threads."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from cpuinfo import get_cpu_info

PACKAGES = ("torch", "triton", "transformers", "numpy")
# Of one thread on a CPU the processor's time is measured: other work on the machine does not count.
ALONE = torch.get_num_threads() == 1 and not torch.cuda.is_available()
CLOCK = time.process_time if ALONE else time.perf_counter


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict:
    return {
        "cpu": get_cpu_info().get("brand_raw", "unknown"),
        "cores": psutil.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "clock": "processor time" if ALONE else "wall clock",
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }
