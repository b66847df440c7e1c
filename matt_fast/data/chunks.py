"""Texts into aligned chunks: tokenise with both tokenizers, cut at segment boundaries."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.offsets import tokenize
from matt_fast.alignment.segments import SPECIAL, align_segments_batch
from matt_fast.alignment.vocabulary import VocabularyPair, special_affixes
from matt_fast.data.packing import Chunk
from matt_fast.support.texts import bounded_pieces, groups

WITHOUT_TEXT = "documents without text"  # a reason to pass something over
TOKENISE_TOGETHER = 1024  # texts; their chunks are shuffled together, and of few texts batches would be alike
CHARACTERS_TOGETHER = 1 << 20  # about a second's work, so that several workers have enough of it


@dataclass(frozen=True)
class Side:
    """One tokenizer's part of the data: how it tokenises, and how many tokens of it a chunk may hold."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    rows: int  # of the embedding: no id may reach it
    max_length: int  # tokens of a chunk, special ones included


def sides_of(vocabulary: VocabularyPair, max_length: int) -> tuple[Side, Side]:
    """The teacher's and the student's side, with chunks of so many tokens at most."""
    return (
        Side("teacher", vocabulary.teacher, vocabulary.teacher_rows, max_length),
        Side("student", vocabulary.student, vocabulary.rows, max_length),
    )


def identity(tokenizer: PreTrainedTokenizerBase) -> list:
    """All of a tokenizer that prepared data depends on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # left there by the last call
    return [backend, special_affixes(tokenizer)]


def make_chunks(documents: Iterable[str], teacher: Side, student: Side, skipped: Counter) -> Iterator[Chunk]:
    """Cut documents into chunks that both sides can hold, at segment boundaries (paper, Appendix B).

    Each chunk gets the special tokens that its tokenizer puts around a text, as tokens outside all segments. Where it
    begins with those of its own, as chats that a template rendered do, these are not put before it again.

    Args:
        documents: texts.
        teacher, student: the two sides.
        skipped: counts what is left out, by reason; updated in place. When a chunk is handed out it has what comes
            before this chunk, and no more.

    Raises:
        ValueError: an id without an embedding row, or a `max_length` that the special tokens fill.
    """
    cutter = Cutter(teacher, student)
    for together in tokenised_together(bounded_pieces(documents)):
        for left_out, chunk in cutter.cut(together):
            skipped.update(left_out)
            if chunk is not None:
                yield chunk


def tokenised_together(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Pieces of text, in the groups that `Cutter.cut` takes."""
    return groups(pieces, TOKENISE_TOGETHER, most=CHARACTERS_TOGETHER)


class Cutter:
    """Cuts texts into chunks that both sides can hold.

    Raises:
        ValueError: a `max_length` that the special tokens fill.
    """

    def __init__(self, teacher: Side, student: Side):
        self.sides = (teacher, student)
        self.affixes = [[np.array(part, np.int64) for part in special_affixes(side.tokenizer)] for side in self.sides]
        self.limits = []
        for side, (prefix, suffix) in zip(self.sides, self.affixes, strict=True):
            special = len(prefix) + len(suffix)
            self.limits.append(side.max_length - special)
            if self.limits[-1] < 1:
                raise ValueError(f"max_length: wanted room for text beside {special} special tokens, got none")

    def cut(self, pieces: list[str]) -> Iterator[tuple[Counter, Chunk | None]]:
        """Each chunk of some texts, and what was left out before it, by reason; behind the last one None.

        Raises:
            ValueError: an id without an embedding row.
        """
        texts = list(filter(None, pieces))
        aligned = iter(_align(texts, self.sides) if texts else ())
        skipped: Counter = Counter()
        for text in pieces:
            if not text:
                skipped[WITHOUT_TEXT] += 1
                continue
            for parts in _cut(*next(aligned), self.limits, self.affixes, skipped):
                yield skipped.copy(), Chunk(*parts)
                skipped.clear()
        yield skipped, None


def _align(texts: list[str], sides: tuple[Side, Side]) -> Iterator[tuple[list[NDArray], list[NDArray]]]:
    """(ids, segments) of each text, each on both sides."""
    encoded, offsets = zip(*(tokenize(side.tokenizer, texts) for side in sides), strict=True)
    segments = align_segments_batch(*offsets)
    for row in range(len(texts)):
        ids = [part[row] for part in encoded]
        for side, side_ids in zip(sides, ids, strict=True):
            _check_ids(side, side_ids)
        yield ids, [part[row] for part in segments]


def _check_ids(side: Side, ids: NDArray[np.int64]) -> None:
    if len(ids) and ids.max() >= side.rows:
        token = side.tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise ValueError(
            f"{side.name} tokenizer: wanted ids below the {side.rows} embedding rows, got {ids.max()} ({token!r})"
        )


def _cut(ids, segments, limits, affixes, skipped: Counter) -> Iterator[tuple[NDArray, ...]]:
    """The arrays of chunks. Greedy: each takes as many whole segments as fit on both sides."""
    n_segments = max(int(part.max(initial=-1)) for part in segments) + 1
    if n_segments == 0:
        skipped["documents without a common boundary"] += 1
        return
    # ends[side][k]: tokens of that side in the first k segments
    ends = [np.searchsorted(part, np.arange(n_segments + 1)) for part in segments]
    first = 0
    while first < n_segments:
        last = min(
            int(np.searchsorted(end, end[first] + limit, side="right")) - 1
            for end, limit in zip(ends, limits, strict=True)
        )
        if last <= first:
            skipped["segments longer than a chunk"] += 1
            first += 1
            continue
        cut_ids, cut_segments = [], []
        for side in range(2):
            inside = slice(ends[side][first], ends[side][last])
            prefix, suffix = affixes[side]
            if np.array_equal(ids[side][inside][: len(prefix)], prefix):
                prefix = prefix[:0]
            cut_ids.append(np.concatenate([prefix, ids[side][inside], suffix]))
            around = [np.full(len(part), SPECIAL) for part in (prefix, suffix)]
            cut_segments.append(np.concatenate([around[0], segments[side][inside] - first, around[1]]))
        yield *cut_ids, *cut_segments
        first = last
