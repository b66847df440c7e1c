"""What the teacher wrote of its own, among other chunks: one chunk in five of a stream."""

from pathlib import Path

import numpy as np

from matt_fast.data.packing import Chunk
from matt_fast.data.prepared import ShuffledChunks

EVERY = 5  # of so many chunks of a process the last is the teacher's own
OTHERS = (EVERY - 1) / EVERY  # the share of the others


def is_own(number: int) -> bool:
    """Whether a chunk of a process, counted from 0, is the teacher's own."""
    return number % EVERY == EVERY - 1


class OwnChunks:
    """The chunks of a folder of `prepare_once` without an end: they go round the processes, pass after pass.

    Args:
        folder: of the chunks.
        seed: of their order, which each pass has anew.
        process, processes: whose chunks they are.
    """

    def __init__(self, folder: Path, seed: int, process: int, processes: int):
        self.folder, self.seed, self.process, self.processes = folder, seed, process, processes
        self.epoch, self.chunks = 0, self._pass(0)

    def chunk(self, number: int) -> Chunk:
        """The one that is chunk `number` of all chunks of this process, see `is_own`."""
        epoch, place = divmod(number // EVERY * self.processes + self.process, len(self.chunks))
        if epoch != self.epoch:
            self.epoch, self.chunks = epoch, self._pass(epoch)
        (found,) = self.chunks.read(np.array([place]))
        return found

    def _pass(self, epoch: int) -> ShuffledChunks:
        return ShuffledChunks([self.folder], [self.seed, epoch])
