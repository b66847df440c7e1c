"""New tokens as sparse mixtures of the teacher's rows: what several methods share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from matt_fast.alignment.vocabulary import Token, VocabularyPair


class Coefficients(NamedTuple):
    """A sparse matrix by rows: row i has `values[j]` in column `col_indices[j]`, crow_indices[i] <= j < [i + 1].

    Attributes:
        crow_indices: [rows + 1] int64.
        col_indices: [non-zeros] int64; in each row by falling value.
        values: [non-zeros] float32.
    """

    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Mixtures:
    """New tokens as mixtures of the teacher's rows; those that have none are left to the caller.

    Attributes:
        ids: [n] int64, the new tokens with a mixture, ascending.
        coefficients: [n, teacher rows]; each row's sum is 1, or it is empty.
        counts: [vocabulary rows] int64: how often each student token occurs in it.
    """

    ids: torch.Tensor
    coefficients: Coefficients
    counts: torch.Tensor

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """[n, d] float32: the mixtures of `weight` [teacher rows, d], an input embedding or an output head."""
        coefficients = Coefficients(*(part.to(weight.device) for part in self.coefficients))
        return apply(coefficients, weight)


def mixtures(
    vocabulary: VocabularyPair,
    student_ids: torch.Tensor,
    teacher_ids: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
) -> Mixtures:
    """Mixtures for the new tokens that have a letter, by weights of pairs of tokens.

    Digits, spaces, punctuation, special tokens and fragments of characters are left out: what they are is told best by
    how the teacher spells them.

    Args:
        vocabulary: the two vocabularies.
        student_ids, teacher_ids: [p] int64, pairs of tokens, each once.
        weights: [p] float, positive.
        counts: [vocabulary rows] int64: how often each student token occurs in the text.
    """
    new = set(vocabulary.tokens) - set(vocabulary.matches)
    wanted = torch.zeros(vocabulary.rows, dtype=torch.bool)
    wanted[[i for i in new if has_letter(vocabulary.tokens[i])]] = True
    usable = torch.zeros(vocabulary.teacher_rows, dtype=torch.bool)
    usable[[i for i in text_tokens(vocabulary.teacher_tokens) if i < vocabulary.teacher_rows]] = True
    kept = wanted[student_ids] & usable[teacher_ids]
    student_ids, teacher_ids, weights = student_ids[kept], teacher_ids[kept], weights[kept].double()
    # By student id, then falling weight, then teacher id.
    order = teacher_ids.argsort(stable=True)
    order = order[weights[order].argsort(descending=True, stable=True)]
    order = order[student_ids[order].argsort(stable=True)]
    student_ids, teacher_ids, weights = student_ids[order], teacher_ids[order], weights[order]
    ids, row, sizes = student_ids.unique_consecutive(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, row, weights)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    coefficients = Coefficients(offsets, teacher_ids, (weights / sums[row]).float())
    return Mixtures(ids, coefficients, counts)


def text_tokens(tokens: Mapping[int, Token]) -> list[int]:
    """The ids that are not special, ascending."""
    return sorted(i for i, token in tokens.items() if token.kind != "special")


def has_letter(token: Token) -> bool:
    """Whether the token is text, whole characters, with a letter among them."""
    if token.kind != "text":
        return False
    try:
        return any(character.isalpha() for character in token.bytes.decode())
    except UnicodeDecodeError:
        return False


def apply(coefficients: Coefficients, weight: torch.Tensor, *, block_bytes: int = 1 << 28) -> torch.Tensor:
    """The product coefficients @ weight.

    Args:
        coefficients: [m, s].
        weight: [s, d], floating point, on the same device.
        block_bytes: bound of the temporary memory: so many columns of `weight` are taken at a time.

    Returns:
        [m, d] float32. Empty rows of the coefficients give zeros.

    Raises:
        ValueError: a column without a row in `weight`.
    """
    offsets, columns, values = coefficients
    if len(columns) and int(columns.max()) >= len(weight):
        raise ValueError(f"weight: wanted a row for each column up to {int(columns.max())}, got {len(weight)} rows")
    out = torch.zeros(len(offsets) - 1, weight.shape[1], device=weight.device)
    if len(columns) == 0:
        return out
    at_a_time = max(1, block_bytes // (4 * (len(weight) + len(out))))
    for start in range(0, weight.shape[1], at_a_time):
        some = weight.detach()[:, start : start + at_a_time].float().contiguous()
        out[:, start : start + at_a_time] = torch.nn.functional.embedding_bag(
            columns, some, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )
    return out
