"""What the new embeddings are trained for: each objective is a loss between what the two sides did with one batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from matt_fast.capture import AttentionInputs, Capture, capture
from matt_fast.data import Batch
from matt_fast.embeddings import BatchRows, EmbeddingTable, embed
from matt_fast.head import Head
from matt_fast.loss import aim_loss
from matt_fast.options import TrainingOptions


@dataclass(frozen=True)
class Student:
    """The student's vocabulary: its embedding, and its output side where an objective needs it.

    Attributes:
        input: the input embedding.
        output: rows of the output head, where it is not tied to the embedding and an objective trains it.
        head: the whole output head; None where no objective needs it.
    """

    input: EmbeddingTable
    output: EmbeddingTable | None = None
    head: Head | None = None

    @property
    def tables(self) -> list[EmbeddingTable]:
        return [self.input] if self.output is None else [self.input, self.output]

    def rows(self, ids: torch.Tensor) -> "StepRows":
        """The rows of one step, given the ids ([any shape] int64) that occur in it."""
        rows = self.input.rows(ids)
        return StepRows(rows, rows if self.output is None else self.output.rows(ids))


@dataclass(frozen=True)
class StepRows:
    """The rows of one step as input and as output embeddings: the same object where they are tied."""

    input: BatchRows
    output: BatchRows

    @property
    def by_table(self) -> list[BatchRows]:
        return [self.input] if self.output is self.input else [self.input, self.output]


@dataclass(frozen=True)
class Pass:
    """What a batch gave on both sides: the material of the losses."""

    batch: Batch
    teacher: Capture
    student: Capture
    rows: StepRows
    head: Head | None
    n_layers: int
    options: TrainingOptions


def aim(given: Pass, variant: str = "aim") -> torch.Tensor:
    """Attention influence at the target layer (paper, eq. 3 to 10)."""
    layer = given.n_layers - 1
    return _aim(given, given.teacher.attention[layer], given.student.attention[layer], variant)


def aim_star(given: Pass) -> torch.Tensor:
    """The outputs of the target layer's attention at segment ends (paper §3.4)."""
    return aim(given, "aim_star")


def aim_all_layers(given: Pass) -> torch.Tensor:
    """The mean of the AIM losses of all layers up to the target layer (the paper's ablation)."""
    layers = range(given.n_layers)
    losses = [_aim(given, given.teacher.attention[i], given.student.attention[i], "aim") for i in layers]
    return torch.stack(losses).mean()


def token_distillation(given: Pass) -> torch.Tensor:
    """Mean squared error of the hidden states behind the target layer at segment ends (Token Distillation)."""
    ends = [_places(_segment_ends(x)) for x in (given.batch.teacher_segments, given.batch.student_segments)]
    states = [
        side.hidden.flatten(0, 1)[end.to(side.hidden.device)].float()
        for side, end in zip((given.teacher, given.student), ends, strict=True)
    ]
    return torch.nn.functional.mse_loss(states[1], states[0])


def boundary_head(given: Pass) -> torch.Tensor:
    """Cross-entropy of the first student token of each segment given the teacher's final state before the segment.

    Trains output rows without a pass through the student.
    """
    teacher, student = boundary_pairs(given.batch)
    hidden = given.teacher.head_input.flatten(0, 1)
    return given.head.loss(
        hidden[teacher.to(hidden.device)],
        given.batch.student_ids.flatten()[student.to(hidden.device)],
        given.rows.output,
    )


def next_token(given: Pass) -> torch.Tensor:
    """Cross-entropy of every next token under the whole student (NTP)."""
    columns = torch.arange(given.batch.student_ids.shape[1] - 1)
    scored = columns + 1 < given.batch.student_lengths[:, None]
    hidden = given.student.head_input
    rows, columns = (x.to(hidden.device, non_blocking=True) for x in scored.nonzero().unbind(1))
    return given.head.loss(hidden[rows, columns], given.batch.student_ids[rows, columns + 1], given.rows.output)


@dataclass(frozen=True)
class _Objective:
    """A loss, and what it reads on each side: "attention" of the target layer, "all" of them, "hidden", "head"."""

    loss: Callable[[Pass], torch.Tensor]
    teacher: str | None
    student: str | None
    trains_output: bool = False


_OBJECTIVES = {
    "aim": _Objective(aim, "attention", "attention"),
    "aim_star": _Objective(aim_star, "attention", "attention"),
    "aim-all-layers": _Objective(aim_all_layers, "all", "all"),
    "token-distillation": _Objective(token_distillation, "hidden", "hidden"),
    "boundary-head": _Objective(boundary_head, "head", None, trains_output=True),
    "ntp": _Objective(next_token, None, "head", trains_output=True),
}


def trains_output(names: tuple[str, ...]) -> bool:
    """Whether an objective trains output rows; it then needs the model at its full depth, head included."""
    return any(_OBJECTIVES[name].trains_output for name in names)


def losses(
    teacher: PreTrainedModel,
    student_model: PreTrainedModel,
    rows: StepRows,
    head: Head | None,
    batch: Batch,
    n_layers: int,
    options: TrainingOptions,
    *,
    causal: bool = True,
) -> dict[str, torch.Tensor]:
    """Each objective's loss of one batch, from one pass of each side at most, differentiable by the rows' leaves."""
    captures = (
        teacher_pass(teacher, batch, n_layers, options, causal=causal),
        student_pass(student_model, rows, batch, n_layers, options, causal=causal),
    )
    return losses_of(Pass(batch, *captures, rows, head, n_layers, options))


def teacher_pass(
    model: PreTrainedModel, batch: Batch, n_layers: int, options: TrainingOptions, *, causal: bool = True
) -> Capture:
    """What the objectives read on the teacher's side, without gradients; nothing is run if they read nothing."""
    wanted = _wanted({_OBJECTIVES[name].teacher for name in options.objectives()}, n_layers, options)
    if not wanted:
        return Capture()
    with torch.no_grad():
        mask = _mask(batch.teacher_ids, batch.teacher_lengths, causal)
        return capture(model, **wanted, **mask, input_ids=batch.teacher_ids)


def student_pass(
    model: PreTrainedModel,
    rows: StepRows,
    batch: Batch,
    n_layers: int,
    options: TrainingOptions,
    *,
    causal: bool = True,
) -> Capture:
    """What the objectives read on the student's side, differentiable by the rows' leaves."""
    wanted = _wanted({_OBJECTIVES[name].student for name in options.objectives()}, n_layers, options)
    if not wanted:
        return Capture()
    mask = _mask(batch.student_ids, batch.student_lengths, causal)
    embedded = embed(model.get_input_embeddings(), rows.input, batch.student_ids)
    return capture(model, **wanted, **mask, checkpointing=options.checkpointing, inputs_embeds=embedded)


def losses_of(given: Pass) -> dict[str, torch.Tensor]:
    """Each objective's loss of what both sides gave."""
    return {name: _OBJECTIVES[name].loss(given) for name in given.options.objectives()}


def combine(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of losses with all but the first scaled to the first's value (dynamic scaling: paper, Appendix E)."""
    first, *others = parts.values()
    for other in others:
        ratio = first.detach() / other.detach()
        first = first + other * torch.where(other.detach() == 0, 0.0, ratio)
    return first


def boundary_pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat indices into [B, n]: the teacher's last token before each segment, and the student's first token of it.

    The first segment of a row has a pair only where special tokens stand before it.
    """
    teacher, student = (_segment_starts(x) for x in (batch.teacher_segments, batch.student_segments))
    has_context = torch.arange(teacher.shape[1]) > 0
    first_teacher, first_student = _places(teacher), _places(student)
    kept = has_context.expand_as(teacher).flatten()[first_teacher]
    return first_teacher[kept] - 1, first_student[kept]


def _aim(given: Pass, teacher: AttentionInputs, student: AttentionInputs, variant: str) -> torch.Tensor:
    return aim_loss(
        teacher.states,
        student.states,
        given.batch.teacher_segments,
        given.batch.student_segments,
        teacher_documents=teacher.documents,
        student_documents=student.documents,
        variant=variant,
        metric=given.options.metric,
        reduction=given.options.reduction,
        scale=student.scale,
        sliding_window=student.sliding_window,
        softcap=student.softcap,
        causal=student.causal,
        backend=given.options.backend,
    )


def _mask(ids: torch.Tensor, lengths: torch.Tensor, causal: bool) -> dict[str, torch.Tensor]:
    """The attention mask of an encoder; a causal model never sees the padding behind it."""
    if causal:
        return {}
    columns = torch.arange(ids.shape[1])
    return {"attention_mask": (columns < lengths[:, None]).long().to(ids.device)}


def _wanted(kinds: set[str | None], n_layers: int, options: TrainingOptions) -> dict:
    """The arguments of `capture` for these kinds; empty if there is nothing to capture."""
    layers = range(n_layers) if "all" in kinds else [n_layers - 1] if "attention" in kinds else []
    hidden = n_layers - 1 if "hidden" in kinds else None
    if not layers and hidden is None and "head" not in kinds:
        return {}
    return {
        "attention": layers,
        "hidden": hidden,
        "head": "head" in kinds,
        "attn_implementation": options.attn_implementation,
        "compiled": options.compile,
    }


def _segment_ends(segments: torch.Tensor) -> torch.Tensor:
    """[B, n] bool: the last token of each segment. Ids are consecutive within a segment, negative outside."""
    following = torch.nn.functional.pad(segments[:, 1:], (0, 1), value=-1)
    return (segments >= 0) & (segments != following)


def _segment_starts(segments: torch.Tensor) -> torch.Tensor:
    before = torch.nn.functional.pad(segments[:, :-1], (1, 0), value=-1)
    return (segments >= 0) & (segments != before)


def _places(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().flatten()
