# ruff: noqa: RUF001 - look-alike characters are test data
from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL_TOKENIZERS, standard_library

from matt_fast.alignment import segments
from matt_fast.alignment.offsets import tokenize
from matt_fast.alignment.segments import align_segments, align_segments_batch

PAIRS = list(itertools.combinations(REAL_TOKENIZERS, 2))


# The definition, by enumeration ---------------------------------------------------------------------------------------


def with_token_before(offsets):
    """Tokens that count for cuts, and which of them each token goes with: a stray zero-width token with an earlier."""
    counting, goes_with = [], []
    for x, (start, end) in enumerate(offsets):
        if not (start == end and any(before > start for _, before in offsets[:x])):
            counting.append((start, end))
        goes_with.append(len(counting) - 1)
    return counting, goes_with


def possible_cuts(teacher, student):
    """All (i, j) such that whatever is before the cut ends no later than whatever is behind it starts."""
    ends = [
        [max([end for _, end in side[:i]], default=-1) for i in range(len(side) + 1)] for side in (teacher, student)
    ]
    starts = [
        [min([start for start, _ in side[i:]], default=np.inf) for i in range(len(side) + 1)]
        for side in (teacher, student)
    ]
    return {
        (i, j)
        for i in range(len(teacher) + 1)
        for j in range(len(student) + 1)
        if max(ends[0][i], ends[1][j]) <= min(starts[0][i], starts[1][j])
    }


def clear_cuts(teacher, student):
    """The possible cuts inside both sides, without those of a place that goes with several which have text between."""
    inner = {(i, j) for i, j in possible_cuts(teacher, student) if 0 < i < len(teacher) and 0 < j < len(student)}

    def has_text_between(side, places):
        first, last = min(places), max(places)
        return max(end for _, end in side[:last]) > min(start for start, _ in side[first:])

    unclear_i = {i for i, _ in inner if has_text_between(student, [b for a, b in inner if a == i])}
    unclear_j = {j for _, j in inner if has_text_between(teacher, [a for a, b in inner if b == j])}
    return {(i, j) for i, j in inner if i not in unclear_i and j not in unclear_j}


def by_definition(teacher, student):
    """Of the longest chains of clear cuts from the beginning to the end, the one whose cuts come earliest."""
    (teacher, teacher_goes), (student, student_goes) = with_token_before(teacher), with_token_before(student)
    if not teacher or not student:
        return [-100] * len(teacher_goes), [-100] * len(student_goes)
    inner = sorted(clear_cuts(teacher, student))
    before, behind = {}, {}  # the most cuts that a chain can have before this one and behind it
    for i, j in inner:
        before[i, j] = max([before[a, b] + 1 for a, b in before if a < i and b < j], default=0)
    for i, j in reversed(inner):
        behind[i, j] = max([behind[a, b] + 1 for a, b in behind if a > i and b > j], default=0)
    most = max([before[cut] + behind[cut] + 1 for cut in inner], default=0)
    chain = []
    for number in range(most):
        candidates = [cut for cut in inner if before[cut] == number and before[cut] + behind[cut] + 1 == most]
        earliest = tuple(map(min, zip(*candidates, strict=True)))
        assert earliest in candidates  # on both sides at once: the definition picks exactly one chain
        chain.append(earliest)
    return (
        [sum(i <= x for i, _ in chain) for x in teacher_goes],
        [sum(j <= x for _, j in chain) for x in student_goes],
    )


def paper_loop(teacher, student):
    """Algorithm 1 of the paper, line by line."""
    teacher, student = deque(teacher), deque(student)
    teacher_ids, student_ids = [], []
    end = segment = -1
    while teacher or student:
        if not teacher:
            return teacher_ids, student_ids + [segment] * len(student)
        if not student:
            return teacher_ids + [segment] * len(teacher), student_ids
        if teacher[0][0] < end:
            teacher_ids.append(segment)
            end = max(end, teacher.popleft()[1])
        elif student[0][0] < end:
            student_ids.append(segment)
            end = max(end, student.popleft()[1])
        else:
            segment += 1
            teacher_ids.append(segment)
            student_ids.append(segment)
            end = max(teacher.popleft()[1], student.popleft()[1])
    return teacher_ids, student_ids


def in_order(offsets):
    return all(a[0] <= b[0] for a, b in itertools.pairwise(offsets))


def aligned(*arguments):
    teacher, student = align_segments(*arguments)
    assert teacher.dtype == student.dtype == np.int64
    return teacher.tolist(), student.tolist()


def check(teacher, student):
    """Definition, Algorithm 1 where it applies, and the promises made to callers, each looked at directly."""
    found = aligned(teacher, student)
    assert found == by_definition(teacher, student)
    if not teacher or not student:
        return
    counting = [with_token_before(side) for side in (teacher, student)]
    clear = clear_cuts(counting[0][0], counting[1][0])
    inner = {(i, j) for i, j in possible_cuts(counting[0][0], counting[1][0]) if i and j}
    inner = {(i, j) for i, j in inner if i < len(counting[0][0]) and j < len(counting[1][0])}
    if in_order(teacher) and in_order(student) and clear == inner:
        assert found == paper_loop(teacher, student)

    count = found[0][-1] + 1
    for ids in found:
        assert ids == sorted(ids)
        assert set(ids) == set(range(count))

    # No boundary in a token: all that covers characters lies on its own side of each boundary.
    sides = [
        [(start, end, k) for (start, end), k in zip(side, ids, strict=True) if start < end]
        for side, ids in zip((teacher, student), found, strict=True)
    ]
    tokens = sorted(sides[0] + sides[1], key=lambda token: token[2])
    for cut in range(1, count):
        reach = max([end for _, end, k in tokens if k < cut], default=0)
        assert all(start >= reach for start, _, k in tokens if k >= cut)

    # Nothing left to cut: no clear cut has tokens of both sides in its segment before it and behind it.
    first = [[] for _ in range(count + 1)]
    for (kept, goes_with), ids in zip(counting, found, strict=True):
        by_token = dict(zip(goes_with, ids, strict=True))
        for k in range(count + 1):
            first[k].append(sum(by_token[x] < k for x in range(len(kept))))
    for i, j in clear:
        assert not any(a < i < c and b < j < d for (a, b), (c, d) in itertools.pairwise(first))


# Cases by hand --------------------------------------------------------------------------------------------------------

CASES = {
    "same tokens": ([(0, 5), (5, 11)], [(0, 5), (5, 11)], [0, 1], [0, 1]),
    "figure 2: _for m ula against _form ula": ([(0, 4), (4, 5), (5, 8)], [(0, 5), (5, 8)], [0, 0, 1], [0, 1]),
    "no common boundary": ([(0, 2), (2, 5), (5, 9)], [(0, 3), (3, 6), (6, 9)], [0, 0, 0], [0, 0, 0]),
    "leading space on one side": ([(0, 5), (5, 11)], [(0, 5), (6, 11)], [0, 1], [0, 1]),
    "leading space on one side, finer tokens": ([(0, 5), (5, 11)], [(0, 5), (6, 8), (8, 11)], [0, 1], [0, 1, 1]),
    "space is a token of its own on one side": ([(0, 5), (5, 6), (6, 11)], [(0, 5), (6, 11)], [0, 0, 0], [0, 0]),
    "space belongs to the word before it": ([(0, 6), (6, 11)], [(0, 5), (6, 11)], [0, 1], [0, 1]),
    "trimmed to zero width (RoBERTa)": ([(0, 1), (2, 2), (3, 4)], [(0, 1), (1, 2), (2, 4)], [0, 0, 1], [0, 0, 1]),
    "dummy prefix of zero width": ([(0, 0), (0, 5)], [(0, 5)], [0, 0], [0]),
    "dummy prefix reported over the first character": ([(0, 1), (0, 5), (5, 9)], [(0, 5), (5, 9)], [0, 0, 1], [0, 1]),
    "dummy prefix on both sides": ([(0, 0), (0, 5)], [(0, 0), (0, 5)], [0, 1], [0, 1]),
    "zero width between words, one side": ([(0, 5), (5, 5), (5, 9)], [(0, 5), (5, 9)], [0, 1, 1], [0, 1]),
    "zero width between words, both": ([(0, 5), (5, 5), (5, 9)], [(0, 5), (5, 5), (5, 9)], [0, 1, 2], [0, 1, 2]),
    "several of zero width": ([(0, 5), (5, 5), (5, 5), (5, 9)], [(0, 5), (5, 5), (5, 9)], [0, 1, 2, 2], [0, 1, 2]),
    "(0, 0) in the text": ([(0, 5), (0, 0), (5, 9)], [(0, 5), (5, 9)], [0, 0, 1], [0, 1]),
    "(0, 0) at the end, unmasked": ([(0, 5), (5, 9), (0, 0)], [(0, 5), (5, 9), (0, 0)], [0, 1, 1], [0, 1, 1]),
    "zero width inside the other's token": ([(0, 3), (3, 3), (3, 5)], [(0, 5), (5, 6)], [0, 0, 0], [0, 0]),
    "only zero width": ([(0, 0), (0, 0)], [(0, 0), (0, 0), (0, 0)], [0, 1], [0, 1, 1]),
    "bytes of one character": ([(0, 1), *[(1, 2)] * 3, (2, 3)], [(0, 1), (1, 2), (2, 3)], [0, 1, 1, 1, 2], [0, 1, 2]),
    "bytes of one character, both sides": ([(0, 1)] * 4 + [(1, 2)], [(0, 1)] * 2 + [(1, 2)], [0] * 4 + [1], [0, 0, 1]),
    "space and first byte in one token": ([(0, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)], [0, 0, 1], [0, 0, 1]),
    "NFKC: one character, many tokens": ([(0, 2), (1, 2), (1, 2), (2, 4)], [(0, 2), (2, 4)], [0, 0, 0, 1], [0, 1]),
    "normaliser drops characters": ([(0, 3), (3, 4), (4, 5), (5, 8)], [(0, 3), (5, 8)], [0, 0, 0, 0], [0, 0]),
    "accent composed into its letter": ([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)], [0, 0, 0], [0, 0]),
    "dropped at the end": ([(0, 3), (3, 4), (4, 5)], [(0, 3)], [0, 0, 0], [0]),
    "dropped at the beginning": ([(0, 1), (1, 2), (2, 5)], [(2, 5)], [0, 0, 0], [0]),
    "each drops what the other keeps": ([(0, 5), (10, 15)], [(5, 10), (10, 15)], [0, 1], [0, 1]),
    "boundary inside the other's gap": ([(0, 2), (8, 9)], [(0, 2), (2, 5), (5, 8), (8, 9)], [0, 0], [0, 0, 0, 0]),
    "out of order": ([(0, 2), (4, 6), (2, 4), (6, 8)], [(0, 2), (2, 4), (4, 6), (6, 8)], [0, 1, 1, 2], [0, 1, 1, 2]),
    "out of order to the beginning": ([(0, 2), (2, 4), (0, 1)], [(0, 2), (2, 4)], [0, 0, 0], [0, 0]),
    "overlap": ([(0, 3), (2, 5), (5, 6)], [(0, 2), (2, 5), (5, 6)], [0, 0, 1], [0, 0, 1]),
    "student ends early": ([(0, 3), (3, 6), (6, 9), (9, 12)], [(0, 3), (3, 6)], [0, 1, 1, 1], [0, 1]),
    "student ends early within a token": ([(0, 3), (3, 9), (9, 12)], [(0, 3), (3, 5)], [0, 1, 1], [0, 1]),
    "one token": ([(0, 9)], [(0, 9)], [0], [0]),
    "whole text against many": ([(0, 9)], [(k, k + 1) for k in range(9)], [0], [0] * 9),
    "no token on one side": ([(0, 3), (3, 5)], [], [-100, -100], []),
    "no token at all": ([], [], [], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    teacher, student, teacher_ids, student_ids = CASES[case]
    assert aligned(teacher, student) == (teacher_ids, student_ids)
    assert aligned(student, teacher) == (student_ids, teacher_ids)
    check(teacher, student)
    check(student, teacher)


def test_special_tokens_are_left_out_whatever_their_offsets():
    teacher = [(0, 0), (0, 5), (3, -7), (5, 9), (0, 0)]
    assert aligned(teacher, [(0, 5), (5, 9)], [1, 0, 1, 0, 1]) == ([-100, 0, -100, 1, -100], [0, 1])
    assert aligned([(0, 5), (5, 9)], teacher, None, [True, False, True, False, True]) == (
        [0, 1],
        [-100, 0, -100, 1, -100],
    )


def test_only_special_tokens_on_one_side():
    assert aligned([(0, 5), (5, 9)], [(0, 0), (0, 0)], None, [1, 1]) == ([-100, -100], [-100, -100])
    teacher, student = align_segments_batch(
        [[(0, 5)], [(0, 5), (5, 9)], [(0, 2)]],
        [[(0, 5)], [(0, 0), (5, 9)], [(0, 2)]],
        student_special=[[0], [1, 1], [0]],
    )
    assert [ids.tolist() for ids in teacher] == [[0], [-100, -100], [0]]
    assert [ids.tolist() for ids in student] == [[0], [-100, -100], [0]]


def test_bos_on_one_side_only():
    text = "Hello world, hello."
    mistral, deepseek = REAL_TOKENIZERS["sentencepiece-bpe"](), REAL_TOKENIZERS["byte-bpe"]()
    with_bos = mistral(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    without = deepseek(text, return_offsets_mapping=True)["offset_mapping"]
    teacher, student = align_segments(with_bos["offset_mapping"], without, with_bos["special_tokens_mask"])
    assert teacher[0] == -100
    assert (teacher[1:].tolist(), student.tolist()) == aligned(with_bos["offset_mapping"][1:], without)


# Real tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three \t tab\r\n\r\nlines \n ",
    "def f(x):\n    return x  # noqa\n\n\n",
    "naïve café, déjà vu; cafe\u0301 a\u0300\u0301\u0302\u0303 Å\u030a",
    "ﬁne ﬂow ① ½ ℌ ﷺ Ⅷ ㍿ ２０２４ ｶﾞ",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 e\u200bf\u200dg\u00adh\ufeff",
    "日本語のテキストと中文字符，한국어도。",
    "السَّلَامُ عَلَيْكُمْ שָׁלוֹם",
    "မြန်မာ ဘာသာ ไทย ภาษา हिन्दी",
    "\x00\x01\x02 nul \x7f\x80\x9f \u2028\u2029\u3000x\u00a0y",
    "𝕳𝖊𝖑𝖑𝖔 𠀋 \U000e0001 \U0010ffff \ufffd \ufdd0",
    "İıſß ŉ ΐ ǰ Ω Å ẞ",
    "1234567890 3.14159 1e-10 0xDEADBEEF 12345678901234567890",
    "<s> </s> [CLS] [SEP] <unk> <|endoftext|> <SPECIAL_1>",
    "▁ ▁▁word Ġword ##ing",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\x\\y",
    " leading and trailing ",
]  # fmt: skip

unicode_texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(
        st.one_of(
            st.sampled_from(
                ["the", " of", " ", "  ", "\n", "\n\n", "\t", "\x00", "e\u0301", "ﬁ", "👩‍👩‍👧", "👍🏽", "世界", "ﷺ"]
            ),
            st.sampled_from(
                ["\u200b", "\u00ad", "مرحبا", "\u0301", "①", "ß", "İ", "한", "ᄒ\u1161", "(", "42", ".", "▁"]
            ),
            st.characters(exclude_categories=["Cs"]),
        ),
        max_size=14,
    ).map("".join),
)


def encoded(name, texts, special=True):
    tokenizer = REAL_TOKENIZERS[name]()
    found = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=special)
    return found["offset_mapping"], found["special_tokens_mask"]


def without_special(offsets, mask):
    return [offset for offset, special in zip(offsets, mask, strict=True) if not special]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_real_tokenizers_on_awkward_texts(teacher, student):
    (teacher_offsets, teacher_mask), (student_offsets, student_mask) = encoded(teacher, TEXTS), encoded(student, TEXTS)
    together = align_segments_batch(teacher_offsets, student_offsets, teacher_mask, student_mask)
    for d, _ in enumerate(TEXTS):
        ours = without_special(teacher_offsets[d], teacher_mask[d])
        theirs = without_special(student_offsets[d], student_mask[d])
        check(ours, theirs)
        check(theirs, ours)
        expected = by_definition(ours, theirs)
        for ids, mask, want in zip(together, (teacher_mask, student_mask), expected, strict=True):
            special = np.array(mask[d], bool)
            assert ids[d][~special].tolist() == want
            assert (ids[d][special] == -100).all()


@settings(max_examples=60, deadline=None)
@given(text=unicode_texts, special=st.booleans())
def test_real_tokenizers_on_any_text(text, special):
    offsets = {}
    for name in REAL_TOKENIZERS:
        found, mask = encoded(name, [text], special)
        offsets[name] = without_special(found[0], mask[0])
    for teacher, student in PAIRS:
        check(offsets[teacher], offsets[student])


@settings(max_examples=30, deadline=None)
@given(text=unicode_texts, pair=st.sampled_from(PAIRS))
def test_special_tokens_not_marked(text, pair):
    check(*(encoded(name, [text])[0][0] for name in pair))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_real_tokenizers_on_long_documents_equal_algorithm_1(teacher, student):
    texts = [text[:4000] for text in standard_library(8)]
    sides = (tokenize(REAL_TOKENIZERS[name](), texts)[1] for name in (teacher, student))
    teacher_offsets, student_offsets = ([x.tolist() for x in side] for side in sides)
    found = zip(*align_segments_batch(teacher_offsets, student_offsets), strict=True)
    for ours, theirs, ids in zip(teacher_offsets, student_offsets, found, strict=True):
        assert in_order(ours)
        assert in_order(theirs)
        assert tuple(side.tolist() for side in ids) == paper_loop(ours, theirs)


# Made-up offsets ------------------------------------------------------------------------------------------------------

spans = st.tuples(st.integers(0, 8), st.sampled_from([0, 0, 1, 1, 2, 4])).map(lambda s: (s[0], s[0] + s[1]))
any_offsets = st.lists(spans, max_size=9)


@st.composite
def forward_offsets(draw):
    """Tokens from left to right, with gaps, overlaps, zero widths and repeated spans."""
    offsets, end = [], 0
    for gap, width in draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3)), max_size=12)):
        start = max(end + gap, offsets[-1][0] if offsets else 0)
        offsets.append((start, start + width))
        end = max(end, start + width)
    return offsets


offsets = st.one_of(any_offsets, forward_offsets())


@settings(max_examples=600, deadline=None)
@given(teacher=offsets, student=offsets)
def test_any_offsets(teacher, student):
    check(teacher, student)


def test_long_runs_without_characters_equal_algorithm_1():
    random = np.random.default_rng(0)
    for _ in range(300):
        sides = []
        for _ in range(2):
            widths = random.choice([0] * 8 + [1, 2], 300)
            ends = np.cumsum(widths)
            sides.append(list(zip((ends - widths).tolist(), ends.tolist(), strict=True)))
        assert aligned(*sides) == paper_loop(*sides)


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.tuples(offsets, offsets), max_size=6),
    seed=st.integers(0, 2**32 - 1),
    chunk=st.integers(1, 40),
)
def test_batch_equals_one_by_one(documents, seed, chunk):
    random = np.random.default_rng(seed)
    teacher, student = [list(side) for side in zip(*documents, strict=True)] if documents else ([], [])
    masks = [[random.random(len(document)) < 0.2 for document in side] for side in (teacher, student)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "CHUNK", chunk)
        together = align_segments_batch(teacher, student, *masks)
    alone = [align_segments(*document) for document in zip(teacher, student, *masks, strict=True)]
    assert len(together[0]) == len(together[1]) == len(documents)
    for d, pair in enumerate(alone):
        for side in (0, 1):
            assert together[side][d].dtype == np.int64
            assert np.array_equal(together[side][d], pair[side])


@given(teacher=forward_offsets(), student=forward_offsets(), scale=st.sampled_from([1000, 2**40]))
def test_far_apart_offsets(teacher, student, scale):
    def far(side):
        return [(start * scale, end * scale) for start, end in side]

    assert aligned(far(teacher), far(student)) == aligned(teacher, student)


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.uint64, np.int64])
def test_inputs_may_be_arrays_lists_or_tensors(kind):
    teacher, student = [(0, 2), (2, 5)], [(0, 2), (3, 5)]
    expected = aligned(teacher, student)
    assert aligned(np.array(teacher, kind), np.array(student, kind)) == expected
    assert aligned(np.asfortranarray(teacher).astype(kind), [[0, 2], [3, 5]]) == expected
    assert aligned(torch.tensor(teacher), tuple(student)) == expected
    assert aligned(np.array(teacher, kind), np.array(student, kind), np.zeros(2, bool), torch.zeros(2) > 0) == expected


def test_padded_array_with_mask():
    padded = np.array([[[0, 2], [2, 5], [0, 0]], [[0, 1], [0, 0], [0, 0]]])
    mask = np.array([[0, 0, 1], [0, 1, 1]])
    teacher, student = align_segments_batch(padded, padded, mask, mask)
    assert [ids.tolist() for ids in teacher] == [ids.tolist() for ids in student] == [[0, 1, -100], [0, -100, -100]]


GOOD = [(0, 2), (2, 5)]
BAD = {
    "row of three": ([(0, 1, 2), (1, 2, 3)], ValueError, r"teacher_offsets must have shape \[n, 2\], got \[2, 3\]"),
    "ragged": ([(0, 1), (1,)], ValueError, r"teacher_offsets must have shape \[n, 2\], got rows of different lengths"),
    "flat": ([0, 1, 2], ValueError, r"teacher_offsets must have shape \[n, 2\], got \[3\]"),
    "nested": ([GOOD], ValueError, r"teacher_offsets must have shape \[n, 2\], got \[1, 2, 2\]"),
    "nested tuples": ([tuple(GOOD)], ValueError, r"teacher_offsets must have shape \[n, 2\], got \[1, 2, 2\]"),
    "float": ([(0.0, 1.5)], TypeError, "teacher_offsets must hold integers, got dtype float64"),
    "none": ([(0, 1), None], (TypeError, ValueError), "teacher_offsets must"),
    "nones": ([(0, 1), (None, None)], TypeError, "teacher_offsets must hold integers, got dtype object"),
    "bool": ([(True, False)], TypeError, "teacher_offsets must hold integers, got dtype bool"),
    "text": (["ab"], (TypeError, ValueError), "teacher_offsets must"),
    "reversed": ([(0, 2), (5, 4)], ValueError, r"0 <= start <= end, got \(5, 4\) at token 1"),
    "negative": ([(-1, 2)], ValueError, r"teacher_offsets must hold .* got \(-1, 2\) at token 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_offsets(case):
    bad, error, message = BAD[case]
    with pytest.raises(error, match=message):
        align_segments(bad, GOOD)
    with pytest.raises(error, match=message.replace("teacher", "student")):
        align_segments(GOOD, bad)
    with pytest.raises(error, match=message.replace("teacher_offsets", r"student_offsets\[1\]")):
        align_segments_batch([GOOD, GOOD], [GOOD, bad])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1], ValueError, r"student_special must have shape \[2\], one value per token, got \[1\]"),
        ([[0, 1]], ValueError, r"student_special must have shape \[2\]"),
        ([0.0, 1.0], TypeError, "student_special must hold booleans or 0 and 1, got dtype float64"),
        ([0, 2], ValueError, "student_special must hold booleans or 0 and 1, got values from 0 to 2"),
        (["a", "b"], TypeError, "student_special must hold booleans or 0 and 1"),
        ([[0], [0, 1]], ValueError, "student_special must have"),
    ],
)
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=message):
        align_segments(GOOD, GOOD, None, mask)
    with pytest.raises(error, match=message.replace("student_special", r"student_special\[2\]")):
        align_segments_batch([GOOD] * 3, [GOOD] * 3, None, [[0, 0], [0, 0], mask])


def test_batch_names_the_document_in_a_later_chunk(monkeypatch):
    monkeypatch.setattr(segments, "CHUNK", 4)
    bad = [GOOD] * 5 + [[(0, 2), (3, 1)]] + [GOOD]
    with pytest.raises(ValueError, match=r"teacher_offsets\[5\] must hold .* got \(3, 1\) at token 1"):
        align_segments_batch(bad, [GOOD] * 7)


@pytest.mark.parametrize("name", ["student_offsets", "teacher_special", "student_special"])
def test_batch_of_different_lengths(name):
    arguments = {"teacher_offsets": [GOOD] * 2, "student_offsets": [GOOD] * 2}
    arguments[name] = [GOOD] if name == "student_offsets" else [[0, 0]]
    with pytest.raises(ValueError, match=f"{name} must have one entry per document, 2 as in teacher_offsets, got 1"):
        align_segments_batch(**arguments)
