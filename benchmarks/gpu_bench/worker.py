"""A worker runs steps, a line of JSON before and after each; its parent starts another until each task has a result."""

import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from gpu_bench.correctness import NOISES, check
from gpu_bench.failures import Refused, short, stop_if_broken
from gpu_bench.inputs import Shape
from gpu_bench.measuring import fake_measure, look_at_kernels, measure
from gpu_bench.steps import make_step

SCRIPT = Path(__file__).parents[1] / "bench_gpu.py"


def work(state: dict) -> None:
    device = "cpu" if state["dry_run"] else "cuda"
    checks = state["checks"]
    for task in state["tasks"]:
        shape, name = Shape(**task["shape"]), task["step"]
        say({"begun": task})
        record = {"task": task}
        try:
            if name == "check":
                record["checks"] = check(shape, device, checks)
                checks += record["checks"]
            elif name == "die":
                os._exit(9)
            elif name == "raise":
                raise RuntimeError("raised on purpose")
            else:
                refuse_unchecked(shape, name, checks)
                step = make_step(name, shape, device)
                record |= fake_measure(step) if state["dry_run"] else measure(step)
                if name.startswith("triton"):
                    record["kernels"] = look_at_kernels()
        except Refused as error:
            record["refused"] = str(error)
        except Exception as error:
            record["error"] = short(error)
        say(record)
        step = None
        gc.collect()
        stop_if_broken(device)


def refuse_unchecked(shape: Shape, name: str, checks: list[dict]) -> None:
    engine = name.split(",")[0]
    if engine not in ("triton", "torch"):
        return
    mine = [x for x in checks if x["shape"] == asdict(shape) and x["engine"] == engine]
    if len(mine) != len(NOISES) or not all(x["passed"] for x in mine):
        raise Refused("not timed: " + ("incorrect" if mine else "correctness not established"))


def say(record: dict) -> None:
    print("@" + json.dumps(record), flush=True)


def supervise(tasks: list[dict], options, on_result) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    checks: list[dict] = []
    waiting = list(tasks)
    while waiting:
        if time.monotonic() > deadline:
            for task in waiting:
                on_result({"task": task, "refused": f"not run: {options.minutes} minutes were over"})
            return
        before = len(waiting)
        ending = run_worker(waiting, checks, options, deadline, on_result)
        if len(waiting) == before:  # it could not even begin
            for task in waiting:
                on_result({"task": task, "error": ending})
            return


def run_worker(waiting: list[dict], checks: list[dict], options, deadline: float, on_result) -> str:
    """Takes tasks off `waiting` as their results come; returns how the worker ended."""
    state = {"tasks": waiting, "checks": checks, "dry_run": options.dry_run}
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "state.json"), Path(folder, "log")
        file.write_text(json.dumps(state))
        command = [sys.executable, str(SCRIPT), "--work", str(file), *(["--dry-run"] if options.dry_run else [])]
        with log.open("w") as errors:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            lines = queue.Queue()
            threading.Thread(target=forward_lines, args=(worker.stdout, lines), daemon=True).start()
            begun, ending = None, ""
            while True:
                limit = min(options.step_seconds, max(1.0, deadline - time.monotonic()))
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    worker.kill()
                    ending = f"no result within {limit:.0f} s"
                    break
                if line is None:
                    break
                record = json.loads(line)
                if "begun" in record:
                    begun = record["begun"]
                    continue
                begun = None
                checks += record.get("checks", [])
                waiting.pop(0)
                on_result(record)
            status = worker.wait()
        last = " ".join(log.read_text().split()[-30:])
        ending = ending or f"the process ended with status {status}: {last[-300:]}"
    if begun is not None:
        on_result({"task": waiting.pop(0), "error": ending})
    return ending


def forward_lines(stream, lines: queue.Queue) -> None:
    for line in stream:
        if line.startswith("@"):
            lines.put(line[1:])
    lines.put(None)
