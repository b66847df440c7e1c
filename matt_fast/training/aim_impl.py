"""AIM on attention weights, with the calls of the reference library's `matt.training.aim_impl`.

For its scripts and tests, and to compare with: n × n × d numbers per head pass through memory. Training uses
`matt_fast.aim_loss`, whose value is the mean squared difference of the two tensors that `aim_impl` returns.

Word ids are int64, -100 for a token of no word (padding, special tokens). Neighbours with one id are a word,
in each row of a batch on its own.
"""

from collections.abc import Callable

import torch

from matt_fast.support.ids import SPECIAL


def get_aim_impl(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`aim_impl` for "aim", `aim_star_impl` for "aim_star".

    Raises:
        ValueError: another name.
    """
    known = {"aim": aim_impl, "aim_star": aim_star_impl}
    if name not in known:
        raise ValueError(f"name: wanted one of {', '.join(known)}, got {name!r}")
    return known[name]


def aim_impl(
    teacher_attn_weights: torch.Tensor,
    teacher_value_states: torch.Tensor,
    teacher_word_ids: torch.Tensor,
    student_attn_weights: torch.Tensor,
    student_value_states: torch.Tensor,
    student_word_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each word's last token takes from each word up to it, on both sides (paper, eq. 5).

    Args:
        teacher_attn_weights, student_attn_weights: [B, H, n, n].
        teacher_value_states, student_value_states: [B, H or H_kv, n, d].
        teacher_word_ids, student_word_ids: [B, n] int64, ascending and the same words on both sides in each row.

    Returns:
        Two tensors [pairs, d], ordered by row, head, word that takes, word it is taken from. Their mean squared
        difference is `aim_loss` of the same states.

    Raises:
        ValueError: shapes that do not fit, a row whose words differ between the sides, or one whose ids do not ascend.
    """
    teacher = teacher_word_ids, teacher_attn_weights, teacher_value_states
    student = student_word_ids, student_attn_weights, student_value_states
    _check_sides(teacher, student)
    return get_aim_states(*teacher), get_aim_states(*student)


def aim_star_impl(
    teacher_attn_weights: torch.Tensor,
    teacher_value_states: torch.Tensor,
    teacher_word_ids: torch.Tensor,
    student_attn_weights: torch.Tensor,
    student_value_states: torch.Tensor,
    student_word_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention outputs at each word's last token, on both sides (paper, eq. 9).

    Arguments and errors are those of `aim_impl`.

    Returns:
        Two tensors [words, d], ordered by row, head, word.
    """
    teacher = teacher_word_ids, teacher_attn_weights, teacher_value_states
    student = student_word_ids, student_attn_weights, student_value_states
    _check_sides(teacher, student)
    return get_aim_star_states(*teacher), get_aim_star_states(*student)


def get_aim_states(word_ids: torch.Tensor, attn_weights: torch.Tensor, value_states: torch.Tensor) -> torch.Tensor:
    """What each word's last token takes from each word up to it, on one side.

    Args:
        word_ids: [B, n] int64.
        attn_weights: [B, H, n, n] floating point.
        value_states: [B, H or H_kv, n, d] floating point.

    Returns:
        [pairs, d] in the common dtype of weights and values, ordered by row, head, word that takes, word it is taken
        from. A row of m words has m (m + 1) / 2 pairs for each head; without any word there are no pairs.

    Raises:
        ValueError: shapes that do not fit.
    """
    return _states(_pairs, word_ids, attn_weights, value_states)


def get_aim_star_states(word_ids: torch.Tensor, attn_weights: torch.Tensor, value_states: torch.Tensor) -> torch.Tensor:
    """The attention outputs at each word's last token, on one side.

    Arguments and errors are those of `get_aim_states`.

    Returns:
        [words, d] in the common dtype of weights and values, ordered by row, head, word.
    """
    return _states(lambda weight, value, words, ends: weight[ends] @ value, word_ids, attn_weights, value_states)


def _states(states_of: Callable[..., torch.Tensor], word_ids, attn_weights, value_states) -> torch.Tensor:
    """What `states_of` gives for each head of each row, in one tensor."""
    _check_shapes("word_ids, attn_weights, value_states", word_ids, attn_weights, value_states)
    dtype = torch.promote_types(attn_weights.dtype, value_states.dtype)
    groups = attn_weights.shape[1] // value_states.shape[1]
    found = [value_states.new_empty(0, value_states.shape[-1], dtype=dtype)]
    for ids, weights, values in zip(word_ids, attn_weights.to(dtype), value_states.to(dtype), strict=True):
        words, ends = (x.to(weights.device) for x in _words(ids))
        found += [states_of(weight, values[head // groups], words, ends) for head, weight in enumerate(weights)]
    return torch.cat(found)


def _pairs(weight: torch.Tensor, value: torch.Tensor, words: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[n, n], [n, d], what `_words` gives -> [pairs, d]."""
    member = (words == torch.arange(len(ends), device=words.device)[:, None]).to(value.dtype)  # [m, n]
    taking, taken = torch.tril_indices(len(ends), len(ends), device=words.device)
    # [m, n] x [m, n] x [n, d] -> [m, m, d]
    return torch.einsum("in,jn,nd->ijd", weight[ends], member, value)[taking, taken]


def _words(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] ids -> ([n] the number of the word that a token is part of, -1 for none; [m] where each word ends)."""
    outside = ids.new_full((1,), SPECIAL)
    inside = ids != SPECIAL
    first = inside & (ids.diff(prepend=outside) != 0)
    last = inside & (ids.diff(append=outside) != 0)
    return torch.where(inside, first.cumsum(0) - 1, -1), last.nonzero().flatten()


def _check_shapes(name: str, word_ids, attn_weights, value_states) -> None:
    ids, weights, values = (tuple(x.shape) for x in (word_ids, attn_weights, value_states))
    fits = len(ids) == 2 and len(weights) == len(values) == 4 and ids == (weights[0], weights[2])
    fits = fits and weights[2] == weights[3] and (values[0], values[2]) == ids
    if not fits or values[1] == 0 or weights[1] % values[1]:
        raise ValueError(
            f"{name}: wanted attn_weights [B, H, n, n], value_states [B, H or H_kv, n, d], word_ids [B, n]; "
            f"got {weights}, {values}, {ids}"
        )


def _check_sides(teacher: tuple[torch.Tensor, ...], student: tuple[torch.Tensor, ...]) -> None:
    _check_shapes("teacher", *teacher)
    _check_shapes("student", *student)
    if len(teacher[0]) != len(student[0]):
        raise ValueError(f"student_word_ids: wanted the teacher's {len(teacher[0])} rows, got {len(student[0])}")
    for row, sides in enumerate(zip(teacher[0], student[0], strict=True)):
        theirs, mine = (ids[_words(ids)[1]] for ids in sides)
        if theirs.tolist() != mine.tolist():
            raise ValueError(
                f"student_word_ids: wanted the teacher's words in row {row}, {theirs.tolist()}; got {mine.tolist()}"
            )
        if (mine.diff() <= 0).any():
            raise ValueError(f"word_ids: wanted ids that ascend in row {row}, got {mine.tolist()}")
