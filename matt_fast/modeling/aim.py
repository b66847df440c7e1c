"""AIM on attention weights, after the reference library's functions: n × n numbers per head, to compare with."""

import torch


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
        teacher_word_ids, student_word_ids: [B, n] int64, ascending and the same on both sides in each row; -100 is no
            word. A word's tokens stand together.

    Returns:
        Two tensors [pairs, d], ordered by row, head, word that takes, word it is taken from. Their mean squared
        difference is `aim_loss` of the same states.

    Raises:
        ValueError: shapes that do not fit, a row whose words differ between the sides, or one whose ids do not ascend.
    """
    return _both(_aim_states, locals())


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
    return _both(_aim_star_states, locals())


def _both(states_of, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    for side in ("teacher", "student"):
        weights, values, ids = (given[f"{side}_{name}"] for name in ("attn_weights", "value_states", "word_ids"))
        batch, heads, length = weights.shape[:3]
        fits = weights.shape[3] == length and values.shape[0] == batch and values.shape[2] == length
        if not fits or heads % values.shape[1] or ids.shape != (batch, length):
            raise ValueError(
                f"{side}: wanted attn_weights [B, H, n, n], value_states [B, H or H_kv, n, d], word_ids [B, n]; "
                f"got {tuple(weights.shape)}, {tuple(values.shape)}, {tuple(ids.shape)}"
            )
    rows = list(zip(map(_words, given["teacher_word_ids"]), map(_words, given["student_word_ids"]), strict=True))
    for row, ((teacher_words, _), (student_words, _)) in enumerate(rows):
        if not torch.equal(teacher_words, student_words.to(teacher_words.device)):
            raise ValueError(
                f"student_word_ids: wanted the teacher's words in row {row}, {teacher_words.tolist()}; "
                f"got {student_words.tolist()}"
            )
        if (student_words.diff() <= 0).any():
            raise ValueError(f"word_ids: wanted ids that ascend in row {row}, got {student_words.tolist()}")
    teacher, student = (
        torch.cat(
            [
                state
                for row, words in enumerate(rows)
                for state in states_of(
                    given[f"{side}_attn_weights"][row],
                    given[f"{side}_value_states"][row],
                    given[f"{side}_word_ids"][row],
                    *words[number],
                )
            ]
        )
        for number, side in enumerate(("teacher", "student"))
    )
    return teacher, student


def _words(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of a row in their order, and where each ends."""
    last = torch.cat([ids[1:] != ids[:-1], ids.new_ones(1, dtype=torch.bool)]) & (ids >= 0)
    ends = last.nonzero().flatten()
    return ids[ends], ends


def _aim_states(weights, values, ids, words, ends):
    """[H, n, n], [H_kv, n, d], [n] -> for each head, [pairs, d]."""
    member = (ids == words[:, None]).to(values.dtype)  # [m, n]
    count = len(words)
    taking, taken = torch.tril_indices(count, count, device=ids.device)
    groups = len(weights) // len(values)
    for head, weight in enumerate(weights):
        value = values[head // groups]
        # [m, n] x [m, n] x [n, d] -> [m, m, d]
        yield torch.einsum("in,jn,nd->ijd", weight[ends], member, value)[taking, taken]


def _aim_star_states(weights, values, ids, words, ends):
    groups = len(weights) // len(values)
    for head, weight in enumerate(weights):
        yield weight[ends] @ values[head // groups]
