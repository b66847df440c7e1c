"""Endless training batches: chunks of a corpus, made on the fly or read from what was prepared, packed and collated."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from matt_fast.data.background import made_ahead
from matt_fast.data.batches import Batch, Chunk, Packer, Position, collate
from matt_fast.data.chunks import Cutter, Side, tokenised_together
from matt_fast.data.documents import read_documents
from matt_fast.data.prepared import open_chunks, read_prepared
from matt_fast.support.texts import bounded_pieces

TEXT_ORDER = 2  # counted up with each change of how texts are shuffled: a `Position` then means other texts
PIECE_CHARACTERS = 32  # of a piece of a long text, for each token of a chunk: some six to ten chunks of European text


class Share(NamedTuple):
    """A part of a pass over the data that belongs to this process."""

    epoch: int
    turn: int  # the process that has the first text of the pass
    pieces: list[tuple[int, str]]  # numbers and texts
    ends: bool  # nothing of the pass is behind it


class Found(NamedTuple):
    """The chunks of a part of a pass, each behind what was left out before it; None behind the last."""

    epoch: int
    turn: int
    chunks: Iterable[tuple[Counter, Chunk | None]]
    ends: bool


class Unmade(NamedTuple):
    """What a batch is made of."""

    rows: list[list[Chunk]]
    skipped: Counter
    position: Position


Each = Callable[[str, Iterable], Iterator]  # calls the method of that name for each item, gives the results in order


class AlignedBatches(IterableDataset):
    """An endless stream of training batches; each pass over the data is shuffled anew.

    Prepared chunks are in an order of their own. On the fly texts are shuffled in a buffer, of long ones pieces of some
    chunks each, and then the chunks of those that are tokenised together.

    Long documents are cut where both tokenizers have a token boundary, never truncated. What cannot be used is counted
    in `Batch.skipped`: documents with no text, without a common boundary on both sides, and single segments that alone
    are longer than a chunk.

    Args:
        source, split, text_field: as `read_documents`; source may be None where `prepared` has all.
        prepared: folders of `prepare_once` with the chunks of this source, or more; made on the fly if None.
        leading: numbers of prepared chunks that come first in the first pass, see `cover`.
        teacher, student: the two sides.
        batch_size: rows per batch.
        seed: of the order of the documents.
        packing: fill each row with as many chunks as it holds; otherwise a row is one chunk.
        finish: what else is done to each batch ahead of the step, if anything.
        process, processes: texts (or prepared chunks) go round the processes in turn, through all passes, so that each
            gets some of a file that has fewer of them. Of a hub dataset that has a multiple of `processes` shards each
            process reads its own.
        start: `Batch.position` of the last batch that is behind.

    Raises (while iterating):
        ValueError: a pass over the data gave not one chunk (as many passes, of several processes), or a token's id has
            no embedding row.
    """

    def __init__(
        self,
        source: str | Path | None,
        teacher: Side,
        student: Side,
        *,
        batch_size: int,
        seed: int,
        split: str = "train",
        text_field: str = "text",
        prepared: Sequence[Path] | None = None,
        leading: NDArray[np.int64] | None = None,
        packing: bool = False,
        finish: Callable[[Batch], Batch] | None = None,
        process: int = 0,
        processes: int = 1,
        start: Position | None = None,
    ):
        self.source, self.split, self.text_field = source, split, text_field
        self.teacher, self.student, self.prepared = teacher, student, prepared
        self.leading = leading
        self.batch_size, self.seed, self.packing, self.finish = batch_size, seed, packing, finish
        self.process, self.processes = process, processes
        self.start = start or Position()

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(lambda method, items: map(getattr(self, method), items))

    def batches(self, each: Each) -> Iterator:
        """The batches, by someone who calls `cut` and `make` for each item and gives the results in their order."""
        return each("make", self._rows(each))

    def in_background(self, workers: int = 1, *, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches, made ahead in other processes; see `made_ahead`."""
        return made_ahead(self, workers, pin_memory=pin_memory)

    def behind(self, position: Position) -> "AlignedBatches":
        """The same stream, from another position on."""
        stream = copy.copy(self)
        stream.start = position
        return stream

    def cut(self, share: Share) -> Found:
        """Tokenise, align and cut texts: most of the work."""
        found = list(self._cutter.cut(share.pieces))
        left_out = sum((left for left, _ in found), Counter())
        chunks = [replace(chunk, piece=share.pieces[0][0]) for _, chunk in found if chunk is not None]
        if chunks:
            order = np.random.default_rng([self.seed, share.epoch, share.pieces[0][0]]).permutation(len(chunks))
            chunks = [chunks[index] for index in order]
        counts = itertools.chain([left_out], itertools.repeat(Counter()))
        return Found(share.epoch, share.turn, list(zip(counts, chunks or [None], strict=False)), share.ends)

    def make(self, unmade: Unmade) -> Batch:
        """Collate a batch and finish it."""
        batch = replace(collate(unmade.rows, unmade.skipped), position=unmade.position)
        return batch if self.finish is None else self.finish(batch)

    def _rows(self, each: Each) -> Iterator[Unmade]:
        """The rows of each batch. What decides on the order of the data is done here, by one process."""
        skipped: Counter = Counter()
        limits = self.teacher.max_length, self.student.max_length
        packer = Packer(limits, rows=self.start.open_rows()) if self.packing else None
        rows: list[list[Chunk]] = []
        for chunk, position in self._chunks(skipped, each):
            row = [chunk] if packer is None else packer.add(chunk)
            if row is not None:
                rows.append(row)
            if len(rows) == self.batch_size:
                position = position if packer is None else position.with_open_rows(packer.rows)
                yield Unmade(rows, skipped.copy(), position)
                skipped.clear()
                rows = []

    def _chunks(self, skipped: Counter, each: Each) -> Iterator[tuple[Chunk, Position]]:
        """Chunks from the start on, and where the stream stands behind each."""
        piece, behind = self.start.piece, self.start.chunk  # of a pass that has begun
        current, number, without = piece, 0, 0 if piece + behind == 0 else -1
        parts = each("cut", self._texts()) if self.prepared is None else self._prepared(skipped)
        for part in parts:
            for left_out, chunk in part.chunks:
                skipped.update(left_out)
                if chunk is None:
                    continue
                current, number = chunk.piece, number + 1 if chunk.piece == current else 1
                if part.epoch == self.start.epoch and current == piece and number <= behind:
                    skipped.clear()  # counted before
                    continue
                without = -1
                yield chunk, Position(part.epoch, current, number, part.turn)
            if part.ends:
                current, number, without = 0, 0, without + 1
                if without == self.processes:
                    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no documents"
                    raise ValueError(f"data: wanted text to train on in {str(self.source)!r}, got none ({reasons})")

    def _texts(self) -> Iterator[Share]:
        """This process's texts, pass after pass, in groups."""
        turn, first = self.start.turn, self.start.piece
        for epoch in itertools.count(self.start.epoch):
            order = {"seed": self.seed + epoch, "most": PIECE_CHARACTERS * self._longest}
            documents = read_documents(self.source, split=self.split, text_field=self.text_field, **order)
            shards = documents.shards_of(self.process, self.processes)
            counted = _Counted(bounded_pieces(documents if shards is None else shards))
            mine = counted
            if shards is None:
                mine = itertools.islice(counted, (self.process - turn) % self.processes, None, self.processes)
            for pieces in tokenised_together(itertools.islice(enumerate(mine), first, None)):
                yield Share(epoch, turn, pieces, ends=False)
            yield Share(epoch, turn, [], ends=True)
            turn, first = (turn + counted.count) % self.processes if shards is None else 0, 0

    def _prepared(self, skipped: Counter) -> Iterator[Found]:
        """This process's prepared chunks, pass after pass."""
        turn, first, count = self.start.turn, self.start.piece, len(open_chunks(self.prepared))
        for epoch in itertools.count(self.start.epoch):
            process, seed = (self.process - turn) % self.processes, [self.seed, epoch]
            leading = self.leading if epoch == 0 else None
            chunks = read_prepared(self.prepared, seed, process, self.processes, skipped, first, leading)
            yield Found(epoch, turn, ((Counter(), chunk) for chunk in chunks), ends=True)
            turn, first = (turn + count) % self.processes, 0

    @property
    def _longest(self) -> int:
        """Tokens of the longer side's chunks."""
        return max(self.teacher.max_length, self.student.max_length)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.teacher, self.student)


class _Counted:
    """An iterator that counts what it gives."""

    def __init__(self, items: Iterable[str]):
        self.items, self.count = iter(items), 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        item = next(self.items)
        self.count += 1
        return item
