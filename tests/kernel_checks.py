"""The kernels beside the eager formula in float64, for the tests of them."""

import pytest
import torch
from test_loss import gradients, rows, segment_ids
from triton import knobs
from triton.runtime import JITFunction, interpreter

from matt_fast.loss import aim_loss

interpreted = pytest.mark.skipif(not knobs.runtime.interpret, reason="needs Triton's interpreter, which no GPU needs")
FLOAT32 = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def found(arguments, options):
    return gradients(aim_loss, arguments, options | {"backend": "triton"})


def exact(arguments, options):
    teacher, student, *segments = arguments
    student = tuple(x.detach().double().requires_grad_() for x in student)
    return gradients(aim_loss, (tuple(x.double() for x in teacher), student, *segments), options | {"backend": "eager"})


def assert_close(arguments, options, tolerance=None):
    tolerance = FLOAT32[arguments[1][0].dtype] if tolerance is None else tolerance
    for x, y in zip(found(arguments, options), exact(arguments, options), strict=True):
        # rows that see one token have no gradient by q and k but rounding
        rounding = 1e-7 if y.norm() < 1e-12 else 0
        assert (x - y).norm() <= tolerance * y.norm() + rounding, (x - y).norm() / y.norm()


def long_segments():
    teacher = rows(segment_ids([1, 2, 30, 1, 40, 2], specials=[0, 10, 40]))
    return teacher, rows(segment_ids([1, 2, 1, 1, 50, 2], specials=[0, 10, 40]))


def record_launches(monkeypatch) -> list[str]:
    """The names of kernels launched from now on; none of them runs."""
    names = []
    launcher, name = (interpreter.GridExecutor, "__call__") if knobs.runtime.interpret else (JITFunction, "run")
    monkeypatch.setattr(launcher, name, lambda kernel, *_, **__: names.append(kernel.fn.__name__))
    return names
