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
from matt_fast.data.batches import Batch, collate
from matt_fast.data.chunks import Cutter, Side, tokenised_together
from matt_fast.data.documents import Texts, read_documents
from matt_fast.data.own import OwnChunks, is_own
from matt_fast.data.packing import Chunk, Packer
from matt_fast.data.places import is_url
from matt_fast.data.positions import Position
from matt_fast.data.prepared import ShuffledChunks, left_out_of
from matt_fast.data.shards import Shards
from matt_fast.support.texts import bounded_pieces

TEXT_ORDER = 4  # counted up with each change of how texts are shuffled: a `Position` then means other texts
ITEMS_TOGETHER = 1 << 16
PIECE_CHARACTERS = 32  # of a piece of a long text, for each token of a chunk: some six to ten chunks of European text


class Place(NamedTuple):
    """A group of what is read: the pass, the items before this pass, the item, and its number in the item."""

    epoch: int
    before: int
    item: int
    group: int


class Share(NamedTuple):
    """A group of texts of this process; no texts at the end of a pass."""

    place: Place
    texts: list[str]
    seed: list[int]  # of the order of its chunks

    @property
    def ends(self) -> bool:
        return not self.texts


class Found(NamedTuple):
    """The chunks of a group, each behind what was left out before it; None behind the last."""

    place: Place
    chunks: Iterable[tuple[Counter, Chunk | None]]
    ends: bool = False  # a pass: nothing of it is behind this


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
    in `Batch.skipped`, in the first pass: documents with no text, without a common boundary on both sides, and single
    segments that alone are longer than a chunk.

    Args:
        source, split, text_field: as `read_documents`; source may be None where `prepared` has all.
        prepared: folders of `prepare_once`, or of shards, with the chunks of this source, or more; or the URL of one
            folder of shards, which are then read as streams. Made on the fly if None.
        leading: numbers of prepared chunks that come first in the first pass, see `cover`.
        own: folder of `prepare_once` with what the teacher wrote of its own: one chunk in five. It belongs to no pass.
        teacher, student: the two sides.
        batch_size: rows per batch.
        seed: of the order of the documents.
        packing: fill each row with as many chunks as it holds; otherwise a row is one chunk.
        finish: what else is done to each batch ahead of the step, if anything.
        process, processes: groups of texts (or prepared chunks) go round the processes in turn, through all passes, so
            that each gets some of a file that has fewer of them. Where a source has a multiple of `processes` shards,
            as many hub datasets and folders of files of a size have, shards do, and a process reads its own only.
        start: `Batch.position` of the last batch that is behind; of another number of processes see `deal_anew`.

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
        prepared: Sequence[Path | str] | None = None,
        leading: NDArray[np.int64] | None = None,
        own: Path | None = None,
        packing: bool = False,
        finish: Callable[[Batch], Batch] | None = None,
        process: int = 0,
        processes: int = 1,
        start: Position | None = None,
    ):
        self.source, self.split, self.text_field = source, split, text_field
        self.teacher, self.student, self.prepared = teacher, student, prepared
        self.leading, self.own = leading, own
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
        found = list(self._cutter.cut(share.texts))
        left_out = sum((left for left, _ in found), Counter())
        chunks = [chunk for _, chunk in found if chunk is not None]
        if chunks:
            order = np.random.default_rng(share.seed).permutation(len(chunks))
            chunks = [chunks[index] for index in order]
        counts = itertools.chain([left_out], itertools.repeat(Counter()))
        return Found(share.place, list(zip(counts, chunks or [None], strict=False)), share.ends)

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
        chunks = self._chunks(skipped, each)
        for chunk, position in chunks if self.own is None else self._with_own(chunks, self.own):
            row = [chunk] if packer is None else packer.add(chunk)
            if row is not None:
                rows.append(row)
            if len(rows) == self.batch_size:
                position = position if packer is None else position.with_open_rows(packer.rows)
                yield Unmade(rows, skipped.copy(), position)
                skipped.clear()
                rows = []

    def _with_own(self, chunks: Iterator[tuple[Chunk, Position]], folder: Path) -> Iterator[tuple[Chunk, Position]]:
        """Chunks, and among them those of the teacher's own, behind which the stream stands where it stood."""
        own, position = OwnChunks(folder, self.seed, self.process, self.processes), self.start
        for number in itertools.count(self.start.read):
            chunk, position = (own.chunk(number), position) if is_own(number) else next(chunks)
            position = replace(position, read=number + 1)
            yield chunk, position

    def _chunks(self, skipped: Counter, each: Each) -> Iterator[tuple[Chunk, Position]]:
        """Chunks from the start on, and where the stream stands behind each."""
        without = 0 if self.start.sharded is None else -1  # passes, of which the first may be nearly behind
        parts = each("cut", self._texts()) if self.prepared is None else self._prepared(skipped)
        for part in parts:
            groups_behind, behind = self._behind(part.place.item)
            behind = behind if part.place.group == groups_behind else 0
            for number, (left_out, chunk) in enumerate(part.chunks, 1):
                if number <= behind:
                    continue  # what was left out before it was counted then
                if part.place.epoch == 0:  # each pass leaves out the same
                    skipped.update(left_out)
                if chunk is not None:
                    without = -1
                    yield chunk, Position(*part.place, number, self.sharded, deal=self.start.deal)
            if part.ends:
                without += 1
                if without == self.processes:
                    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no documents"
                    raise ValueError(f"data: wanted text to train on in {str(self.source)!r}, got none ({reasons})")

    def _behind(self, item: int) -> tuple[int, int]:
        """Groups of an item of this process that are behind, and chunks of the next one."""
        start, found = self.start, self.start.deal.begins(item)
        return max(found, (start.group, start.chunk)) if item == start.item else found

    def _mine(self, before: int, count: int) -> Iterator[NDArray[np.int64]]:
        """Those of some items that are this process's and not behind, in blocks."""
        for first in range(max(before, self.start.item), before + count, ITEMS_TOGETHER):
            items = np.arange(first, min(first + ITEMS_TOGETHER, before + count))
            yield items[self.start.deal.mine(items, self.process, self.processes)]

    def _texts(self) -> Iterator[Share]:
        """This process's texts, pass after pass, in groups."""
        before = self.start.before
        for epoch in itertools.count(self.start.epoch):
            documents = self._documents(epoch)
            if self.sharded:
                count = documents.num_shards
                order = np.random.default_rng([self.seed, epoch]).permutation(count)
                for item in itertools.chain.from_iterable(x.tolist() for x in self._mine(before, count)):
                    groups = tokenised_together(bounded_pieces(documents.shard(int(order[item - before]))))
                    for group, texts in enumerate(groups):
                        if group >= self._behind(item)[0]:
                            yield Share(Place(epoch, before, item, group), texts, [self.seed, epoch, group, item])
            else:
                count = number = 0
                for texts in tokenised_together(bounded_pieces(documents)):
                    item = before + count
                    if any(map(len, self._mine(item, 1))):
                        yield Share(Place(epoch, before, item, 0), texts, [self.seed, epoch, number])
                    count, number = count + 1, number + len(texts)
            yield Share(Place(epoch, before, -1, 0), [], [])
            before += count

    def _prepared(self, skipped: Counter) -> Iterator[Found]:
        """This process's prepared chunks, pass after pass."""
        before = self.start.before
        for epoch in itertools.count(self.start.epoch):
            if epoch == 0 and self.process == 0 and (self.start.item, self.start.chunk) <= (before, 0):
                skipped.update(left_out_of(self.prepared))
            if self.sharded:
                (folder,) = self.prepared
                shards = Shards(str(folder))
                count = len(shards)
                order = np.random.default_rng([self.seed, epoch]).permutation(count)
                for item in itertools.chain.from_iterable(x.tolist() for x in self._mine(before, count)):
                    shard, first = int(order[item - before]), self._behind(item)[0]
                    for group, chunks in shards.stream(shard, [self.seed, epoch, item], first):
                        yield Found(Place(epoch, before, item, group), ((Counter(), chunk) for chunk in chunks))
            else:
                chunks = ShuffledChunks(self.prepared, [self.seed, epoch], self.leading if epoch == 0 else None)
                count = len(chunks)
                for items in self._mine(before, count):
                    for item, chunk in zip(items.tolist(), chunks.read(items - before), strict=True):
                        yield Found(Place(epoch, before, item, 0), [(Counter(), chunk)])
            yield Found(Place(epoch, before, -1, 0), (), ends=True)
            before += count

    def _documents(self, epoch: int) -> Texts:
        order = {"seed": self.seed + epoch, "most": PIECE_CHARACTERS * self._longest}
        return read_documents(self.source, split=self.split, text_field=self.text_field, **order)

    @cached_property
    def sharded(self) -> bool:
        """Whether shards go round the processes, and not groups of texts or prepared chunks."""
        if self.start.sharded is not None:
            return self.start.sharded
        if self.prepared is not None:
            return any(is_url(folder) for folder in self.prepared)
        return self._documents(0).are_for(self.processes)

    @property
    def _longest(self) -> int:
        """Tokens of the longer side's chunks."""
        return max(self.teacher.max_length, self.student.max_length)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.teacher, self.student)
