"""Where streams of batches stand, and how what is to be read goes round the processes.

What is read is a sequence of items without an end, numbered through all passes over the data: groups of texts that are
tokenised together, prepared chunks, or shards of a source that has enough of them. Items go round the processes in
turn. So a position says of each item whether it is behind, and another number of processes can go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from matt_fast.data.packing import Chunk


def _empty(*shape: int) -> NDArray[np.int64]:
    return np.empty(shape, np.int64)


@dataclass(frozen=True)
class Deal:
    """Which items go to which process.

    Attributes:
        first: all items before this one are behind.
        behind: [items] int64, ascending: those from `first` on that are behind too. The others go round.
        begun: [items, 3] int64: of items that are begun their number, groups of them that are behind, and chunks of the
            group after those.
    """

    first: int = 0
    behind: NDArray[np.int64] = field(default_factory=lambda: _empty(0))
    begun: NDArray[np.int64] = field(default_factory=lambda: _empty(0, 3))

    def mine(self, items: NDArray[np.int64], process: int, processes: int) -> NDArray[np.bool_]:
        """Which of some items are those of a process."""
        before = np.searchsorted(self.behind, items)
        turn = (items - self.first - before) % processes == process
        return turn & (items >= self.first) & ~np.isin(items, self.behind)

    def begins(self, item: int) -> tuple[int, int]:
        """Groups of an item that are behind, and chunks of the next."""
        found = self.begun[self.begun[:, 0] == item]
        return (int(found[0, 1]), int(found[0, 2])) if len(found) else (0, 0)


@dataclass(frozen=True)
class Position:
    """Where a process's stream of chunks stands; together with the stream's arguments it decides all that follows.

    Attributes:
        epoch: the pass over the data, from 0.
        before: items in the passes before it.
        item: the item that the last chunk was of; of this process those before it are behind.
        group, chunk: groups of it that are behind, and chunks of the group after those.
        sharded: whether items are shards; None before the first chunk.
        read: chunks that are behind, where some are the teacher's own (`OwnChunks`); else 0.
        deal: whose items are which.
        open_shapes: [chunks, 3] int32: of the chunks in rows that packing is filling: row, teacher and student tokens.
        open_numbers: [numbers] int32: their four arrays, one chunk after the other.
    """

    epoch: int = 0
    before: int = 0
    item: int = 0
    group: int = 0
    chunk: int = 0
    sharded: bool | None = None
    read: int = 0
    deal: Deal = field(default_factory=Deal)
    open_shapes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 3), np.int32))
    open_numbers: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def with_open_rows(self, rows: list[list[Chunk]]) -> "Position":
        """This position, with rows that packing is filling."""
        placed = [(number, chunk) for number, row in enumerate(rows) for chunk in row]
        shapes = [(number, *chunk.lengths) for number, chunk in placed]
        parts = [part for _, chunk in placed for part in chunk.arrays]
        return replace(
            self,
            open_shapes=np.array(shapes, np.int32).reshape(-1, 3),
            open_numbers=np.concatenate([np.empty(0, np.int32), *parts], dtype=np.int32, casting="same_kind"),
        )

    def open_rows(self) -> list[list[Chunk]]:
        """The rows that packing is filling."""
        rows: dict[int, list[Chunk]] = {}
        numbers, start = self.open_numbers.astype(np.int64), 0
        for row, teacher, student in self.open_shapes.tolist():
            ends = start + np.cumsum([teacher, student, teacher, student])
            rows.setdefault(row, []).append(Chunk(*np.split(numbers[start : ends[-1]], ends[:-1] - start)))
            start = ends[-1]
        return list(rows.values())


def deal_anew(positions: Sequence[Position], processes: int) -> list[Position]:
    """The positions from which another number of processes goes on, where these stopped behind the same step.

    What is not behind goes round the new processes, as do the rows that packing was filling: each item and each chunk
    comes as if nothing had happened, to some process. Of the teacher's own chunks a few may come again, or not.

    Args:
        positions: of all processes of the run, in their order.
        processes: that go on.
    """
    lowest = min(positions, key=lambda position: position.item)
    items = np.arange(lowest.item, max(position.item for position in positions) + 1)
    behind = np.isin(items, lowest.deal.behind) | (items < lowest.deal.first)
    begun = {item: (group, chunk) for item, group, chunk in lowest.deal.begun.tolist()}
    for process, position in enumerate(positions):
        mine = position.deal.mine(items, process, len(positions))
        behind |= mine & (items < position.item)
        if mine[position.item - lowest.item] and (position.group or position.chunk):
            begun[position.item] = position.group, position.chunk
    passed = set(items[behind].tolist())
    left = [(item, *where) for item, where in sorted(begun.items()) if item >= lowest.item and item not in passed]
    deal = Deal(lowest.item, items[behind], np.array(left, np.int64).reshape(-1, 3))
    read = -(-sum(position.read for position in positions) // processes)
    start = replace(lowest, group=0, chunk=0, read=read, deal=deal)
    rows = [row for position in positions for row in position.open_rows()]
    return [start.with_open_rows(rows[process::processes]) for process in range(processes)]
