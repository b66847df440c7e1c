# ruff: noqa: RUF001 - look-alike characters are what is shown
"""A text's segments under two tokenizers, with each token as it is drawn (paper, Figure 2)."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.offsets import tokenize
from matt_fast.alignment.segments import align_segments
from matt_fast.alignment.vocabulary import Token, check_fast, show_token, token_bytes
from matt_fast.support.printable import visible


@dataclass(frozen=True)
class Piece:
    """A token of the text.

    Attributes:
        id: in its vocabulary.
        text: its characters, `visible`; the bytes of one that is only a part of a character, as "‹E3 81›".
    """

    id: int
    text: str


@dataclass(frozen=True)
class Segment:
    """One segment.

    Attributes:
        text: its characters, as they are in the text.
        old, new: its tokens, at least one on either side.
    """

    text: str
    old: tuple[Piece, ...]
    new: tuple[Piece, ...]

    @property
    def ends_line(self) -> bool:
        return "\n" in self.text

    def label(self, number: int) -> str:
        """Its number; and its text, where the tokens are only parts of characters."""
        whole = any(not x.text.startswith("‹") for x in (*self.old, *self.new))
        return str(number) if whole else f"{number} {visible(self.text)}"


@dataclass(frozen=True)
class Segments:
    """The segments of a text.

    Attributes:
        segments: in order.
        right_to_left: whether the text's first letter is of a script that is written so.
    """

    segments: tuple[Segment, ...]
    right_to_left: bool

    @property
    def kinds(self) -> Counter:
        """How many segments have so many (old, new) tokens."""
        return Counter((len(x.old), len(x.new)) for x in self.segments)


def find_segments(text: str, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> Segments:
    """Cut a text where both tokenizers have a boundary, and say what each has between (`align_segments`).

    Args:
        text: without special tokens around it.
        old, new: fast tokenizers.

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: the text has no tokens; a tokenizer's tokens cannot be read as bytes.
    """
    for name, tokenizer in (("old", old), ("new", new)):
        check_fast(tokenizer, name)
    (old_ids, old_spans), (new_ids, new_spans) = ([x[0] for x in tokenize(side, [text])] for side in (old, new))
    aligned = align_segments(old_spans, new_spans)
    if not max((part.max(initial=-1) + 1 for part in aligned), default=0):
        raise ValueError(f"text: wanted text that both tokenizers have tokens for, got {text[:40]!r}")
    sides = [
        _by_segment(_pieces(text, ids, spans, token_bytes(tokenizer)), part)
        for ids, spans, tokenizer, part in zip(
            (old_ids, new_ids), (old_spans, new_spans), (old, new), aligned, strict=True
        )
    ]
    ends = np.zeros(len(sides[0]), np.int64)
    np.maximum.at(ends, np.concatenate(aligned), np.concatenate([old_spans, new_spans])[:, 1])
    ends = np.maximum.accumulate(ends).tolist()
    ends[-1] = len(text)
    starts = [0, *ends[:-1]]
    found = (Segment(text[a:b], *pieces) for a, b, *pieces in zip(starts, ends, *sides, strict=True))
    return Segments(tuple(found), is_right_to_left(text))


def is_right_to_left(text: str) -> bool:
    """Whether the first letter that has a direction is of a script written from right to left."""
    kinds = (unicodedata.bidirectional(x) for x in text)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _by_segment(pieces: Sequence[Piece], owner: NDArray[np.int64]) -> list[tuple[Piece, ...]]:
    cuts = np.flatnonzero(np.diff(owner)) + 1
    return [tuple(pieces[a:b]) for a, b in zip([0, *cuts], [*cuts, len(pieces)], strict=True)]


def _pieces(text: str, ids: NDArray, spans: NDArray, tokens: dict[int, Token]) -> list[Piece]:
    """Tokens by their characters; by their bytes where several share a character or one has none."""
    starts, ends = spans.T
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    behind = np.concatenate([np.minimum.accumulate(starts[::-1])[::-1][1:], [len(text)]]) if len(starts) else starts
    alone = (starts < ends) & (starts >= before) & (ends <= behind)
    return [
        Piece(int(i), visible(text[a:b]) if own else show_token(tokens.get(int(i))))
        for i, (a, b), own in zip(ids, spans.tolist(), alone, strict=True)
    ]
