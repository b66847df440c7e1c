"""Alignment of 1,000 documents of 2 kB: our functions against the plain loop of Algorithm 1.

python -m pytest benchmarks/bench_segments.py --benchmark-enable -s
"""

from __future__ import annotations

import sys
import tracemalloc
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from machine import CLOCK

from matt_fast.alignment.segments import align_segments, align_segments_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from real_tokenizers import REAL_TOKENIZERS, standard_library

DOCUMENTS, CHARACTERS = 1000, 2000
TEACHER, STUDENT = "byte-bpe", "sentencepiece-bpe"


def paper_loop(teacher: list[tuple[int, int]], student: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Algorithm 1 of the paper, line by line, on deques."""
    teacher, student = deque(teacher), deque(student)
    teacher_ids, student_ids = [], []
    end = segment = -1
    while teacher or student:
        if not teacher:
            student_ids += [segment] * len(student)
            break
        if not student:
            teacher_ids += [segment] * len(teacher)
            break
        teacher_start, teacher_end = teacher[0]
        student_start, student_end = student[0]
        if teacher_start < end:
            teacher_ids.append(segment)
            teacher.popleft()
            end = max(end, teacher_end)
        elif student_start < end:
            student_ids.append(segment)
            student.popleft()
            end = max(end, student_end)
        else:
            segment += 1
            teacher_ids.append(segment)
            student_ids.append(segment)
            teacher.popleft()
            student.popleft()
            end = max(teacher_end, student_end)
    return teacher_ids, student_ids


def paper_loop_batch(teacher, student):
    return [list(side) for side in zip(*map(paper_loop, teacher, student), strict=True)]


def one_by_one(teacher, student):
    return [list(side) for side in zip(*map(align_segments, teacher, student), strict=True)]


@pytest.fixture(scope="module")
def lists() -> tuple[list, list]:
    """The standard library's first 2 MB in pieces: offsets as the tokenizers give them, lists of tuples."""
    text = "\n".join(standard_library())
    pieces = [text[start : start + CHARACTERS] for start in range(0, DOCUMENTS * CHARACTERS, CHARACTERS)]
    assert len(pieces) == DOCUMENTS
    assert len(pieces[-1]) == CHARACTERS
    return tuple(
        REAL_TOKENIZERS[name]()(pieces, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for name in (TEACHER, STUDENT)
    )


@pytest.fixture(scope="module")
def arrays(lists):
    return tuple([np.array(document) for document in side] for side in lists)


@pytest.fixture(scope="module")
def expected(lists):
    tokens = [sum(map(len, side)) for side in lists]
    print(f"\n{DOCUMENTS} x {CHARACTERS} characters, {TEACHER} {tokens[0]} tokens, {STUDENT} {tokens[1]} tokens")
    return paper_loop_batch(*lists)


def seconds(align, offsets) -> float:
    start = CLOCK()
    align(*offsets)
    return CLOCK() - start


def added_mebibytes(align, offsets) -> float:
    """What Python and numpy allocate at the peak of a call, its result included."""
    tracemalloc.start()
    align(*offsets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


ROUTES = {
    "batch of arrays": (align_segments_batch, "arrays"),
    "batch of lists": (align_segments_batch, "lists"),
    "arrays one by one": (one_by_one, "arrays"),
    "lists one by one": (one_by_one, "lists"),
    "plain loop": (paper_loop_batch, "lists"),
}


@pytest.mark.benchmark(group="alignment", timer=CLOCK)
@pytest.mark.parametrize("route", ROUTES)
def test_align_segments(benchmark, request, lists, expected, route):
    align, inputs = ROUTES[route]
    offsets = request.getfixturevalue(inputs)
    for got, want in zip(align(*offsets), expected, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(got, want, strict=True))

    benchmark.extra_info |= {"engine": route, "documents": DOCUMENTS, "characters each": CHARACTERS}
    benchmark.extra_info["peak MiB"] = added_mebibytes(align, offsets)
    benchmark.pedantic(align, offsets, rounds=10, warmup_rounds=2)
    if benchmark.enabled:
        # In turns, so that other load on the machine falls on both.
        rounds = [(seconds(align, offsets), seconds(paper_loop_batch, lists)) for _ in range(10)]
        ours, loop = map(min, zip(*rounds, strict=True))
        benchmark.extra_info["plain loop / this, in turns"] = round(loop / ours, 1)
        print(f"{route}: {ours * 1e3:.1f} ms, plain loop {loop * 1e3:.1f} ms, ratio {loop / ours:.1f}")
