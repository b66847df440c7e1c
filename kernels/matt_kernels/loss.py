"""aim_loss on Triton kernels, usable without the rest of matt-fast."""

import math

import torch

from matt_kernels.configs import Config, choose_config, target_of
from matt_kernels.mse import AimMse
from matt_kernels.plan import AimPlan, make_plan

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def aim_plan(
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
    *,
    teacher_documents: torch.Tensor | None = None,
    student_documents: torch.Tensor | None = None,
    reduction: str = "pairs",
    sliding_window: int | None = None,
    causal: bool = True,
    widths: tuple[int, int] = (32, 32),
) -> AimPlan:
    """What the kernels need to know about a batch's ids, on the ids' device and without synchronisation.

    Arguments as in aim_loss, which makes the plan itself unless it is given one, for instance from the data workers.
    `widths` is the most teacher and student tokens of a tile, powers of 2 from 16.
    """
    return make_plan(
        teacher_segments, student_segments, teacher_documents, student_documents, widths=widths, variant="aim",
        causal=causal, sliding_window=sliding_window, reduction=reduction,
    )  # fmt: skip


def aim_loss(
    teacher: Tensors,
    student: Tensors,
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
    *,
    teacher_documents: torch.Tensor | None = None,
    student_documents: torch.Tensor | None = None,
    reduction: str = "pairs",
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    plan: AimPlan | None = None,
) -> torch.Tensor:
    """Attention Influence Modeling with the mean squared error ("Model-Aware Tokenizer Transfer", eq. 10).

    Args:
        teacher: (q [B, H, n_T, d], k [B, H_kv, n_T, d], v [B, H_kv, n_T, d_v]), after rotary embedding and any norm, as
            attention receives them; H a multiple of H_kv. Detached.
        student: the same with n_S tokens. Gradients flow to those that require one, the others cost nothing.
        teacher_segments, student_segments: integers [B, n_T] and [B, n_S] on the same device: 0..m-1 in order in every
            row, the same m on both sides, negative for tokens in no segment. Not checked: checking would synchronise.
        teacher_documents, student_documents: integers [B, n], both or neither: the document of each token of packed or
            padded rows, -1 for padding. Nothing is seen across documents; padding is neither seen nor counted.
        reduction: "pairs", the mean over all pairs of the batch, or "documents", the mean over documents of each one's.
        scale: factor on q·k, by default 1 / sqrt(d).
        sliding_window: token p sees t when 0 <= p - t < window; without `causal` when |p - t| <= window.
        softcap: logits become softcap * tanh(logits / softcap).
        causal: False for encoders.
        plan: of these ids and options, from aim_plan; None makes it.

    Tensors are float32, bfloat16 or float16, all the same, on a GPU (or anywhere with TRITON_INTERPRET=1). Sums are in
    float32; float32 inputs never meet a single tf32 product. Memory beyond the gradients is linear in n: 20 bytes per
    query row and head kept for backward, and `(n_S + 2 n_T) * 32` numbers per key head while a pass runs.

    Returns:
        Scalar, float32; 0 for a batch without segments. Differentiable once.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or options that do not fit.
    """
    check_tensors(teacher, student)
    if reduction not in ("pairs", "documents"):
        raise ValueError(f"reduction must be 'pairs' or 'documents'; got {reduction!r}")
    if (teacher_documents is None) != (student_documents is None):
        raise ValueError("teacher_documents and student_documents must be given together or not at all; got one")
    query, _, value = student
    config = choose_config(query.shape[-1], value.shape[-1], query.dtype, target_of(query.device))
    if plan is None:
        plan = aim_plan(
            teacher_segments, student_segments, teacher_documents=teacher_documents,
            student_documents=student_documents, reduction=reduction, sliding_window=sliding_window, causal=causal,
            widths=(config.block_t, config.block_s),
        )  # fmt: skip
    return aim_mse(teacher, student, plan, config, scale=scale, softcap=softcap)


def aim_mse(
    teacher: Tensors, student: Tensors, plan: AimPlan, config: Config, *, scale: float | None, softcap: float | None
) -> torch.Tensor:
    """The loss for a plan and a config of one's own."""
    scale = 1 / math.sqrt(student[0].shape[-1]) if scale is None else float(scale)
    teacher, student = (tuple(with_unit_stride(x) for x in side) for side in (teacher, student))
    return AimMse.apply(*student, tuple(x.detach() for x in teacher), plan, config, scale, softcap)


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any stride but the last one's."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_tensors(teacher: Tensors, student: Tensors) -> None:
    """TypeError or ValueError that names the tensor at fault."""
    dtype = student[0].dtype
    if dtype not in DTYPES:
        raise TypeError(f"student q must be float32, bfloat16 or float16; got {dtype}")
    for side, (query, key, value) in (("teacher", teacher), ("student", student)):
        for name, x in (("q", query), ("k", key), ("v", value)):
            if x.dtype != dtype:
                raise TypeError(f"{side} {name} must have the dtype of student q, {dtype}; got {x.dtype}")
            if x.device != student[0].device:
                raise ValueError(f"{side} {name} must be on the device of student q; got {x.device}")
        fits = query.ndim == 4 and key.shape[:3] == value.shape[:3]
        fits = fits and (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])
        if not fits or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"{side} must have shapes q [B, H, n, d], k [B, H_kv, n, d], v [B, H_kv, n, d_v], H a multiple of "
                f"H_kv; got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        if max(query.shape[-1], value.shape[-1]) > 256:
            raise ValueError(f"{side}: head dimensions must be at most 256; got {query.shape[-1]}, {value.shape[-1]}")
    for name, x, y in zip("qkv", teacher, student, strict=True):
        if (x.shape[:2], x.shape[3]) != (y.shape[:2], y.shape[3]):
            raise ValueError(f"teacher and student {name} must agree but in n; got {tuple(x.shape)}, {tuple(y.shape)}")
