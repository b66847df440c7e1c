"""Text as the student cuts it, in the teacher's tokens: what the initialisers that run the teacher read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.support.texts import bounded_pieces, groups, up_to

MAX_CHARACTERS = 1 << 25  # of text that is read, at most
TOGETHER = 256  # documents tokenised at a time
DOCUMENT = -1  # in `SpelledText.ids`: where a document begins


@dataclass(frozen=True)
class Occurrences:
    """N places in a text where student tokens stand.

    Attributes:
        ids: [N] int64, the tokens, ascending.
        before: [N, prefix + width] int64, what the teacher has read before each.
    """

    ids: torch.Tensor
    before: torch.Tensor

    def __getitem__(self, chosen: torch.Tensor) -> "Occurrences":
        return Occurrences(self.ids[chosen], self.before[chosen])


class Pair(NamedTuple):
    """A stretch of text on both sides.

    Attributes:
        student_ids: [n] int64.
        teacher_ids: [t] int64.
        positions, ends: [m] int64, of tokens of the text: where they stand, and where the last of their pieces does.
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class SpelledText:
    """Documents one after another, tokenised by the student, each token spelled by the teacher.

    Attributes:
        ids: [n] int64, student tokens; -1 before each document.
        teacher_ids: [t] int64, how the teacher spells them, one after another: a shared token by itself, a new one by
            its sub-tokens, -1 by what the teacher puts before a text. What it cannot spell is left out.
        starts: [n + 1] int64, where each of `ids` begins in `teacher_ids`.
        prefix: what the teacher puts before a text.
        room: tokens of a stretch on either side, at most, beside what is put before it; no bound if None.
    """

    ids: NDArray[np.int64]
    teacher_ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    prefix: list[int]
    room: int | None = None

    def counts(self, rows: int) -> torch.Tensor:
        """[rows] float32: how often each student token occurs."""
        return torch.from_numpy(np.bincount(self.ids[self.ids >= 0], minlength=rows)).float()

    def occurrences(self, tokens: torch.Tensor, each: int, width: int, seed: int) -> "Occurrences":
        """Some of the places where `tokens` ([r] int64) occur: at most `each` of a token, drawn at random.

        Places with fewer than `width` teacher tokens before them do not count.

        Raises:
            ValueError: there are none.
        """
        wanted = np.zeros(max(self.ids.max(initial=0), int(tokens.max())) + 1, bool)
        wanted[tokens.numpy()] = True
        places = np.flatnonzero((self.ids >= 0) & (self.starts[:-1] >= width))
        places = np.random.default_rng(seed).permutation(places[wanted[self.ids[places]]])
        places = places[np.argsort(self.ids[places], kind="stable")]
        rank = np.arange(len(places)) - np.searchsorted(self.ids[places], self.ids[places])
        places = places[rank < each]
        if len(places) == 0:
            raise ValueError(
                f"texts: wanted text with new tokens, {width} teacher tokens or more before them, got none"
            )
        before = self.teacher_ids[self.starts[places][:, None] + np.arange(-width, 0)]
        prefix = np.broadcast_to(np.array(self.prefix, np.int64), (len(places), len(self.prefix)))
        return Occurrences(torch.from_numpy(self.ids[places]), torch.from_numpy(np.concatenate([prefix, before], 1)))

    def stretches(self, length: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Stretches of `length` student tokens, in random order, each once.

        Yields:
            teacher ids [t] int64, with the teacher's prefix, and the positions among them at which the next student
            token is told: those before its first piece.
        """
        for first, end in self._stretches(length, seed):
            starts = self.starts[first : end + 1]
            pieces = self.teacher_ids[starts[0] : starts[-1]]
            ends = np.unique(starts[:-1] - starts[0] + len(self.prefix) - 1)
            yield (
                torch.from_numpy(np.concatenate([self.prefix, pieces]).astype(np.int64)),
                torch.from_numpy(ends[(ends >= 0) & (ends < len(self.prefix) + len(pieces))]),
            )

    def pairs(self, length: int, count: int, prefix: list[int], seed: int) -> list[Pair]:
        """Up to `count` stretches of `length` student tokens each, at random, as both sides read them.

        Args:
            length, count: of stretches.
            prefix: what the student puts before a text.
            seed: of the choice.

        Raises:
            ValueError: there are none.
        """
        found = []
        for first, end in self._stretches(length, seed):
            ids, starts = self.ids[first:end], self.starts[first : end + 1]
            pieces = self.teacher_ids[starts[0] : starts[-1]]
            starts = starts - starts[0] + len(self.prefix)
            student = np.concatenate([prefix, *(prefix if i == DOCUMENT else [i] for i in ids)]).astype(np.int64)
            widths = np.where(ids == DOCUMENT, len(prefix), 1)
            compared = (ids != DOCUMENT) & (np.diff(starts) > 0)
            if compared.any():
                parts = (student, np.concatenate([self.prefix, pieces]).astype(np.int64))
                places = (len(prefix) + np.cumsum(widths) - 1, starts[1:] - 1)
                found.append(Pair(*map(torch.from_numpy, (*parts, *(x[compared] for x in places)))))
            if len(found) == count:
                break
        if not found:
            raise ValueError("texts: wanted text with tokens that the teacher can spell, got none")
        return found

    def student_stretches(self, length: int, count: int, seed: int) -> list[torch.Tensor]:
        """Up to `count` stretches of about `length` student tokens each, at random: ids, [n >= 2] int64.

        They are those that `stretches` and `pairs` of this length and seed come to last: what was fitted to the first
        is judged by others where the text has more.
        """
        parts = (self.ids[first:end] for first, end in self._stretches(length, seed)[::-1])
        wanted = (torch.from_numpy(part[part >= 0]) for part in parts)
        return list(islice((part for part in wanted if len(part) > 1), count))

    def _stretches(self, length: int, seed: int) -> NDArray[np.int64]:
        """[n, 2]: where stretches of `length` student tokens, or fewer for `room`, begin and end, in random order."""
        edges = np.array([*range(0, len(self.ids), length), len(self.ids)])
        found = np.stack([edges[:-1], edges[1:]], 1)
        if self.room is not None and max(length, np.diff(self.starts[edges]).max()) > self.room:
            found = np.array([part for first, end in found for part in self._fitting(first, end, self.room)])
        return found[np.random.default_rng(seed).permutation(len(found))]

    def _fitting(self, first: int, end: int, room: int) -> Iterator[tuple[int, int]]:
        """A stretch in parts that have `room` tokens at most on either side; without tokens that have more pieces."""
        while first < end:
            last = np.searchsorted(self.starts, self.starts[first] + room, side="right") - 1
            last = min(last, first + room, end)
            if last > first:
                yield first, last
            first = max(last, first + 1)


def spell_texts(texts: Iterable[str], vocabulary: VocabularyPair, most: int | None = None) -> SpelledText:
    """Tokenise documents, up to 33 million characters of them, and spell each token with the teacher's.

    Args:
        texts: documents.
        vocabulary: the two vocabularies.
        most: tokens that a stretch may have, what is put before it included: the model's positions. No bound if None.

    Raises:
        ValueError: there is no text.
    """
    prefix = start_of_text(vocabulary.teacher)
    room = None if most is None else most - max(len(prefix), len(start_of_text(vocabulary.student)))
    spelling = {i: [match.teacher_id] for i, match in vocabulary.matches.items()} | dict(vocabulary.subtokens)
    pieces = [spelling.get(i, []) for i in range(vocabulary.rows)] + [prefix]  # the last one for -1
    lengths = np.array([len(part) for part in pieces])
    flat = np.array([i for part in pieces for i in part], np.int64)
    offsets = np.cumsum(lengths) - lengths
    documents, pieces = [], filter(None, bounded_pieces(texts))
    for together in groups(up_to(pieces, MAX_CHARACTERS), TOGETHER):
        for ids in vocabulary.student(together, add_special_tokens=False)["input_ids"]:
            documents.append(np.array([DOCUMENT, *ids], np.int64))
    if sum(len(ids) - 1 for ids in documents) == 0:
        raise ValueError("texts: wanted text in which new tokens occur, got none")
    ids = np.concatenate(documents)
    starts = np.concatenate([[0], np.cumsum(lengths[ids])])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths[ids])
    return SpelledText(ids, flat[np.repeat(offsets[ids], lengths[ids]) + within], starts, prefix, room)
