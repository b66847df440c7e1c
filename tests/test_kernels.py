"""The Triton kernels against the eager formula in float64, in the interpreter where there is no GPU."""

import pytest
import torch
from matt_kernels.configs import choose_config
from matt_kernels.loss import aim_mse, aim_plan
from test_loss import gradients, inputs_for, packed, rows, segment_ids, two_sides

from matt_fast.loss import aim_loss


def long_segments():
    teacher = rows(segment_ids([1, 2, 30, 1, 40, 2], specials=[0, 10, 40]))
    return teacher, rows(segment_ids([1, 2, 1, 1, 50, 2], specials=[0, 10, 40]))


def found(arguments, documents=None, **options):
    teacher, student, *segments = arguments
    documents = documents or {}
    config = choose_config(student[0].shape[-1], student[2].shape[-1], student[0].dtype, "cpu").with_blocks(16, 16, 16)
    planned = {x: y for x, y in options.items() if x != "softcap"}
    plan = aim_plan(*segments, **documents, **planned, widths=(16, 16))
    loss = aim_mse(teacher, student, plan, config, scale=None, softcap=options.get("softcap"))
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def exact(arguments, documents=None, **options):
    teacher, student, *segments = arguments
    student = tuple(x.detach().double().requires_grad_() for x in student)
    options = options | (documents or {}) | {"backend": "eager"}
    return gradients(aim_loss, (tuple(x.double() for x in teacher), student, *segments), options)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


CASES = {
    "plain": {},
    "window": {"sliding_window": 3},
    "encoder": {"causal": False},
    "encoder window": {"causal": False, "sliding_window": 2},
    "softcap": {"softcap": 1.5},
}


@pytest.mark.parametrize("case", CASES)
def test_small_float32(case):
    arguments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    for x, y in zip(found(arguments, **CASES[case]), exact(arguments, **CASES[case]), strict=True):
        assert (x - y).norm() <= 4e-6 * y.norm()


@pytest.mark.parametrize("reduction", ["pairs", "documents"])
def test_packed_documents(reduction):
    *segments, documents = packed()
    arguments = inputs_for(*segments, dtype=torch.float32, dim=16)
    for x, y in zip(
        found(arguments, documents, reduction=reduction), exact(arguments, documents, reduction=reduction), strict=True
    ):
        assert (x - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("options", [{}, {"causal": False, "sliding_window": 20}])
def test_segments_longer_than_a_tile(options):
    arguments = inputs_for(*long_segments(), dtype=torch.float32, dim=16)
    for x, y in zip(found(arguments, **options), exact(arguments, **options), strict=True):
        assert (x - y).norm() <= 4e-6 * y.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_sides_and_same_bits_twice(dtype):
    segments = rows(segment_ids([1, 2, 3, 1, 4, 2, 9, 1, 1], specials=[0, 6]))
    teacher, _, *_ = inputs_for(segments, segments, dtype=dtype, dim=16)
    student = tuple(x.clone().requires_grad_() for x in teacher)
    loss, *gradient = found((teacher, student, segments, segments))
    assert 0 <= loss <= 1e-12
    assert all(x.abs().max() <= 1e-8 for x in gradient)
    arguments = inputs_for(*two_sides(), dtype=dtype, dim=16)
    assert all(torch.equal(x, y) for x, y in zip(found(arguments), found(arguments), strict=True))
