"""What the Triton kernels refuse, what gives NaN, and what a plan is."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import matt_kernels
import numpy as np
import pytest
import sanitizer
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from test_loss import (
    GRID,
    inputs_for,
    rows,
    segment_ids,
    two_sides,
)

from matt_fast.loss import api

pytestmark = pytest.mark.usefixtures("poisoned", "device")


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
        "plan elsewhere": ({"plan": plan.to("meta")}, ValueError, "plan must be on .*; got rows on meta"),
        "half a plan elsewhere": (
            {"plan": replace(plan, long=plan.long.to("meta"))}, ValueError, "plan must be on .*; got long on meta",
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
