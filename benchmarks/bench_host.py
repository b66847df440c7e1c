"""Time of the host for one loss with gradients: what a GPU waits for where it is faster than Python.

    python -m pytest benchmarks/bench_host.py --benchmark-enable --benchmark-only

Where there is no GPU, launches are replaced by nothing: their own cost (some 30 microseconds each) is not in the times
then, only checks, allocations, torch operations, autograd and custom ops. tests/test_kernels_launches.py counts both.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import matt_kernels
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, DIM, LENGTH = 32, 8, 64, 64


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    if knobs.runtime.interpret:
        monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)


def make(variant: str, given: bool):
    """A step of forward and backward; the plan is made on the CPU beforehand, or in the step where the ids are."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        tuple(
            torch.randn(1, x, LENGTH, DIM, generator=generator).to(DEVICE, torch.bfloat16)
            for x in (HEADS, KV_HEADS, KV_HEADS)
        )
        for _ in range(2)
    )
    student = tuple(x.requires_grad_() for x in student)
    ids = torch.arange(LENGTH)[None] // 2
    plan = matt_kernels.aim_plan(ids, ids, variant=variant).to(DEVICE) if given else None
    ids = ids.to(DEVICE)

    def step():
        segments = () if given else (ids, ids)
        loss = matt_kernels.aim_loss(teacher, student, *segments, variant=variant, plan=plan)
        torch.autograd.grad(loss, student)

    return step


@pytest.mark.parametrize("given", [True, False], ids=["plan given", "plan made"])
@pytest.mark.parametrize("variant", ["aim", "aim_star"])
def test_host(variant, given, benchmark):
    step = make(variant, given)
    step()
    benchmark.pedantic(step, rounds=200, warmup_rounds=20)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
