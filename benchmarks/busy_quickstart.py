"""Processor time of a program on a machine that is busy, beside the same program on the machine as it is.

    .venv/bin/python benchmarks/busy_quickstart.py [--load 12] [COMMAND ...]

The command is `examples/quickstart.py` if none is given. Python loops are the load; they end with this program, however
it ends. Time is user and system time of the command and the processes that it waited for.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6):\n        pass"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep processors busy while the block runs."""
    loops = []
    try:
        for _ in range(processes):
            loops.append(subprocess.Popen([sys.executable, "-c", LOOP, str(os.getpid())]))
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def processor_time(command: list[str]) -> tuple[float, float]:
    """Processor time and time on the clock of a command, in seconds; it runs in an empty folder.

    Raises:
        CalledProcessError: the command failed; its output is printed before.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        print(done.stdout)
    done.check_returncode()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=int, default=12, help="busy processes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="another command than the quickstart")
    arguments = parser.parse_args()
    command = arguments.command
    if not command:
        fetch = [sys.executable, "-c", "import quickstart; quickstart.fetch_model()"]
        subprocess.run(fetch, cwd=EXAMPLES, check=True)  # once, not counted
        command = [sys.executable, str(EXAMPLES / "quickstart.py")]
    times = []
    for load in (0, arguments.load):
        with busy(load):
            used, seconds = processor_time(command)
        times.append(used)
        print(f"{load:3} busy processes: {used:8.1f} s of processor time, {seconds:8.1f} s on the clock", flush=True)
    cores = len(os.sched_getaffinity(0))
    print(f"ratio {times[1] / times[0]:.2f} (on {cores} cores, load average {os.getloadavg()[0]:.1f} at the end)")


if __name__ == "__main__":
    main()
