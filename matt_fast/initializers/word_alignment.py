"""Which token of a text translates which: word alignment learned from pairs of texts, by expectation maximisation.

C. Dyer, V. Chahuneau and N. A. Smith, "A Simple, Fast, and Effective Reparameterization of IBM Model 2" (NAACL 2013,
https://aclanthology.org/N13-1073), the model of fast_align: each target token translates one source token, or none;
which one depends on the tokens and on how far their positions are from the diagonal. No random numbers: same pairs,
same result. (eflomal 2.0.0 draws its seed from /dev/urandom, and two runs differ.)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

TOKENISE_TOGETHER = 1024
CELLS = 1 << 20  # pairs of positions taken at a time; about 100 bytes each


class Links(NamedTuple):
    """How often tokens translate each other.

    Attributes:
        sources, targets: [p] int64, pairs of tokens, each once.
        counts: [p] float64, the expected number of target tokens that translate the source token; positive.
    """

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    counts: NDArray[np.float64]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], kept: Sequence[int]) -> list[NDArray[np.int64]]:
    """The ids of each text, of those in `kept` only."""
    known = np.zeros(max(kept, default=0) + 2, bool)
    known[list(kept)] = True
    arrays = []
    for start in range(0, len(texts), TOKENISE_TOGETHER):
        together = list(texts[start : start + TOKENISE_TOGETHER])
        encoded = tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"]
        arrays += [np.array(ids, np.int64) for ids in encoded]
    return [ids[known[np.minimum(ids, len(known) - 1)]] for ids in arrays]


def align(
    sources: Sequence[NDArray[np.int64]],
    targets: Sequence[NDArray[np.int64]],
    *,
    iterations: int = 5,
    tension: float = 4.0,
    empty: float = 0.08,
    concentration: float = 0.01,
    max_length: int = 200,
) -> Links:
    """Expected translation counts. The defaults are those of fast_align with its options -d and -v.

    Args:
        sources, targets: ids of each text and of its translation. Pairs with an empty side, or one of more than
            `max_length` tokens, are left out.
        iterations: of expectation maximisation.
        tension: how strongly positions keep to the diagonal.
        empty: prior probability that a target token translates nothing.
        concentration: of the Dirichlet prior on what a source token is translated by; small ones keep rare tokens from
            being linked to everything beside them.
        max_length: tokens of a side. 4 bytes are kept for each pair of positions.

    Raises:
        ValueError: not as many targets as sources, or no pair that can be used.
    """
    if len(sources) != len(targets):
        raise ValueError(f"targets: wanted one for each of the {len(sources)} sources, got {len(targets)}")
    pairs = [
        (source, target)
        for source, target in zip(sources, targets, strict=True)
        if 0 < len(source) <= max_length and 0 < len(target) <= max_length
    ]
    if not pairs:
        raise ValueError(f"parallel: wanted a pair with 1 to {max_length} tokens on both sides, got none")
    width = 1 + max(int(target.max()) for _, target in pairs)
    blocks = list(_blocks(pairs))
    # Of source 0, which stands for none, and of ids from 1 on.
    table = np.unique(np.concatenate([np.unique(_keys(block, width)) for block in blocks]))
    places = [np.searchsorted(table, _keys(block, width)).astype(np.int32) for block in blocks]
    owner = np.unique(table // width, return_inverse=True)[1]
    choices = np.bincount(owner)
    probabilities = np.ones(len(table))
    for step in range(iterations + 1):
        counts = np.zeros(len(table))
        for block, place in zip(blocks, places, strict=True):
            scores = block.prior(tension, empty) * probabilities[place]
            scores /= np.repeat(np.add.reduceat(scores, block.first), block.widths)
            counts += np.bincount(place, scores, minlength=len(table))
        if step < iterations:
            totals = np.bincount(owner, counts) + concentration * choices
            logs = _digamma(counts + concentration) - _digamma(totals)[owner]
            probabilities = np.exp(logs)
    linked = (table >= width) & (counts > 0)
    return Links(table[linked] // width - 1, table[linked] % width, counts[linked])


def _digamma(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return torch.from_numpy(values).digamma().numpy()


class _Block(NamedTuple):
    """Some pairs, and a cell for each target token and source token of a pair; the first of a row stands for none."""

    sources: NDArray[np.int64]  # ids from 1 on, each pair's preceded by a 0
    targets: NDArray[np.int64]
    starts: NDArray[np.int64]  # of each target token: where its pair begins in `sources`
    widths: NDArray[np.int64]  # of each target token: its cells
    first: NDArray[np.int64]  # of each target token: its first cell
    heights: NDArray[np.float64]  # of each target token: its position, up to 1

    def cells(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The target token and the position in the source (0 for none) of each cell."""
        token = np.repeat(np.arange(len(self.targets)), self.widths)
        return token, np.arange(len(token)) - self.first[token]

    def prior(self, tension: float, empty: float) -> NDArray[np.float64]:
        token, position = self.cells()
        away = np.abs(position / (self.widths - 1)[token] - self.heights[token])
        prior = np.exp(-tension * away)
        prior[self.first] = 0
        prior *= ((1 - empty) / np.add.reduceat(prior, self.first))[token]
        prior[self.first] = empty
        return prior


def _keys(block: _Block, width: int) -> NDArray[np.int64]:
    token, position = block.cells()
    return block.sources[block.starts[token] + position] * width + block.targets[token]


def _blocks(pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Iterator[_Block]:
    cells = np.cumsum([(len(source) + 1) * len(target) for source, target in pairs])
    for some in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(cells // CELLS)) + 1):
        sources, targets = zip(*(pairs[i] for i in some), strict=True)
        sizes = np.array([len(source) + 1 for source in sources])
        lengths = np.array([len(target) for target in targets])
        widths = np.repeat(sizes, lengths)
        yield _Block(
            sources=np.concatenate([np.append(0, source + 1) for source in sources]),
            targets=np.concatenate(targets),
            starts=np.repeat(np.cumsum(sizes) - sizes, lengths),
            widths=widths,
            first=np.cumsum(widths) - widths,
            heights=np.concatenate([np.arange(1, n + 1) / n for n in lengths]),
        )
