"""Where the rows of new tokens start, told by the teacher's own rows: the baselines."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from matt_fast.alignment.vocabulary import Match
from matt_fast.initializers.choices import METHODS, PIECES

EXPONENT = 2.0  # AdaptiVocab's
Method = Callable[[torch.Tensor, int, Mapping[int, Match], Mapping[int, Sequence[int]]], torch.Tensor]


def initialize(
    teacher_weight: torch.Tensor,
    student_rows: int,
    matches: Mapping[int, Match],
    subtokens: Mapping[int, Sequence[int]],
    *,
    method: str | Method = "mean",
    seed: int = 0,
    teacher_lengths: Mapping[int, int] | None = None,
    teacher_ids: Iterable[int] | None = None,
) -> torch.Tensor:
    """The first value of every row of a student's embedding table.

    Shared tokens get the teacher's row. New ones get, by `method`:

    * "mean": the mean of the teacher's rows of the token's sub-tokens; a token that the teacher cannot spell gets the
      mean of the rows of all the teacher's tokens;
    * "length-mean": the same, weighted by the bytes of each sub-token;
    * "first-piece", "last-piece": the row of that sub-token alone;
    * "exponential-first", "exponential-last": the mean weighted by exp(2 i), i counted towards the first or the last
      sub-token (AdaptiVocab, https://arxiv.org/abs/2503.19693, which takes the last for the input embedding and the
      first for the output head);
    * "random": a draw from the normal distribution with the mean and covariance of the rows of the teacher's tokens;
    * "zero": zeros;
    * a function of (teacher_weight, student_rows, matches, subtokens), which gives all rows.

    Args:
        teacher_weight: [teacher rows, hidden], floating point: an input embedding or an output head.
        student_rows: rows of the student's table.
        matches: the shared tokens, from `match_tokens`.
        subtokens: student id -> the teacher ids that spell it, from `spell_tokens`.
        method: one of the names above, or a function.
        seed: of the random draws. Same seed, same rows.
        teacher_lengths: teacher id -> bytes of the token; needed by "length-mean".
        teacher_ids: the ids that are tokens of the teacher. Rows of other ids (padding, which no training reached) tell
            nothing: they enter no mean and no draw. All rows count if None.

    Returns:
        [student_rows, hidden] float32.

    Raises:
        ValueError: unknown method, a teacher id that has no row, or rows of another shape from a function.
    """
    weight = teacher_weight.detach().float()
    known = weight
    if teacher_ids is not None:
        known = weight[torch.tensor(sorted(i for i in teacher_ids if i < len(weight)), device=weight.device)]
    used = [match.teacher_id for match in matches.values()] + [i for ids in subtokens.values() for i in ids]
    if used and max(used) >= len(weight):
        raise ValueError(f"teacher_weight: wanted a row for each teacher id up to {max(used)}, got {len(weight)} rows")
    if callable(method):
        rows = method(weight, student_rows, matches, subtokens).detach().float().clone()
        if rows.shape != (student_rows, weight.shape[1]):
            raise ValueError(
                f"method: wanted rows of shape {(student_rows, weight.shape[1])} from it, got {tuple(rows.shape)}"
            )
    elif method in PIECES:
        if method == "length-mean" and teacher_lengths is None:
            raise ValueError("teacher_lengths: wanted the bytes of each teacher token for 'length-mean', got None")
        weights = partial(_piece_weights, method, teacher_lengths or {})
        rows = _weighted_means(weight, known.mean(0), student_rows, subtokens, weights)
    elif method == "random":
        rows = _normal_like(known, student_rows, seed)
    elif method == "zero":
        rows = weight.new_zeros(student_rows, weight.shape[1])
    else:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, or a function; got {method!r}")
    shared = torch.tensor(list(matches), dtype=torch.int64)
    rows[shared] = weight[torch.tensor([match.teacher_id for match in matches.values()], dtype=torch.int64)]
    return rows


def _piece_weights(method: str, lengths: Mapping[int, int], pieces: Sequence[int]) -> list[float]:
    """A weight for each sub-token of a token, up to a factor."""
    places = range(len(pieces))
    if method == "length-mean":
        return [float(lengths[i]) for i in pieces]
    if method == "first-piece":
        return [float(i == 0) for i in places]
    if method == "last-piece":
        return [float(i == len(pieces) - 1) for i in places]
    if method == "exponential-first":
        return [math.exp(-EXPONENT * i) for i in places]
    if method == "exponential-last":
        return [math.exp(EXPONENT * (i - len(pieces) + 1)) for i in places]
    return [1.0] * len(pieces)


def _weighted_means(
    weight: torch.Tensor,
    unspelled: torch.Tensor,
    student_rows: int,
    subtokens: Mapping[int, Sequence[int]],
    weights: Callable[[Sequence[int]], list[float]],
) -> torch.Tensor:
    ids = torch.tensor([(i, piece) for i, pieces in subtokens.items() for piece in pieces], dtype=torch.int64)
    owner, flat = ids.view(-1, 2).T.to(weight.device)
    factors = weight.new_tensor([factor for pieces in subtokens.values() for factor in weights(pieces)])
    sums = weight.new_zeros(student_rows, weight.shape[1]).index_add_(0, owner, weight[flat] * factors[:, None])
    totals = weight.new_zeros(student_rows).index_add_(0, owner, factors)[:, None]
    return torch.where(totals > 0, sums / totals.where(totals > 0, 1), unspelled)


def _normal_like(weight: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    mean = weight.mean(0)
    centred = (weight - mean).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / max(len(weight) - 1, 1))
    factor = (eigenvectors * eigenvalues.clamp_min(0).sqrt()).float()
    noise = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return mean + noise.to(weight.device) @ factor.T
