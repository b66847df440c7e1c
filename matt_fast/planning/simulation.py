"""One training step without weights, data or a device: what is in memory at its peak, and how much it multiplies.

The step's own code runs on PyTorch's meta device, where tensors have shapes and no contents, on any architecture that
a transfer takes. Every new storage is counted until it is freed, so what autograd keeps, and what is only passing
through, comes from the code itself.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from matt_fast.data.batches import Batch, Continued, collate
from matt_fast.data.packing import Chunk
from matt_fast.model.embeddings import BatchRows, OutputRows, RowAdamW
from matt_fast.model.head import Head
from matt_fast.support.flops import ATTENTION, FLOPS
from matt_fast.training.loop import averaged
from matt_fast.training.objectives import (
    Pass,
    combine,
    losses_of,
    needs_target,
    plan_ahead,
    student_pass,
    teacher_pass,
    trains_output,
)
from matt_fast.training.options import HealingOptions, TrainingOptions
from matt_fast.training.sides import StepRows, Target

if TYPE_CHECKING:
    from matt_fast.training.layers import TrainedLayers

# At the end of a segment: tokens that may come, distinct ones, next pieces.
TOKENS, DISTINCT_TOKENS, PIECES, DISTINCT_PIECES = 28, 8, 10, 2
SEGMENTS_OF_A_SPLIT = 50  # one of so many is a token that the student lacks

PARTS = (
    "frozen weights",
    "trained layers",
    "new rows, moments",
    "rows of the batch",
    "teacher",
    "student",
    "loss",
    "backward",
    "update",
)


@dataclass(frozen=True)
class Step:
    """What one step takes.

    Attributes:
        parts: bytes in memory at the step's peak, by the part of the step that made them; names as in `PARTS`.
        flops: multiplications and additions of its matrix products and attention, masked pairs of attention included;
            without those of the Triton kernels.
    """

    parts: dict[str, int]
    flops: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Vocabulary:
    """How many rows there are: all of the student's, and those of them that are trained."""

    rows: int
    trainable: int


class Memory(TorchDispatchMode):
    """Counts the bytes of every storage made inside it until the storage is freed, and the products.

    Attributes:
        part: what new storages are counted under.
        peak: bytes by part when most were in use.
        flops: multiplications and additions.
    """

    def __init__(self, part: str):
        super().__init__()
        self.part, self.peak, self.flops = part, Counter(), 0
        self._counted: set[int] = set()
        self._by_part: Counter = Counter()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type != "meta" or key in self._counted:
            return
        self._counted.add(key)
        weakref.finalize(storage, self._free, key, self.part, size).atexit = False
        self._by_part[self.part] += size
        if self._by_part.total() > self.peak.total():
            self.peak = self._by_part.copy()

    def workspace(self, size: int) -> None:
        """Count bytes that something takes and gives back at once."""
        self._by_part[self.part] += size
        if self._by_part.total() > self.peak.total():
            self.peak = self._by_part.copy()
        self._by_part[self.part] -= size

    def _free(self, key: int, part: str, size: int) -> None:
        self._counted.discard(key)
        self._by_part[part] -= size

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        count = FLOPS.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*arguments, **(options or {}), out_val=result)
        return result


class FullRows(TorchFunctionMode):
    """The meta device has no answer to what a model asks of its masks: is every token seen, is every row one document.
    With full rows it is yes."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.__bool__ and arguments[0].is_meta:
            return True
        return function(*arguments, **(options or {}))


class _Autocast(torch.autocast):
    """Peft turns it off around adapters of experts; the meta device has none."""

    def __init__(self, device_type: str, *given, **named):
        super().__init__("cpu" if device_type == "meta" else device_type, *given, **named)


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Let scaled_dot_product_attention take its fused kernel, as on a CPU or GPU, and products by experts any dtype.

    The meta device has only the plain formula, bfloat16, and no autocast, and no ids in which a model could look for
    padding. A mode for torch functions would not reach the layers that backward runs again.
    """
    plain = F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        if not query.is_meta or query.shape[-1] != value.shape[-1]:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        return ATTENTION(query, key, value, is_causal=is_causal, attn_mask=attn_mask, scale=scale)[0]

    def grouped(tokens, experts, **options):
        return tokens @ experts[0]  # each token with one of them

    with (
        patch.object(F, "scaled_dot_product_attention", fused),
        patch.object(F, "grouped_mm", grouped, create=True),
        patch.object(torch, "autocast", _Autocast),
        patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *given: None),
    ):
        yield


class NeedsWeightsError(ValueError):
    """What a step of this model computes depends on the values of its weights."""


@contextmanager
def shapes_only(model: PreTrainedModel) -> Iterator[None]:
    """Say so where a model asks for values."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise NeedsWeightsError(
            f"model: {type(model).__name__} cannot be planned without its weights, since what it computes depends on "
            f"their values: {error}"
        ) from error


def simulate(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    length: int,
    batch_size: int,
    n_layers: int,
    options: TrainingOptions,
    healing: HealingOptions | None = None,
    processes: int = 1,
) -> Step:
    """One training step with full rows on both sides and every token a new one: no batch of this shape takes more.

    Args:
        model: on the meta device, frozen, as `train` takes it.
        vocabulary: how many rows there are.
        length, batch_size: tokens of a row on either side, and rows.
        n_layers: the target layer, counted from 1.
        options: see `TrainingOptions`; the backend is "torch", "triton" or "eager".
        healing: layers that are trained beside the rows, if any.
        processes: that train together; each has other tokens, and a step the rows of them all.

    Raises:
        ValueError: the model looks at the values of its tensors, as a mixture of experts may.
    """
    with FullRows(), as_on_a_device(), shapes_only(model):
        planned = plan_ahead(model, n_layers, options)(_batch(length, batch_size))
    if "continuations" in needs_target(options.objectives()):
        planned = with_many_continuations(planned, len(model.get_output_embeddings().weight), vocabulary.rows)
    memory = Memory("frozen weights")
    for tensor in (*model.parameters(), *model.buffers()):
        memory.add(tensor)
    with FullRows(), as_on_a_device(), memory:
        memory.part = "trained layers"
        layers = None if healing is None else _layers(model, healing)
        memory.part = "new rows, moments"
        optimizers, head, target = _tables(model, vocabulary, options)
        pending = None if head is None else torch.zeros_like(optimizers[-1].table)
        memory.part = "rows of the batch"
        batch = planned.to(model.device)
        rows = _rows(model, vocabulary, batch.tokens * options.accumulation * processes, optimizers, head)
        batches = min(options.accumulation, 2)  # the second one finds the first one's gradients; all others are like it
        for _ in range(batches):
            with shapes_only(model):
                models = model, model if layers is None else layers.student
                loss = _loss(models, rows, (head, target), batch, n_layers, options, memory)
            memory.part = "backward"
            if loss.requires_grad:
                loss.backward()
        memory.part = "update"
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in rows.leaves]
        gradients += [] if layers is None else layers.gradients()
        gradients = averaged(gradients, _Processes(processes))
        if pending is not None:
            gradients[len(optimizers) - 1] = pending.add_(gradients[len(optimizers) - 1])[rows.input.slots]
        for optimizer, gradient in zip(optimizers, gradients, strict=False):
            gradient.norm()
            optimizer.step(rows.input.slots, gradient)
        if layers is not None:
            torch.nn.utils.get_total_norm(gradients[len(optimizers) :])
            layers.step(gradients[len(optimizers) :], healing.lr)
    return Step({name: memory.peak[name] for name in PARTS}, memory.flops * options.accumulation // batches)


@dataclass(frozen=True)
class _Processes:
    """What `averaged` asks of an accelerator."""

    num_processes: int

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor.clone()


def _batch(length: int, batch_size: int) -> Batch:
    """Every other segment has two tokens: between the 1.3 and 1.6 tokens of a segment that real tokenizers give."""
    segments = np.arange(length) * 2 // 3
    ids = np.arange(batch_size * length).reshape(batch_size, length)
    return collate([[Chunk(row, row, segments, segments)] for row in ids], Counter())


def with_many_continuations(batch: Batch, teacher_rows: int, rows: int) -> Batch:
    """The batch with a place for each segment where tokens of the student may come, and a few for the teacher's.

    As many tokens, and as many distinct ones, as 24,000 tokens for code or for German give in place of a model's own.
    """

    def of_side(ends: torch.Tensor, other_ends: torch.Tensor, stops: int, *rows: int) -> Continued:
        count = len(ends)
        tokens, pieces = torch.arange(count * TOKENS), torch.arange(count * PIECES)
        sizes = map(min, rows, (count * DISTINCT_TOKENS, count * DISTINCT_PIECES))
        distinct, distinct_pieces = map(torch.arange, sizes)
        return Continued(
            token_at=ends,
            piece_at=other_ends,
            tokens=distinct,
            token=tokens % len(distinct),
            token_entry=tokens // TOKENS,
            token_group=tokens * (len(pieces) + stops) // len(tokens),
            pieces=distinct_pieces,
            piece=pieces % len(distinct_pieces),
            piece_entry=pieces // PIECES,
            stops=torch.arange(stops),
        )

    student, teacher = batch.places.student_ends, batch.places.teacher_ends
    few = max(1, len(student) // SEGMENTS_OF_A_SPLIT)
    merged = of_side(student, teacher, len(student), rows, teacher_rows)
    split = of_side(teacher[:few], student[:few] - 1, 0, teacher_rows, rows)
    return replace(batch, continuations=(merged, split))


def _tables(model: PreTrainedModel, vocabulary: Vocabulary, options: TrainingOptions):
    """The trainable rows with their moments, one optimizer for each table, and the head where an objective needs it."""
    weight = model.get_input_embeddings().weight
    with_head = trains_output(options.objectives())
    tied = not with_head or model.get_output_embeddings().weight is weight
    tables = [weight.new_empty(vocabulary.trainable, weight.shape[1], dtype=torch.float32) for _ in range(2 - tied)]
    chosen = {"moments": options.moments, "backend": options.backend}
    optimizers = [RowAdamW(table, options.lr, **chosen) for table in tables]
    if not with_head:
        return optimizers, None, None
    return optimizers, Head(weight.new_empty(vocabulary.rows, weight.shape[1]), fused=False), _target(model, vocabulary)


def _target(model: PreTrainedModel, vocabulary: Vocabulary) -> Target:
    """The teacher's output side as the objectives read it; its weights are the model's own."""
    weight = model.get_output_embeddings().weight
    classes = (torch.empty(rows, dtype=torch.int64, device="meta") for rows in (len(weight), vocabulary.rows))
    return Target(Head(weight, fused=False), *classes, n_classes=min(len(weight), vocabulary.rows))


def _rows(
    model: PreTrainedModel, vocabulary: Vocabulary, tokens: int, optimizers: list[RowAdamW], head: Head | None
) -> StepRows:
    weight = model.get_input_embeddings().weight
    sizes = min(vocabulary.rows, tokens), min(vocabulary.trainable, tokens)
    ids, places, slots = (torch.empty(sizes[i], dtype=torch.int64, device="meta") for i in (0, 1, 1))
    output = None
    if head is not None:
        trained = torch.empty(vocabulary.trainable, dtype=torch.int64, device="meta")
        output = OutputRows(trained, optimizers[-1].table.detach().requires_grad_())
    tied = output is not None and len(optimizers) == 1
    leaf = output.trainable if tied else optimizers[0].table[slots].requires_grad_()
    return StepRows(BatchRows(ids, weight.new_empty(sizes[0], weight.shape[1]), leaf, places, slots), output)


def _layers(model: PreTrainedModel, healing: HealingOptions) -> "TrainedLayers":
    from matt_fast.training.layers import TrainedLayers  # imports peft

    with torch.device("meta"):
        return TrainedLayers(model, healing)


def _loss(models, rows, output_side, batch, n_layers, options, memory: Memory) -> torch.Tensor:
    """As `losses` and `combine`, part by part; what the passes captured is free afterwards."""
    memory.part = "teacher"
    teacher = teacher_pass(models[0], batch, n_layers, options)
    memory.part = "student"
    student = student_pass(models[1], rows, batch, n_layers, options)
    memory.part = "loss"
    if options.backend == "triton" and teacher.attention:
        memory.workspace(_kernel_workspace(*next(iter(teacher.attention.values())).states[:2]))
    return combine(losses_of(Pass(batch, teacher, student, rows, *output_side, n_layers, options)))


def _kernel_workspace(query: torch.Tensor, key: torch.Tensor) -> int:
    """What a pass of the Triton kernels takes and gives back, as the README has it: bytes of a token and key head."""
    return key.shape[:3].numel() * (128 + 64 if query.dtype == torch.bfloat16 else 384 + 128)
