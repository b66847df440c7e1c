"""Batches made ahead of the training by other processes; how many there are does not change the batches.

One process decides on the order of everything. Alone it does all of the work; with workers of its own it hands them
texts to cut into chunks and rows to collate, takes the results in the order of the items, and packs chunks in between.
"""

import io
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import current_process
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils import worker as worker_state

from matt_fast.data.batches import Batch
from matt_fast.support.workers import OrderedPool, die_with_parent

if TYPE_CHECKING:
    from matt_fast.data.stream import AlignedBatches

RESTARTS = 3  # of processes that are killed, without a batch in between
MOST_WORKERS = 8  # by default: several times what the fastest GPU takes
OTHERS = 2  # cores that workers leave: to the training, and to the process that decides on the order


def default_workers(device: torch.device) -> int:
    """Workers of a process that trains on this device: one beside a CPU that trains, else the cores that are free.

    Training processes of one machine share its cores evenly (LOCAL_WORLD_SIZE, which launchers set).
    """
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - OTHERS))


def made_ahead(stream: "AlignedBatches", workers: int, *, pin_memory: bool) -> Iterator[Batch]:
    """The batches of a stream, made ahead; errors are raised here as they are.

    Processes that are killed are started again behind the last batch that was handed over.

    Args:
        stream: the batches.
        workers: processes that tokenise and collate. 0: none, the work is done here; 1: the one that decides on the
            order; from 2 on there is one more for that.
        pin_memory: put what goes to the device into pinned memory.

    Raises:
        RuntimeError: processes that are killed again and again before they hand over a batch.
    """
    if workers == 0:
        yield from (batch.pin_memory() for batch in stream) if pin_memory else stream
        return
    killed = 0
    while True:
        options = {"num_workers": 1, "worker_init_fn": Worker(os.getpid()), "pin_memory": pin_memory}
        loader = DataLoader(_Packets(stream, workers), batch_size=None, **options)
        try:
            with _no_error_from_afar():
                packets = iter(loader)
            for packet in packets:
                item = packet.open() if isinstance(packet, Packet) else packet
                if isinstance(item, Exception):
                    raise item
                stream, killed = stream.behind(item.position), 0
                yield item
        except (RuntimeError, ChildProcessError) as error:
            if not isinstance(error, ChildProcessError) and "DataLoader worker" not in str(error):
                raise
            killed += 1
            if killed == RESTARTS:
                raise RuntimeError(
                    f"the process that prepares data was killed {killed} times ({error}); is there enough memory? "
                    "A smaller max_length or batch_size, or fewer data_workers, need less"
                ) from error
            warnings.warn(f"the process that prepares data was killed and is started again ({error})", stacklevel=3)


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
        current_process().daemon = False  # it may have workers of its own
        worker_state._worker_info = None  # it has all of the data; datasets shuffles otherwise where it sees a worker
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one thread
        die_with_parent(self.parent)


@dataclass(frozen=True)
class Packet:
    """A batch as bytes, or an exception, which would arrive with its traceback as message.

    Torch would put each tensor into a shared file of its own, and the step would wait for milliseconds to open them.
    """

    content: bytes

    def open(self) -> Batch | Exception:
        return pickle.loads(self.content)

    def pin_memory(self) -> Batch | Exception:
        """Called by the thread of a DataLoader that pins."""
        item = self.open()
        return item.pin_memory() if isinstance(item, Batch) else item


class _Packets(IterableDataset):
    """The batches of a stream, as the process that decides on the order hands them over."""

    def __init__(self, stream: "AlignedBatches", workers: int):
        self.stream, self.workers = stream, workers

    def __iter__(self) -> Iterator[Packet]:
        tool = _Tool(self.stream)
        try:
            if self.workers == 1:
                yield from self.stream.batches(lambda method, items: map(getattr(tool, method), items))
            else:
                with OrderedPool(self.workers, tool) as pool:
                    yield from self.stream.batches(pool.map)
        except Exception as error:
            yield Packet(_to_bytes(error))


class _Tool:
    """What workers do."""

    def __init__(self, stream: "AlignedBatches"):
        self.cut, self._make = stream.cut, stream.make

    def make(self, unmade) -> Packet:
        return Packet(_to_bytes(self._make(unmade)))


class _TensorsAsArrays(pickle.Pickler):
    def reducer_override(self, value):
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _to_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    _TensorsAsArrays(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
