"""A plan made by kernels, as for ids on a GPU, against the one of torch operations."""

from itertools import product

import pytest
import sanitizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import long_segments
from matt_kernels import device_plan, plan
from test_kernels_inputs import ids_that_may_break_the_rules
from test_loss import packed, rows, segment_ids, text_like, two_sides

pytestmark = pytest.mark.usefixtures("poisoned", "device", "small_blocks")

CHOICES = list(product(("aim", "aim_star"), (True, False), (None, 3), ("pairs", "documents")))


@pytest.fixture
def small_blocks(monkeypatch):
    """Small inputs have several blocks then."""
    for name in ("BLOCK", "LONG_BLOCK"):
        monkeypatch.setattr(device_plan, name, 32)


def both(segments, documents=(None, None), widths=(16, 16), choice=CHOICES[0]):
    names = "variant", "causal", "sliding_window", "reduction"
    options = dict(zip(names, choice, strict=True)) | {"widths": widths}
    makers = plan.make_plan, device_plan.make_device_plan
    return [make(*segments, *documents, **options) for make in makers]


def assert_same(expected, found):
    """In what is used; beyond the counts a plan may have what it likes."""
    assert torch.equal(expected.counts, found.counts)
    for batch, counts in enumerate(expected.counts.tolist()):
        for name, count in zip(("rows", "tiles", "long"), counts, strict=True):
            x, y = (getattr(plan, name)[batch, :, :count] for plan in (expected, found))
            assert torch.equal(x, y), (name, (x != y).nonzero())
    for name in ("row_weights", "pair_weight", "teacher_segments", "student_segments"):
        assert torch.equal(getattr(expected, name), getattr(found, name)), name


CASES = {
    "special tokens": lambda: (two_sides(), {}),
    "packed": lambda: (packed()[:2], packed()[2]),
    "long": lambda: (long_segments(), {}),
    "one token": lambda: ((rows([0]), rows([0])), {}),
    "longer than a block": lambda: (text_like(80), {}),
    "one long segment": lambda: ((rows(segment_ids([100])), rows(segment_ids([50]))), {}),
}


@pytest.mark.parametrize("widths", [(16, 16), (32, 16)])
@pytest.mark.parametrize("case", CASES)
def test_the_same_plan(case, widths, monkeypatch):
    segments, documents = CASES[case]()
    sanitizer.install(monkeypatch)
    for choice in CHOICES[:: 3 if case == "packed" else 7]:
        assert_same(*both(segments, tuple(documents.values()) or (None, None), widths, choice))


def test_other_kinds_of_ids():
    segments, documents = packed()[:2], packed()[2].values()
    expected, _ = both(segments, documents)
    spread = [x.repeat_interleave(2, 1)[:, ::2] for x in segments]
    assert_same(expected, both(spread, documents)[1])
    assert_same(expected, both([x.int() for x in segments], [x.int() for x in documents])[1])


@settings(max_examples=25, deadline=None)
@given(ids_that_may_break_the_rules(), st.booleans())
def test_the_same_ids_break_the_rules(sides, with_documents):
    segments, documents = zip(*((torch.tensor([x]) for x in side) for side in sides), strict=True)
    expected, found = both(segments, documents if with_documents else (None, None))
    assert expected.pair_weight.isfinite() == found.pair_weight.isfinite()
    if expected.pair_weight.isfinite():
        assert_same(expected, found)


@pytest.mark.parametrize("ids", [[0, 1, 2, 100], [1, 1, 2, 2], [0, 5, 3, 1], [3, 3, 3, 3], [2**40, 0, -(2**40), 1]])
def test_broken_ids_stay_in_bounds(ids, monkeypatch):
    sanitizer.install(monkeypatch)
    segments = torch.tensor([ids])
    _, found = both((segments, segments), (segments, segments))
    assert found.pair_weight.isnan()
    rows_of, tiles = found.rows[0, :, : found.counts[0, 0]], found.tiles[0, :, : found.counts[0, 1]]
    assert ((rows_of[:6] >= 0) & (rows_of[:6] <= 4)).all()
    assert ((tiles[:6] >= 0) & (tiles[:6] <= 4)).all()
