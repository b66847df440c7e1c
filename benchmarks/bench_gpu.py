"""The loss on a GPU: correctness first, then time and memory by engine, beside flash attention at the student's shape.

    python3 benchmarks/bench_gpu.py                writes benchmarks/GPU.md, anew after every result
    python3 benchmarks/bench_gpu.py --minutes 9    what fits into that; the rest is listed as not run
    python3 benchmarks/bench_gpu.py --dry-run      every path at tiny sizes on a CPU, no times, into a temporary file

Needs torch, triton and numpy, nothing of this repository installed. Steps run in a worker process: an engine that
raises, runs out of memory, hangs or breaks the CUDA context is recorded as failed, and the rest goes on. An engine that
failed a shape's correctness is not timed at that shape.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import matt_kernels
import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from matt_fast.loss import aim_loss
from matt_fast.loss.documents import find_documents
from matt_fast.loss.eager import eager_loss

# Tokens of 500 consecutive segments of German text: tekken, and a new tokenizer of 24k (see cost_model.py).
TEACHER_SIZES = (
    "1121111112211111112111111111111111211111111121111111111111211111111111111111111111411111111111111111"
    "1111121111111111312115112122211151111111111111111111122111111221221111311121131111211111331111111221"
    "1121113111211111221111121111122112111211111112211131611111115111311231611212211111111151111512111121"
    "1112111111222212112121111121111221131122213111211111121211111211122113114122211121111115121312111112"
    "2112211212113151111111121221111113121111121311111212111113222212121112111211111112111121112111211111"
)
STUDENT_SIZES = (
    "1111111111111111111121111111111111111121111111111111111111121111111111111111111111111111111111121111"
    "1122111111111211211111122111111111111111112111111111111111112121121111111111111111111111111211111222"
    "1111111111211142222111121114211111111211111112111111111111111212111111111111211111111112121111111111"
    "2111111111111211112111111111111111111111111111111112121111111211111111111111111111111211111111111111"
    "1111111121111111111111111111111111111111111111111121111111111111111111111121111111221111111112111111"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = ("check", "triton", "triton, plan given", "torch", "eager", "compiled eager", "flash")
NOISES = (None, 1e-3)
QUANTITIES = ("value", "dQ", "dK", "dV")
GROUPS_AT_LENGTH = 4096  # beyond it the first and the last key head are compared, not all


@dataclass(frozen=True)
class Shape:
    length: int  # student tokens
    head_dim: int
    heads: int
    kv_heads: int
    dtype: str
    variant: str
    metric: str

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return f"n={self.length} d={self.head_dim} {self.dtype} {self.variant} {self.metric}"


class Refused(Exception):
    """A step that must not run; the reason is its result."""


# Inputs


def segments_of(shape: Shape, noise: float | None) -> list[torch.Tensor]:
    """Ids [1, n] of real segments, repeated; one special token in front. With noise both sides are the student's."""
    teacher, student = ([int(x) for x in sizes] for sizes in (TEACHER_SIZES, STUDENT_SIZES))
    times = -(-shape.length // sum(student))
    teacher, student = np.array(teacher * times), np.array(student * times)
    count = int(np.searchsorted(np.cumsum(student), shape.length - 1, side="right"))
    sides = (student if noise else teacher)[:count], student[:count]
    ids = [np.concatenate([[-100], np.repeat(np.arange(count), x)]) for x in sides]
    return [torch.as_tensor(x)[None] for x in ids]


def make_inputs(shape: Shape, noise: float | None, device: str, seed: int = 0):
    """(teacher, student, teacher ids, student ids), ids on the CPU; the same for the same seed."""
    segments = segments_of(shape, noise)
    generator = torch.Generator(device).manual_seed(seed)
    sizes = shape.heads, shape.kv_heads, shape.kv_heads

    def draw(length):
        return [torch.randn(1, x, length, shape.head_dim, generator=generator, device=device) for x in sizes]

    teacher, student = (draw(x.shape[1]) for x in segments)
    if noise:
        student = [torch.add(x, y, alpha=noise) for x, y in zip(teacher, student, strict=True)]
    return *(tuple(x.to(DTYPES[shape.dtype]) for x in side) for side in (teacher, student)), *segments


def pair_count(shape: Shape, segments: torch.Tensor) -> int:
    count = int(segments.max()) + 1
    pairs = count if shape.variant == "aim_star" else count * (count + 1) // 2
    return pairs * shape.heads * (shape.head_dim if shape.metric == "mse" else 1)


# Engines: (teacher, student, ids on the CPU, ids on the device, plan) -> loss


def loss_of(engine: str, shape: Shape, inputs, prepared=None):
    teacher, student, *segments = inputs
    options = {"variant": shape.variant, "metric": shape.metric}
    if engine.startswith("triton"):
        ids = [x.to(student[0].device) for x in segments] if prepared is None else prepared[0]
        return matt_kernels.aim_loss(teacher, student, *ids, **options, plan=None if prepared is None else prepared[1])
    return aim_loss(teacher, student, *segments, backend=engine, **options)


def results(engine: str, shape: Shape, inputs, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Value and gradients, these times a power of two that keeps them in float16's range, as a gradient scaler does."""
    teacher, student, *segments = inputs
    teacher = tuple(x.to(dtype or x.dtype) for x in teacher)
    student = tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in student)
    loss = loss_of(engine, shape, (teacher, student, *segments))
    multiplier = 2.0 ** round(math.log2(pair_count(shape, segments[1])))
    return [loss.detach(), *torch.autograd.grad(loss * multiplier, student)]


# Correctness


def one_group(inputs, shape: Shape, number: int):
    """The query heads of one key head, as views."""
    teacher, student, *segments = inputs
    queries = slice(number * shape.group, (number + 1) * shape.group)
    keys = slice(number, number + 1)
    return *((x[0][:, queries], x[1][:, keys], x[2][:, keys]) for x in (teacher, student)), *segments


def by_group(engine: str, shape: Shape, inputs, dtype, groups: list[int]) -> list[list[torch.Tensor]]:
    """results of each group of heads, gradients as those of the mean over all groups; all in float64."""
    found = []
    for number in groups:
        value, *gradients = results(engine, shape, one_group(inputs, shape, number), dtype)
        found.append([value.double(), *(x.double() / shape.kv_heads for x in gradients)])
    return found


def of_groups(engine: str, shape: Shape, inputs, groups: list[int]):
    """The same for an engine: gradients from one run at the full shape, values from runs of the groups alone, without
    gradients; and the value of the full run."""
    value, *gradients = results(engine, shape, inputs)
    found = []
    for number in groups:
        own = loss_of(engine, shape, one_group(inputs, shape, number))
        parts = zip(gradients, (shape.group, 1, 1), strict=True)
        found.append([own.detach().double(), *(x[:, number * y : (number + 1) * y].double() for x, y in parts)])
    return found, value.double()


def relative_errors(found, exact) -> list[float]:
    """Of value, dQ, dK, dV, over all groups."""
    errors = []
    for ours, theirs in zip(zip(*found, strict=True), zip(*exact, strict=True), strict=True):
        ours, theirs = torch.stack(ours), torch.stack(theirs)
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    return errors


def engine_errors(engine: str, shape: Shape, inputs, exact, groups: list[int]) -> list[float]:
    found, value = of_groups(engine, shape, inputs, groups)
    errors = relative_errors(found, exact)
    if len(groups) == shape.kv_heads:
        mean = torch.stack([x[0] for x in exact]).mean()
        errors[0] = max(errors[0], float((value - mean).abs() / mean))
    return errors


def eager_fits(shape: Shape, size: int, device: str, heads: int) -> bool:
    """About six tensors of heads x segments x tokens x head_dim (or, for aim_star, of heads x tokens x tokens)."""
    teacher, student = segments_of(shape, None)
    count, length = int(student.max()) + 1, teacher.shape[1]
    numbers = heads * (length * length if shape.variant == "aim_star" else count * length * shape.head_dim)
    memory = 2**33 if device == "cpu" else torch.cuda.mem_get_info()[0]
    return 6 * numbers * size < 0.8 * memory


def limits_of(shape: Shape, eager: list[float]) -> list[float]:
    """Twice eager's own error; a value may be luckier than its rounding, so eps / 64 is always allowed."""
    floor = max(torch.finfo(DTYPES[shape.dtype]).eps / 64, 2.5e-7)
    return [max(2 * eager[0], floor), *(2 * x for x in eager[1:])]


def eager_before(shape: Shape, noise: float | None, earlier: list[dict]) -> dict:
    same = "head_dim", "dtype", "variant", "metric"
    alike = [x for x in earlier if x["noise"] == noise and x["source"] == "eager here"]
    alike = [x for x in alike if all(x["shape"][name] == getattr(shape, name) for name in same)]
    if not alike:
        raise Refused("no shape where the eager formula fits came before: nothing to compare errors with")
    return max(alike, key=lambda x: x["shape"]["length"])


def check(shape: Shape, device: str, earlier: list[dict]) -> list[dict]:
    """One record per noise and engine."""
    return [x for noise in NOISES for x in check_noise(shape, noise, device, earlier)]


def check_noise(shape: Shape, noise: float | None, device: str, earlier: list[dict]) -> list[dict]:
    groups = list(range(shape.kv_heads)) if shape.length <= GROUPS_AT_LENGTH else [0, shape.kv_heads - 1]
    dtype = DTYPES[shape.dtype]
    has_eager = eager_fits(shape, torch.finfo(dtype).bits // 8, device, shape.group)
    reference = "eager" if eager_fits(shape, 8, device, shape.group) else "torch"
    before = None if has_eager else eager_before(shape, noise, earlier)
    found, failed = {"eager": [], "triton": [], "torch": []}, {}
    draws = 1 if shape.length > 512 else 2 if device == "cpu" else 4
    for seed in range(draws):
        inputs = make_inputs(shape, noise, device, seed)
        exact = by_group(reference, shape, inputs, torch.float64, groups)
        if has_eager:
            found["eager"].append(relative_errors(by_group("eager", shape, inputs, dtype, groups), exact))
        for engine in ("triton", "torch"):
            try:
                found[engine].append(engine_errors(engine, shape, inputs, exact, groups))
            except Exception as error:
                failed[engine] = short(error)
                stop_if_broken(device, failed[engine])
    # Root mean squares: one draw of a rounding error can be zero by luck.
    errors = {x: np.sqrt(np.mean(np.square(y), 0)).tolist() for x, y in found.items() if y}
    eager = errors["eager"] if has_eager else before["eager"]
    source = "eager here" if has_eager else f"eager at n={before['shape']['length']}"
    shared = {"noise": noise, "shape": asdict(shape), "reference": f"{reference} float64", "groups": len(groups)}
    shared |= {"eager": eager, "source": source}
    limits = limits_of(shape, eager)
    records = []
    for engine in ("triton", "torch"):
        if engine in failed:
            records.append({**shared, "engine": engine, "passed": False, "error": failed[engine]})
            continue
        passed = all(x <= y for x, y in zip(errors[engine], limits, strict=True))
        records.append({**shared, "engine": engine, "passed": passed, "errors": errors[engine]})
    return records


# Time and memory


def make_step(name: str, shape: Shape, device: str):
    """A callable that runs forward and backward once."""
    teacher, student, *segments = make_inputs(shape, None, device)
    if name == "flash":
        return flash_step(shape, student)
    for x in student:
        x.requires_grad_()
    inputs = teacher, student, *segments
    if name in ("eager", "compiled eager") and not eager_fits(
        shape, torch.finfo(DTYPES[shape.dtype]).bits // 8, device, shape.heads
    ):
        raise Refused("does not fit")
    if name == "compiled eager":
        return compiled_step(shape, inputs)
    prepared = None
    if name.startswith("triton"):
        ids = [x.to(device) for x in segments]
        plan = matt_kernels.aim_plan(*ids, variant=shape.variant, **planned(shape, inputs)) if "plan" in name else None
        prepared = ids, plan

    def step():
        torch.autograd.grad(loss_of(name, shape, inputs, prepared), student)

    return step


def planned(shape: Shape, inputs) -> dict:
    """The widths that aim_loss itself would take."""
    from matt_kernels import tile_widths

    (teacher, _, _), (query, _, value), *_ = inputs
    return {"widths": tile_widths(query, value, shape.variant, shape.metric)(teacher.shape[2], query.shape[2])}


def compiled_step(shape: Shape, inputs):
    teacher, student, *segments = inputs
    torch._dynamo.reset()
    documents = find_documents(*segments)
    options = {"scale": shape.head_dim**-0.5, "sliding_window": None, "softcap": None, "causal": True}
    options |= {"variant": shape.variant, "metric": shape.metric}
    weights = [1 / pair_count(shape, segments[1])]
    backend = "eager" if os.environ.get("TRITON_INTERPRET") == "1" else "inductor"

    @torch.compile(backend=backend)
    def compiled(teacher, student):
        return eager_loss(teacher, student, documents, weights, **options)

    def step():
        torch.autograd.grad(compiled(teacher, student), student)

    return step


def flash_step(shape: Shape, student):
    backend = SDPBackend.FLASH_ATTENTION if student[0].is_cuda else SDPBackend.MATH
    if shape.dtype == "fp32" and student[0].is_cuda:
        backend = SDPBackend.EFFICIENT_ATTENTION
        student = (student[0], *(x.repeat_interleave(shape.group, 1) for x in student[1:]))
    gradient = torch.randn_like(student[0])
    student = tuple(x.requires_grad_() for x in student)
    shared = student[1].shape[1] != shape.heads

    def step():
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(*student, is_causal=True, enable_gqa=shared)
        torch.autograd.grad(output, student, gradient)

    return step


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


# The worker: runs steps, prints a line of JSON before and after each


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


def fake_measure(step) -> dict:
    step()
    return {"median": None}


def look_at_kernels() -> list[dict] | str:
    try:
        return compiled_kernels()
    except Exception as error:  # another Triton keeps them elsewhere
        return f"not available: {short(error)}"


def stop_if_broken(device: str, reason: str = "") -> None:
    """An illegal access breaks every later call of the process: end it, the parent starts another."""
    if device == "cpu":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        print(reason, file=sys.stderr, flush=True)
        os._exit(3)


def short(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def say(record: dict) -> None:
    print("@" + json.dumps(record), flush=True)


# The parent: keeps a worker running until every task has a result


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
        command = [sys.executable, __file__, "--work", str(file), *(["--dry-run"] if options.dry_run else [])]
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


# The report


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


INTRODUCTION = """Forward and backward with all three gradients of the student. n counts student tokens; the teacher
reads the same segments (real ones of German text) in about 1.2 times as many tokens. Times: CUDA events around one
step, L2 flushed before each, median and 10th to 90th percentile; launches are included, and the plan unless it is
given. Memory: peak of torch's allocator above what inputs take. "flash" is torch's scaled_dot_product_attention (for
fp32 its memory-efficient kernel) on the student's q, k, v, causal: the yardstick, not the same job.
"""
CHECKED = """Relative errors (norms over key heads; up to n = 512 root mean squares over draws) against float64. Passed:
value, dQ, dK and dV each within twice the error that the eager formula has in the same dtype ("eager here": on the same
inputs; otherwise at the longest n where it fits); a value may always be off by eps / 64. Reference: the eager formula
in float64 by key head where it fits, else the torch engine in float64. Beyond n = 4096 the first and the last key head
are compared, of runs on all.
"""


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


def tasks_of(options) -> list[dict]:
    tasks = []
    choices = itertools.product(options.variants, options.metrics, options.dtypes, sorted(options.lengths))
    for variant, metric, dtype, length in choices:
        for head_dim in options.head_dims:
            shape = Shape(length, head_dim, options.heads, options.kv_heads, dtype, variant, metric)
            tasks += [{"shape": asdict(shape), "step": x} for x in options.steps]
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
    if options.output is None:
        options.output = Path(__file__).with_name("GPU.md")
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
        options.output.write_text(report(records, options, about))
        task = record["task"]
        found = record.get("median", record.get("refused") or record.get("error") or "done")
        if "checks" in record:
            found = ", ".join(f"{x['engine']} {'passed' if x['passed'] else 'FAILED'}" for x in record["checks"])
        print(f"{len(records)}/{len(tasks)} {Shape(**task['shape'])} {task['step']}: {found}", flush=True)

    supervise(tasks, options, on_result)
    print(options.output)


if __name__ == "__main__":
    main()
