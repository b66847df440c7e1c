"""The Triton kernels through aim_loss against the eager formula in float64, in the interpreter where there is no GPU.

With the tiles that ship these inputs would fit into one: most tests shrink tiles and blocks to 16, so that small inputs
take every path.
"""

from itertools import product

import matt_kernels
import numpy as np
import pytest
import sanitizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import FLOAT32, assert_close, exact, found, long_segments
from matt_kernels import ops
from test_loss import (
    AWKWARD,
    GRID,
    VARIATIONS,
    gradients,
    inputs_for,
    packed,
    rows,
    segment_ids,
    two_sides,
)
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder

from matt_fast.loss import aim_loss

pytestmark = pytest.mark.usefixtures("poisoned", "device")


@pytest.mark.parametrize("options", VARIATIONS, ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_special_tokens_and_options(base, options, small_tiles):
    assert_close(inputs_for(*two_sides(), dtype=torch.float32, dim=16), base | options)


# Where documents come in; the last has all at once.
OF_DOCUMENTS = [x for x in VARIATIONS if not x or "reduction" in x or x.get("causal") is False]


@pytest.mark.parametrize("options", OF_DOCUMENTS, ids=str)
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
    ids = (rows(segment_ids(x, specials=[0])) for x in sizes)
    assert_close(inputs_for(*ids, heads=1, dtype=torch.float32, dim=16), base)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"sliding_window": 50, "causal": False}], ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_loops_without_masks(base, options, small_tiles):
    """Blocks of 16 that all rows see between blocks that some see, in documents that end inside a block."""
    segments = rows(segment_ids([1, 2] * 40)), rows(segment_ids([2, 1] * 40))
    documents = {f"{x}_documents": (y >= 35).long() for x, y in zip(("teacher", "student"), segments, strict=True)}
    arguments = inputs_for(*segments, heads=1, dtype=torch.float32, dim=16)
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


DIMENSIONS = [(20, 24, torch.float32), (80, 80, torch.float32), (64, 128, torch.float32), (256, 256, torch.float32)]
DIMENSIONS += [(x, y, dtype) for x, y in ((16, 16), (96, 96)) for dtype in (torch.float16, torch.bfloat16)]
DIMENSIONS += [(24, 20, torch.float16), (256, 256, torch.bfloat16)]


@pytest.mark.parametrize(("dim", "value_dim", "dtype"), DIMENSIONS)
def test_head_dimensions(dim, value_dim, dtype, small_tiles):
    arguments = inputs_for(*(x[:1] for x in two_sides()), dtype=dtype, dim=dim, value_dim=value_dim)
    for base in GRID:
        assert_close(arguments, base)


@pytest.mark.parametrize(("dim", "value_dim"), [(20, 24), (72, 72), (100, 64)])
@pytest.mark.parametrize("name", ["aim_forward", "attend_forward"])
def test_kernels_see_multiples_of_16_alone(name, dim, value_dim, monkeypatch, small_tiles):
    """Or strides would tell Triton another thing at another length."""
    seen = []
    original = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *x: (seen.extend(x[:6]), original(*x))[1])
    arguments = inputs_for(*two_sides(), dtype=torch.float32, dim=dim, value_dim=value_dim)
    assert_close(arguments, {"variant": "aim" if name == "aim_forward" else "aim_star"})
    for x in seen:
        assert all(y % 16 == 0 for y in x.stride()[:3])


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (3, 1)])
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

    if knobs.runtime.interpret:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", like_a_gpu)
    for (side, which), broken in product(product((0, 1), range(3)), ("nan", "inf")):
        arguments = inputs_for(*(x[:1] for x in two_sides()), dtype=dtype, dim=16)
        with torch.no_grad():
            arguments[side][which][0, 0] = float(broken)
        assert aim_loss(*arguments, **base, backend="triton").isnan()


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize("size", [1e-10, 1e-21, 1e-23])
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
