"""Every kernel under the sanitizer: no access out of bounds, no element stored by two programs."""

import pytest
import sanitizer
import torch
import triton
import triton.language as tl
from kernel_checks import interpreted, long_segments
from test_loss import GRID, gradients, inputs_for, packed, two_sides
from triton.runtime.errors import InterpreterError

from matt_fast.loss import aim_loss

pytestmark = interpreted


@triton.jit
def copy_kernel(source_ptr, target_ptr, size, BLOCK: tl.constexpr, OWNED: tl.constexpr):
    places = tl.arange(0, BLOCK)
    if OWNED:
        places += tl.program_id(0) * BLOCK
    tl.store(target_ptr + places, tl.load(source_ptr + places), mask=places < size)


def test_it_finds_what_it_looks_for(monkeypatch):
    sanitizer.install(monkeypatch)
    source, target = torch.arange(32.0), torch.zeros(32)
    copy_kernel[(2,)](source, target, 32, BLOCK=16, OWNED=True)
    assert torch.equal(source, target)
    with pytest.raises(InterpreterError, match="store outside"):
        copy_kernel[(2,)](source, target[:31], 32, BLOCK=16, OWNED=True)
    with pytest.raises(InterpreterError, match="load outside"):
        copy_kernel[(2,)](source[:31], target, 31, BLOCK=16, OWNED=True)
    with pytest.raises(InterpreterError, match="store to one element"):
        copy_kernel[(2,)](source, target, 16, BLOCK=16, OWNED=False)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"causal": False, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("case", ["special tokens", "packed", "long"])
@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_in_bounds_and_owned(base, case, options, monkeypatch):
    *segments, documents = {
        "special tokens": (*two_sides(), {}),
        "packed": packed(),
        "long": (*long_segments(), {}),
    }[case]
    sanitizer.install(monkeypatch)
    arguments = inputs_for(*segments, heads=2, kv_heads=1, dtype=torch.float32, dim=20, value_dim=17)
    loss, *found = gradients(aim_loss, arguments, base | options | documents | {"backend": "triton"})
    assert all(x.isfinite().all() for x in (loss, *found))
