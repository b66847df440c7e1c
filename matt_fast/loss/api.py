"""aim_loss and AIMLoss: what they promise, what they refuse, and which engine computes them."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from matt_fast.loss.choices import check_choices
from matt_fast.loss.documents import Document, find_documents
from matt_fast.support.installing import install_line

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def aim_loss(
    teacher: Tensors,
    student: Tensors,
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
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
    backend: str = "auto",
    plan=None,
) -> torch.Tensor:
    """Attention Influence Modeling: how far the student's segments influence each other as the teacher's do.

    Paper §3.3-3.4. A segment's query is that of its last token (eq. 8). `s[i, j]` is the part of its attention output
    that comes from the tokens of segment j (eq. 5), `o[i]` all of it, special tokens included (eq. 9).

    Args:
        teacher: (q, k, v) as attention receives them: q [B, H, n_T, d], k [B, H_kv, n_T, d], v [B, H_kv, n_T, d_v];
            H a multiple of H_kv (MHA, GQA, MQA). Detached: the teacher never gets a gradient.
        student: the same with n_S tokens; B, H, H_kv, d and d_v equal the teacher's. Gradients flow to those of q, k, v
            that require one, and the others cost nothing. Differentiable once.
        teacher_segments, student_segments: int64 or int32 [B, n_T] and [B, n_S]: 0..m-1 in order in every row, the same
            m on both sides, -100 for tokens in no segment. A special token inside a document is a visible key like any
            other but forms no pair. Keep ids on the CPU: "torch" and "eager" copy ids on a GPU back once per call, and
            "triton" checks those without waiting, on the device: NaN instead of an error where they break the rules.
        teacher_documents, student_documents: integers [B, n], both or neither: for packed or padded rows, the document
            of each token, -1 for padding. A document is contiguous; segment ids run on through the row; nothing is seen
            across documents, and padding is neither seen nor counted. None: every row is one document without padding.
        variant: "aim" compares s[i, j] for every pair j <= i (eq. 10), "aim_star" compares o[i] (eq. 11).
        metric: "mse", the mean over d of (s_T - s_S)², or "cosine", torch.nn.functional.cosine_embedding_loss with its
            epsilon, per head. A pair that a sliding window hides on both sides counts as two zero vectors.
        reduction: "pairs", the mean over all pairs of the batch, or "documents", the mean over documents of each one's
            mean (eq. 10 as printed); documents without a segment do not count.
        scale: factor on q·k, above 0, by default 1 / sqrt(d).
        sliding_window: as in transformers: with `causal`, token p sees t when 0 <= p - t < window, otherwise when
            |p - t| <= window. Positions are token indices on each side.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        causal: False for encoders: all tokens of the document are visible, and all (i, j) are pairs.
        backend: "eager" is the definition, n × n × d per head; "torch" gives the same in memory linear in n; "triton"
            does in fused kernels (matt_kernels): a GPU, head dimensions up to 256, no float64, traced by torch.compile;
            on a CPU only with TRITON_INTERPRET=1, slowly. "auto" takes "triton" where it can on a GPU, of NVIDIA's
            those from Ampere (compute capability 8.0) on, else "torch".
        plan: for "triton" only: what `tile_planner` makes of the same ids and options, ahead of the step; on the GPU.

    Inputs may be float64, float32, bfloat16 or float16, also mixed, contiguous or not, inside autocast or not (it does
    not reach inside). "torch" works in float32 for anything less than float64, the others in the inputs' common dtype.

    Returns:
        Scalar, float64 if any input is, else float32.

    Raises:
        TypeError: an argument is not of the kind named above, or float64 for "triton".
        ImportError: backend="triton" without Triton.
        ValueError: shapes, heads or devices that do not fit together, ids that break the rules, different numbers of
            segments on the two sides, an unknown option, or no segment in the whole batch.
    """
    chosen = {"variant": variant, "metric": metric, "reduction": reduction, "backend": backend}
    _check_options(chosen, scale, sliding_window, softcap, causal)
    _check_tensors(teacher, student)
    ids = {
        "teacher_segments": teacher_segments,
        "student_segments": student_segments,
        "teacher_documents": teacher_documents,
        "student_documents": student_documents,
    }
    _check_ids(ids, teacher, student)
    dtype = reduce(torch.promote_types, (x.dtype for x in (*teacher, *student)))
    teacher, student = _as_dtype(teacher, dtype), _as_dtype(student, dtype)
    shared = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "causal": causal}
    with _no_autocast(student[0]):
        if _runs_kernels(student, backend):
            return _triton_loss(teacher, student, ids, plan, variant, metric, reduction, **shared)
        return _plain_loss(teacher, student, ids, plan, backend, variant, metric, reduction, **shared)


def _as_dtype(side: Tensors, dtype: torch.dtype) -> Tensors:
    query, key, value = side
    return query.to(dtype), key.to(dtype), value.to(dtype)


class AIMLoss(nn.Module):
    """aim_loss with its options fixed. forward(teacher, student, teacher_segments, student_segments) -> scalar."""

    def __init__(
        self,
        *,
        variant: str = "aim",
        metric: str = "mse",
        reduction: str = "pairs",
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        causal: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        chosen = {"variant": variant, "metric": metric, "reduction": reduction, "backend": backend}
        _check_options(chosen, scale, sliding_window, softcap, causal)
        self.options: dict[str, Any] = chosen | {
            "scale": scale,
            "sliding_window": sliding_window,
            "softcap": softcap,
            "causal": causal,
        }

    def forward(
        self,
        teacher: Tensors,
        student: Tensors,
        teacher_segments: torch.Tensor,
        student_segments: torch.Tensor,
        *,
        teacher_documents: torch.Tensor | None = None,
        student_documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return aim_loss(
            teacher, student, teacher_segments, student_segments, teacher_documents=teacher_documents,
            student_documents=student_documents, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _no_autocast(x: torch.Tensor):
    return nullcontext() if x.is_meta else torch.autocast(device_type=x.device.type, enabled=False)


def _find_segments(ids: dict) -> list[Document]:
    documents = find_documents(*ids.values())
    if not documents:
        raise ValueError("teacher_segments and student_segments must hold at least one segment; all tokens are -100")
    return documents


def _engine(backend: str):
    if backend == "eager":
        from matt_fast.loss.eager import eager_loss

        return eager_loss
    from matt_fast.loss.blockwise import torch_loss

    return torch_loss


def tile_planner(
    student: Tensors,
    *,
    variant: str,
    metric: str,
    reduction: str,
    sliding_window: int | None,
    causal: bool,
    backend: str,
) -> Callable | None:
    """How a data worker makes the `plan` that `aim_loss` otherwise makes at each call; None where no kernels run.

    Args:
        student: (q, k, v) as `aim_loss` will get them; of their shapes only head dimensions matter.
        variant, metric, reduction, sliding_window, causal, backend: as `aim_loss` will get them.

    Returns:
        A function of the two segment tensors and, by name, the two of documents.
    """
    if not _runs_kernels(student, backend):
        return None
    try:
        import matt_kernels
    except ImportError as error:
        raise ImportError(f"backend='triton' needs Triton: {install_line('triton')}") from error
    if student[0].dtype == torch.float64:
        raise TypeError("backend='triton' takes float32, bfloat16 or float16; got float64: use backend='torch'")
    query, _, value = student
    options = {"variant": variant, "reduction": reduction, "sliding_window": sliding_window, "causal": causal}
    return partial(_plan_tiles, matt_kernels.tile_widths(query, value, variant, metric), options)


def _plan_tiles(choose_widths, options, teacher_segments, student_segments, **documents):
    import matt_kernels

    widths = choose_widths(teacher_segments.shape[1], student_segments.shape[1])
    return matt_kernels.aim_plan(teacher_segments, student_segments, **documents, **options, widths=widths)


def _runs_kernels(student: Tensors, backend: str) -> bool:
    query, _, value = student
    if backend != "auto":
        return backend == "triton"
    fits = query.is_cuda and query.dtype != torch.float64 and max(query.shape[-1], value.shape[-1]) <= 256
    # Older GPUs have no tensor cores for bfloat16 and tf32.
    fits = fits and (torch.version.hip is not None or torch.cuda.get_device_capability(query.device) >= (8, 0))
    return fits and find_spec("triton") is not None


def _triton_loss(
    teacher, student, ids, plan, variant, metric, reduction, sliding_window, causal, **options
) -> torch.Tensor:
    if plan is None:
        if ids["student_segments"].device.type == "cpu" and not torch.compiler.is_compiling():
            _find_segments(ids)
        shared = {"sliding_window": sliding_window, "causal": causal, "backend": "triton"}
        make_plan = tile_planner(student, variant=variant, metric=metric, reduction=reduction, **shared)
        assert make_plan is not None  # these are inputs for the kernels
        plan = make_plan(**ids).to(student[0].device, non_blocking=True)
    import matt_kernels

    return matt_kernels.aim_loss(teacher, student, plan=plan, variant=variant, metric=metric, **options)


@torch.compiler.disable(reason="aim_loss by torch operations has other shapes for the segments of each batch")
def _plain_loss(
    teacher, student, ids, plan, backend, variant, metric, reduction, scale, causal, **options
) -> torch.Tensor:
    """The loss by an engine of torch operations."""
    if plan is not None:
        raise ValueError(f"plan: wanted None for an engine other than 'triton', got one; backend is {backend!r}")
    documents = _find_segments(ids)
    scale = 1 / math.sqrt(student[0].shape[-1]) if scale is None else float(scale)
    vector_size = student[2].shape[-1] if metric == "mse" else 1
    weights = _pair_weights(documents, variant, causal, reduction, student[0].shape[1], vector_size)
    options |= {"variant": variant, "metric": metric, "scale": scale, "causal": causal}
    return _engine(backend)(teacher, student, documents, weights, **options)


def _pair_weights(
    documents: list[Document], variant: str, causal: bool, reduction: str, heads: int, vector_size: int
) -> list[float]:
    """What one unit of distance of one pair of one head weighs in the loss, for each document."""
    pairs = [_pair_count(x.segment_count, variant, causal) * heads * vector_size for x in documents]
    if reduction == "pairs":
        return [1 / sum(pairs)] * len(documents)
    return [1 / (len(documents) * count) for count in pairs]


def _pair_count(segments: int, variant: str, causal: bool) -> int:
    if variant == "aim_star":
        return segments
    return segments * (segments + 1) // 2 if causal else segments**2


def _check_options(chosen: dict, scale, sliding_window, softcap, causal) -> None:
    check_choices(chosen)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or None; got {type(value).__name__}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite; got {value}")
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
            raise TypeError(f"sliding_window must be an int or None; got {type(sliding_window).__name__}")
        if sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1; got {sliding_window}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool; got {type(causal).__name__}")


def _check_tensors(teacher: Tensors, student: Tensors) -> None:
    for side, tensors in (("teacher", teacher), ("student", student)):
        if not isinstance(tensors, tuple | list) or len(tensors) != 3:
            raise TypeError(f"{side} must be a tuple (q, k, v) of three tensors; got {_kind(tensors)}")
        for name, x in zip("qkv", tensors, strict=True):
            _check_tensor(f"{side} {name}", x, student[0] if isinstance(student, tuple | list) else x)
        _check_shapes(side, *(x.shape for x in tensors))
    for index, name in ((0, "batch size"), (1, "number of heads"), (3, "head dimension")):
        for letter, mine, other in zip("qkv", teacher, student, strict=True):
            if mine.shape[index] != other.shape[index]:
                raise ValueError(
                    f"teacher and student {letter} must have the same {name}; "
                    f"got shapes {tuple(mine.shape)} and {tuple(other.shape)}"
                )


def _check_tensor(name: str, x, reference) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have the four dimensions [B, heads, n, d]; got shape {tuple(x.shape)}")
    if isinstance(reference, torch.Tensor) and x.device != reference.device:
        raise ValueError(f"{name} must be on the device of student q, {reference.device}; got {x.device}")


def _check_shapes(side: str, query, key, value) -> None:
    if key[:3] != value[:3] or (query[0], query[2], query[3]) != (key[0], key[2], key[3]):
        raise ValueError(
            f"{side} must have shapes q [B, H, n, d], k [B, H_kv, n, d], v [B, H_kv, n, d_v]; "
            f"got {tuple(query)}, {tuple(key)}, {tuple(value)}"
        )
    if key[1] == 0 or query[1] % key[1] or 0 in (query[1], query[3], value[3]):
        raise ValueError(f"{side}: H of q must be a positive multiple of H_kv of k and v; got {query[1]} and {key[1]}")


def _check_ids(ids: dict, teacher: Tensors, student: Tensors) -> None:
    if (ids["teacher_documents"] is None) != (ids["student_documents"] is None):
        raise ValueError("teacher_documents and student_documents must be given together or not at all; got one")
    for name, x in ids.items():
        if x is None and name.endswith("documents"):
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32; got {x.dtype}")
        query = teacher[0] if name.startswith("teacher") else student[0]
        if x.shape != (query.shape[0], query.shape[2]):
            wanted = (query.shape[0], query.shape[2])
            raise ValueError(f"{name} must have shape [B, n] = {wanted}; got {tuple(x.shape)}")


def _kind(x) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, tuple | list) else type(x).__name__
