"""AdamW on rows of a table by one Triton kernel, usable without the rest of matt-fast."""

import torch

from matt_kernels.loss import INTERPRETED
from matt_kernels.ops import update_rows


def adamw_rows(
    table: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    updates: torch.Tensor,
    slots: torch.Tensor,
    gradient: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of AdamW without weight decay for the rows `slots` of `table`; all other rows stay as they are.

    Args:
        table, first_moment, second_moment: [rows, hidden] float32, contiguous, changed in place.
        updates: [rows] or [rows, 1] int64, contiguous: how often each row was updated; counted on in place. A row's
            bias correction is by its own count.
        slots: [r] int64, distinct rows; neither that nor their range is checked, which would wait for the device.
        gradient: [r, hidden] float32.
        lr, betas, eps: as in torch.optim.AdamW.

    Tensors are on a GPU, or anywhere with TRITON_INTERPRET=1. Tables may have more than 2³¹ elements.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes, devices or betas that do not fit.
    """
    rows, hidden = table.shape if table.ndim == 2 else (None, None)
    wanted = (
        ("table", table, torch.float32, [(rows, hidden)]),
        ("first_moment", first_moment, torch.float32, [(rows, hidden)]),
        ("second_moment", second_moment, torch.float32, [(rows, hidden)]),
        ("updates", updates, torch.int64, [(rows,), (rows, 1)]),
        ("slots", slots, torch.int64, [(slots.numel(),)]),
        ("gradient", gradient, torch.float32, [(slots.numel(), hidden)]),
    )
    for name, x, dtype, shapes in wanted:
        if x.dtype != dtype:
            raise TypeError(f"{name} must be a {dtype} tensor; got {x.dtype}")
        if tuple(x.shape) not in shapes:
            of = "[rows, hidden]" if name == "table" else " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {of}; got {tuple(x.shape)}")
        if x.device != table.device:
            raise ValueError(f"{name} must be on the device of table, {table.device}; got {x.device}")
        if x is not slots and x is not gradient and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got strides {x.stride()}")
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"betas must lie between 0 and 1; got {betas}")
    if table.device.type not in ("cuda", "meta") and not INTERPRETED:
        raise ValueError(
            "the Triton kernels need tensors on a GPU, or TRITON_INTERPRET=1 set before Python starts for a (slow) "
            f"trial on the CPU; got {table.device}"
        )
    update_rows(table, first_moment, second_moment, updates, slots, gradient, lr, *betas, eps)
