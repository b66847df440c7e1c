"""The prototype of columns grouped by the shape of their segment: its formulas in float64, and its kernels in the
interpreter, against the eager formula."""

import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import FLOAT32, exact, record_launches
from test_loss import gradients, inputs_for, rows, segment_ids

from matt_fast.loss import aim_loss

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from gpu_bench.grouped import device_layout
from gpu_bench.grouped.layout import SHAPES, grouped_plan
from gpu_bench.grouped.loss import Launch, Launches, value_and_gradients

SMALL = Launch(32, (32, 32), 4, 1)


def reference(teacher, student, ids):
    """(loss, dQ, dK, dV) of one row by the formulas of the columns, segment by segment, without autograd."""
    (tq, tk, tv), (q, k, v) = ([x[0] for x in side] for side in (teacher, student))
    group, count, scale = len(q) // len(k), int(ids[1].max()) + 1, q.shape[2] ** -0.5
    last = [torch.stack([(x[0] == j).nonzero().max() for j in range(count)]) for x in ids]
    weights = []
    for query, key, ends in ((tq, tk, last[0]), (q, k, last[1])):
        scores = query[:, ends] @ key.repeat_interleave(group, 0).transpose(1, 2) * scale
        weights.append(scores.masked_fill(torch.arange(key.shape[1]) > ends[:, None], float("-inf")).softmax(-1))
    value, unit = 0.0, 1 / (len(q) * v.shape[2] * count * (count + 1) / 2)
    products, dq, dk, dv = torch.zeros_like(weights[1]), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for head in range(len(q)):
        own = head // group
        for j in range(count):
            places = [(x[0] == j).nonzero()[:, 0] for x in ids]
            t, s = (x[head][:, y] for x, y in zip(weights, places, strict=True))
            values = v[own, places[1]]
            gram, mixture = values @ values.T, tv[own, places[0]] @ torch.linalg.pinv(values)
            left = tv[own, places[0]] - mixture @ values
            e = s - t @ mixture
            h = e @ gram
            value += (e * h).sum() + (t @ left).square().sum()
            products[head][:, places[1]] = h
            dv[own, places[1]] += 2 * unit * (s.T @ e @ values - s.T @ t @ left)
        change = weights[1][head] * (products[head] - (weights[1][head] * products[head]).sum(1, keepdim=True))
        dq[head, last[1]] = 2 * unit * scale * change @ k[own]
        dk[own] += 2 * unit * scale * change.T @ q[head, last[1]]
    return [unit * value, *(x[None] for x in (dq, dk, dv))]


def mixed(count, largest=2):
    """More than a tile of one shape in front, then all shapes; special tokens on both sides."""
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, largest + 1, (2, count), generator=generator)
    sizes[:, : count - 20] = 1
    return [rows(segment_ids(x.tolist(), specials=y)) for x, y in zip(sizes, ([0, 5, 8], [0, 3, 17, 60]), strict=True)]


def test_formulas_of_columns():
    ids = mixed(25)
    teacher, student, *_ = inputs_for(*ids, heads=4, kv_heads=2)
    with torch.no_grad():
        # Values that depend on each other, as those of equal tokens do.
        student[2][:, :, 30] = 2 * student[2][:, :, 29]
        found = reference(teacher, student, ids)
    for x, y in zip(found, exact((teacher, student, *ids), {}), strict=True):
        assert (x - y).norm() <= 1e-12 * y.norm()


def close(ids, documents, dtype, share=1, softcap=None, metric="mse", make_plan=grouped_plan, **options):
    teacher, student, *_ = inputs_for(*ids, dtype=dtype, dim=16)
    if dtype == torch.bfloat16 and metric == "mse":
        # Far from zero, where a key of zeros would outweigh all others.
        teacher[0][..., 0], teacher[1][..., 0] = 20, -20
    plan = make_plan(*ids, *documents.values(), metric=metric, **options)
    found = value_and_gradients(teacher, student, plan, Launches(SMALL, SMALL, share), softcap, metric)
    options = documents | options | {"softcap": softcap, "metric": metric}
    for x, y in zip(found, exact((teacher, student, *ids), options), strict=True):
        assert x.dtype == (dtype if x.ndim else torch.float32)
        assert (x - y).norm() <= FLOAT32[dtype] * y.norm()
    return plan


@pytest.mark.usefixtures("poisoned", "device")
@pytest.mark.parametrize(
    ("dtype", "metric"), [(torch.float32, "mse"), (torch.bfloat16, "mse"), (torch.bfloat16, "cosine")]
)
def test_small_segments(dtype, metric):
    """A tile that rows see whole, and those that some see in part."""
    plan = close(mixed(100), {}, dtype, share=1 + (dtype == torch.bfloat16), metric=metric)
    assert plan.others is None
    assert set(plan.tiles[0, 0].tolist()) == {-1, *range(len(SHAPES))}


def several_documents():
    """Segments of any shape, one longer than a tile, in two documents of unlike length a row."""
    sizes = [[1, 2, 3, 40, 1, 2, 1, 1, 5, 2], [2, 1, 1, 50, 1, 4, 1, 2, 1, 2]]
    ids = [rows(segment_ids(x, specials=[0, 7]), segment_ids(x[::-1], specials=[1, 9])) for x in sizes]
    # Special tokens go with the segment before them.
    documents = {
        f"{side}_documents": (x.cummax(1).values >= torch.tensor([[5], [7]])).long()
        for side, x in zip(("teacher", "student"), ids, strict=True)
    }
    return ids, documents


@pytest.mark.usefixtures("poisoned", "device")
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 6, "reduction": "documents"},
        {"causal": False, "reduction": "documents", "softcap": 2.0},
        {"sliding_window": 6, "reduction": "documents", "metric": "cosine"},
    ],
    ids=str,
)
def test_any_segments_of_several_documents(options):
    """Those of other shapes, one of them longer than a tile, by the kernels that ship."""
    plan = close(*several_documents(), torch.float32, **options)
    assert plan.others.long_segments


@pytest.mark.usefixtures("poisoned", "device")
def test_sides_that_rows_see_apart():
    """In tiles that some rows see whole, and in such that none does."""
    plan = close(mixed(120), {}, torch.float32, causal=False, sliding_window=110)
    seen = plan.tiles[0, 4] > plan.tiles[0, 3]
    assert seen.any()
    assert (~seen & (plan.tiles[0, 0] >= 0)).any()


def nearly_equal(noise, seed=3):
    """Sides that differ by so much, on the same segments; one of the teacher's values is zero."""
    generator = torch.Generator().manual_seed(seed)
    ids = rows(segment_ids(torch.randint(1, 3, (30,), generator=generator).tolist(), specials=[0]))
    teacher, student, *_ = inputs_for(ids, ids, dtype=torch.float32, dim=16)
    with torch.no_grad():
        teacher[2][:, :, 5] = 0
        student = [x + noise * (y - x) for x, y in zip(teacher, student, strict=True)]
    return teacher, [x.requires_grad_() for x in student], ids


@pytest.mark.usefixtures("poisoned", "device")
def test_cosine_of_nearly_equal_sides():
    """No worse than the plain formula in the same dtype, and as good as nothing where there is no difference.

    Root mean squares over draws, as gpu_bench/correctness.py has them for short texts: what one draw gives depends on
    the CPU that computes the plain formula.
    """
    options, squares = {"metric": "cosine", "backend": "eager"}, []
    for seed in range(8):
        teacher, student, ids = nearly_equal(1e-3, seed)
        plan = grouped_plan(ids, ids, metric="cosine")
        found = value_and_gradients(teacher, student, plan, Launches(SMALL, SMALL, 1), metric="cosine")
        plain = gradients(aim_loss, (teacher, student, ids, ids), options)
        wanted = exact((teacher, student, ids, ids), options)
        both = [[(x - y).norm() / y.norm() for x, y in zip(z, wanted, strict=True)] for z in (found, plain)]
        squares.append(torch.tensor(both).square())
    found, plain = torch.stack(squares).mean(0).sqrt()
    assert (found <= torch.maximum(2 * plain, torch.tensor(1e-6))).all(), (found, plain)
    equal = value_and_gradients(teacher, teacher, plan, Launches(SMALL, SMALL, 1), metric="cosine")
    assert equal[0] < 1e-9
    assert all(x.abs().max() < 1e-7 for x in equal[1:])


def same(found, wanted, count):
    """Entries of the first `count` of the last dimension."""
    return torch.equal(found[..., :count], wanted[..., :count])


MADE = [x for x in range(12) if x not in (6, 7, 10, 11)]  # fields of rows that do not depend on tiles


def assert_same_plan(found, wanted):
    for name in ("columns", "starts", "tiles", "order", "hidden"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.plan.row_weights, wanted.plan.row_weights)
    assert torch.allclose(found.plan.pair_weight, wanted.plan.pair_weight, rtol=1e-7)
    assert torch.equal(found.others.counts, wanted.others.counts)
    assert torch.equal(found.moved_counts, wanted.moved_counts)
    for row, (count, tiles, long) in enumerate(wanted.others.counts.tolist()):
        assert same(found.bounds[row], wanted.bounds[row], count)
        assert same(found.plan.rows[row, MADE], wanted.plan.rows[row, MADE], count)
        assert same(found.others.rows[row, :12], wanted.others.rows[row, :12], count)
        segments = int(wanted.others.student_segments[row].max()) + 1
        assert same(found.others.rows[row, 12], wanted.others.rows[row, 12], segments)
        assert same(found.others.tiles[row], wanted.others.tiles[row], tiles)
        assert same(found.others.long[row], wanted.others.long[row], long)
        for x, y, most in zip(found.moved, wanted.moved, wanted.moved_counts[row].tolist(), strict=True):
            assert same(x[row], y[row], most)


@pytest.mark.usefixtures("poisoned", "device")
def test_the_same_plan_made_on_the_device(monkeypatch):
    window = {"sliding_window": 6, "metric": "cosine", "reduction": "documents"}
    cases = (mixed(90, largest=4), {}, {"causal": False}), (*several_documents(), window)
    for ids, documents, options in cases:
        wanted = grouped_plan(*ids, *documents.values(), **options)
        monkeypatch.setattr(device_layout, "widths_of_others", lambda *_, widths=wanted.others.widths: widths)
        assert_same_plan(device_layout.make_device_layout(*ids, *documents.values(), **options), wanted)


@pytest.mark.usefixtures("poisoned", "device")
def test_a_plan_made_on_the_device():
    """Used: without synchronisation nothing is known of other segments, of which there is none here."""
    ids = [rows(segment_ids(x, specials=[0])) for x in ([1, 2, 1, 2, 1] * 3, [1, 1, 2, 2, 1] * 3)]
    assert grouped_plan(*ids).others is None
    close(ids, {}, torch.float32, make_plan=device_layout.make_device_layout, metric="cosine")
    broken = [x.clone() for x in ids]
    broken[0][0, -1] = 2**20
    teacher, student, *_ = inputs_for(*broken, dtype=torch.float32, dim=16)
    plan = device_layout.make_device_layout(*broken)
    assert value_and_gradients(teacher, student, plan, Launches(SMALL, SMALL, 1))[0].isnan()


@pytest.mark.usefixtures("device")
def test_launches_of_a_plan_made_on_the_device(monkeypatch):
    names = record_launches(monkeypatch)
    ids, documents = several_documents()
    device_layout.make_device_layout(*ids)
    assert len(names) == 9
    device_layout.make_device_layout(*ids, *documents.values(), sliding_window=3)
    assert len(names) == 9 + 10
