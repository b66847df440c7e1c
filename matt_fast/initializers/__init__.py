"""Where the rows of new tokens start: from the teacher's own rows, at random, or from a folder of someone else's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from matt_fast.teacher import Teacher
from matt_fast.vocabulary import Match, VocabularyPair

METHODS = ("mean", "random")


def initialize(
    teacher_weight: torch.Tensor,
    student_rows: int,
    matches: Mapping[int, Match],
    subtokens: Mapping[int, Sequence[int]],
    *,
    method: str = "mean",
    seed: int = 0,
) -> torch.Tensor:
    """The first value of every row of a student's embedding table.

    Shared tokens get the teacher's row. New ones get, by `method`:

    * "mean": the mean of the teacher's rows of the token's sub-tokens; a token that the teacher cannot spell gets the
      mean of all the teacher's rows;
    * "random": a draw from the normal distribution with the mean and covariance of the teacher's rows.

    Args:
        teacher_weight: [teacher rows, hidden], floating point: an input embedding or an output head.
        student_rows: rows of the student's table.
        matches: the shared tokens, from `match_tokens`.
        subtokens: student id -> the teacher ids that spell it, from `spell_tokens`.
        method: "mean" or "random".
        seed: of the random draws. Same seed, same rows.

    Returns:
        [student_rows, hidden] float32.

    Raises:
        ValueError: unknown method, or a teacher id that has no row.
    """
    weight = teacher_weight.detach().float()
    used = [match.teacher_id for match in matches.values()] + [i for ids in subtokens.values() for i in ids]
    if used and max(used) >= len(weight):
        raise ValueError(f"teacher_weight: wanted a row for each teacher id up to {max(used)}, got {len(weight)} rows")
    if method == "mean":
        rows = _subtoken_means(weight, student_rows, subtokens)
    elif method == "random":
        rows = _normal_like(weight, student_rows, seed)
    else:
        raise ValueError(f"method: wanted 'mean' or 'random', got {method!r}")
    shared = torch.tensor(list(matches), dtype=torch.int64)
    rows[shared] = weight[torch.tensor([match.teacher_id for match in matches.values()], dtype=torch.int64)]
    return rows


@dataclass(frozen=True)
class Rows:
    """Embeddings of a whole vocabulary.

    Attributes:
        input: [student rows, hidden] float.
        output: [student rows, hidden], the head's; None where it is tied to the input embedding.
        output_bias: [student rows]; None where the head has no bias.
    """

    input: torch.Tensor
    output: torch.Tensor | None
    output_bias: torch.Tensor | None


def initial_rows(
    teacher: PreTrainedModel, vocabulary: VocabularyPair, init: str | Path, seed: int, **hub_options
) -> Rows:
    """Input and, where untied, output embeddings for the student's vocabulary.

    Args:
        teacher: a language model; only its embeddings and head are read.
        vocabulary: the two vocabularies.
        init: "mean" or "random" (see `initialize`), or a model folder whose rows are taken for the new tokens.
        seed: of the random draws.
        **hub_options: for loading that folder.

    Raises:
        ValueError: unknown method, or a folder whose embeddings do not fit.
    """
    theirs = None
    if init not in METHODS:
        theirs = _load_folder(init, **hub_options)

    def rows(weight: torch.Tensor, name: str) -> torch.Tensor:
        method = "mean" if theirs is not None else init
        start = initialize(weight, vocabulary.rows, vocabulary.matches, vocabulary.subtokens, method=method, seed=seed)
        if theirs is not None:
            prepared = _prepared_rows(theirs, name, start.shape, init)
            new = [i for i in vocabulary.tokens if i not in vocabulary.matches]
            start[new] = prepared[new]
        return start

    head = teacher.get_output_embeddings()
    tied = head is None or head.weight is teacher.get_input_embeddings().weight
    bias = None if head is None else getattr(head, "bias", None)
    return Rows(
        input=rows(teacher.get_input_embeddings().weight, "get_input_embeddings"),
        output=None if tied else rows(head.weight, "get_output_embeddings"),
        output_bias=None
        if bias is None
        else initialize(bias[:, None], vocabulary.rows, vocabulary.matches, vocabulary.subtokens)[:, 0],
    )


def _load_folder(path: str | Path, **hub_options) -> PreTrainedModel:
    """A model folder's embeddings, with one layer of the model."""
    try:
        source = Teacher(path, **hub_options)
    except ValueError as error:
        raise ValueError(
            f"init: wanted {', '.join(METHODS)}, or a model folder with ready embeddings; got {error}"
        ) from error
    return source.load(torch.float32, n_layers=1)


def _prepared_rows(model: PreTrainedModel, getter: str, wanted: tuple[int, int], path: str | Path) -> torch.Tensor:
    weight = getattr(model, getter)().weight.detach()
    if weight.shape[0] < wanted[0] or weight.shape[1] != wanted[1]:
        raise ValueError(
            f"init: wanted embeddings with at least {wanted[0]} rows of width {wanted[1]} in {str(path)!r}, "
            f"got {tuple(weight.shape)}"
        )
    return weight


def _subtoken_means(weight: torch.Tensor, student_rows: int, subtokens: Mapping[int, Sequence[int]]) -> torch.Tensor:
    owner = torch.tensor([student_id for student_id, ids in subtokens.items() for _ in ids], dtype=torch.int64)
    flat = torch.tensor([i for ids in subtokens.values() for i in ids], dtype=torch.int64)
    sums = torch.zeros(student_rows, weight.shape[1]).index_add_(0, owner, weight[flat])
    lengths = owner.bincount(minlength=student_rows)[:, None]
    return torch.where(lengths > 0, sums / lengths.clamp_min(1), weight.mean(0))


def _normal_like(weight: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    mean = weight.mean(0)
    centred = (weight - mean).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / max(len(weight) - 1, 1))
    factor = (eigenvectors * eigenvalues.clamp_min(0).sqrt()).float()
    noise = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return mean + noise.to(weight.device) @ factor.T
