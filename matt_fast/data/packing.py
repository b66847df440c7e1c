"""Chunks, and how several of them are packed into a row."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OPEN_ROWS = 16  # rows that packing fills at a time; more gain under half a percent


@dataclass(frozen=True)
class Chunk:
    """A stretch of one document under both tokenizers. All arrays are int64, [n_teacher] or [n_student]."""

    teacher_ids: NDArray[np.int64]
    student_ids: NDArray[np.int64]
    teacher_segments: NDArray[np.int64]
    student_segments: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[2]: teacher and student tokens."""
        return np.array([len(self.teacher_ids), len(self.student_ids)])

    @property
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        return self.teacher_ids, self.student_ids, self.teacher_segments, self.student_segments


class Packer:
    """Puts chunks together into rows, each into the first open row with room for it on both sides.

    Args:
        limits: teacher and student tokens of a row, at most.
        open_rows: rows being filled at a time.
        rows: those that are being filled already.
    """

    def __init__(self, limits: tuple[int, int], open_rows: int = OPEN_ROWS, rows: Iterable[list[Chunk]] = ()):
        self.limits, self.open_rows = limits, open_rows
        self.rows = list(rows)
        self.room: list[tuple[int, int]] = []  # of each row, on each side
        for row in self.rows:
            self.room.append(limits)
            for chunk in row:
                self._take(-1, chunk.lengths.tolist())

    def add(self, chunk: Chunk) -> list[Chunk] | None:
        """Place a chunk, which is within the limits.

        The fullest row is handed out where none has room for it, or where more are open than there should be.
        """
        closed, lengths = None, chunk.lengths.tolist()
        row = self._row_for(lengths)
        if len(self.rows) > self.open_rows or (row is None and len(self.rows) == self.open_rows):
            fullest = min(range(len(self.rows)), key=lambda x: min(self.room[x]))
            closed = self.rows.pop(fullest)
            del self.room[fullest]
            row = self._row_for(lengths)
        if row is None:
            row = len(self.rows)
            self.rows.append([])
            self.room.append(self.limits)
        self.rows[row].append(chunk)
        self._take(row, lengths)
        return closed

    def _row_for(self, lengths: Sequence[int]) -> int | None:
        """The first open row with room for so many tokens on either side."""
        return next((x for x, room in enumerate(self.room) if room[0] >= lengths[0] and room[1] >= lengths[1]), None)

    def _take(self, row: int, lengths: Sequence[int]) -> None:
        self.room[row] = self.room[row][0] - lengths[0], self.room[row][1] - lengths[1]


def pack(chunks: Iterable[Chunk], limits: tuple[int, int], open_rows: int = OPEN_ROWS) -> Iterator[list[Chunk]]:
    """Put chunks together into rows, see `Packer`; those that are open at the end come last."""
    packer = Packer(limits, open_rows)
    for chunk in chunks:
        if (row := packer.add(chunk)) is not None:
            yield row
    yield from packer.rows
