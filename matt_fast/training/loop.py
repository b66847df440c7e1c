"""The training loop: the losses of both sides' passes, and an update of the rows that occurred."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedModel

from matt_fast.data.batches import Batch
from matt_fast.support.flops import count_flops
from matt_fast.training.frozen import keep_gradients
from matt_fast.training.objectives import combine, losses
from matt_fast.training.options import TrainingOptions
from matt_fast.training.sides import StepRows, Student
from matt_fast.training.state import Progress, TrainingState

if TYPE_CHECKING:
    from matt_fast.training.layers import TrainedLayers  # imports peft

UPDATES = 2  # counted up with each change of what a step does with the same batch: a run goes on as it began
DIVERGED = 1000  # times the first loss
DIVERGED_STEPS = 5  # in a row
EXCHANGED = 1 << 24  # numbers that processes average at a time, where no single tensor has more: 64 MiB


class Watcher:
    """What goes on beside the steps; this one does nothing."""

    def wishes(self, progress: Progress) -> tuple[bool, ...]:
        """What this process wants done behind the step that is running; always as many."""
        return ()

    def after_step(self, state: TrainingState, granted: tuple[bool, ...]) -> bool:
        """Called in each process after each step with the wishes that any process had; whether training goes on."""
        return True

    def out_of_memory(self, step: int) -> None:
        """The device had no memory for a step, which is made once more."""


class DivergedError(FloatingPointError):
    """The loss is not finite, or far above where it began."""


def train(
    teacher: PreTrainedModel,
    student_model: PreTrainedModel,
    student: Student | TrainingState,
    batches: Iterator[Batch],
    n_layers: int,
    options: TrainingOptions,
    accelerator: Accelerator,
    on_step: Callable[[Progress], None] = lambda progress: None,
    *,
    causal: bool = True,
    watcher: Watcher | None = None,
) -> tuple[Progress, torch.Tensor]:
    """Train the rows of `student` for the objective of `options` (paper §3.5); all other weights stay as they are.

    Args:
        teacher, student_model: the frozen weights of the two sides, on the accelerator's device; usually the same
            object. At least `n_layers` deep, and whole where the objective trains output rows.
        student: the student's rows, trained in place; or the state in which training goes on.
        batches: an iterator of `Batch`, at least `steps * accumulation` long, from the state's position on.
        n_layers: the target layer, counted from 1.
        options: see `TrainingOptions`.
        accelerator: device and processes. Each process has its own batches; gradients are averaged over all.
        on_step: called after each step.
        causal: False for an encoder.
        watcher: writes checkpoints, ends training early.

    Returns:
        The final progress, and seen: [student rows] int64 on the CPU, how often each id occurred in this process's
        batches.

    Raises:
        DivergedError: (a FloatingPointError) the loss or a gradient is not finite, with the tables as after the last
            good step; or the loss was DIVERGED times the first for DIVERGED_STEPS steps.
        torch.OutOfMemoryError: the device had no memory for a step, twice.
    """
    state = student if isinstance(student, TrainingState) else TrainingState.begin(student, options)
    watcher = watcher or Watcher()
    progress = state.progress
    if progress.step < options.steps:
        batches = itertools.chain([next(batches)], batches)  # the clock starts behind the start of the data worker
    start = time.perf_counter() - progress.seconds
    while progress.step < options.steps:
        asked = time.perf_counter()
        micro_batches = [next(batches) for _ in range(options.accumulation)]
        progress.seconds_waiting += time.perf_counter() - asked
        step = teacher, student_model, state, micro_batches, n_layers, options, accelerator, causal, watcher
        granted = _step(*step)
        progress.step += 1
        progress.seconds = time.perf_counter() - start
        on_step(progress)
        _check_course(progress)
        if not watcher.after_step(state, granted):
            break
    return progress, state.seen


def _step(
    teacher: PreTrainedModel,
    student_model: PreTrainedModel,
    state: TrainingState,
    micro_batches: list[Batch],
    n_layers: int,
    options: TrainingOptions,
    accelerator: Accelerator,
    causal: bool,
    watcher: Watcher,
) -> tuple[bool, ...]:
    """One update from a list of batches; returns what any process wished for behind it."""
    names, student, progress = options.objectives(), state.student, state.progress
    _count(state, micro_batches)
    ids = torch.cat([batch.distinct_ids for batch in micro_batches])
    micro_batches = [batch.to(accelerator.device) for batch in micro_batches]
    rows = student.rows(_of_all_processes(ids, accelerator))

    passes = partial(
        _passes, teacher, student_model, state, rows, micro_batches, n_layers, options, accelerator.device, causal
    )
    sums, tokens = None, sum(batch.padding[1] for batch in micro_batches)
    try:
        with count_flops(progress, tokens):
            sums = passes()
    except torch.OutOfMemoryError:
        if options.shard:  # the other processes are in the middle of it, and wait for this one
            raise
    if sums is None:  # behind the except: what the failed pass held is free only now
        _drop_gradients(rows, state.layers)
        clear_device_cache(garbage_collection=True)
        watcher.out_of_memory(progress.step + 1)
        with count_flops(progress, tokens):  # of a pass that failed nothing is counted
            sums = passes()
    state.occurred[rows.input.slots] = True
    (progress.loss, *values), granted = _update(state, rows, sums, options, accelerator, watcher.wishes(progress))
    progress.parts = dict(zip(names, values, strict=True))
    if student.head is not None:
        table = student.tables[-1]
        moved = slice(None) if options.moments == "dense" else rows.input.slots
        student.head.update(table.trainable_ids[moved], table.trainable[moved])
    progress.losses.append(progress.loss)
    without = len(rows.input.slots) == 0
    progress.steps_without_new_tokens += without
    if progress.first_loss is None and not without and progress.loss > 0:  # 0 where a batch has nothing to predict
        progress.first_loss = progress.loss
    return granted


def _passes(
    teacher: PreTrainedModel,
    student_model: PreTrainedModel,
    state: TrainingState,
    rows: StepRows,
    micro_batches: list[Batch],
    n_layers: int,
    options: TrainingOptions,
    device: torch.device,
    causal: bool,
) -> torch.Tensor:
    """[1 + objectives], the loss and its parts, means over the batches. Gradients are in `rows` and the layers."""
    sums = torch.zeros(1 + len(options.objectives()), device=device)
    for batch in micro_batches:
        sides = {"causal": causal, "teaching": None if state.layers is None else state.layers.teaching()}
        parts = losses(teacher, student_model, state.student, rows, batch, n_layers, options, **sides)
        loss = combine(parts) / len(micro_batches)
        if loss.requires_grad:
            loss.backward()
        sums += torch.stack([loss, *(part / len(micro_batches) for part in parts.values())]).detach()
    return sums


def _drop_gradients(rows: StepRows, layers: "TrainedLayers | None") -> None:
    for leaf in rows.leaves:
        leaf.grad = None
    if layers is not None:
        layers.student.zero_grad()


def _count(state: TrainingState, micro_batches: list[Batch]) -> None:
    """Count what is in a step's batches."""
    progress = state.progress
    for batch in micro_batches:
        progress.tokens += batch.tokens
        padding, in_all = batch.padding
        progress.padding_tokens += padding
        progress.all_tokens += in_all
        for reason, count in batch.skipped.items():
            progress.skipped[reason] = progress.skipped.get(reason, 0) + count
        in_text = batch.student_ids[batch.student_segments >= 0]
        state.seen.index_add_(0, in_text, torch.ones_like(in_text))
        state.position = batch.position
    progress.epoch = state.position.epoch


def _check_course(progress: Progress) -> None:
    """Raise a DivergedError where the loss has been far above its first value for some steps."""
    first = progress.first_loss
    far_off = first is not None and progress.loss > DIVERGED * first
    progress.steps_far_off = progress.steps_far_off + 1 if far_off else 0
    if progress.steps_far_off == DIVERGED_STEPS:
        raise DivergedError(
            f"the loss is {progress.loss:.3g} at step {progress.step}, over {DIVERGED:,} times its start "
            f"({first:.3g}), and has been for some steps; a lower lr may help"
        )


def freeze(model: PreTrainedModel) -> None:
    """Make `model` the frozen trunk of both sides: no gradients, no dropout, no row whose gradient torch would drop."""
    keep_gradients(model.requires_grad_(False).eval())
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # an index into the full vocabulary; rows of a batch are numbered anew


def _update(
    state: TrainingState,
    rows: StepRows,
    sums: torch.Tensor,
    options: TrainingOptions,
    accelerator: Accelerator,
    wishes: tuple[bool, ...],
) -> tuple[list[float], tuple[bool, ...]]:
    """Average losses and gradients over the processes, update the tables; return the losses and the joined wishes.

    The rows of the tokens in the step are updated. With an output row goes what was said of it while its token did not
    come, at every place: that it should be less likely there. Told only of batches that have their tokens rows rise,
    and layers that are trained too learn to push against all of them.
    """
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in rows.leaves]
    tables, layers = len(gradients), state.layers
    gradients += [] if layers is None else layers.gradients()
    wished = torch.tensor(wishes, dtype=sums.dtype).to(sums.device, non_blocking=True)
    sums, wished, *gradients = averaged([sums, wished, *gradients], accelerator)
    slots = rows.input.slots  # of the output rows too
    if state.pending is not None:
        gradients[tables - 1] = state.pending.add_(gradients[tables - 1])[slots]
    norms = [gradient.norm() for gradient in gradients[:tables]]
    norms += [] if layers is None else [torch.nn.utils.get_total_norm(gradients[tables:])]
    norms = torch.stack(norms)
    counted = state.occurred.sum()[None].to(norms.dtype)
    # The step's one wait for the device.
    figures = iter(torch.cat([sums, norms, counted, wished]).tolist())
    values, norms, (seen,), wished = (list(itertools.islice(figures, n)) for n in (len(sums), len(norms), 1, None))
    step, progress = state.progress.step + 1, state.progress
    if not all(map(math.isfinite, (*values, *norms))):
        raise DivergedError(
            f"the loss ({values[0]}) or the gradient's norm ({max(norms)}) is not finite at step {step}; "
            "a lower lr, or float32 instead of a half precision, may help; segments that differ between the two sides "
            "of a batch give NaN too"
        )
    progress.lr, progress.gradient_norm, progress.new_tokens_seen = options.lr_at(step), max(norms), round(seen)
    groups = [*([gradient] for gradient in gradients[:tables]), gradients[tables:]]
    for group, norm in zip(groups, norms, strict=False):
        if options.max_grad_norm is not None and norm > options.max_grad_norm:
            torch._foreach_mul_(group, options.max_grad_norm / norm)
    for optimizer, gradient in zip(state.optimizers, gradients, strict=False):
        optimizer.lr = progress.lr
        optimizer.step(slots, gradient)
    if state.pending is not None:
        state.pending[slots] = 0
    if layers is not None:
        layers.step(gradients[tables:], layers.options.lr * progress.lr / options.lr)
    return values, tuple(wish > 0 for wish in wished)


def averaged(tensors: list[torch.Tensor], accelerator: Accelerator) -> list[torch.Tensor]:
    """Their means over the processes, which meet once for as many tensors as fit into an exchange."""
    if accelerator.num_processes == 1:
        return tensors
    exchanges: list[list[torch.Tensor]] = []
    numbers = 0  # in the last one
    for tensor in tensors:
        numbers += tensor.numel()
        if exchanges and exchanges[-1][0].dtype == tensor.dtype and numbers <= EXCHANGED:
            exchanges[-1].append(tensor)
        else:
            exchanges.append([tensor])
            numbers = tensor.numel()
    found = []
    for exchange in exchanges:
        together = exchange[0].flatten() if len(exchange) == 1 else torch.cat([x.flatten() for x in exchange])
        parts = accelerator.reduce(together, reduction="mean").split([x.numel() for x in exchange])
        found += [part.view_as(x) for part, x in zip(parts, exchange, strict=True)]
    return found


def _of_all_processes(ids: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The student ids of a step, of all processes, since gradients are averaged row by row.

    Several processes tell each other theirs, which waits for the device; of one they stay on the CPU.
    """
    if accelerator.num_processes == 1:
        return ids
    filler, ids = int(ids[0]), ids.to(accelerator.device)
    return accelerator.gather(accelerator.pad_across_processes(ids, pad_index=filler))
