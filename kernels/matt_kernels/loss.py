"""aim_loss on Triton kernels, usable without the rest of matt-fast."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from triton import knobs

from matt_kernels.autograd import AimLoss, AimStarLoss
from matt_kernels.configs import is_lopsided
from matt_kernels.ops import aim_plan_op, config_for
from matt_kernels.plan import TENSORS, AimPlan, layout

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHOICES = {"variant": ("aim", "aim_star"), "metric": ("mse", "cosine"), "reduction": ("pairs", "documents")}
LARGEST_HEAD_DIM = 256
MOST_HEADS = 65_535  # of a batch: programs, one for each head and block, are counted in int32
FARTHEST = 2**24  # from token to token, in numbers: kernels count inside a tile in int32
INTERPRETED = knobs.runtime.interpret


def aim_plan(
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
    *,
    teacher_documents: torch.Tensor | None = None,
    student_documents: torch.Tensor | None = None,
    variant: str = "aim",
    reduction: str = "pairs",
    sliding_window: int | None = None,
    causal: bool = True,
    widths: tuple[int, int] = (32, 32),
) -> AimPlan:
    """What the kernels need to know about a batch's ids, on the ids' device and without synchronisation.

    Arguments as in aim_loss, which makes the plan itself unless it is given one, for instance from the data workers.
    `widths` is the most teacher and student tokens of a tile, powers of 2 from 16; `tile_widths` says what suits. A
    plan made on the CPU knows whether a segment is longer than a tile: the loss launches two kernels less if none is.
    """
    plan = _plan(
        teacher_segments, student_segments, teacher_documents, student_documents, variant, reduction, sliding_window,
        causal, widths,
    )  # fmt: skip
    if teacher_segments.device.type == "cpu" and not torch.compiler.is_compiling():
        return replace(plan, long_segments=bool(plan.counts[:, 2].any()))
    return plan


def _plan(
    teacher_segments, student_segments, teacher_documents, student_documents, variant, reduction, sliding_window,
    causal, widths,
) -> AimPlan:  # fmt: skip
    """One that nobody has looked at: without synchronisation wherever the ids are."""
    _check_options(variant=variant, reduction=reduction)
    _check_ids(teacher_segments, student_segments, teacher_documents, student_documents)
    _check_visibility(sliding_window, causal)
    _check_widths(widths)
    tensors = aim_plan_op(
        teacher_segments, student_segments, teacher_documents, student_documents, *widths, variant, causal,
        sliding_window, reduction,
    )  # fmt: skip
    return AimPlan(*tensors, tuple(widths), variant)


def aim_loss(
    teacher: Tensors,
    student: Tensors,
    teacher_segments: torch.Tensor | None = None,
    student_segments: torch.Tensor | None = None,
    *,
    teacher_documents: torch.Tensor | None = None,
    student_documents: torch.Tensor | None = None,
    variant: str = "aim",
    metric: str = "mse",
    reduction: str = "pairs",
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    plan: AimPlan | None = None,
) -> torch.Tensor:
    """Attention Influence Modeling ("Model-Aware Tokenizer Transfer", eq. 10 and 11).

    Args:
        teacher: (q [B, H, n_T, d], k [B, H_kv, n_T, d], v [B, H_kv, n_T, d_v]), after rotary embedding and any norm, as
            attention receives them; H a multiple of H_kv, d and d_v at most 256, B * H at most 65535. Detached.
        student: the same with n_S tokens. Gradients flow to those that require one, the others cost nothing.
        teacher_segments, student_segments: integers [B, n_T] and [B, n_S] on the same device: 0..m-1 in order in every
            row, the same m on both sides, negative for tokens in no segment. Checked on the device, without waiting for
            it: ids that break the rules, or a batch without a segment, give NaN.
        teacher_documents, student_documents: integers [B, n], both or neither: the document of each token of packed or
            padded rows, -1 for padding. A document is contiguous, no segment lies in two or in padding, and both sides
            have the same documents in the same order with the same segments: checked as ids are. Nothing is seen across
            documents; padding is neither seen nor counted.
        variant: "aim" compares the part of attention outputs that comes from each segment, "aim_star" all of it.
        metric: "mse" or "cosine", torch.nn.functional.cosine_embedding_loss with its epsilon.
        reduction: "pairs", the mean over all pairs of the batch, or "documents", the mean over documents of each one's.
        scale: factor on q·k, above 0, by default 1 / sqrt(d).
        sliding_window: token p sees t when 0 <= p - t < window; without `causal` when |p - t| <= window.
        softcap: logits become softcap * tanh(logits / softcap).
        causal: False for encoders.
        plan: from aim_plan, in place of ids, reduction, sliding_window and causal, which are not read then. Its variant
            must be that of the loss.

    Tensors are float32, bfloat16 or float16, all the same, on a GPU (or anywhere with TRITON_INTERPRET=1); any strides.
    Kernels are compiled once for all lengths, and once more where the teacher has half as many tokens again as the
    student. Head dimensions that are no multiples of 16 are copied into such.
    Sums are in float32; float32 inputs never meet a single tf32 product. Memory is linear in the numbers of tokens; the
    README states the constants.

    Returns:
        Scalar, float32. Differentiable once.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes, devices, options or a plan that do not fit.
    """
    _check_options(variant=variant, metric=metric, reduction=reduction)
    _check_tensors(teacher, student)
    _check_factors(scale=scale, softcap=softcap)
    query, _, value = student
    if plan is None:
        widths = tile_widths(query, value, variant, metric)(teacher[0].shape[2], query.shape[2])
        plan = _plan(
            teacher_segments, student_segments, teacher_documents, student_documents, variant, reduction,
            sliding_window, causal, widths,
        )  # fmt: skip
    else:
        _check_plan(plan, variant, query.device)
    for name, segments, side in (
        ("teacher", plan.teacher_segments, teacher),
        ("student", plan.student_segments, student),
    ):
        wanted = (side[0].shape[0], side[0].shape[2])
        if tuple(segments.shape) != wanted or segments.device != query.device:
            raise ValueError(
                f"{name}_segments must have shape [B, n] = {wanted} on {query.device}; "
                f"got {tuple(segments.shape)} on {segments.device}"
            )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    student = tuple(_aligned(x) for x in student)
    teacher = tuple(_aligned(x.detach() if x.requires_grad else x) for x in teacher)
    # The mean over heads, and over d_v for mse.
    divisor = query.shape[1] * (value.shape[-1] if metric == "mse" else 1)
    needed = [torch.is_grad_enabled() and x.requires_grad for x in student]
    shared = *teacher, *student, *plan.tensors(), *plan.widths
    if variant == "aim_star":
        return AimStarLoss.apply(*shared, metric, scale, softcap, divisor, any(needed))
    return AimLoss.apply(*shared, plan.long_segments, metric, scale, softcap, divisor, *needed)


def tile_widths(
    query: torch.Tensor, value: torch.Tensor, variant: str = "aim", metric: str = "mse"
) -> Callable[[int, int], tuple[int, int]]:
    """For tensors like these: a function of the lengths of teacher and student rows that gives the `widths` with which
    aim_loss itself calls aim_plan. It holds no tensor."""
    _check_options(variant=variant, metric=metric)
    kind = query, value, variant, metric
    return partial(_choose_widths, *(config_for(*kind, lopsided=x).widths for x in (False, True)))


def _choose_widths(widths, lopsided_widths, teacher_tokens: int, student_tokens: int) -> tuple[int, int]:
    return lopsided_widths if is_lopsided(teacher_tokens, student_tokens) else widths


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any stride but the last one's. Head dimensions get zeros up to a multiple of 16: Triton compiles
    for whether strides are multiples of it, which would depend on the length otherwise."""
    missing = -x.shape[-1] % 16
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    return x if x.stride(-1) == 1 and x.stride(-2) < FARTHEST else x.contiguous()


def _check_options(**chosen) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}; got {value!r}")


def _check_factors(**factors) -> None:
    for name, value in factors.items():
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or None; got {type(value).__name__}")
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite; got {value}")


def _check_visibility(sliding_window, causal) -> None:
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
            raise TypeError(f"sliding_window must be an int or None; got {type(sliding_window).__name__}")
        if sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1; got {sliding_window}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool; got {type(causal).__name__}")


def _check_widths(widths) -> None:
    pair = isinstance(widths, tuple | list) and len(widths) == 2
    if not pair or not all(isinstance(x, int) for x in widths):
        raise TypeError(f"widths must be two ints; got {widths!r}")
    if any(x not in (16, 32, 64, 128) for x in widths):
        raise ValueError(f"widths must be powers of 2 from 16 to 128; got {widths}")


def _check_ids(teacher_segments, student_segments, teacher_documents, student_documents) -> None:
    if (teacher_documents is None) != (student_documents is None):
        raise ValueError("teacher_documents and student_documents must be given together or not at all; got one")
    segments = {"teacher_segments": teacher_segments, "student_segments": student_segments}
    documents = {"teacher_documents": teacher_documents, "student_documents": student_documents}
    for name, x in (segments | ({} if teacher_documents is None else documents)).items():
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be an int64 or int32 tensor; got {getattr(x, 'dtype', type(x).__name__)}")
        side = teacher_segments if name.startswith("teacher") else student_segments
        if x.ndim != 2 or 0 in x.shape or x.shape != side.shape:
            raise ValueError(
                f"{name} must have shape [B, n], that of its side, and no dimension of 0; got {tuple(x.shape)}"
            )
        if x.shape[0] != teacher_segments.shape[0] or x.device != teacher_segments.device:
            raise ValueError(
                f"{name} must have batch size and device of teacher_segments, {teacher_segments.shape[0]} and "
                f"{teacher_segments.device}; got {x.shape[0]} and {x.device}"
            )


def _check_plan(plan, variant: str, device: torch.device) -> None:
    if not isinstance(plan, AimPlan):
        raise TypeError(f"plan must be an AimPlan, as aim_plan makes it, or None; got {type(plan).__name__}")
    if plan.variant != variant:
        raise ValueError(f"plan must be made for the variant of the loss, {variant!r}; got one for {plan.variant!r}")
    batch, *lengths = *plan.teacher_segments.shape, plan.student_segments.shape[-1]
    wanted = layout(batch, lengths, plan.widths)
    for name, x, (shape, dtype) in zip(TENSORS, plan.tensors(), wanted, strict=True):
        if x.device != device:
            raise ValueError(f"plan must be on the device of student q, {device}; got {name} on {x.device}")
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise ValueError(f"plan: {name} must have shape {shape} and {dtype}; got {tuple(x.shape)} and {x.dtype}")


def _check_tensors(teacher: Tensors, student: Tensors) -> None:
    for side, tensors in (("teacher", teacher), ("student", student)):
        if not isinstance(tensors, tuple | list) or len(tensors) != 3:
            raise TypeError(f"{side} must be a tuple (q, k, v) of three tensors; got {type(tensors).__name__}")
    query = student[0]
    for side, tensors in (("student", student), ("teacher", teacher)):
        for name, x in zip("qkv", tensors, strict=True):
            if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
                kind = getattr(x, "dtype", type(x).__name__)
                raise TypeError(f"{side} {name} must be a float32, bfloat16 or float16 tensor; got {kind}")
            if x.dtype != query.dtype:
                raise TypeError(f"{side} {name} must have the dtype of student q, {query.dtype}; got {x.dtype}")
            if x.device != query.device:
                raise ValueError(f"{side} {name} must be on the device of student q, {query.device}; got {x.device}")
        _check_shapes(side, *(tuple(x.shape) for x in tensors))
    for name, x, y in zip("qkv", teacher, student, strict=True):
        if (x.shape[:2], x.shape[3]) != (y.shape[:2], y.shape[3]):
            raise ValueError(f"teacher and student {name} must agree but in n; got {tuple(x.shape)}, {tuple(y.shape)}")
    if query.shape[0] * query.shape[1] > MOST_HEADS:
        raise ValueError(f"q: batch size times heads must be at most {MOST_HEADS}; got {tuple(query.shape)}")
    if query.device.type not in ("cuda", "meta") and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need tensors on a GPU, or TRITON_INTERPRET=1 set before Python starts for a (slow) "
            f"trial on the CPU; got {query.device}"
        )


def _check_shapes(side: str, query, key, value) -> None:
    fits = len(query) == len(key) == len(value) == 4 and key[:3] == value[:3]
    if not fits or (query[0], *query[2:]) != (key[0], *key[2:]) or key[1] == 0 or query[1] % key[1]:
        raise ValueError(
            f"{side} must have shapes q [B, H, n, d], k [B, H_kv, n, d], v [B, H_kv, n, d_v], H a multiple of H_kv; "
            f"got {query}, {key}, {value}"
        )
    if 0 in query or not 0 < value[3] <= LARGEST_HEAD_DIM or query[3] > LARGEST_HEAD_DIM:
        raise ValueError(
            f"{side}: no dimension may be 0, head dimensions at most {LARGEST_HEAD_DIM}; got {query}, {value}"
        )
