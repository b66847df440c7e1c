"""The student's embedding table: rows shared with the teacher stay where they are, the others are trained.

A batch's embeddings read, and its update changes, only the rows that occur in it. A row that predicts has a gradient in
every batch: that its token does not come. Nothing here is as large as vocabulary times hidden size but the trainable
rows themselves, their two moments, and for rows that predict their gradient.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class BatchRows:
    """The rows that one step uses as embeddings.

    Attributes:
        ids: [u] int64, the distinct student ids of the step, ascending.
        frozen: [u, hidden] in the model's dtype, right for the frozen ones among them.
        trainable: [r, hidden] float32, the leaf that receives the gradient; or [trainable rows, hidden], that of all
            rows, where the table predicts too.
        positions: [r] int64, where the trainable rows stand among the u.
        slots: [r] int64, where they stand in `EmbeddingTable.trainable`.
    """

    ids: torch.Tensor
    frozen: torch.Tensor
    trainable: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor

    def weight(self) -> torch.Tensor:
        """All u rows, [u, hidden] in the model's dtype; gradients flow to `trainable`."""
        rows = self.trainable if len(self.trainable) == len(self.slots) else self.trainable[self.slots]
        return self.frozen.index_copy(0, self.positions, rows.to(self.frozen.dtype))


class OutputRows(NamedTuple):
    """The trainable rows of an output head.

    Attributes:
        ids: [r] int64, their ids, ascending.
        trainable: [r, hidden] float32, the leaf that receives the gradient.
    """

    ids: torch.Tensor
    trainable: torch.Tensor


class EmbeddingTable:
    """The student's input embedding (paper §3.5): frozen rows are read from the teacher's table, never copied.

    Args:
        teacher_weight: [teacher rows, hidden], the teacher's embedding; not modified.
        frozen_from: [student rows] int64: the teacher row of a frozen token, -1 for a trainable one.
        initial: [student rows, hidden], where the trainable rows start; the other rows are not read.

    Raises:
        ValueError: shapes that do not fit together, or a teacher row that does not exist.
    """

    def __init__(self, teacher_weight: torch.Tensor, frozen_from: torch.Tensor, initial: torch.Tensor):
        if initial.shape != (len(frozen_from), teacher_weight.shape[1]):
            wanted = (len(frozen_from), teacher_weight.shape[1])
            raise ValueError(f"initial: wanted shape {wanted} (student rows, hidden), got {tuple(initial.shape)}")
        if len(frozen_from) and int(frozen_from.max()) >= len(teacher_weight):
            raise ValueError(
                f"frozen_from: wanted teacher rows below {len(teacher_weight)}, got {int(frozen_from.max())}"
            )
        device = teacher_weight.device
        self.teacher_weight = teacher_weight.detach()
        self.frozen_from = frozen_from.to(device)
        is_trainable = self.frozen_from < 0
        self.trainable_ids = is_trainable.nonzero().flatten()
        self.slot = torch.full_like(self.frozen_from, -1)
        self.slot[self.trainable_ids] = torch.arange(len(self.trainable_ids), device=device)
        self.slot_on_cpu = self.slot.cpu()
        self.trainable = initial.to(device)[self.trainable_ids].float()

    def output_rows(self) -> OutputRows:
        """All trainable rows, as they predict; the values share the table's memory."""
        return OutputRows(self.trainable_ids, self.trainable.detach().requires_grad_())

    def rows(self, ids: torch.Tensor, output: OutputRows | None = None) -> BatchRows:
        """Gather the distinct rows of `ids` (int64, any shape); where these are on the CPU, a GPU is not waited for.

        Of a table that predicts too, gradients flow to the leaf of its `output` rows.
        """
        ids, device = ids.unique(), self.slot.device
        slot = self.slot if ids.device == device else self.slot_on_cpu
        positions = (slot[ids] >= 0).nonzero().flatten()
        found = ids, positions, slot[ids[positions]]
        if ids.device != device:
            found = tuple((x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True) for x in found)
        ids, positions, slots = found
        frozen = self.teacher_weight[self.frozen_from[ids].clamp_min(0)]
        leaf = self.trainable[slots].requires_grad_() if output is None else output.trainable
        return BatchRows(ids, frozen, leaf, positions, slots)

    def weight(self) -> torch.Tensor:
        """The whole table as the model stores it: [student rows, hidden], a new tensor in the teacher's dtype."""
        weight = self.teacher_weight[self.frozen_from.clamp_min(0)]
        weight[self.trainable_ids] = self.trainable.to(weight.dtype)
        return weight


class RowAdamW:
    """AdamW without weight decay on some rows of a table at a time, with moments for each row.

    Lazy moments: a row that does not occur in a step keeps its values and moments; its bias correction counts its own
    updates. Dense ones: such a row has a gradient of zero, so its moments fade and it moves on with what is left of
    them, and a step costs as much as the table is large; this is `torch.optim.AdamW(weight_decay=0)`. The two are equal
    on rows that occur in every step, and leave rows that never occurred as they are.

    Args:
        table: [rows, hidden] float32, updated in place.
        lr, betas, eps: as in torch.optim.AdamW.
        moments: "lazy" or "dense".
        backend: of lazy updates: "triton", one kernel that passes over the rows once, for a table on a GPU (or anywhere
            with TRITON_INTERPRET=1); "torch" or "eager", torch operations; "auto", the kernel where the table is on a
            GPU and Triton is installed. Dense ones are torch operations.
    """

    def __init__(
        self,
        table: torch.Tensor,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: str = "lazy",
        backend: str = "auto",
    ):
        self.table, self.lr, self.betas, self.eps = table, lr, betas, eps
        self.dense = moments == "dense"
        on_gpu = table.is_cuda and find_spec("triton") is not None
        self.fused = not self.dense and (backend == "triton" or (backend == "auto" and on_gpu))
        self.first_moment = torch.zeros_like(table)
        self.second_moment = torch.zeros_like(table)
        self.updates = 0 if self.dense else torch.zeros(len(table), 1, dtype=torch.int64, device=table.device)

    @torch.no_grad()
    def step(self, slots: torch.Tensor, gradient: torch.Tensor) -> None:
        """One step in which the rows `slots` ([r] int64, distinct) have the gradient [r, hidden]."""
        beta1, beta2 = self.betas
        if self.dense:
            self.updates += 1
            self.first_moment.mul_(beta1).index_add_(0, slots, gradient, alpha=1 - beta1)
            self.second_moment.mul_(beta2).index_add_(0, slots, gradient.square(), alpha=1 - beta2)
            denominator = (self.second_moment / (1 - beta2**self.updates)).sqrt_().add_(self.eps)
            self.table.addcdiv_(self.first_moment, denominator.mul_(1 - beta1**self.updates), value=-self.lr)
            return
        if self.fused:
            from matt_kernels import adamw_rows

            moments = self.first_moment, self.second_moment, self.updates
            adamw_rows(self.table, *moments, slots, gradient, lr=self.lr, betas=self.betas, eps=self.eps)
            return
        updates = self.updates[slots] + 1
        corrections = [-torch.expm1(updates * math.log(beta)) for beta in self.betas]  # 1 - beta ** updates, exactly
        first = self.first_moment[slots].lerp_(gradient, 1 - beta1)
        second = self.second_moment[slots].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self.updates[slots], self.first_moment[slots], self.second_moment[slots] = updates, first, second
        denominator = (second / corrections[1]).sqrt_().add_(self.eps)
        self.table[slots] -= self.lr * (first / corrections[0]) / denominator


def embed(embedding: nn.Module, rows: BatchRows, ids: torch.Tensor) -> torch.Tensor:
    """Embed `ids` (int64, any shape, all among `rows.ids`) with the model's own embedding module and these rows.

    The module's forward is used as it is, so that scaled embeddings (Gemma) stay scaled and the rows unscaled.

    Returns:
        [*ids.shape, hidden] in the model's dtype.
    """
    compact = torch.searchsorted(rows.ids, ids)
    return torch.func.functional_call(embedding, {"weight": rows.weight()}, (compact,))


@contextmanager
def rows_of_any_number(embedding: nn.Module) -> Iterator[None]:
    """`padding_idx` is an index into the full vocabulary: other rows may end before it, and lose no gradient to it."""
    padding = getattr(embedding, "padding_idx", None)
    embedding.padding_idx = None
    try:
        yield
    finally:
        embedding.padding_idx = padding
