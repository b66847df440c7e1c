"""Endless training batches: chunks of a corpus, made on the fly or read from what was prepared, packed and collated."""

import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

from matt_fast.data.batches import Batch, Chunk, collate, pack
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.documents import read_documents
from matt_fast.data.prepared import read_prepared


class AlignedBatches(IterableDataset):
    """An endless stream of training batches; each pass over the data is shuffled anew.

    On the fly the documents are shuffled, in a buffer, and the chunks of one follow each other; prepared chunks are in
    an order of their own.

    Long documents are cut where both tokenizers have a token boundary, never truncated. What cannot be used is counted
    in `Batch.skipped`: documents with no text, without a common boundary on both sides, and single segments that alone
    are longer than a chunk.

    Args:
        source, split, text_field: as `read_documents`.
        prepared: folder of `prepare_once` with the chunks of this source; they are made on the fly if None.
        teacher, student: the two sides.
        batch_size: rows per batch.
        seed: of the order of the documents.
        packing: fill each row with as many chunks as it holds; otherwise a row is one chunk.
        finish: what else is done to each batch ahead of the step, if anything.
        process, processes: this process takes every `processes`-th document, or prepared chunk.

    Raises (while iterating):
        ValueError: a pass over the data gave not one chunk, or a token's id has no embedding row.
    """

    def __init__(
        self,
        source: str | Path,
        teacher: Side,
        student: Side,
        *,
        batch_size: int,
        seed: int,
        split: str = "train",
        text_field: str = "text",
        prepared: Path | None = None,
        packing: bool = False,
        finish: Callable[[Batch], Batch] | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        self.source, self.split, self.text_field = source, split, text_field
        self.teacher, self.student, self.prepared = teacher, student, prepared
        self.batch_size, self.seed, self.packing, self.finish = batch_size, seed, packing, finish
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Batch]:
        skipped: Counter = Counter()
        chunks = self._chunks(skipped)
        limits = self.teacher.max_length, self.student.max_length
        rows = pack(chunks, limits) if self.packing else ([chunk] for chunk in chunks)
        while True:
            batch = collate(list(itertools.islice(rows, self.batch_size)), Counter(skipped))
            yield batch if self.finish is None else self.finish(batch)
            skipped.clear()

    def in_background(self) -> Iterator[Batch]:
        """The batches, made ahead in a worker process; its errors are raised here as they are."""
        for item in map(pickle.loads, DataLoader(_AsBytes(self), batch_size=None, num_workers=1)):
            if isinstance(item, Exception):
                raise item
            yield item

    def _chunks(self, skipped: Counter) -> Iterator[Chunk]:
        for epoch in itertools.count():
            found = False
            for chunk in self._pass(epoch, skipped):
                found = True
                yield chunk
            if not found:
                reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no documents"
                raise ValueError(f"data: wanted text to train on in {str(self.source)!r}, got none ({reasons})")

    def _pass(self, epoch: int, skipped: Counter) -> Iterator[Chunk]:
        """This process's share of one pass."""
        if self.prepared is not None:
            return read_prepared(self.prepared, [self.seed, epoch], self.process, self.processes, skipped)
        documents = read_documents(self.source, split=self.split, text_field=self.text_field, seed=self.seed + epoch)
        mine = itertools.islice(documents, self.process, None, self.processes)
        return make_chunks(mine, self.teacher, self.student, skipped)


class _AsBytes(IterableDataset):
    """What a worker hands over: batches as bytes, and its exception, which would arrive with its traceback as message.

    Torch would put each tensor into a shared file of its own, and the step would wait for milliseconds to open them.
    """

    def __init__(self, batches: AlignedBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from map(_to_bytes, self.batches)
        except Exception as error:
            yield _to_bytes(error)


class _TensorsAsArrays(pickle.Pickler):
    def reducer_override(self, value):
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _to_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    _TensorsAsArrays(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
