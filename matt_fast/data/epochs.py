"""How many batches a pass over prepared data has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyarrow.compute import list_value_length

from matt_fast.data.packing import pack
from matt_fast.data.prepared import numbers_of, open_chunks


@dataclass(frozen=True)
class _Lengths:
    lengths: NDArray[np.int64]


def count_batches(folders: Sequence[Path], batch_size: int, processes: int, limits: tuple[int, int] | None) -> float:
    """Batches of one process in a pass over the chunks of `prepare_once`, with the fraction of the last.

    Args:
        folders: of the chunks.
        batch_size: rows of a batch.
        processes: that share a pass.
        limits: teacher and student tokens of a row, with packing; it then depends a little on the order of a pass, and
            the order on disk is counted. None without.
    """
    numbers = numbers_of(folders)
    if limits is None:
        rows = len(numbers)
    else:
        chunks = open_chunks(folders).data
        sides = [list_value_length(chunks.column(f"{side}_ids")).to_numpy() for side in ("teacher", "student")]
        rows = sum(1 for _ in pack(map(_Lengths, np.stack(sides, 1).astype(np.int64)[numbers]), limits))
    return rows / processes / batch_size
