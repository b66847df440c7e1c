"""The training loop: the losses of both sides' passes, and an update of the rows that occurred."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from matt_fast.data.batches import Batch
from matt_fast.model.embeddings import RowAdamW
from matt_fast.training.frozen import keep_gradients
from matt_fast.training.objectives import StepRows, Student, combine, losses
from matt_fast.training.options import TrainingOptions


@dataclass
class Progress:
    """What happened so far in this process, handed to the progress callback after each step.

    `parts` has the values of the objectives of the last step by name, before they are scaled to the first; `seconds`
    are counted from the first batch on; `padding` is the share of both sides' tokens that is padding, `waiting` the
    share of the time in which the loop waited for data.
    """

    step: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    steps_without_new_tokens: int = 0
    skipped: Counter = field(default_factory=Counter)
    padding_tokens: int = 0
    all_tokens: int = 0
    seconds_waiting: float = 0.0

    @property
    def padding(self) -> float:
        return self.padding_tokens / self.all_tokens

    @property
    def waiting(self) -> float:
        return self.seconds_waiting / self.seconds


def train(
    teacher: PreTrainedModel,
    student_model: PreTrainedModel,
    student: Student,
    batches: Iterator[Batch],
    n_layers: int,
    options: TrainingOptions,
    accelerator: Accelerator,
    on_step: Callable[[Progress], None] = lambda progress: None,
    *,
    causal: bool = True,
) -> tuple[Progress, torch.Tensor]:
    """Train the rows of `student` for the objective of `options` (paper §3.5); all other weights stay as they are.

    Args:
        teacher, student_model: the frozen weights of the two sides, on the accelerator's device; usually the same
            object. At least `n_layers` deep, and whole where the objective trains output rows.
        student: the student's rows, trained in place.
        batches: an iterator of `Batch`, at least `steps * accumulation` long.
        n_layers: the target layer, counted from 1.
        options: see `TrainingOptions`.
        accelerator: device and processes. Each process has its own batches; gradients are averaged over all.
        on_step: called after each step.
        causal: False for an encoder.

    Returns:
        The final progress, and seen: [student rows] int64 on the CPU, how often each id occurred in this process's
        batches.

    Raises:
        FloatingPointError: the loss or a gradient is not finite. The tables are as after the last good step.
    """
    names = options.objectives()
    chosen = {"moments": options.moments, "backend": options.backend}
    optimizers = [RowAdamW(table.trainable, options.lr, **chosen) for table in student.tables]
    progress = Progress()
    seen = torch.zeros(len(student.input.slot), dtype=torch.int64)
    batches = itertools.chain([next(batches)], batches)  # the clock starts behind the start of the data worker
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        asked = time.perf_counter()
        micro_batches = [next(batches) for _ in range(options.accumulation)]
        progress.seconds_waiting += time.perf_counter() - asked
        for batch in micro_batches:
            progress.tokens += batch.tokens
            padding, in_all = batch.padding
            progress.padding_tokens += padding
            progress.all_tokens += in_all
            progress.skipped.update(batch.skipped)
            in_text = batch.student_ids[batch.student_segments >= 0]
            seen.index_add_(0, in_text, torch.ones_like(in_text))
        micro_batches = [batch.to(accelerator.device) for batch in micro_batches]
        rows = student.rows(_distinct_ids(micro_batches, accelerator))

        sums = torch.zeros(1 + len(names), device=accelerator.device)
        for batch in micro_batches:
            parts = losses(teacher, student_model, rows, student.head, batch, n_layers, options, causal=causal)
            loss = combine(parts) / len(micro_batches)
            if loss.requires_grad:
                loss.backward()
            sums += torch.stack([loss, *(part / len(micro_batches) for part in parts.values())]).detach()
        progress.step = step
        progress.loss, *values = _update(rows, sums, optimizers, options, accelerator, step)
        progress.parts = dict(zip(names, values, strict=True))
        if student.head is not None:
            table = student.tables[-1]
            moved = slice(None) if options.moments == "dense" else rows.output.slots
            student.head.update(table.trainable_ids[moved], table.trainable[moved])
        progress.losses.append(progress.loss)
        progress.steps_without_new_tokens += len(rows.input.slots) == 0
        progress.seconds = time.perf_counter() - start
        on_step(progress)
    return progress, seen


def freeze(model: PreTrainedModel) -> None:
    """Make `model` the frozen trunk of both sides: no gradients, no dropout, no row whose gradient torch would drop."""
    keep_gradients(model.requires_grad_(False).eval())
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # an index into the full vocabulary; rows of a batch are numbered anew


def _update(
    rows: StepRows,
    sums: torch.Tensor,
    optimizers: list[RowAdamW],
    options: TrainingOptions,
    accelerator: Accelerator,
    step: int,
) -> list[float]:
    """Average losses and gradients over the processes, update the tables; return the losses."""
    leaves = [table_rows.trainable for table_rows in rows.by_table]
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    sums, *gradients = accelerator.reduce((sums, *gradients), reduction="mean")
    norms = torch.stack([gradient.norm() for gradient in gradients])
    figures = torch.cat([sums, norms]).tolist()  # the step's one wait for the device
    values, norms = figures[: len(sums)], figures[len(sums) :]
    if not all(map(math.isfinite, figures)):
        raise FloatingPointError(
            f"the loss ({values[0]}) or the gradient's norm ({max(norms)}) is not finite at step {step}; "
            "a lower lr, or float32 instead of a half precision, may help; segments that differ between the two sides "
            "of a batch give NaN too"
        )
    for optimizer, table_rows, gradient, norm in zip(optimizers, rows.by_table, gradients, norms, strict=True):
        if options.max_grad_norm is not None and norm > options.max_grad_norm:
            gradient *= options.max_grad_norm / norm
        optimizer.lr = options.lr_at(step)
        optimizer.step(table_rows.slots, gradient)
    return values


def _distinct_ids(micro_batches: list[Batch], accelerator: Accelerator) -> torch.Tensor:
    """The student ids of a step, of all processes: their gradients are averaged row by row."""
    ids = torch.cat([batch.distinct_ids for batch in micro_batches])
    if accelerator.num_processes > 1:
        ids = accelerator.gather(accelerator.pad_across_processes(ids, pad_index=int(ids[0])))
    return ids
