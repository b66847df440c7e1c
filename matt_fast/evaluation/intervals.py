"""How sure bits per byte are: intervals by bootstrap over the documents of the held-out text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matt_fast.evaluation.bits_per_byte import Evaluation

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
TOGETHER = 1 << 20  # numbers drawn at a time
FEW = 10  # documents or pieces: with fewer an interval comes out too narrow


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval (percentiles of the bootstrap).

    Attributes:
        low, high: its ends.
        units: how many documents, or pieces, were drawn from.
        of: "documents", or "pieces" where the text is one document.
    """

    low: float
    high: float
    units: int
    of: str

    @property
    def few(self) -> bool:
        """Whether it rests on so few documents or pieces that it is too narrow."""
        return self.units < FEW


def bits_interval(found: Evaluation) -> Interval | None:
    """The interval of bits per byte; None where a single piece was scored.

    Documents are drawn with replacement, as many as there are, 2,000 times with a fixed seed. Their bits and bytes are
    summed before they are divided, as in the figure itself.
    """
    bits, sizes, of = _units(found)
    return _interval(len(bits), of, lambda drawn: bits[drawn].sum(1) / sizes[drawn].sum(1))


def bits_in_words(found: Evaluation) -> str:
    """Bits per byte, and their interval in parentheses where there is one."""
    return f"{found.bits_per_byte:.4f}{in_words(bits_interval(found))}"


def in_words(interval: Interval | None) -> str:
    """An interval in parentheses, behind a figure; nothing for None."""
    return "" if interval is None else f" ({interval.low:.3f} to {interval.high:.3f})"


def ratio_interval(found: Evaluation, reference: Evaluation) -> Interval | None:
    """The interval of `found`'s bits per byte over `reference`'s; None where a single piece was scored.

    Both models are drawn the same documents (paired), so what makes a document hard for both does not widen it.

    Raises:
        ValueError: the two did not score the same pieces of text.
    """
    cuts = [[(number, size) for number, _, size in x.pieces] for x in (found, reference)]
    if cuts[0] != cuts[1]:
        raise ValueError(
            f"reference: wanted an evaluation on the same text, cut into the same pieces, got one of "
            f"{len(reference.pieces)} pieces beside one of {len(found.pieces)}"
        )
    (bits, _, of), (other, _, _) = _units(found), _units(reference)
    return _interval(len(bits), of, lambda drawn: bits[drawn].sum(1) / other[drawn].sum(1))


def _units(found: Evaluation) -> tuple[NDArray, NDArray, str]:
    """Bits and bytes of each document, float64 [units]; of each piece where there is one document."""
    if not found.pieces:
        return np.zeros(0), np.zeros(0), "pieces"
    numbers, bits, sizes = np.array(found.pieces, np.float64).T
    documents = numbers.astype(np.int64)
    if documents[-1] == 0:
        return bits, sizes, "pieces"
    return np.bincount(documents, bits), np.bincount(documents, sizes), "documents"


def _interval(units: int, of: str, statistic: Callable[[NDArray], NDArray]) -> Interval | None:
    if units < 2:
        return None
    found = np.concatenate([statistic(drawn) for drawn in _draws(units)])
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), units, of)


def _draws(units: int) -> Iterator[NDArray]:
    """Indices int64 [rows, units] of each resample, in groups that memory holds."""
    random = np.random.default_rng(SEED)
    rows = max(1, TOGETHER // units)
    for first in range(0, RESAMPLES, rows):
        yield random.integers(0, units, (min(rows, RESAMPLES - first), units))
