"""Custom ops: what torch.compile and opcheck see. Each calls launchers and nothing else.

aim_plan                          ids -> the tensors of a plan
aim_forward, aim_backward         variant aim: loss with dQ for a unit of it; dQ, dK and dV
aim_query_backward                dQ where nothing else is wanted
attend_forward, attend_backward   variant aim_star: loss, then dQ, dK and dV
update_rows                       AdamW on some rows of a table, in place

Gradients go through the autograd functions of autograd.py. No op has a formula of its own (torch's wrapping of one
costs more than all launches): a second derivative raises a RuntimeError that names the op.
"""

from dataclasses import dataclass

import torch
from torch.library import custom_op

from matt_kernels import configs, launch
from matt_kernels.aim_columns import aim_columns
from matt_kernels.aim_rows import aim_rows
from matt_kernels.attend import attend
from matt_kernels.attend_gradients import attend_columns, attend_rows
from matt_kernels.device_plan import make_device_plan
from matt_kernels.factors import aim_factors, empty_factors
from matt_kernels.long import aim_long_columns, aim_long_rows
from matt_kernels.plan import AimPlan, layout, make_plan
from matt_kernels.rows import adamw_rows
from matt_kernels.softmax import softmax_rows
from matt_kernels.total import add_up

Tensor = torch.Tensor
Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Options:
    scale: float
    softcap: float | None
    metric: str = "mse"


# What autotune found in this process.
TUNED: dict[configs.Problem, configs.Config] = {}


def problem_of(
    query: Tensor, value: Tensor, variant: str, metric: str, *, lopsided: bool = False, softcap: bool = False
) -> configs.Problem:
    """Head dimensions in multiples of 16, which aim_loss makes of others."""
    metric = metric if variant == "aim" else "mse"
    sizes = (-(-x.shape[-1] // 16) * 16 for x in (query, value))
    return configs.Problem(*sizes, query.dtype, metric, configs.target_of(query.device), lopsided, softcap)


def config_for(*tensors_and_options, **flags) -> configs.Config:
    """The tuned or the chosen one; arguments as in problem_of."""
    problem = problem_of(*tensors_and_options, **flags)
    return TUNED[problem] if problem in TUNED else configs.choose_config(problem)


def _config_of(query: Tensor, value: Tensor, metric: str, plan: AimPlan, softcap: float | None) -> configs.Config:
    lopsided = plan.widths[0] > plan.widths[1]
    return config_for(query, value, plan.variant, metric, lopsided=lopsided, softcap=softcap is not None)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """What is kept until backward multiplies: float16 would lose gradients that a gradient scaler is to lift."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _zeros(*tensors_and_needed) -> list[Tensor | None]:
    """Gradients that kernels write in part, cleared in one operation; None where not needed."""
    found = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None for x, needed in tensors_and_needed
    ]
    if wanted := [x for x in found if x is not None]:
        torch._foreach_zero_(wanted)
    return found


def _present(tensors, like: Tensor) -> list[Tensor]:
    """Ops return tensors: empty ones for None."""
    return [like.new_empty(0, dtype=torch.float32) if x is None else x for x in tensors]


def _optional(tensors) -> list[Tensor | None]:
    """The opposite."""
    return [None if x.ndim == 1 else x for x in tensors]


@custom_op("matt_kernels::aim_plan", mutates_args=())
def aim_plan_op(
    teacher_segments: Tensor, student_segments: Tensor, teacher_documents: Tensor | None,
    student_documents: Tensor | None, teacher_width: int, student_width: int, variant: str, causal: bool,
    sliding_window: int | None, reduction: str,
) -> Plan:  # fmt: skip
    make = make_device_plan if teacher_segments.is_cuda else make_plan
    with launch.on_device(teacher_segments):
        return make(
            teacher_segments, student_segments, teacher_documents, student_documents,
            widths=(teacher_width, student_width), variant=variant, causal=causal, sliding_window=sliding_window,
            reduction=reduction,
        ).tensors()  # fmt: skip


@aim_plan_op.register_fake
def _(
    teacher_segments, student_segments, teacher_documents, student_documents, teacher_width, student_width, variant,
    causal, sliding_window, reduction,
):  # fmt: skip
    batch, *lengths = *teacher_segments.shape, student_segments.shape[1]
    shapes = layout(batch, lengths, (teacher_width, student_width))
    return tuple(teacher_segments.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


@custom_op("matt_kernels::aim_forward", mutates_args=())
def aim_forward(
    teacher_query: Tensor, teacher_key: Tensor, teacher_value: Tensor, query: Tensor, key: Tensor, value: Tensor,
    plan: list[Tensor], teacher_width: int, student_width: int, long_segments: bool, metric: str, scale: float,
    softcap: float | None, divisor: int, query_needed: bool, key_needed: bool, value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, what a unit of it weighs in gradients, dQ before multiplication by both, softmax of both sides' rows, D,
    factors as aim_factors has them); empty where not needed for backward."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim", long_segments)
    config = _config_of(query, value, metric, plan, softcap)
    options = Options(scale, softcap, metric)
    teacher, student = (teacher_query, teacher_key, teacher_value), (query, key, value)
    rows = *query.shape[:2], plan.rows.shape[-1]
    loss = query.new_empty(rows, dtype=torch.float32)
    correction = torch.empty_like(loss)
    softmaxes = loss.new_empty(2, launch.softmax_numbers(query), *rows)
    gradient = mean_key = None
    if query_needed:
        # Tokens that end no segment have no query row.
        gradient = torch.zeros(query.shape, dtype=gradient_dtype(query), device=query.device)
        mean_key = loss.new_empty(*rows, query.shape[-1])
    with launch.on_device(query):
        sides = softmaxes.unbind()
        softmax_rows(teacher, student, sides, plan, config, options, mean_key)
        factors = aim_factors(teacher_value, value, plan, config, metric)
        if plan.long_segments:
            aim_long_rows(teacher, student, sides, mean_key, plan, config, options, loss, correction, gradient)
        aim_rows(teacher, student, factors, sides, mean_key, plan, config, options, loss, correction, gradient)
        total, unit = add_up(loss, plan, divisor, metric, weighted=True)
    mixture, gram, rest, low, *_ = factors
    kept = [softmaxes, correction, mixture, gram, rest if metric == "cosine" else None, low]
    kept = kept if key_needed or value_needed else [None] * 6
    return total, unit, *_present([gradient, *kept], query)


@aim_forward.register_fake
def _(
    teacher_query, teacher_key, teacher_value, query, key, value, plan, teacher_width, student_width, long_segments,
    metric, scale, softcap, divisor, query_needed, key_needed, value_needed,
):  # fmt: skip
    new, rows = query.new_empty, (*query.shape[:2], plan[0].shape[-1])
    gradient = new(query.shape, dtype=gradient_dtype(query)) if query_needed else None
    kept = [None] * 6
    if key_needed or value_needed:
        softmaxes = new(2, launch.softmax_numbers(query), *rows, dtype=torch.float32)
        widths, kind = (teacher_width, student_width), configs.factor_kind(query.dtype, metric)
        mixture, gram, rest, low = empty_factors(teacher_value, value, widths, kind)
        rest = rest if metric == "cosine" else None
        kept = [softmaxes, new(rows, dtype=torch.float32), mixture, gram, rest, low]
    return *(new((), dtype=torch.float32) for _ in range(2)), *_present([gradient, *kept], query)


@custom_op("matt_kernels::aim_query_backward", mutates_args=())
def aim_query_backward(query: Tensor, gradient: Tensor, unit: Tensor, output_gradient: Tensor) -> Tensor:
    """dQ. It takes the query, so that it is no constant to a second derivative."""
    return _multiplied(gradient, output_gradient * unit, query)


@aim_query_backward.register_fake
def _(query, gradient, unit, output_gradient):
    return query.new_empty(query.shape)


def _multiplied(gradient: Tensor, multiplier: Tensor, query: Tensor) -> Tensor:
    return torch.mul(gradient, multiplier, out=torch.empty(query.shape, dtype=query.dtype, device=query.device))


@custom_op("matt_kernels::aim_backward", mutates_args=())
def aim_backward(
    teacher_query: Tensor, teacher_key: Tensor, teacher_value: Tensor, query: Tensor, key: Tensor, value: Tensor,
    plan: list[Tensor], teacher_width: int, student_width: int, long_segments: bool, metric: str, scale: float,
    softcap: float | None, kept: list[Tensor], output_gradient: Tensor, key_needed: bool, value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV) from what aim_forward returned beside the loss; empty where not needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim", long_segments)
    config = _config_of(query, value, metric, plan, softcap)
    options = Options(scale, softcap, metric)
    teacher, student = (teacher_query, teacher_key, teacher_value), (query, key, value)
    unit, gradient, softmaxes, correction, *factors = kept
    multiplier = output_gradient * unit
    # Padding and documents without a segment are in no tile.
    gradients = _zeros((key, key_needed), (value, value_needed))
    with launch.on_device(query):
        common = softmaxes.unbind(), correction, plan, config, options, multiplier, *gradients
        aim_columns(teacher, student, _optional(factors), *common)
        if plan.long_segments:
            aim_long_columns(teacher, student, *common)
    query_gradient = None if gradient.ndim == 1 else _multiplied(gradient, multiplier, query)
    return tuple(_present([query_gradient, *gradients], query))


@aim_backward.register_fake
def _(
    teacher_query, teacher_key, teacher_value, query, key, value, plan, teacher_width, student_width, long_segments,
    metric, scale, softcap, kept, output_gradient, key_needed, value_needed,
):  # fmt: skip
    sides = (query, kept[1].ndim > 1), (key, key_needed), (value, value_needed)
    return tuple(_present([x.new_empty(x.shape) if needed else None for x, needed in sides], query))


@custom_op("matt_kernels::attend_forward", mutates_args=())
def attend_forward(
    teacher_query: Tensor, teacher_key: Tensor, teacher_value: Tensor, query: Tensor, key: Tensor, value: Tensor,
    plan: list[Tensor], teacher_width: int, student_width: int, metric: str, scale: float, softcap: float | None,
    divisor: int, gradient_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, what a unit of it weighs in gradients, the derivative by the student's o, softmax, D); the last three
    empty where no gradient is needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim_star")
    config = _config_of(query, value, metric, plan, softcap)
    options = Options(scale, softcap, metric)
    with launch.on_device(query):
        teacher, student = (teacher_query, teacher_key, teacher_value), (query, key, value)
        loss, *kept = attend(teacher, student, plan, config, options, gradient=gradient_needed)
        total, unit = add_up(loss, plan, divisor, metric, weighted=False)
    return total, unit, *_present(kept if gradient_needed else [None] * 3, query)


@attend_forward.register_fake
def _(
    teacher_query, teacher_key, teacher_value, query, key, value, plan, teacher_width, student_width, metric, scale,
    softcap, divisor, gradient_needed,
):  # fmt: skip
    new, rows = query.new_empty, (*query.shape[:2], plan[0].shape[-1])
    shapes = (*rows, value.shape[-1]), (launch.attend_numbers(query), *rows), rows
    dtypes = gradient_dtype(query), torch.float32, torch.float32
    kept = [new(x, dtype=y) if gradient_needed else None for x, y in zip(shapes, dtypes, strict=True)]
    return *(new((), dtype=torch.float32) for _ in range(2)), *_present(kept, query)


@custom_op("matt_kernels::attend_backward", mutates_args=())
def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, plan: list[Tensor], teacher_width: int, student_width: int,
    scale: float, softcap: float | None, kept: list[Tensor], output_gradient: Tensor, query_needed: bool,
    key_needed: bool, value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV) of the student from what attend_forward returned beside the loss; empty where not needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim_star")
    config = _config_of(query, value, "mse", plan, softcap)
    options = Options(scale, softcap)
    unit, *of_rows = kept
    # Tokens that end no segment have no query row; padding is in no tile.
    gradients = _zeros((query, query_needed), (key, key_needed), (value, value_needed))
    inputs = query, key, value, of_rows, plan, config, options, output_gradient * unit
    with launch.on_device(query):
        sinks = None
        if query_needed or (key_needed and config.kind == "fp32"):
            sinks = attend_rows(*inputs, gradients[0])
        if key_needed or value_needed:
            attend_columns(*inputs, sinks, *gradients[1:])
    return tuple(_present(gradients, query))


@attend_backward.register_fake
def _(
    query, key, value, plan, teacher_width, student_width, scale, softcap, kept, output_gradient, query_needed,
    key_needed, value_needed,
):  # fmt: skip
    sides = (query, query_needed), (key, key_needed), (value, value_needed)
    return tuple(_present([x.new_empty(x.shape) if needed else None for x, needed in sides], query))


@custom_op("matt_kernels::update_rows", mutates_args=("table", "first_moment", "second_moment", "updates"))
def update_rows(
    table: Tensor, first_moment: Tensor, second_moment: Tensor, updates: Tensor, slots: Tensor, gradient: Tensor,
    lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    if slots.numel():
        with launch.on_device(table):
            moments = first_moment, second_moment, updates
            adamw_rows(table, *moments, slots.contiguous(), gradient.contiguous(), lr, (beta1, beta2), eps)


@update_rows.register_fake
def _(table, first_moment, second_moment, updates, slots, gradient, lr, beta1, beta2, eps):
    return None
