"""Which chunks to read first, so that every new token comes soon and often enough (paper, Appendix C)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matt_fast.data.prepared import open_chunks

READ_TOGETHER = 1024  # chunks


@dataclass(frozen=True)
class Coverage:
    """Chunks that come first, and what they give.

    Attributes:
        chunks: [c] int64, numbers of prepared chunks, in the order to read them.
        enough: tokens that come `per_token` times in them, or more.
        fewer: tokens that come in the text, but fewer times than that; all of these are among the chunks.
        absent: tokens that never come.
    """

    chunks: NDArray[np.int64]
    enough: int
    fewer: int
    absent: int

    def message(self, per_token: int, rows: float) -> str:
        """What a person should know; `rows` are those of a step, in all processes, that are for such chunks."""
        steps = ceil(len(self.chunks) / rows)
        return (
            f"per_token: {self.enough:,} new tokens come {per_token} times or more in the first {len(self.chunks):,} "
            f"chunks (about {steps:,} steps without packing), {self.fewer:,} come fewer times in the text, "
            f"{self.absent:,} never"
        )


def cover(folders: Sequence[Path], tokens: Collection[int], per_token: int, seed: int) -> Coverage:
    """Choose chunks in which each token comes `per_token` times, or as often as the text has it.

    The rarest token chooses first, among its chunks in random order; so few chunks are taken twice for nothing.

    Args:
        folders: of `prepare_once`.
        tokens: student ids that are wanted.
        per_token: how often each is wanted, at least.
        seed: of the order.
    """
    wanted = np.sort(np.fromiter(tokens, np.int64, len(tokens)))
    chunks, which, counts, total = _occurrences(folders, wanted)
    generator = np.random.default_rng(seed)
    have, taken = np.zeros(len(wanted), np.int64), np.zeros(total, bool)
    by_chunk = np.argsort(chunks, kind="stable")
    starts = np.searchsorted(chunks[by_chunk], np.arange(total + 1))
    by_token = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[by_token], np.arange(len(wanted) + 1))
    in_text = np.bincount(which, counts, minlength=len(wanted)).astype(np.int64)
    for token in np.argsort(in_text, kind="stable"):
        own = chunks[by_token[bounds[token] : bounds[token + 1]]]
        for chunk in generator.permutation(own):
            if have[token] >= per_token:
                break
            if not taken[chunk]:
                taken[chunk] = True
                entries = by_chunk[starts[chunk] : starts[chunk + 1]]
                have[which[entries]] += counts[entries]
    enough = int((have >= per_token).sum())
    absent = int((in_text == 0).sum())
    order = generator.permutation(np.flatnonzero(taken))
    return Coverage(order, enough, len(wanted) - enough - absent, absent)


def how_often(folders: Sequence[Path], tokens: Collection[int]) -> dict[int, int]:
    """Token -> how often it comes in the chunks of `prepare_once`, for each of `tokens` (student ids)."""
    wanted = np.sort(np.fromiter(tokens, np.int64, len(tokens)))
    if not folders:
        return dict.fromkeys(wanted.tolist(), 0)
    _, which, counts, _ = _occurrences(folders, wanted)
    in_text = np.bincount(which, counts, minlength=len(wanted)).astype(np.int64)
    return dict(zip(wanted.tolist(), in_text.tolist(), strict=True))


def _occurrences(folders: Sequence[Path], wanted: NDArray) -> tuple[NDArray, NDArray, NDArray, int]:
    """(chunk, index into `wanted`, how often) of each pair that there is, and how many chunks there are."""
    data = open_chunks(folders).with_format("numpy")
    chunks, which, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(data), READ_TOGETHER):
        rows = data[start : start + READ_TOGETHER]["student_ids"]
        ids = np.concatenate(rows).astype(np.int64)
        chunk = np.repeat(np.arange(start, start + len(rows)), [len(row) for row in rows])
        found = np.searchsorted(wanted, ids)
        inside = (
            (found < len(wanted)) & (wanted[np.minimum(found, len(wanted) - 1)] == ids) if len(wanted) else found < 0
        )
        pairs, how_often = np.unique(chunk[inside] * len(wanted) + found[inside], return_counts=True)
        chunks.append(pairs // max(1, len(wanted)))
        which.append(pairs % max(1, len(wanted)))
        counts.append(how_often)
    return np.concatenate(chunks), np.concatenate(which), np.concatenate(counts), len(data)
