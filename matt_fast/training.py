"""The training loop: both sides' attention inputs, the AIM loss between them, an update of the rows that occurred."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from matt_fast.capture import capture_attention
from matt_fast.data import Batch
from matt_fast.embeddings import BatchRows, EmbeddingTable, RowAdamW, embed
from matt_fast.loss import AIMLoss, aim_loss


@dataclass(frozen=True)
class TrainingOptions:
    """How to train (paper §3.5 gives the defaults).

    Attributes:
        steps: number of updates.
        lr: constant learning rate of AdamW; there is no weight decay.
        accumulation: batches per update.
        max_grad_norm: clip the gradient of a step's rows to this norm; None for no clipping.
        variant, metric, reduction, backend: as in `aim_loss`.
        attn_implementation: what the layers below the target layer run.
    """

    steps: int = 1000
    lr: float = 1e-4
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    variant: str = "aim"
    metric: str = "mse"
    reduction: str = "pairs"
    backend: str = "auto"
    attn_implementation: str = "sdpa"

    def __post_init__(self):
        for name in ("steps", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: wanted a number above 0, got {value}")
        AIMLoss(variant=self.variant, metric=self.metric, reduction=self.reduction, backend=self.backend)  # checks


@dataclass
class Progress:
    """What happened so far in this process, handed to the progress callback after each step."""

    step: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    steps_without_new_tokens: int = 0
    skipped: Counter = field(default_factory=Counter)


def train(
    model: PreTrainedModel,
    table: EmbeddingTable,
    batches: Iterator[Batch],
    n_layers: int,
    options: TrainingOptions,
    accelerator: Accelerator,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Progress, torch.Tensor]:
    """Train the rows of `table` so that the student's attention at one layer moves what the teacher's does (eq. 10).

    Teacher and student are the same frozen `model` with different embeddings; there is one copy of its weights.

    Args:
        model: the decoder, at least `n_layers` deep, on the accelerator's device.
        table: the student's rows, trained in place.
        batches: an iterator of `Batch`, at least `steps * accumulation` long.
        n_layers: layers to run; the loss is at the attention of the last of them.
        options: see `TrainingOptions`.
        accelerator: device and processes. Each process has its own batches; gradients are averaged over all.
        on_step: called after each step.

    Returns:
        The final progress, and seen: [student rows] int64 on the CPU, how often each id occurred in this process's
        batches.

    Raises:
        FloatingPointError: the loss or a gradient is not finite. The table is as after the last good step.
    """
    optimizer = RowAdamW(table.trainable, options.lr)
    progress = Progress()
    seen = torch.zeros(len(table.slot), dtype=torch.int64)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        micro_batches = [next(batches) for _ in range(options.accumulation)]
        for batch in micro_batches:
            progress.tokens += batch.tokens
            progress.skipped.update(batch.skipped)
            in_text = batch.student_ids[batch.student_segments >= 0]
            seen.index_add_(0, in_text, torch.ones_like(in_text))
        micro_batches = [batch.to(accelerator.device) for batch in micro_batches]
        rows = table.rows(_distinct_ids(micro_batches, accelerator))
        progress.step = step
        progress.loss = _step(model, rows, micro_batches, n_layers, options, optimizer, accelerator, step)
        progress.losses.append(progress.loss)
        progress.steps_without_new_tokens += len(rows.slots) == 0
        progress.seconds = time.perf_counter() - start
        on_step(progress)
    return progress, seen


def aim_step_loss(
    model: PreTrainedModel, rows: BatchRows, batch: Batch, n_layers: int, options: TrainingOptions
) -> torch.Tensor:
    """The AIM loss of one batch, differentiable with respect to `rows.trainable`."""
    layer, attn = n_layers - 1, options.attn_implementation
    with torch.no_grad():
        teacher = capture_attention(model, layer, attn_implementation=attn, input_ids=batch.teacher_ids)
    embedded = embed(model.get_input_embeddings(), rows, batch.student_ids)
    student = capture_attention(model, layer, attn_implementation=attn, inputs_embeds=embedded)
    if not student.causal:
        raise ValueError("model: wanted a decoder with causal attention, got an encoder")
    return aim_loss(
        teacher.states,
        student.states,
        batch.teacher_segments,
        batch.student_segments,
        variant=options.variant,
        metric=options.metric,
        reduction=options.reduction,
        scale=student.scale,
        sliding_window=student.sliding_window,
        softcap=student.softcap,
        backend=options.backend,
    )


def freeze(model: PreTrainedModel) -> None:
    """Make `model` the frozen trunk of both sides: no gradients, no dropout, no row whose gradient torch would drop."""
    model.requires_grad_(False).eval()
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # an index into the full vocabulary; rows of a batch are numbered anew


def _step(model, rows, micro_batches, n_layers, options, optimizer, accelerator, step) -> float:
    """Gradients of all micro-batches and processes, one update; returns the mean loss."""
    loss = torch.zeros((), device=accelerator.device)
    for batch in micro_batches:
        part = aim_step_loss(model, rows, batch, n_layers, options) / len(micro_batches)
        if part.requires_grad:
            part.backward()
        loss += part.detach()
    gradient = torch.zeros_like(rows.trainable) if rows.trainable.grad is None else rows.trainable.grad
    loss, gradient = accelerator.reduce((loss, gradient), reduction="mean")
    value, norm = torch.stack([loss, gradient.norm()]).tolist()  # the step's one wait for the device
    if not math.isfinite(value) or not math.isfinite(norm):
        raise FloatingPointError(
            f"the loss ({value}) or the gradient's norm ({norm}) is not finite at step {step}; "
            "a lower lr, or float32 instead of a half precision, may help"
        )
    if options.max_grad_norm is not None and norm > options.max_grad_norm:
        gradient *= options.max_grad_norm / norm
    optimizer.step(rows.slots, gradient)
    return value


def _distinct_ids(micro_batches: list[Batch], accelerator: Accelerator) -> torch.Tensor:
    """The student ids of a step, of all processes: their gradients are averaged row by row."""
    ids = torch.cat([batch.student_ids.flatten() for batch in micro_batches]).unique()
    if accelerator.num_processes > 1:
        ids = accelerator.gather(accelerator.pad_across_processes(ids, pad_index=int(ids[0])))
    return ids
