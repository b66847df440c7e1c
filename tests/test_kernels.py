"""The Triton kernels through aim_loss against the eager formula in float64, in the interpreter where there is no GPU.

With the tiles that ship these inputs would fit into one: most tests shrink tiles and blocks to 16, so that small inputs
take every path.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import matt_kernels
import numpy as np
import pytest
import sanitizer
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from matt_kernels import configs, ops, tune
from matt_kernels import loss as loss_module
from test_loss import (
    AWKWARD,
    GRID,
    VARIATIONS,
    _poison,
    allocations,
    gradients,
    inputs_for,
    packed,
    rows,
    segment_ids,
    text_like,
    two_sides,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from matt_fast.loss import aim_loss, api

FLOAT32 = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: _poison(_original(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))


@pytest.fixture
def small_tiles(monkeypatch):
    chosen = configs.choose_config
    monkeypatch.setattr(configs, "choose_config", lambda *a: chosen(*a).with_blocks(16))


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


# -- coverage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIATIONS, ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_special_tokens_and_options(base, options, small_tiles):
    assert_close(inputs_for(*two_sides(), dtype=torch.float32, dim=16), base | options)


@pytest.mark.parametrize("options", VARIATIONS, ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_packed_and_padded(base, options, small_tiles):
    *segments, documents = packed()
    assert_close(inputs_for(*segments, dtype=torch.float32, dim=16), base | options | documents)


LONG_CASES = [
    ({}, torch.float32),
    ({"causal": False, "sliding_window": 20}, torch.float32),
    ({"sliding_window": 7}, torch.float32),
    ({}, torch.bfloat16),
    ({}, torch.float16),
]


@pytest.mark.parametrize(("options", "dtype"), LONG_CASES, ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_segments_longer_than_a_tile(base, options, dtype, small_tiles):
    assert_close(inputs_for(*long_segments(), dtype=dtype, dim=16), base | options)


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_segments(case, base, small_tiles):
    teacher, student, teacher_specials, student_specials = AWKWARD[case]
    segments = rows(segment_ids(teacher, teacher_specials)), rows(segment_ids(student, student_specials))
    for options in ({}, {"causal": False}, {"sliding_window": 3}):
        teacher, student, *ids = inputs_for(*segments, dtype=torch.float32, dim=16)
        expected = exact((teacher, student, *ids), base | options)
        for x, y in zip(found((teacher, student, *ids), base | options), expected, strict=True):
            # one token alone has no gradient but rounding
            assert (x - y).norm() <= 1e-5 * y.norm() + 1e-7


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize("sizes", [([300], [211]), ([90, 1, 1, 70, 2], [1, 80, 1, 75, 1]), ([3] * 70, [2] * 70)])
def test_tiles_that_ship(base, sizes):
    assert_close(inputs_for(*(rows(segment_ids(x, specials=[0])) for x in sizes), dtype=torch.float32, dim=16), base)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"sliding_window": 50, "causal": False}], ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_loops_without_masks(base, options, small_tiles):
    """Blocks of 16 that all rows see between blocks that some see, in documents that end inside a block."""
    segments = rows(segment_ids([1, 2] * 40)), rows(segment_ids([2, 1] * 40))
    documents = {f"{x}_documents": (y >= 35).long() for x, y in zip(("teacher", "student"), segments, strict=True)}
    arguments = inputs_for(*segments, dtype=torch.float32, dim=16)
    assert_close(arguments, base | documents | options)


@pytest.mark.parametrize(("sizes", "widths"), [((4, 2), (32, 16)), ((2, 4), None), ((2, 2), None)])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_a_longer_teacher_has_wider_tiles(base, sizes, widths):
    segments = [rows(segment_ids([x] * 40)) for x in sizes]
    arguments = inputs_for(*segments, dtype=torch.bfloat16, dim=16)
    _, (query, _, value), *_ = arguments
    chosen = matt_kernels.tile_widths(query, value, **base)(*(x.shape[1] for x in segments))
    narrow = base == {"variant": "aim", "metric": "cosine"}  # aim_star has no factors
    assert chosen == (widths or ((16, 16) if narrow else (32, 32)))
    assert_close(arguments, base)


@pytest.mark.parametrize("dtype", FLOAT32)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (20, 24), (80, 80), (96, 96), (64, 128), (256, 256)])
def test_head_dimensions(dim, value_dim, dtype, small_tiles):
    arguments = inputs_for(*(x[:1] for x in two_sides()), dtype=dtype, dim=dim, value_dim=value_dim)
    for base in GRID:
        assert_close(arguments, base)


@pytest.mark.parametrize(("dim", "value_dim"), [(20, 24), (72, 72), (100, 64)])
@pytest.mark.parametrize("name", ["aim_forward", "attend_forward"])
def test_kernels_see_multiples_of_16_alone(name, dim, value_dim, monkeypatch, small_tiles):
    """Or strides would tell Triton another thing at another length."""
    seen = []
    original = getattr(loss_module, name)
    monkeypatch.setattr(loss_module, name, lambda *x: (seen.extend(x[:6]), original(*x))[1])
    arguments = inputs_for(*two_sides(), dtype=torch.float32, dim=dim, value_dim=value_dim)
    assert_close(arguments, {"variant": "aim" if name == "aim_forward" else "aim_star"})
    for x in seen:
        assert all(y % 16 == 0 for y in x.stride()[:3])


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_heads(base, heads, kv_heads, small_tiles):
    assert_close(inputs_for(*two_sides(), heads=heads, kv_heads=kv_heads, dtype=torch.float32, dim=16), base)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_segmentation(data):
    count = data.draw(st.integers(1, 6))
    sides = []
    for _ in range(2):
        sizes = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
        specials = data.draw(st.lists(st.integers(0, sum(sizes)), max_size=3))
        sides.append(rows(segment_ids(sizes, specials)))
    window = data.draw(st.none() | st.integers(1, 50))
    options = data.draw(st.sampled_from(GRID)) | {"sliding_window": window, "causal": data.draw(st.booleans())}
    arguments = inputs_for(*sides, heads=1, dtype=torch.float32, dim=16)
    for x, y in zip(found(arguments, options), exact(arguments, options), strict=True):
        assert (x - y).norm() <= 2e-5 * y.norm() + 1e-7


def test_values_that_depend_on_each_other(small_tiles):
    """Equal, parallel and zero value vectors inside one segment leave its span smaller than its tokens."""
    arguments = inputs_for(*long_segments(), dtype=torch.float32, dim=16)
    with torch.no_grad():
        for values in (arguments[0][2], arguments[1][2]):
            values[:, :, 1::3] = 2 * values[:, :, ::3][:, :, : values[:, :, 1::3].shape[2]]
            values[:, :, 2::7] = 0
            values[:, :, 5:9] = values[:, :, 4:5]
    for base in GRID:
        assert_close(arguments, base)


@pytest.mark.parametrize("base", GRID, ids=str)
def test_strides(base, small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    expected = found((teacher, student, *segments), base)
    for spread in (
        lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.detach().transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x.detach(), x.detach()], 3)[..., : x.shape[3]],
    ):
        sides = tuple(spread(x) for x in teacher), tuple(spread(x).requires_grad_() for x in student)
        assert not sides[1][0].is_contiguous()
        assert all(torch.equal(x, y) for x, y in zip(found((*sides, *segments), base), expected, strict=True))


def test_padding_content_is_never_read(small_tiles):
    *segments, documents = packed()
    teacher, student, *_ = inputs_for(*segments, dtype=torch.float32, dim=16)
    padding = documents["student_documents"] == -1
    spoilt = tuple(x.detach().masked_fill(padding[:, None, :, None], float("nan")).requires_grad_() for x in student)
    for base in GRID:
        expected = found((teacher, student, *segments), base | documents)
        results = found((teacher, spoilt, *segments), base | documents)
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        assert all((x.transpose(1, 2)[padding] == 0).all() for x in results[1:])


@pytest.mark.parametrize("content", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_padding_between_documents_is_never_read(base, options, content):
    segments = torch.tensor([[0, 0, 1, 1, 2, -100, -100, -100, 3, 3, 4, 5, -100, -100]])
    documents = torch.tensor([[0] * 5 + [-1] * 3 + [1] * 4 + [-1] * 2])
    padding = (documents == -1)[:, None, :, None]
    teacher, student, *_ = inputs_for(segments, segments, dtype=torch.float32, dim=16)
    options = base | options | {"teacher_documents": documents, "student_documents": documents}
    expected = found((teacher, student, segments, segments), options)
    spoilt = tuple(x.masked_fill(padding, content) for x in teacher)
    wanted = tuple(x.detach().masked_fill(padding, content).requires_grad_() for x in student)
    for x, y in zip(found((spoilt, wanted, segments, segments), options), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", FLOAT32)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_nan_reaches_the_loss(base, dtype, small_tiles, monkeypatch):
    """Or a gradient scaler would not see that float16 has overflown. NaNs of a GPU have other bits than numpy's."""
    create_dot = InterpreterBuilder.create_dot

    def like_a_gpu(self, *operands):
        result = create_dot(self, *operands)
        result.data = result.data.copy()
        result.data.view(np.uint32)[np.isnan(result.data)] = 0x7FFFFFFF
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_dot", like_a_gpu)
    for (side, which), broken in product(product((0, 1), range(3)), ("nan", "inf")):
        arguments = inputs_for(*two_sides(), dtype=dtype, dim=16)
        with torch.no_grad():
            arguments[side][which][0, 0] = float(broken)
        assert found(arguments, base)[0].isnan()


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-21, 1e-23])
def test_values_whose_squares_float32_does_not_hold(size, base, small_tiles):
    arguments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    with torch.no_grad():
        for side in arguments[:2]:
            side[2][:, :, 3:9] *= size
    assert_close(arguments, base, tolerance=1e-4)


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_what_all_keys_have_in_common_cancels(metric, small_tiles):
    """An offset of all keys changes no weight: bfloat16 gradients must not lose their digits to it."""
    segments = rows(segment_ids([2] * 60))[:1]
    teacher, student, *_ = inputs_for(segments, segments, heads=1, kv_heads=1, dtype=torch.float32, dim=16)
    sides = []
    for side in (teacher, student):
        query, key, value = (x.detach().clone() for x in side)
        query[..., :8] *= 0.05  # queries hardly look where the offset is
        key[..., :8] += 16
        sides.append(tuple(x.bfloat16() for x in (query, key, value)))
    teacher, student = sides
    arguments = teacher, tuple(x.requires_grad_() for x in student), segments, segments
    wanted = exact(arguments, {"metric": metric})
    eager = gradients(aim_loss, arguments, {"metric": metric, "backend": "eager"})
    for x, y, z in zip(found(arguments, {"metric": metric})[1:], eager[1:], wanted[1:], strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm()


@pytest.mark.parametrize("ids", [[0, 1, 2, 100], [1, 1, 2, 2], [0, 5, 3, 1], [3, 3, 3, 3]])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_broken_ids_give_nan_in_bounds(base, ids, monkeypatch):
    sanitizer.install(monkeypatch)
    segments = torch.tensor([ids])
    arguments = inputs_for(segments, segments, dtype=torch.float32, dim=16)
    teacher, student, *_ = arguments
    loss = matt_kernels.aim_loss(teacher, student, segments, segments, **base)
    loss.backward()
    assert loss.isnan()


# -- behaviour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT32)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_identical_sides_cost_nothing(base, dtype, small_tiles):
    segments = rows(segment_ids([1, 2, 3, 1, 4, 2, 9, 1, 1, 20], specials=[0, 6]))
    teacher, *_ = inputs_for(segments, segments, dtype=dtype, dim=16)
    student = tuple(x.clone().requires_grad_() for x in teacher)
    loss, *gradient = found((teacher, student, segments, segments), base)
    noise = 1e-12 if base["metric"] == "mse" else 1e-5 if dtype == torch.bfloat16 else 1e-6
    assert 0 <= loss <= noise
    assert all(x.abs().max() <= max(noise, 1e-8) for x in gradient)


@pytest.mark.parametrize("dtype", FLOAT32)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_same_bits_twice(base, dtype, small_tiles):
    arguments = inputs_for(*long_segments(), dtype=dtype, dim=16)
    first, second = (found(arguments, base) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_only_what_is_needed(base, needed, small_tiles):
    arguments = inputs_for(*long_segments(), dtype=torch.float32, dim=16)
    loss, *expected = found(arguments, base)
    for x, wanted in zip(arguments[1], needed, strict=True):
        x.requires_grad_(bool(wanted))
    expected = [x for x, wanted in zip(expected, needed, strict=True) if wanted]
    if not expected:
        assert torch.equal(aim_loss(*arguments, **base, backend="triton"), loss)
        return
    results = found(arguments, base)
    assert torch.equal(results[0], loss)
    # a long segment's share of D is summed up in another order without dQ
    for x, y in zip(results[1:], expected, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


def test_scaled_no_grad_and_detached_teacher(small_tiles):
    for base in GRID:
        teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
        teacher = tuple(x.requires_grad_() for x in teacher)
        loss = aim_loss(teacher, student, *segments, **base, backend="triton")
        first = torch.autograd.grad(loss, student, retain_graph=True)
        (3 * loss).backward()
        assert all(x.grad is None for x in teacher)
        for x, y in zip(student, first, strict=True):
            torch.testing.assert_close(x.grad, 3 * y)
        with torch.no_grad():
            assert torch.equal(aim_loss(teacher, student, *segments, **base, backend="triton"), loss)


@pytest.mark.parametrize("needed", [x for x in product((False, True), repeat=3) if any(x)], ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_second_derivatives_are_refused(base, needed, small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    student = tuple(x.detach().requires_grad_(wanted) for x, wanted in zip(student, needed, strict=True))
    wanted = [x for x in student if x.requires_grad]
    loss = aim_loss(teacher, student, *segments, **base, backend="triton")
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    for gradient, x in zip(first, wanted, strict=True):
        with pytest.raises(RuntimeError, match=r"matt_kernels\.\w+_backward.* no autograd formula"):
            torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)


def test_float16_gradients_survive_a_gradient_scaler(small_tiles):
    arguments = inputs_for(*two_sides(), dtype=torch.float16, dim=16)
    for base in GRID:
        loss = aim_loss(*arguments, **base, backend="triton")
        results = torch.autograd.grad(2.0**14 * loss, arguments[1])
        for x, y in zip(results, exact(arguments, base)[1:], strict=True):
            assert (x.double() / 2**14 - y).norm() <= 5e-3 * y.norm()


def test_mixed_dtypes_and_autocast(small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    halves = (*student[:2], student[2].detach().bfloat16().requires_grad_())
    _, *gradient = found((tuple(x.bfloat16() for x in teacher), halves, *segments), {})
    assert [x.dtype for x in gradient] == [torch.float32, torch.float32, torch.bfloat16]
    expected = found((teacher, student, *segments), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = aim_loss(teacher, student, *segments, backend="triton")
    results = loss.detach(), *torch.autograd.grad(loss, student)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_gradient_checkpointing(small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    expected = found((teacher, student, *segments), {})

    def step(*student):
        return aim_loss(teacher, tuple(1.0 * x for x in student), *segments, backend="triton")

    loss = torch.utils.checkpoint.checkpoint(step, *student, use_reentrant=False)
    results = loss.detach(), *torch.autograd.grad(loss, student)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_plan_from_elsewhere(small_tiles):
    *segments, documents = packed()
    teacher, student, *_ = inputs_for(*segments, dtype=torch.float32, dim=16)
    plan = matt_kernels.aim_plan(*segments, **documents, reduction="documents", sliding_window=3, widths=(16, 16))
    loss = matt_kernels.aim_loss(teacher, student, plan=plan)
    options = documents | {"reduction": "documents", "sliding_window": 3, "backend": "triton"}
    assert torch.equal(loss, aim_loss(teacher, student, *segments, **options))


def test_a_plan_is_pinned_by_a_data_loader(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: (pinned.append(x), x.clone())[1])
    plan = matt_kernels.aim_plan(*two_sides(), variant="aim_star", widths=(16, 32))
    batch = torch.utils.data._utils.pin_memory.pin_memory({"plans": [plan]})
    copy = batch["plans"][0]
    assert isinstance(copy, matt_kernels.AimPlan)
    assert (copy.widths, copy.variant) == (plan.widths, plan.variant)
    assert all(x is y for x, y in zip(pinned, plan.tensors(), strict=True))
    assert all(torch.equal(x, y) and x is not y for x, y in zip(copy.tensors(), plan.tensors(), strict=True))


# -- memory, synchronisation, compilation --------------------------------------------------------------------------


@pytest.mark.parametrize("base", GRID, ids=str)
def test_memory_is_linear(base):
    """The same bytes per token for twice the tokens, in all and for the largest buffer: nothing is n x n."""
    heads, dim, peaks = 2, 16, []
    lengths, single = [], []
    for length in (128, 256):
        arguments = inputs_for(*text_like(length), heads=heads, dim=dim, dtype=torch.float32)

        def step(arguments=arguments):
            torch.autograd.grad(aim_loss(*arguments, **base, backend="triton"), arguments[1])

        peak, largest = allocations(step)
        peaks.append(peak)
        lengths.append(arguments[2].shape[1] + arguments[3].shape[1])
        # per token: 3 gradients and dQ twice, 3 x 32 factors per key head, and integers of the plan
        assert peak <= lengths[-1] * (heads * (5 * dim * 4 + 64) + 96 * 4 + 600)
        single.append(largest)
    assert peaks[1] / lengths[1] <= 1.05 * peaks[0] / lengths[0]
    assert single[1] / lengths[1] <= 1.05 * single[0] / lengths[0]


KEPT = {torch.bfloat16: (2, 12, 8), torch.float16: (4, 12, 8), torch.float32: (4, 20, 12)}


@pytest.mark.parametrize("dtype", KEPT)
@pytest.mark.parametrize("variant", ["aim", "aim_star"])
def test_what_is_kept_for_backward(variant, dtype):
    """The constants of the README, per token and query head: of a number, of a row for aim and for aim_star."""
    number, of_aim, of_star = KEPT[dtype]
    heads, dim = 4, 16
    teacher, student, *segments = inputs_for(*text_like(50), heads=heads, kv_heads=2, dim=dim, dtype=dtype)
    plan = matt_kernels.aim_plan(*segments, variant=variant)
    given = {x.data_ptr() for x in (*teacher, *student, *plan.tensors())}
    kept = {}
    hook = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x)
    with hook:
        matt_kernels.aim_loss(teacher, student, plan=plan, variant=variant)
    kept = sum(size for place, size in kept.items() if place not in given)
    student_tokens, rows_of = segments[1].numel(), min(x.numel() for x in segments)
    if variant == "aim":
        assert kept == heads * (student_tokens * number * dim + rows_of * of_aim)
    else:
        assert kept == heads * rows_of * (number * dim + of_star)


def forbidden(*_, **__):
    raise AssertionError("a copy to the CPU")


class NoWaiting(TorchDispatchMode):
    """Fails at torch operations, also inside our ops, that make the CPU wait for a GPU. Counts the others."""

    WAIT = ("local_scalar_dense", "item", "nonzero", "unique", "masked_select", "is_nonzero", "equal.", "bincount")
    WAIT += ("repeat_interleave.Tensor", "allclose", "argwhere")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        namespace, name = str(function).split(".", 1)
        self.seen[name] += 1
        if namespace == "matt_kernels":
            op = name.removesuffix(".default")
            with self:
                return getattr(ops, "aim_plan_op" if op == "aim_plan" else op)._init_fn(*arguments, **(options or {}))
        assert not name.lstrip("_").startswith(self.WAIT), function
        masks = arguments[1] if name.lstrip("_").startswith(("index.", "index_put")) else ()
        assert not any(x is not None and x.dtype == torch.bool for x in masks), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: range(x[0].long()),
    ],
)
def test_what_waits_is_found(wait):
    with NoWaiting(), pytest.raises(AssertionError):
        wait(torch.arange(3.0))


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_never_waits_for_the_device(base, with_documents, monkeypatch, small_tiles):
    """Between ids on the device and the gradients."""
    monkeypatch.setattr(configs.triton.runtime.interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    for name in ("cpu", "numpy", "tolist"):  # no torch operation where the tensor is on the CPU already
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    *segments, documents = packed()
    documents = documents if with_documents else {}
    teacher, student, *_ = inputs_for(*segments, dtype=torch.float32, dim=16)
    for reduction, sliding_window, causal in product(("pairs", "documents"), (None, 3), (True, False)):
        options = base | documents | {"reduction": reduction, "sliding_window": sliding_window, "causal": causal}
        for softcap, needed in ((None, student), (2.0, student[:1]), (None, student[1:])):
            for x in student:
                x.requires_grad_(any(x is y for y in needed))
            with NoWaiting() as mode:
                loss = matt_kernels.aim_loss(teacher, student, *segments, **options, softcap=softcap)
                torch.autograd.grad(loss, needed)
            assert mode.seen["aim_plan.default"] == 1
            assert mode.seen["searchsorted.Tensor"] > 1  # inside it
            assert sum(x for name, x in mode.seen.items() if "_backward" in name) >= 1


@pytest.mark.parametrize("base", GRID, ids=str)
def test_opcheck(base, small_tiles):
    *segments, documents = packed()
    teacher, student, *_ = inputs_for(*segments, dtype=torch.float32, dim=16)
    checks = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    arguments = *segments, *documents.values(), 16, 16, base["variant"], True, None, "pairs"
    torch.library.opcheck(ops.aim_plan_op, arguments, test_utils=checks)
    plan = list(ops.aim_plan_op(*arguments))
    if base["variant"] == "aim_star":
        arguments = *teacher, *student, plan, 16, 16, base["metric"], 0.25, None
        torch.library.opcheck(ops.attend_forward, (*arguments, True), test_utils=checks)
        student = [x.detach() for x in student]
        kept = [x.detach() for x in ops.attend_forward(*arguments, True)[1:]]
        arguments = *student, plan, 16, 16, 0.25, None, *kept, torch.ones(())
        for needed in ((True, True, True), (True, False, False), (False, True, False)):
            torch.library.opcheck(ops.attend_backward, (*arguments, *needed), test_utils=checks)
        return
    arguments = *teacher, *student, plan, 16, 16, base["metric"], 0.25, None
    torch.library.opcheck(ops.aim_forward, (*arguments, True, True, True), test_utils=checks)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    _, gradient, *kept = ops.aim_forward(*arguments, True, True, True)
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(ops.aim_query_backward, (gradient, torch.ones(()), dtype), test_utils=checks)
    for needed in ((True, True), (True, False), (False, True)):
        arguments_of = *arguments, *kept, torch.ones(()), *needed
        torch.library.opcheck(ops.aim_backward, arguments_of, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_compiles_without_a_graph_break(base, dynamic, small_tiles):
    arguments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    torch.compiler.reset()
    compiled = torch.compile(aim_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    loss = compiled(*arguments, **base, backend="triton")
    results = loss.detach(), *torch.autograd.grad(loss, arguments[1])
    for x, y in zip(results, found(arguments, base), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plan_and_options_compile_without_a_graph_break(dynamic, small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    torch.compiler.reset()
    compiled = torch.compile(matt_kernels.aim_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    plan = matt_kernels.aim_plan(*segments, sliding_window=3, causal=False, widths=(16, 16))
    options = {"scale": 0.3, "softcap": 2.0}
    wanted = matt_kernels.aim_loss(teacher, student, plan=plan, **options)
    torch.testing.assert_close(compiled(teacher, student, plan=plan, **options), wanted)
    options |= {"sliding_window": 3, "causal": False}
    torch.testing.assert_close(compiled(teacher, student, *segments, **options), wanted)


def test_autotune_keeps_the_fastest_for_every_length(monkeypatch):
    monkeypatch.setattr(ops, "TUNED", {})
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    plain = ops.config_for(student[0], student[2], "aim", "mse")
    tried = []

    def measure(step):
        config = ops.config_for(student[0], student[2], "aim", "mse")
        if len(tried) == 3:
            step()
        tried.append(config)
        if config.columns.stages == 3:
            raise tune.OutOfResources(2, 1, "shared memory")
        return 1.0 + (config.rows.block_m - 32) ** 2 + (config.columns.warps - 8) ** 2

    found = matt_kernels.autotune(teacher, student, *segments, measure=measure)
    assert (found.rows.block_m, found.columns.warps) == (32, 8)
    assert (found.softmax, found.widths) == (plain.softmax, plain.widths)
    assert len(set(map(repr, tried))) == len(tried)
    longer = torch.zeros(3, 2, 999, 16)
    assert ops.config_for(longer, longer, "aim", "mse") == found
    assert ops.config_for(longer, longer, "aim", "cosine") != found
    assert ops.config_for(longer.half(), longer.half(), "aim", "mse") != found


@pytest.mark.parametrize("sizes", [([1, 2, 3], [1, 3, 2]), ([4, 4, 4], [1, 2, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autotune_of_aim_star_is_what_both_metrics_launch(dtype, sizes, monkeypatch):
    """Also where the teacher has more tokens, whether tiles are others for it or not, and of any head dimension."""
    monkeypatch.setattr(ops, "TUNED", {})
    arguments = inputs_for(*(rows(segment_ids(x)) for x in sizes), dtype=dtype, dim=20)
    launched = []
    plain = ops.attend_rows
    monkeypatch.setattr(ops, "attend_rows", lambda *a: (launched.append(a[5].attend_rows), plain(*a)))

    def measure(step):
        step()
        return 2.0 - (launched[-1].block_m == 32 and launched[-1].warps == 8)

    options = {"variant": "aim_star", "metric": "cosine"}
    with monkeypatch.context() as few:
        for name, values in (("BLOCKS_M", (32,)), ("WARPS", (8,)), ("STAGES", (1,))):
            few.setattr(tune, name, values)
        best = matt_kernels.autotune(*arguments, measure=measure, **options)
    assert (best.attend_rows.block_m, best.attend_rows.warps) == (32, 8)
    for metric in ("mse", "cosine"):
        assert_close(arguments, {"variant": "aim_star", "metric": metric})
        assert launched[-1] == best.attend_rows


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "80"), ((8, 6), "86"), ((8, 7), "80"), ((8, 9), "89"), ((9, 0), "90"), ((10, 0), "100"),
        ((10, 3), "100"), ((11, 0), "100"), ((12, 0), "120"), ((12, 1), "120"),
    ],
)  # fmt: skip
def test_every_device_has_the_configs_of_its_family(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert configs.target_of(torch.device("cuda", 0)) == f"cuda:{name}"


def test_devices_without_the_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer; got 7\.5 on cuda:0"):
        configs.target_of(torch.device("cuda", 0))


# -- errors --------------------------------------------------------------------------------------------------------


def test_ids_that_break_the_rules_on_the_device_give_nan(small_tiles):
    """Ids on the CPU are refused by aim_loss; matt_kernels alone does not look at them."""
    teacher, student, teacher_segments, student_segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    assert matt_kernels.aim_loss(teacher, student, teacher_segments, student_segments).isfinite()
    fewer = torch.where(student_segments == 4, -100, student_segments)
    gap = torch.where(student_segments == 2, -100, student_segments)
    split = torch.zeros_like(student_segments)
    split[:, 6:] = 1
    for base in GRID:
        for ids in (fewer, gap, student_segments.flip(1), torch.full_like(fewer, -100)):
            assert matt_kernels.aim_loss(teacher, student, teacher_segments, ids, **base).isnan()
        documents = {"teacher_documents": torch.zeros_like(teacher_segments), "student_documents": split}
        assert matt_kernels.aim_loss(teacher, student, teacher_segments, student_segments, **documents, **base).isnan()


@pytest.mark.parametrize(
    ("ids", "documents", "breaks"),
    [
        ([0, 0, 1, 2, 2, -100], [0, 0, 0, 1, 1, -1], False),
        ([0, 0, 1, 2, 2, -100], [7, 7, 7, 3, 3, -1], False),
        ([0, 0, 1, -100, 2, 2], [0, 0, 0, -1, 1, 1], False),
        ([-100, 0, 0, -100, 1, 1], [4, 5, 5, 6, 8, 8], False),
        ([0, 0, 1, 2, 2, 3], [0, 0, 0, 0, -1, -1], True),
        ([0, 0, 1, 1, 2, 3], [0, 0, 0, 1, 1, 1], True),
        ([0, 0, 1, -100, 2, 2], [0, 0, 0, -1, 0, 0], True),
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 0, 0], True),
        ([0, 0, 1, 1, -100, 2], [0, 0, 0, 0, -2, 1], True),
    ],
    ids=str,
)
def test_documents_that_break_the_rules_give_nan(ids, documents, breaks, monkeypatch):
    sanitizer.install(monkeypatch)
    ids, documents = torch.tensor([ids]), torch.tensor([documents])
    given = {"teacher_documents": documents, "student_documents": documents}
    teacher, student, *_ = inputs_for(ids, ids, dtype=torch.float32, dim=16)
    for base in GRID:
        loss = matt_kernels.aim_loss(teacher, student, ids, ids, **given, **base)
        loss.backward()
        assert loss.isnan() == breaks


@st.composite
def ids_that_may_break_the_rules(draw):
    """[segments, documents] of both sides: one row by the rules, then tokens changed, on one side or on both alike."""
    counts = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
    names = draw(st.permutations(range(5)))
    found = []
    for side_counts in (counts, draw(st.sampled_from((counts, counts, counts[::-1])))):
        segments, documents, next_segment = [], [], 0
        for name, count in zip(names, side_counts, strict=False):
            lengths = draw(st.lists(st.integers(1, 2), min_size=count, max_size=count))
            specials = [-100] * draw(st.integers(0 if count else 1, 2))
            padding = draw(st.integers(0, 2))
            tokens = [next_segment + i for i, length in enumerate(lengths) for _ in range(length)] + specials
            segments += [*tokens, *[-100] * padding]
            documents += [*[name] * len(tokens), *[-1] * padding]
            next_segment += count
        found.append([segments, documents])
    found = found[:1] * 2 if draw(st.booleans()) else found
    for values, low, high in ((0, -1, 4), (1, -2, 5)):
        for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
            row = draw(st.sampled_from(found))[values]
            value = draw(st.integers(low, high))
            row[draw(st.integers(0, len(row) - 1))] = -100 if values == 0 and value < 0 else value
    return found


@settings(max_examples=500, deadline=None)
@given(ids_that_may_break_the_rules(), st.booleans())
@example([[[0, -100], [0, 1]], [[0, -100], [0, 0]]], True)
@example([[[0, 1, 2], [0, 1, 1]], [[0, 1, 2], [0, 0, 1]]], True)
@example([[[0, 1], [0, -1]]] * 2, True)
@example([[[0, -100], [0, -2]]] * 2, True)
@example([[[0, 0], [0, 1]]] * 2, True)
@example([[[0, -100, 1], [0, -1, 0]]] * 2, True)
def test_both_checks_of_ids_agree(sides, with_documents):
    (teacher_segments, teacher_documents), (student_segments, student_documents) = (
        [torch.tensor([x]) for x in side] for side in sides
    )
    documents = {"teacher_documents": teacher_documents, "student_documents": student_documents}
    documents = documents if with_documents else dict.fromkeys(documents)
    ids = {"teacher_segments": teacher_segments, "student_segments": student_segments} | documents
    try:
        api._find_segments(ids)
        breaks = False
    except ValueError:
        breaks = True
    event("breaks the rules" if breaks else "by the rules")
    for variant, reduction in product(("aim", "aim_star"), ("pairs", "documents")):
        plan = matt_kernels.aim_plan(
            teacher_segments, student_segments, **documents, variant=variant, reduction=reduction
        )
        assert plan.pair_weight.isfinite() != breaks


def bad_calls():
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    q, k, v = student
    wide = tuple(torch.zeros(*x.shape[:3], 264) for x in student)
    many = tuple(torch.zeros(1).expand(2, 32768, 1, 16) for _ in student)
    names = dict(
        zip(("teacher", "student", "teacher_segments", "student_segments"), (teacher, student, *segments), strict=True)
    )
    plan = matt_kernels.aim_plan(*segments, widths=(16, 16))
    other = matt_kernels.aim_plan(segments[0][:, 1:], segments[1])
    changes = {
        "double": ({"student": tuple(x.double() for x in student)}, TypeError, "float32, bfloat16 or float16"),
        "mixed": ({"student": (q.half(), k, v)}, TypeError, "dtype of student q"),
        "tuple": ({"student": (q, k)}, TypeError, "three tensors"),
        "groups": ({"student": (q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))}, ValueError, "multiple of H_kv"),
        "wide": ({"student": wide, "teacher": wide}, ValueError, "at most 256"),
        "many heads": ({"student": many, "teacher": many}, ValueError, r"q: .* at most 65535; got \(2, 32768, 1, 16\)"),
        "heads": ({"teacher": (q[:, :1], k, v)}, ValueError, "q must agree but in n"),
        "ids": ({"student_segments": segments[1][:, 1:]}, ValueError, "student_segments must have shape"),
        "ids kind": ({"student_segments": segments[1].float()}, TypeError, "student_segments must be an int64"),
        "no ids": ({"teacher_segments": None}, TypeError, "teacher_segments must be an int64 .* got NoneType"),
        "one side's ids": ({"student_segments": None}, TypeError, "student_segments must be an int64 .* got NoneType"),
        "no student": ({"student": None}, TypeError, r"student must be a tuple \(q, k, v\) .* got NoneType"),
        "rows of ids": ({"student_segments": segments[1][:1]}, ValueError, "student_segments must have batch size"),
        "empty ids": ({"teacher_segments": segments[0][:, :0]}, ValueError, r"teacher_segments .* got \(2, 0\)"),
        "ids elsewhere": ({"student_segments": segments[1].to("meta")}, ValueError, "got 2 and meta"),
        "documents": ({"teacher_documents": segments[0]}, ValueError, "given together"),
        "documents' shape": (
            {"teacher_documents": segments[0][:, :2], "student_documents": segments[1]}, ValueError,
            r"teacher_documents must have shape .* got \(2, 2\)",
        ),
        "variant": ({"variant": "x"}, ValueError, "variant must be one of 'aim', 'aim_star'; got 'x'"),
        "softcap": ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
        "softcap kind": ({"softcap": "a"}, TypeError, "softcap must be a number or None; got str"),
        "softcap inf": ({"softcap": float("inf")}, ValueError, "softcap must be above 0 and finite; got inf"),
        "scale nan": ({"scale": float("nan")}, ValueError, "scale must be above 0 and finite; got nan"),
        "scale kind": ({"scale": torch.ones(())}, TypeError, "scale must be a number or None; got Tensor"),
        "window": ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1"),
        "window float": ({"sliding_window": 3.0}, TypeError, "sliding_window must be an int or None; got float"),
        "window bool": ({"sliding_window": True}, TypeError, "sliding_window must be an int or None; got bool"),
        "causal": ({"causal": "yes"}, TypeError, "causal must be a bool; got str"),
        "plan kind": ({"plan": "x"}, TypeError, "plan must be an AimPlan, .* got str"),
        "plan's variant": ({"plan": plan, "variant": "aim_star"}, ValueError, "variant .* 'aim_star'; got .* 'aim'"),
        "plan elsewhere": ({"plan": plan.to("meta")}, ValueError, "plan must be on .* cpu; got rows on meta"),
        "half a plan elsewhere": (
            {"plan": replace(plan, long=plan.long.to("meta"))}, ValueError, "plan must be on .* cpu; got long on meta",
        ),
        "cut plan": ({"plan": replace(plan, rows=plan.rows[..., 1:])}, ValueError, "plan: rows must have shape"),
        "plan's dtypes": ({"plan": replace(plan, counts=plan.counts.long())}, ValueError, "got .* torch.int64"),
        "another batch's plan": ({"plan": other}, ValueError, "teacher_segments must have shape"),
    }  # fmt: skip
    return {name: (names | change, error, message) for name, (change, error, message) in changes.items()}


@pytest.mark.parametrize("case", bad_calls())
def test_errors(case):
    arguments, error, message = bad_calls()[case]
    with pytest.raises(error, match=message):
        matt_kernels.aim_loss(**arguments)


@pytest.mark.parametrize("widths", [(16.0, 16.0), (16, 16, 16), 16, "ab", None, (8, 16)], ids=str)
def test_widths_are_two_ints(widths):
    ids = torch.arange(3)[None]
    error, message = (ValueError, "powers of 2") if widths == (8, 16) else (TypeError, "two ints")
    with pytest.raises(error, match=f"widths must be {message}"):
        matt_kernels.aim_plan(ids, ids, widths=widths)


def test_cpu_without_the_interpreter():
    program = """
import torch, matt_kernels
x = tuple(torch.zeros(1, 1, 3, 16) for _ in range(3))
ids = torch.arange(3)[None]
try:
    matt_kernels.aim_loss(x, x, ids, ids)
except ValueError as error:
    assert "need tensors on a GPU" in str(error), error
else:
    raise AssertionError("no error")
"""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_nothing_of_matt_fast_is_needed():
    program = "import sys, matt_kernels; assert not {'matt_fast', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_plan_visits_every_token_once():
    """Tiles of a document are disjoint, in order, within the widths, and hold every token of it."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(1, 60, (2, generator.integers(1, 30)))
        ids = [rows(segment_ids(x.tolist(), specials=[0, 3])) for x in sizes]
        plan = matt_kernels.aim_plan(*ids, widths=(16, 32))
        count = plan.counts[0, 1]
        for side, width in ((0, 16), (1, 32)):
            start, stop = plan.tiles[0, 2 * side : 2 * side + 2, :count]
            assert start[0] == 0
            assert stop[-1] == ids[side].shape[1]
            assert torch.equal(start[1:], stop[:-1])
            assert ((stop - start) <= width).all()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}, {"sliding_window": 9, "causal": False}], ids=str)
def test_plan_knows_what_needs_no_mask(options):
    """For each row the tiles, and for each tile the rows, that see the other whole on both sides; by brute force."""
    generator = np.random.default_rng(1)
    for _ in range(10):
        count = generator.integers(2, 60)
        ids = [rows(segment_ids(generator.integers(1, 6, count).tolist(), specials=[0, 3])) for _ in range(2)]
        documents = [(x >= count // 2).long() for x in ids]
        for x in documents:
            x[:, -1] = -1 if generator.random() < 0.5 else 1
            x[:, :] = x.cummax(1).values if x[0, -1] == 1 else torch.cat([x[:, :-1].cummax(1).values, x[:, -1:]], 1)
        ids = [x.masked_fill(y < 0, -100) for x, y in zip(ids, documents, strict=True)]
        if ids[0].max() != ids[1].max():
            continue
        given = {"teacher_documents": documents[0], "student_documents": documents[1]}
        plan = matt_kernels.aim_plan(*ids, **given, **options, widths=(16, 16))
        row_count, tile_count, _ = plan.counts[0].tolist()
        found_rows, found_tiles = plan.rows[0, :, :row_count], plan.tiles[0, :, :tile_count]
        whole = torch.ones(row_count, tile_count, dtype=torch.bool)
        for side in (0, 1):
            low, high = found_rows[2 + 2 * side : 4 + 2 * side]
            start, stop = found_tiles[2 * side : 2 * side + 2]
            whole &= (start >= low[:, None]) & (stop <= high[:, None])
        tiles = torch.arange(tile_count)
        numbers = torch.arange(row_count)[:, None]
        assert torch.equal(whole, (tiles >= found_rows[10, :, None]) & (tiles < found_rows[11, :, None]))
        assert torch.equal(whole, (numbers >= found_tiles[7]) & (numbers < found_tiles[8]))
        for tile in range(tile_count):
            start, stop, low, high = found_tiles[[2, 3, 9, 10], tile].tolist()
            inside = ids[1][0, start:stop]
            assert set(inside[inside >= 0].tolist()) <= set(range(low, high))
