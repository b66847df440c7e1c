"""What the new embeddings are trained for: each objective is a loss between what the two sides did with one batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.continuations import Continuations
from matt_fast.data.batches import PADDING, Batch
from matt_fast.data.continuations import with_continuations
from matt_fast.loss import aim_loss, tile_planner
from matt_fast.model.capture import AttentionInputs, Capture, capture
from matt_fast.model.distributions import class_divergence, token_log_probs
from matt_fast.model.embeddings import embed
from matt_fast.model.head import Head
from matt_fast.training.continuations import continuation_kl
from matt_fast.training.options import TrainingOptions
from matt_fast.training.sides import StepRows, Student, Target

INSIDE = 2.0  # weight of how tokens go on, beside how they begin: best between two texts (docs/healing-tried.md)


@dataclass(frozen=True)
class Pass:
    """What a batch gave on both sides: the material of the losses."""

    batch: Batch
    teacher: Capture
    student: Capture
    rows: StepRows
    head: Head | None
    target: Target | None
    n_layers: int
    options: TrainingOptions


def aim(given: Pass) -> torch.Tensor:
    """Attention influence at the target layer (paper, eq. 3 to 10)."""
    return _aim(given, given.n_layers - 1, "aim")


def aim_star(given: Pass) -> torch.Tensor:
    """The outputs of the target layer's attention at segment ends (paper §3.4)."""
    return _aim(given, given.n_layers - 1, "aim_star")


def aim_all_layers(given: Pass) -> torch.Tensor:
    """The mean of the AIM losses of all layers up to the target layer (the paper's ablation)."""
    return torch.stack([_aim(given, layer, "aim") for layer in range(given.n_layers)]).mean()


def token_distillation(given: Pass) -> torch.Tensor:
    """Mean squared error of the hidden states behind the target layer at segment ends (Token Distillation)."""
    places = given.batch.places
    teacher, student = (
        side.hidden.flatten(0, 1)[ends].to(torch.promote_types(side.hidden.dtype, torch.float32))
        for side, ends in ((given.teacher, places.teacher_ends), (given.student, places.student_ends))
    )
    return torch.nn.functional.mse_loss(student, teacher, reduction="sum") / max(1, student.numel())


def boundary_head(given: Pass) -> torch.Tensor:
    """Cross-entropy of the first student token of each segment given the teacher's final state before the segment.

    Trains output rows without a pass through the student. The first segment of a document counts only where special
    tokens stand before it.
    """
    places = given.batch.places
    hidden = given.teacher.head_input.flatten(0, 1)[places.teacher_before]
    return given.head.loss(hidden, given.batch.student_ids.flatten()[places.student_first], given.rows.output)


def next_token(given: Pass) -> torch.Tensor:
    """Cross-entropy of every next token under the whole student (NTP)."""
    predicting = given.batch.places.predicting
    hidden = given.student.head_input.flatten(0, 1)[predicting]
    return given.head.loss(hidden, given.batch.student_ids.flatten()[predicting + 1], given.rows.output)


def likelihood(given: Pass) -> torch.Tensor:
    """Divergence of each segment's likelihood under the student from that under the teacher (ALM, arXiv 2503.20083).

    A segment happens or does not: two outcomes, with the probability p^(1/temperature) of the first. Segments with
    nothing before them on either side do not count.
    """
    places, temperature = given.batch.places, given.options.alm_temperature
    sides = (
        (given.teacher.head_input, given.batch.teacher_ids, places.teacher_scored, places.teacher_scored_in),
        (given.student.head_input, given.batch.student_ids, places.student_scored, places.student_scored_in),
    )
    logs = []
    for head, (states, ids, scored, number) in zip((given.target.head, given.head), sides, strict=True):
        found = token_log_probs(head, states.flatten(0, 1)[scored - 1], ids.flatten()[scored], given.rows.output)
        whole = found.new_zeros(len(places.scored_ends)).index_add(0, number, found)
        logs.append((whole / temperature).clamp_max(-1e-6))
    teacher, student = logs[0].detach(), logs[1]
    found = _TWO_OUTCOMES[given.options.alm_divergence](teacher, student)
    return found.sum() / max(1, len(found))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence of two outcomes; p and q are the logarithms of the first one's probability."""
    return p.exp() * (p - q) - p.expm1() * (_other(p) - _other(q))


def _other(log_probability: torch.Tensor) -> torch.Tensor:
    return (-log_probability.expm1()).log()


_TWO_OUTCOMES = {
    "kl": _kl,
    "reverse-kl": lambda p, q: _kl(q, p),
    "tvd": lambda p, q: (p.exp() - q.exp()).abs(),
}


def boundary_kl(given: Pass) -> torch.Tensor:
    """KL divergence of the student's next-token distribution from the teacher's at the end of each segment.

    Tokens are compared by classes, see `next_token_classes`.
    """
    places, target = given.batch.places, given.target
    return class_divergence(
        given.head,
        given.student.head_input.flatten(0, 1)[places.student_ends],
        target.student_classes,
        given.rows.output,
        target.head,
        given.teacher.head_input.flatten(0, 1)[places.teacher_ends],
        target.teacher_classes,
        target.n_classes,
    )


def segment_kl(given: Pass) -> torch.Tensor:
    """`boundary_kl`, and INSIDE times how the tokens of each class go on (`continuation_kl`); a mean over segments."""
    sides = given.head, given.student.head_input, given.rows.output, given.target.head, given.teacher.head_input
    inside = continuation_kl(given.batch, *sides)
    return boundary_kl(given) + INSIDE * inside / max(1, len(given.batch.places.student_ends))


@dataclass(frozen=True)
class _Objective:
    """A loss, and what it reads on each side: "attention" of the target layer, "all" of them, "hidden", "head".

    `target`: what it needs of the teacher's output side, "head", "classes" or "continuations".
    """

    loss: Callable[[Pass], torch.Tensor]
    teacher: str | None
    student: str | None
    trains_output: bool = False
    target: str | None = None


_OBJECTIVES = {
    "aim": _Objective(aim, "attention", "attention"),
    "aim_star": _Objective(aim_star, "attention", "attention"),
    "aim-all-layers": _Objective(aim_all_layers, "all", "all"),
    "token-distillation": _Objective(token_distillation, "hidden", "hidden"),
    "boundary-head": _Objective(boundary_head, "head", None, trains_output=True),
    "ntp": _Objective(next_token, None, "head", trains_output=True),
    "alm": _Objective(likelihood, "head", "head", trains_output=True, target="head"),
    "boundary-kl": _Objective(boundary_kl, "head", "head", trains_output=True, target="classes"),
    "segment-kl": _Objective(segment_kl, "head", "head", trains_output=True, target="continuations"),
}


def trains_output(names: tuple[str, ...]) -> bool:
    """Whether an objective trains output rows; it then needs the model at its full depth, head included."""
    return any(_OBJECTIVES[name].trains_output for name in names)


def needs_target(names: tuple[str, ...]) -> set[str]:
    """What the objectives need of the teacher's output side: "head", "classes", "continuations"."""
    return {_OBJECTIVES[name].target for name in names} - {None}


def compares_predictions(name: str) -> bool:
    """Whether an objective reads nothing of the teacher but what it predicts, so that any model may be the teacher."""
    return _OBJECTIVES[name].target is not None or _OBJECTIVES[name].teacher is None


def reads_layers(names: tuple[str, ...]) -> bool:
    """Whether an objective compares what happens at the target layer, or below it."""
    return any(x.teacher in ("attention", "all", "hidden") for x in map(_OBJECTIVES.__getitem__, names))


def trains_input(names: tuple[str, ...]) -> bool:
    """Whether an objective reaches input rows: one that runs the student."""
    return any(_OBJECTIVES[name].student is not None for name in names)


def layer_passes(names: tuple[str, ...]) -> int:
    """How often a batch goes through the layers: the teacher's way, the student's, and back."""
    return any(_OBJECTIVES[name].teacher is not None for name in names) + 2 * trains_input(names)


def losses(
    teacher: PreTrainedModel,
    student_model: PreTrainedModel,
    student: Student,
    rows: StepRows,
    batch: Batch,
    n_layers: int,
    options: TrainingOptions,
    *,
    causal: bool = True,
    teaching: AbstractContextManager | None = None,
) -> dict[str, torch.Tensor]:
    """Each objective's loss of one batch, from one pass of each side at most, differentiable by the rows' leaves.

    `teaching` is open during the teacher's pass: where both are one model, it is the teacher's in it.
    """
    with teaching or nullcontext():
        taught = teacher_pass(teacher, batch, n_layers, options, causal=causal)
    learned = student_pass(student_model, rows, batch, n_layers, options, causal=causal)
    return losses_of(Pass(batch, taught, learned, rows, student.head, student.target, n_layers, options))


def teacher_pass(
    model: PreTrainedModel, batch: Batch, n_layers: int, options: TrainingOptions, *, causal: bool = True
) -> Capture:
    """What the objectives read on the teacher's side, without gradients; nothing is run if they read nothing."""
    wanted = _wanted({_OBJECTIVES[name].teacher for name in options.objectives()}, n_layers, options)
    if not wanted:
        return Capture()
    visibility = _visibility(batch.teacher_documents, batch, causal)
    with torch.no_grad():
        return capture(model, **wanted, **visibility, compiled=options.compile, input_ids=batch.teacher_ids)


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
    visibility = _visibility(batch.student_documents, batch, causal)
    layers = {"checkpointing": options.checkpointing, "compiled": options.compile}
    embedded = embed(model.get_input_embeddings(), rows.input, batch.student_ids)
    return capture(model, **wanted, **visibility, **layers, inputs_embeds=embedded)


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


def plan_ahead(
    model: PreTrainedModel, n_layers: int, options: TrainingOptions, continuations: Continuations | None = None
) -> Callable[[Batch], Batch]:
    """What data workers do to batches for these objectives: where kernels run, they plan their tiles; where
    `Target.continuations` is there, they look up how tokens go on."""
    names = options.objectives()
    wanted = _wanted({_OBJECTIVES[name].student for name in names} & {"attention", "all"}, n_layers, options)
    layers = {}
    if wanted:
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            layers = capture(model, **wanted, input_ids=one_token).attention
    variants = {"aim_star" if name == "aim_star" else "aim" for name in names if name.startswith("aim")}
    planners = {
        (variant, layer.sliding_window): tile_planner(layer.states, **_aim_options(layer, variant, options))
        for layer in layers.values()
        for variant in variants
    }
    planners = {name: planner for name, planner in planners.items() if planner is not None}
    return partial(_finish, planners, continuations)


def _finish(planners: dict[tuple, Callable], continuations: Continuations | None, batch: Batch) -> Batch:
    if continuations is not None:
        batch = with_continuations(continuations, batch)
    documents = {"teacher_documents": batch.teacher_documents, "student_documents": batch.student_documents}
    ids = batch.teacher_segments, batch.student_segments
    return replace(batch, plans={name: planner(*ids, **documents) for name, planner in planners.items()})


def _aim_options(layer: AttentionInputs, variant: str, options: TrainingOptions) -> dict:
    return {
        "variant": variant,
        "metric": options.metric,
        "reduction": options.reduction,
        "backend": options.backend,
        "sliding_window": layer.sliding_window,
        "causal": layer.causal,
    }


def _aim(given: Pass, layer: int, variant: str) -> torch.Tensor:
    teacher, student = given.teacher.attention[layer], given.student.attention[layer]
    return aim_loss(
        teacher.states,
        student.states,
        given.batch.teacher_segments,
        given.batch.student_segments,
        teacher_documents=given.batch.teacher_documents,
        student_documents=given.batch.student_documents,
        scale=student.scale,
        softcap=student.softcap,
        plan=given.batch.plans.get((variant, student.sliding_window)),
        **_aim_options(student, variant, given.options),
    )


def _wanted(kinds: set[str | None], n_layers: int, options: TrainingOptions) -> dict:
    """The arguments of `capture` for these kinds; empty if there is nothing to capture."""
    layers = range(n_layers) if "all" in kinds else [n_layers - 1] if "attention" in kinds else []
    if not layers and kinds.isdisjoint(("hidden", "head")):
        return {}
    return {
        "attention": layers,
        "hidden": n_layers - 1 if "hidden" in kinds else None,
        "head": "head" in kinds,
        "attn_implementation": options.attn_implementation,
    }


def _visibility(documents: torch.Tensor, batch: Batch, causal: bool) -> dict:
    """The argument of `capture` that hides documents and padding from each other; causal rows of one need none."""
    if batch.packed:
        return {"documents": documents}
    if causal:
        return {}
    return {"attention_mask": (documents != PADDING).long().to(batch.student_ids.device, non_blocking=True)}
