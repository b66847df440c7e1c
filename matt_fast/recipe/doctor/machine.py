"""What a transfer will ask of this machine: packages, memory, time, disk."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

from matt_fast.data.parallel import read_pairs
from matt_fast.initializers import INIT_HEADS, INITS
from matt_fast.initializers.choices import FROM_DONOR, FROM_PAIRS
from matt_fast.initializers.donors import open_donor, ready_rows
from matt_fast.model.precision import NAMES, choose_dtype
from matt_fast.planning.plan import Plan, plan_step
from matt_fast.planning.simulation import NeedsWeightsError, Vocabulary
from matt_fast.recipe.doctor.finding import Said, fail, look, ok
from matt_fast.recipe.job import Job
from matt_fast.recipe.subject import Subject
from matt_fast.support.installing import install_line
from matt_fast.support.units import size_in_words
from matt_fast.training.frozen import check_frozen
from matt_fast.training.trackers import trackers_for

FROM_FASTTEXT = {"focus": "focus", "omp-self": "focus", "wechsel": "wechsel"}  # and the extra that brings it
TIGHT = 0.9  # of the memory that is free
SIDE, SECONDS = 1024, 0.2  # of the matrices that are multiplied, and for how long
LONG = 24 * 3600


def device_of(subject: Subject) -> torch.device:
    """Where a transfer would run in this process."""
    job = subject.job
    if job.device is not None:
        return torch.device(job.device)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def packages(subject: Subject) -> Iterator[Said]:
    """The device, and what options need."""
    job, device = subject.job, device_of(subject)
    if device.type == "cuda" and not torch.cuda.is_available():
        yield fail(f"--device {device} is wanted, and PyTorch finds no such device", "--device cpu, or another PyTorch")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else str(device)
    yield ok(f"torch {version('torch')}, transformers {version('transformers')}; on {where}")
    if device.type == "cuda" and job.training.backend == "auto" and find_spec("triton") is None:
        yield look("Triton is not installed: the loss will not run in its kernels", install_line("triton"))
    for option, init in _starts(job).items():
        extra = FROM_FASTTEXT.get(init) if isinstance(init, str) else None
        if extra and find_spec("fasttext_pybind") is None:
            yield fail(f"--{option} {init} needs fasttext, which is not installed", install_line(extra))
    trackers_for(job.track)
    check_frozen(subject.teacher, job.training, device)


def start_of_rows(subject: Subject) -> Iterator[Said]:
    """What --init and --init-head need beside the data."""
    job = subject.job
    for option, init in _starts(job).items():
        if init in FROM_DONOR:
            open_donor(subject.vocabulary, job.donor, job.hub_options)
            yield ok(f"{option} {init}: the donor has the new vocabulary")
        elif init in FROM_PAIRS:
            yield ok(f"{option} {init}: {len(read_pairs(job.parallel)):,} pairs of texts")
        elif isinstance(init, str | Path) and str(init) not in INITS + INIT_HEADS:
            found = ready_rows(init, **job.hub_options)
            yield ok("init: " + ", ".join(f"{name} {list(rows.shape)}" for name, rows in found.items()))
        else:
            yield ok(f"{option} {getattr(init, '__name__', init)} needs nothing else")


def _starts(job: Job) -> dict[str, object]:
    """Option -> how rows start by it; the head's only where it says something."""
    return {"init": job.init} | ({} if job.init_head == "same" else {"init-head": job.init_head})


def memory(subject: Subject) -> Iterator[Said]:
    """What a training step takes, by `matt-fast plan`, and what is free."""
    if subject.limit is not None and subject.job.max_length > subject.limit:
        return  # said already
    device, found = device_of(subject), _plan(subject)
    if isinstance(found, Said):
        yield found
        return
    free = psutil.virtual_memory().available
    if device.type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(device)[0]
    peak = max((step.peak for step in (found.step, found.healing) if step is not None), default=0)
    line = f"a training step takes {size_in_words(peak)}, {size_in_words(free)} are free"
    if peak > free:
        yield fail(line, "matt-fast plan --vram tells what would make it fit")
    elif peak > TIGHT * free:
        yield look(line, "libraries and the data worker take 1 to 2 GiB beside it; a smaller --batch-size takes less")
    else:
        yield ok(line)


def work(subject: Subject) -> Iterator[Said]:
    """How long training takes at least: its products at the speed that one product has here."""
    job, found = subject.job, _plan(subject)
    if isinstance(found, Said):
        return
    rate = _multiplications_a_second(device_of(subject), _dtype(subject))
    if job.epochs is not None:
        yield ok(f"{found.step.flops / 1e12:,.2f} teraflop a step, at least {found.step.flops / rate:,.2f} s here")
        return
    parts = [(job.training.steps, found.step)] if found.step is not None else []
    parts += [(job.healing.steps, found.healing)] if found.healing is not None else []
    if not parts:
        return
    steps = " and ".join(f"{count:,} steps of {step.flops / 1e12:,.2f} teraflop" for count, step in parts)
    seconds = sum(count * step.flops for count, step in parts) / rate
    shown = f"{seconds / 3600:,.1f} h" if seconds > 7200 else f"{seconds / 60:,.1f} min"
    line = f"{steps} take at least {shown} at the {rate / 1e12:,.2f} teraflop/s that a matrix product reaches here"
    yield look(line, "fewer --steps, shorter chunks or a GPU") if seconds > LONG else ok(line)


def _plan(subject: Subject) -> Plan | Said:
    return subject.once("plan", lambda: _made_plan(subject))


def _made_plan(subject: Subject) -> Plan | Said:
    job, kind = subject.job, "cuda" if device_of(subject).type == "cuda" else "cpu"
    given = {"length": job.max_length, "batch_size": job.batch_size, "n_layers": job.n_layers, "device": kind}
    rows = Vocabulary(subject.vocabulary.rows, subject.trainable)
    steps = job.training.steps or int(job.trains_rows_alone)  # whatever epochs are
    training = replace(job.training, steps=steps, compile=False)  # which the meta device does not have
    try:
        given |= {"precision": NAMES[_dtype(subject)], "healing": job.healing}
        return plan_step(subject.teacher, rows, training, **given)
    except NeedsWeightsError as error:
        return look(str(error), "watch the first steps")


def _dtype(subject: Subject) -> torch.dtype:
    precision = subject.job.precision
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if precision == "auto" else precision
    return choose_dtype(SimpleNamespace(mixed_precision=mixed, device=device_of(subject)), precision)


def _multiplications_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of one large matrix product."""
    left = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    left @ left
    wait()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        left @ left
        wait()
        count += 1
    return 2 * SIDE**3 * count / (time.perf_counter() - begin)
