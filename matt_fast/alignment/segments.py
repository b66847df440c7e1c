"""Segments: the finest common partition of one text's tokens under two tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from matt_fast.support.ids import SPECIAL

CHUNK = 1 << 16  # tokens of both sides taken at a time: their arrays then stay in the processor's cache
POSITIONS_PER_TOKEN = 32  # up to here tables over all positions, which are several times as fast as searches


def align_segments(
    teacher_offsets: ArrayLike,
    student_offsets: ArrayLike,
    teacher_special: ArrayLike | None = None,
    student_special: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give every token of one document, tokenized twice, the id of its segment.

    Algorithm 1 of the MATT paper (Appendix B), made exact for offsets that are out of order.

    Definition. Take the non-special tokens of each side. After the first ``i`` tokens of the teacher and the first
    ``j`` of the student a *cut* is possible when every token before it, of either side, ends no later than every token
    behind it, of either side, starts: some character position then separates the two and lies inside no token. It is
    *clear* unless ``i`` could be cut together with several places of the student's, or ``j`` with several of the
    teacher's, that have text between them: nobody can tell which side of the cut that text belongs to. A segmentation
    is a chain of clear cuts from ``(0, 0)`` to the end of both sides in which each cut is behind the one before on both
    sides, so each segment has tokens of both. The result is the longest such chain and, where several are equally long,
    the one whose every cut comes earliest (there is exactly one).

    Where starts do not decrease and all possible cuts are clear, as in nearly every tokenizer's output, this is the
    paper's loop token for token. What follows for the awkward cases:

    * A stretch of text that one side leaves out and the other has within a longer token (spaces trimmed) belongs to
      that token. So ``" world"`` (5, 11) and ``"world"`` (6, 11) make one segment, cut off at 5.
    * Where the other side has a token of its own for it (an accent that a composing normaliser takes into the letter
      before, a space that was trimmed off the word behind), nothing is cut there: the tokens on both sides of the
      stretch stay together, which is right either way. Give the text's characters to tokens first to get finer
      segments, as ``make_chunks`` does (``matt_fast.alignment.offsets``). The paper's loop takes such a stretch to the
      segment behind it.
    * Several tokens over one character (bytes of an emoji, NFKC's expansion of a ligature), and tokens that overlap
      (the ``"▁"`` that SentencePiece puts before the text and reports over its first character), stay together.
    * A zero-width token sits at its position and can be cut off on either side of it; it goes to the segment behind it
      unless both sides have one there. One that lies before the end of an earlier token of its side, as (0, 0) of an
      unmasked special token in or behind the text, belongs to the token before it and prevents no cut.
    * Tokens out of order that cover characters share a segment with everything between.
    * When one side ends early, the other side's remaining tokens join the last segment. Cut long documents at a segment
      boundary rather than truncating one side.
    * When one side has no token left at all, no segment exists: every id is -100.

    Args:
        teacher_offsets: [n, 2] integers, character (start, end) of each token, as in a fast tokenizer's
            ``offset_mapping``. An empty list is a document without tokens.
        student_offsets: [m, 2], the same text under the student's tokenizer.
        teacher_special: [n] bool or 0/1, True for special tokens and padding, as in ``special_tokens_mask``. Their
            offsets are not looked at. None: no token is special.
        student_special: [m], the same for the student.

    Returns:
        Segment ids of the teacher's tokens, int64 [n], and of the student's, int64 [m]: -100 for special tokens,
        otherwise 0 … s-1, non-decreasing, every id on both sides.

    Raises:
        TypeError: offsets that are not integers, a mask that is neither bool nor integer.
        ValueError: a wrong shape, a negative start, an end before its start, a mask of another length or with values
            other than 0 and 1.
    """
    teacher_ids, student_ids = _align(
        _checked("teacher_offsets", [teacher_offsets], "teacher_special", _listed(teacher_special)),
        _checked("student_offsets", [student_offsets], "student_special", _listed(student_special)),
    )
    return teacher_ids[0], student_ids[0]


def align_segments_batch(
    teacher_offsets: Sequence[ArrayLike],
    student_offsets: Sequence[ArrayLike],
    teacher_special: Sequence[ArrayLike] | None = None,
    student_special: Sequence[ArrayLike] | None = None,
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """:func:`align_segments` for many documents in one vectorised pass.

    Args:
        teacher_offsets: for each document [n_d, 2] integers.
        student_offsets: for each document [m_d, 2] integers, as many documents as the teacher has.
        teacher_special: None, or for each document a mask [n_d].
        student_special: None, or for each document a mask [m_d].

    Returns:
        Two lists with one int64 array [n_d] or [m_d] per document, equal to what :func:`align_segments` gives for it.

    Raises:
        TypeError: as :func:`align_segments`.
        ValueError: as :func:`align_segments`; also lists of different lengths.
    """
    for name, documents in [
        ("student_offsets", student_offsets),
        ("teacher_special", teacher_special),
        ("student_special", student_special),
    ]:
        if documents is not None and len(documents) != len(teacher_offsets):
            raise ValueError(
                f"{name} must have one entry per document, {len(teacher_offsets)} as in teacher_offsets, "
                f"got {len(documents)}"
            )
    teacher = _checked("teacher_offsets[{}]", teacher_offsets, "teacher_special[{}]", teacher_special)
    student = _checked("student_offsets[{}]", student_offsets, "student_special[{}]", student_special)
    chunk = np.cumsum(teacher.lengths + student.lengths) // CHUNK
    stops = (np.flatnonzero(np.diff(chunk, append=-1)) + 1).tolist()
    teacher_ids: list[NDArray[np.int64]] = []
    student_ids: list[NDArray[np.int64]] = []
    for start, stop in zip([0, *stops], stops, strict=False):
        ids = _align(teacher.part(start, stop), student.part(start, stop))
        teacher_ids += ids[0]
        student_ids += ids[1]
    return teacher_ids, student_ids


class _Documents(NamedTuple):
    """One side's documents: types and shapes are checked, values not yet."""

    label: str  # what errors call a document's offsets, given its number
    before: int  # number of the first document
    offsets: list[NDArray[np.integer]]
    special: list[NDArray[np.bool_]] | None
    lengths: NDArray[np.int64]

    def part(self, start: int, stop: int) -> _Documents:
        special = None if self.special is None else self.special[start:stop]
        return _Documents(self.label, start, self.offsets[start:stop], special, self.lengths[start:stop])

    def joined(self) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """All offsets [n, 2], and which tokens are not special (None: all)."""
        spans = np.concatenate(self.offsets, dtype=np.int64)
        kept = None if self.special is None else ~np.concatenate(self.special)
        wrong = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0])
        if wrong.any() and (kept is None or (wrong & kept).any()):
            token = (wrong if kept is None else wrong & kept).argmax()
            stops = np.cumsum(self.lengths)
            document = np.searchsorted(stops, token, side="right")
            raise ValueError(
                f"{self.label.format(self.before + document)} must hold (start, end) with 0 <= start <= end, got "
                f"{tuple(spans[token].tolist())} at token {token - stops[document] + self.lengths[document]}"
            )
        return spans, kept


def _align(teacher: _Documents, student: _Documents) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Lay the documents one behind the other on one line of characters, cut it once, number segments by document."""
    sides = teacher, student
    joined = [side.joined() for side in sides]
    spans, masks = [spans for spans, _ in joined], [kept for _, kept in joined]
    counts = [_sums(mask, side.lengths) for mask, side in zip(masks, sides, strict=True)]
    alive = (counts[0] > 0) & (counts[1] > 0)
    if not alive.all():
        of_alive = [np.repeat(alive, side.lengths) for side in sides]
        masks = [own if mask is None else own & mask for own, mask in zip(of_alive, masks, strict=True)]
    spans = [span if mask is None else span[mask] for span, mask in zip(spans, masks, strict=True)]
    first = [np.concatenate([[0], np.cumsum(count[alive])]) for count in counts]
    starting = _starting(spans, first) if alive.any() else [np.zeros(0, bool)] * 2

    results = []
    for starts, begins, mask, side in zip(starting, first, masks, sides, strict=True):
        ids = np.cumsum(starts, dtype=np.int64)
        ids -= np.repeat(ids[begins[:-1]], np.diff(begins))
        if mask is not None:
            kept_ids, ids = ids, np.full(len(mask), SPECIAL, np.int64)
            ids[mask] = kept_ids
        stops = np.cumsum(side.lengths).tolist()
        results.append([ids[start:stop] for start, stop in zip([0, *stops], stops, strict=False)])
    return results[0], results[1]


def _starting(spans, first):
    """By side, for each token, whether a segment starts with it.

    ``spans`` is by side [n, 2]; ``first`` each document's first token and behind them n. No document is empty.
    """
    # Document d takes positions edges[d] + 1 … edges[d+1] - 1. The edges themselves belong to no token, so the cuts
    # between documents, which are put there, pair up with each other and with nothing else.
    top = np.maximum(*(np.maximum.reduceat(span[:, 1], f[:-1]) for span, f in zip(spans, first, strict=True)))
    edges = np.concatenate([[0], np.cumsum(top + 2)])
    teacher, student = (_cuts(span, f, edges) for span, f in zip(spans, first, strict=True))
    dense = edges[-1] <= POSITIONS_PER_TOKEN * (first[0][-1] + first[1][-1])
    if teacher.exact and student.exact and dense:
        return _common(teacher, student), _common(student, teacher)

    teacher_at, student_at = np.flatnonzero(teacher.possible), np.flatnonzero(student.possible)
    clear = _clear(teacher, teacher_at, student, student_at), _clear(student, student_at, teacher, teacher_at)
    teacher_at, student_at = teacher_at[clear[0]], student_at[clear[1]]
    teacher_low, teacher_high = teacher.low[teacher_at], teacher.high[teacher_at]
    student_low, student_high = student.low[student_at], student.high[student_at]

    # A teacher cut and a student cut make a pair when their intervals meet. Intervals are in order on both sides, so
    # the partners of one teacher cut are a run of student cuts, from_ … to.
    to = _count_up_to(student_low, teacher_high, dense) - 1
    paired = np.flatnonzero(student_high[to] >= teacher_low)
    teacher_at, teacher_low, to = teacher_at[paired], teacher_low[paired], to[paired]
    from_ = to.copy()
    several = np.flatnonzero(student_high[to[1:] - 1] >= teacher_low[1:]) + 1
    from_[several] = np.searchsorted(student_high, teacher_low[several])

    # The earliest chain takes the first partner behind the last one used, if there is any:
    # partner[k] = min(to[k], max(partner[k-1] + 1, from_[k])), and k is in the chain when partner grew.
    row = np.arange(len(to))
    partner = row + _clip_scan(from_ - row, to - row)
    taken = np.flatnonzero(np.diff(partner, prepend=-1))
    starting = np.zeros(len(teacher.low), bool), np.zeros(len(student.low), bool)
    starting[0][teacher_at[taken]] = True
    starting[1][student_at[partner[taken]]] = True
    return starting[0][:-1], starting[1][:-1]


class _Cuts(NamedTuple):
    """Cuts of one side before each token and behind the last: the positions low … high they can be at."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    possible: NDArray[np.bool_]
    exact: bool  # no cut has a choice of positions, no two cuts have the same one


def _cuts(spans, first, edges) -> _Cuts:
    """A cut can be anywhere from the last end of the tokens before it to the first start of those behind it."""
    shift = np.repeat(edges[:-1] + 1, np.diff(first))
    low, high = np.empty((2, len(spans) + 1), np.int64)
    reach, onset = np.add(spans[:, 1], shift, out=low[1:]), np.add(spans[:, 0], shift, out=high[:-1])
    zero_width = reach == onset
    stray = None
    if (reach[1:] < reach[:-1]).any() or (onset[1:] < onset[:-1]).any():
        np.maximum.accumulate(reach, out=reach)
        # A zero-width token behind its own side's reach goes with the token before it, whatever its position says.
        stray = zero_width & (onset < reach)
        onset[stray] = reach[stray]
        np.minimum.accumulate(onset[::-1], out=onset[::-1])
    low[first] = high[first] = edges
    possible = low <= high
    if stray is not None:
        possible[:-1] &= ~stray
    return _Cuts(low, high, possible, not zero_width.any() and not (low < high).any())


def _clear(ours: _Cuts, ours_at, theirs: _Cuts, theirs_at) -> NDArray[np.bool_]:
    """Which of our cuts do not lie in a gap of ours that holds text of theirs which can be cut off on both sides."""
    low, high, clear = ours.low[ours_at], ours.high[ours_at], np.ones(len(ours_at), bool)
    their_low, their_high = theirs.low[theirs_at], theirs.high[theirs_at]
    wide = np.flatnonzero(low < high)
    from_ = np.searchsorted(their_high, low[wide])
    to = np.searchsorted(their_low, high[wide], side="right") - 1
    clear[wide] = their_low[to] <= their_high[from_]
    return clear


def _common(ours: _Cuts, theirs: _Cuts) -> NDArray[np.bool_]:
    """Which of our tokens start where the other side can be cut too; all cuts exact."""
    marks = np.zeros(theirs.low[-1] + 1, bool)
    # Where cuts share their low position all but the last are impossible, and the last to be written counts.
    marks[theirs.low] = theirs.possible
    return marks[ours.low[:-1]] & ours.possible[:-1]


def _count_up_to(values, positions, dense):
    """For each position how many of the sorted ``values`` are at most that."""
    if not dense:
        return np.searchsorted(values, positions, side="right")
    return np.cumsum(np.bincount(values, minlength=positions[-1] + 1))[positions]


def _sums(kept, lengths):
    """How many of each document's tokens are kept."""
    if kept is None:
        return lengths
    before = np.concatenate([[0], np.cumsum(kept)])
    return np.diff(before[np.concatenate([[0], np.cumsum(lengths)])])


def _clip_scan(low, high):
    """y[k] = clip(y[k-1], low[k], high[k]) for all k; low[0] == high[0].

    Clips compose to clips, so rows still open take in twice as many rows before them each time, until every row is
    closed: reached from a row whose clip leaves one value. Runs of open rows are short: spaces, zero-width tokens.
    """
    low, high = low.copy(), high.copy()
    step = 1
    rows = np.flatnonzero(low < high)
    while rows.size:
        low[rows], high[rows] = (np.clip(side[rows - step], low[rows], high[rows]) for side in (low, high))
        rows = rows[low[rows] < high[rows]]
        step *= 2
    return low


def _checked(offsets_label, offsets, special_label, special) -> _Documents:
    """Check types and shapes of one side's documents; labels are what errors call them, given a document's number."""
    arrays = [_integers(document, offsets_label, d) for d, document in enumerate(offsets)]
    masks = None
    if special is not None:
        masks = [
            _mask(mask, len(array), special_label.format(d))
            for d, (mask, array) in enumerate(zip(special, arrays, strict=True))
        ]
    return _Documents(offsets_label, 0, arrays, masks, np.array([len(array) for array in arrays], np.int64))


def _integers(offsets: ArrayLike, label: str, document: int) -> NDArray[np.integer]:
    try:
        array = _pairs(offsets) if isinstance(offsets, list) else np.asarray(offsets)
    except ValueError as error:
        raise ValueError(f"{label.format(document)} must have shape [n, 2], got rows of different lengths") from error
    if array.size == 0 and array.shape in {(0,), (0, 2)}:
        return np.empty((0, 2), np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{label.format(document)} must hold integers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{label.format(document)} must have shape [n, 2], got {list(array.shape)}")
    return array


def _pairs(offsets: list) -> NDArray:
    """np.array(offsets), in half the time where it is a list of pairs of numbers."""
    with suppress(TypeError):  # elements without a length
        if set(map(len, offsets)) == {2}:
            flat = np.array(list(chain.from_iterable(offsets)))
            if flat.ndim == 1:
                return flat.reshape(-1, 2)
    return np.array(offsets)


def _mask(special: ArrayLike, length: int, name: str) -> NDArray[np.bool_]:
    try:
        array = np.asarray(special)
    except ValueError as error:
        raise ValueError(f"{name} must have shape [{length}], got rows of different lengths") from error
    if array.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], one value per token, got {list(array.shape)}")
    if array.size and array.dtype.kind not in "biu":
        raise TypeError(f"{name} must hold booleans or 0 and 1, got dtype {array.dtype}")
    if array.dtype.kind in "iu" and array.size and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must hold booleans or 0 and 1, got values from {array.min()} to {array.max()}")
    return array.astype(bool)


def _listed(mask: ArrayLike | None) -> list[ArrayLike] | None:
    return None if mask is None else [mask]
