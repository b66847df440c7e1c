"""Endless training batches: chunks of a corpus, made on the fly or read from what was prepared, packed and collated."""

import copy
import io
import itertools
import os
import pickle
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import signal_handling

from matt_fast.data.batches import Batch, Chunk, Packer, Position, collate
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.documents import read_documents
from matt_fast.data.prepared import read_prepared
from matt_fast.support.workers import die_with_parent

RESTARTS = 3  # of a worker that is killed, without a batch in between


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
        start: `Batch.position` of the last batch that is behind.

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
        start: Position | None = None,
    ):
        self.source, self.split, self.text_field = source, split, text_field
        self.teacher, self.student, self.prepared = teacher, student, prepared
        self.batch_size, self.seed, self.packing, self.finish = batch_size, seed, packing, finish
        self.process, self.processes = process, processes
        self.start = start or Position()

    def __iter__(self) -> Iterator[Batch]:
        skipped: Counter = Counter()
        limits = self.teacher.max_length, self.student.max_length
        packer = Packer(limits, rows=self.start.open_rows()) if self.packing else None
        rows: list[list[Chunk]] = []
        for chunk, position in self._chunks(skipped):
            row = [chunk] if packer is None else packer.add(chunk)
            if row is not None:
                rows.append(row)
            if len(rows) == self.batch_size:
                position = position if packer is None else position.with_open_rows(packer.rows)
                batch = replace(collate(rows, Counter(skipped)), position=position)
                yield batch if self.finish is None else self.finish(batch)
                skipped.clear()
                rows = []

    def in_background(self) -> Iterator[Batch]:
        """The batches, made ahead in a worker process; its errors are raised here as they are.

        A worker that was killed is started again behind the last batch that it handed over.

        Raises:
            RuntimeError: one that is killed again and again before it hands over a batch.
        """
        stream, killed = self, 0
        while True:
            loader = DataLoader(_AsBytes(stream), batch_size=None, num_workers=1, worker_init_fn=Worker(os.getpid()))
            try:
                with _no_error_from_afar():
                    batches = iter(loader)
                for item in map(pickle.loads, batches):
                    if isinstance(item, Exception):
                        raise item
                    stream, killed = stream.behind(item.position), 0
                    yield item
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                killed += 1
                if killed == RESTARTS:
                    raise RuntimeError(
                        f"the process that prepares data was killed {killed} times ({error}); is there enough memory? "
                        "A smaller max_length or batch_size needs less"
                    ) from error
                warnings.warn(f"the process that prepares data was killed and is started again ({error})", stacklevel=2)

    def behind(self, position: Position) -> "AlignedBatches":
        """The same stream, from another position on."""
        stream = copy.copy(self)
        stream.start = position
        return stream

    def _chunks(self, skipped: Counter) -> Iterator[tuple[Chunk, Position]]:
        """Chunks from the start on, and where the stream stands behind each."""
        piece, behind = self.start.piece, self.start.chunk
        for epoch in itertools.count(self.start.epoch):
            found = piece + behind > 0
            current, number = piece, 0
            for chunk in self._pass(epoch, piece, skipped):
                current, number = chunk.piece, number + 1 if chunk.piece == current else 1
                if current == piece and number <= behind:
                    skipped.clear()  # counted before
                    continue
                found = True
                yield chunk, Position(epoch, current, number)
            if not found:
                reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no documents"
                raise ValueError(f"data: wanted text to train on in {str(self.source)!r}, got none ({reasons})")
            piece = behind = 0

    def _pass(self, epoch: int, first: int, skipped: Counter) -> Iterator[Chunk]:
        """This process's share of one pass, without its `first` pieces."""
        if self.prepared is not None:
            return read_prepared(self.prepared, [self.seed, epoch], self.process, self.processes, skipped, first)
        documents = read_documents(self.source, split=self.split, text_field=self.text_field, seed=self.seed + epoch)
        mine = itertools.islice(documents, self.process, None, self.processes)
        return make_chunks(mine, self.teacher, self.student, skipped, first)


@contextmanager
def _no_error_from_afar() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD out: it raises wherever the main thread is when a worker ends, mid-update too.

    A loader that waits for a worker looks every few seconds whether it lives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
        signal_handling._SIGCHLD_handler_set = False  # other loaders of this process set it as before


class Worker:
    """Makes the process that prepares data die with the one that trains, and leave Ctrl-C to it."""

    def __init__(self, parent: int):
        self.parent = parent

    def __call__(self, worker: int) -> None:
        die_with_parent(self.parent)


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
