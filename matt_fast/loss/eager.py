"""The AIM loss written down as the paper has it (§3.3-3.4): the specification, and the baseline of every benchmark.

Attention weights are n × n per head, weighted values n × n × d, and autograd keeps what it needs. Rounding is part of
the specification: products, weights and sums in the dtype of the inputs, softmax in float32 and rounded back, as
transformers' eager attention does; only the distance between two segment vectors is taken in float32 (its squares
would underflow in float16).
"""

import torch
import torch.nn.functional as F

from matt_fast.loss.documents import Document, Side

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def eager_loss(
    teacher: Tensors,
    student: Tensors,
    documents: list[Document],
    pair_weights: list[float],
    *,
    variant: str,
    metric: str,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    causal: bool,
) -> torch.Tensor:
    """Sum over documents of pair_weights[document] * sum over heads and pairs of the distance of s_T and s_S."""
    teacher = tuple(x.detach() for x in teacher)
    options = {
        "variant": variant,
        "scale": scale,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "causal": causal,
    }
    terms = []
    for document, weight in zip(documents, pair_weights, strict=True):
        teacher_states = segment_states(teacher, document.row, document.teacher, **options)
        student_states = segment_states(student, document.row, document.student, **options)
        if variant == "aim" and causal:
            queries, keys = torch.tril_indices(document.segment_count, document.segment_count, device=student[0].device)
            teacher_states, student_states = teacher_states[:, queries, keys], student_states[:, queries, keys]
        terms.append(weight * _distance(teacher_states, student_states, metric))
    return torch.stack(terms).sum()


def segment_states(inputs: Tensors, row: int, side: Side, variant, **options) -> torch.Tensor:
    """s[i, j] of eq. 5, [H, m, m, d], or o[i] of eq. 9, [H, m, d], of one document's side; `variant` says which."""
    query, key, value = (x[row, :, side.start : side.stop] for x in inputs)
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    weights = _attention_weights(query, key, **options)
    # [H, n, n] -> [H, m, n]
    weights = weights[:, torch.as_tensor(side.last, device=weights.device)]
    if variant == "aim_star":
        return weights @ value
    # [H, m, n, 1] * [H, 1, n, d] -> [H, m, n, d]
    weighted_values = weights[..., None] * value[:, None]
    segments = torch.as_tensor(side.segments, device=value.device)
    tokens = (segments >= 0).nonzero()[:, 0]
    heads, count, _, size = weighted_values.shape
    states = weighted_values.new_zeros(heads, count, count, size)
    return states.index_add(2, segments[tokens], weighted_values[:, :, tokens])


def _attention_weights(query, key, *, scale, sliding_window, softcap, causal) -> torch.Tensor:
    # [H, n, d] @ [H, d, n] -> [H, n, n]
    logits = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    positions = torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.masked_fill(~visible(positions[:, None], positions, sliding_window, causal), float("-inf"))
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)


def visible(query_position, key_position, sliding_window: int | None, causal: bool) -> torch.Tensor:
    """transformers' masks: a causal window does not reach back to p - window, a bidirectional one includes it."""
    distance = query_position - key_position
    if causal:
        seen = distance >= 0
        return seen if sliding_window is None else seen & (distance < sliding_window)
    return distance == distance if sliding_window is None else distance.abs() <= sliding_window


def _distance(teacher_states: torch.Tensor, student_states: torch.Tensor, metric: str) -> torch.Tensor:
    dtype = torch.promote_types(student_states.dtype, torch.float32)
    teacher_states, student_states = (x.to(dtype).flatten(0, -2) for x in (teacher_states, student_states))
    if metric == "mse":
        return F.mse_loss(student_states, teacher_states, reduction="sum")
    target = student_states.new_ones(len(student_states))
    return F.cosine_embedding_loss(student_states, teacher_states, target, reduction="sum")
