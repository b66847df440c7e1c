"""How many rows a pass over prepared data has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyarrow.compute import list_value_length

from matt_fast.data.own import EVERY
from matt_fast.data.packing import pack
from matt_fast.data.prepared import open_chunks


@dataclass(frozen=True)
class _Lengths:
    lengths: NDArray[np.int64]


def count_rows(folders: Sequence[Path], limits: tuple[int, int] | None, own: Path | None = None) -> int:
    """Rows of batches in a pass over the chunks of `prepare_once`.

    Args:
        folders: of the chunks.
        limits: teacher and student tokens of a row, with packing; it then depends a little on the order of a pass, and
            the order on disk is counted. None without.
        own: folder of what the teacher wrote of its own, which comes among them, see `OwnChunks`.
    """
    lengths = _lengths(folders)
    if own is not None:
        theirs, count = _lengths([own]), len(lengths) // (EVERY - 1)
        places = (EVERY - 1) * np.arange(1, count + 1)
        lengths = np.insert(lengths, places, theirs[np.arange(count) % len(theirs)], axis=0)
    return len(lengths) if limits is None else sum(1 for _ in pack(map(_Lengths, lengths), limits))


def _lengths(folders: Sequence[Path]) -> NDArray[np.int64]:
    """[chunks, 2] int64: teacher and student tokens of each."""
    chunks = open_chunks(folders).data
    sides = [list_value_length(chunks.column(f"{side}_ids")).to_numpy() for side in ("teacher", "student")]
    return np.stack(sides, 1).astype(np.int64)
