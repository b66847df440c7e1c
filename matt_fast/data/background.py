"""Batches made ahead of the training by other processes; how many there are does not change the batches.

One process decides on the order of everything. Alone it does all of the work; with workers of its own it hands them
texts to cut into chunks and rows to collate, takes the results in the order of the items, and packs chunks in between.
"""

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from matt_fast.data.batches import Batch
from matt_fast.support.threads import cores
from matt_fast.support.workers import Ahead, OrderedPool, ProcessDiedError

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
    return max(1, min(MOST_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - OTHERS))


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
        try:
            with Ahead(partial(_packets, stream, workers), partial(_open, pin_memory=pin_memory)) as items:
                for item in items:
                    if isinstance(item, Exception):
                        raise item
                    stream, killed = stream.behind(item.position), 0
                    yield item
        except ProcessDiedError as error:
            killed += 1
            if killed == RESTARTS:
                raise RuntimeError(
                    f"the process that prepares data was killed {killed} times ({error}); is there enough memory? "
                    "A smaller max_length or batch_size, or fewer data_workers, need less"
                ) from error
            warnings.warn(f"the process that prepares data was killed and is started again ({error})", stacklevel=3)


def _open(content: bytes, *, pin_memory: bool) -> Batch | Exception:
    item = pickle.loads(content)
    return item.pin_memory() if pin_memory and isinstance(item, Batch) else item


def _packets(stream: "AlignedBatches", workers: int) -> Iterator[bytes]:
    """What the process that decides on the order hands over: batches as bytes, and the exception that ends them.

    Torch would put each tensor into a shared file of its own, and the step would wait for milliseconds to open them.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one thread
    torch.set_num_threads(1)
    tool = _Tool(stream)
    try:
        if workers == 1:
            yield from stream.batches(lambda method, items: map(getattr(tool, method), items))
        else:
            with OrderedPool(workers, tool) as pool:
                yield from stream.batches(pool.map)
    except Exception as error:
        yield _to_bytes(error)


class _Tool:
    """What workers do."""

    def __init__(self, stream: "AlignedBatches"):
        self.cut, self._make = stream.cut, stream.make

    def make(self, unmade) -> bytes:
        return _to_bytes(self._make(unmade))


class _TensorsAsArrays(pickle.Pickler):
    def reducer_override(self, value):
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _to_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    _TensorsAsArrays(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
