"""How a token goes on for a side that reads it in pieces: what may follow the first pieces of one side's tokens."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matt_fast.alignment.vocabulary import VocabularyPair, spell_tokens

NONE = -1


class Ragged(NamedTuple):
    """Lists of integers of different lengths, one behind the other.

    Attributes:
        values: [all items] int64.
        starts: [lists + 1] int64, where each list begins in `values`.
    """

    values: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> "Ragged":
        lists = list(lists)
        starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(np.array([x for part in lists for x in part], np.int64), starts)

    def take(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The items of some lists ([n] int64), one list behind the other, and for each item the place of its list."""
        sizes = self.starts[chosen + 1] - self.starts[chosen]
        owner = np.repeat(np.arange(len(chosen)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.values[self.starts[chosen][owner] + within], owner

    def item(self, chosen: NDArray[np.int64], place: int) -> NDArray[np.int64]:
        """[n] int64: that item of some lists, NONE of lists that are shorter."""
        at = self.starts[chosen] + place
        inside = at < self.starts[chosen + 1]
        return np.where(inside, self.values[np.where(inside, at, 0)] if len(self.values) else NONE, NONE)


@dataclass(frozen=True)
class Spellings:
    """The tokens of one side by the pieces, tokens of the other side, that spell them.

    A node is the first pieces of some token that goes on behind them.

    Attributes:
        pieces: of each token.
        nodes: of each token, the node of its first piece, of its first two, and so on; NONE where it is none.
        below: of each node, the tokens that go on behind it.
        below_next: the same tokens by the place of their next piece in `next`.
        next: of each node, the pieces that may come next, ascending.
        here: of each node, the tokens that end at it; several where they stand for the same bytes.
    """

    pieces: Ragged
    nodes: Ragged
    below: Ragged
    below_next: Ragged
    next: Ragged
    here: Ragged

    @classmethod
    def of(cls, spelled: Mapping[int, Sequence[int]], rows: int) -> "Spellings":
        """From token -> pieces, of ids below `rows`."""
        below: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for token in sorted(spelled):
            for size in range(1, len(spelled[token])):
                below[tuple(spelled[token][:size])].append(token)
        number = {path: i for i, path in enumerate(below)}
        here: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for token in sorted(spelled):
            here[tuple(spelled[token])].append(token)
        steps = [[spelled[token][len(path)] for token in tokens] for path, tokens in below.items()]
        following = [sorted(set(part)) for part in steps]
        places = [{piece: i for i, piece in enumerate(part)} for part in following]
        pieces = [tuple(spelled.get(token, ())) for token in range(rows)]
        return cls(
            pieces=Ragged.of(pieces),
            nodes=Ragged.of([number.get(part[: i + 1], NONE) for i in range(len(part))] for part in pieces),
            below=Ragged.of(below.values()),
            below_next=Ragged.of([of[x] for x in part] for of, part in zip(places, steps, strict=True)),
            next=Ragged.of(following),
            here=Ragged.of(here.get(path, ()) for path in below),
        )


class Continuations(NamedTuple):
    """Both sides' tokens by the other's.

    Attributes:
        merged: student tokens by the teacher's: shared ones, and those that the teacher spells.
        split: teacher tokens that the student lacks, by the student's.
    """

    merged: Spellings
    split: Spellings

    @classmethod
    def of(cls, vocabulary: VocabularyPair) -> "Continuations":
        rows, matches = vocabulary.rows, vocabulary.matches
        merged = {i: (match.teacher_id,) for i, match in matches.items()}
        merged |= {i: pieces for i, pieces in vocabulary.subtokens.items() if i not in matches}
        shared = {match.teacher_id for match in matches.values()}
        lost = {i: token for i, token in vocabulary.teacher_tokens.items() if i not in shared}
        lost = {i: token for i, token in lost.items() if i < vocabulary.teacher_rows}
        split = spell_tokens(lost, vocabulary.student, rows)
        return cls(Spellings.of(merged, rows), Spellings.of(split, vocabulary.teacher_rows))
