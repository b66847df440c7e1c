"""Custom ops: what torch.compile, autograd and opcheck see. Each calls launchers and nothing else.

aim_plan                          ids -> the tensors of a plan
aim_forward                       variant aim: loss with dQ for a unit of it
aim_query_backward, aim_backward  variant aim: dQ; dK and dV
attend_forward, attend_backward   variant aim_star: loss, then dQ, dK and dV
update_rows                       AdamW on some rows of a table, in place

The backward ops have no autograd formula: a second derivative raises a RuntimeError that names the op.
"""

from dataclasses import dataclass

import torch
from torch.library import custom_op, register_autograd

from matt_kernels import configs, launch
from matt_kernels.aim import aim_columns, aim_rows
from matt_kernels.attend import attend, attend_columns, attend_rows
from matt_kernels.factors import aim_factors
from matt_kernels.long import aim_long_columns, aim_long_rows
from matt_kernels.plan import AimPlan, layout, make_plan
from matt_kernels.rows import adamw_rows
from matt_kernels.softmax import softmax_rows

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


def factor(metric: str, query: Tensor, value: Tensor) -> float:
    """What one unit of a row's loss weighs before pair_weight: the mean over heads, and over d_v for mse."""
    return 1 / (query.shape[1] * (value.shape[-1] if metric == "mse" else 1))


@custom_op("matt_kernels::aim_plan", mutates_args=())
def aim_plan_op(
    teacher_segments: Tensor, student_segments: Tensor, teacher_documents: Tensor | None,
    student_documents: Tensor | None, teacher_width: int, student_width: int, variant: str, causal: bool,
    sliding_window: int | None, reduction: str,
) -> Plan:  # fmt: skip
    return make_plan(
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
    plan: list[Tensor], teacher_width: int, student_width: int, metric: str, scale: float, softcap: float | None,
    query_needed: bool, key_needed: bool, value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, dQ for a unit of it, softmax of the teacher's rows, of the student's, D); empty where not needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim")
    config = _config_of(query, value, metric, plan, softcap)
    options = Options(scale, softcap, metric)
    teacher, student = (teacher_query, teacher_key, teacher_value), (query, key, value)
    row_limit = plan.rows.shape[-1]
    loss = query.new_empty(*query.shape[:2], row_limit, dtype=torch.float32)
    correction = torch.empty_like(loss)
    gradient = mean_key = None
    if query_needed:
        # Tokens that end no segment have no query row.
        gradient = torch.zeros(query.shape, dtype=gradient_dtype(query), device=query.device)
        mean_key = loss.new_empty(*loss.shape, query.shape[-1])
    with launch.on_device(query):
        softmaxes = [
            softmax_rows(*x[:2], plan, config, scale, softcap, side=side, mean_key=keys)
            for side, (x, keys) in enumerate(((teacher, None), (student, mean_key)))
        ]
        factors = aim_factors(teacher_value, value, plan, config, rest=True)
        aim_long_rows(teacher, student, softmaxes, mean_key, plan, config, options, loss, correction, gradient)
        aim_rows(teacher, student, factors, softmaxes, mean_key, plan, config, options, loss, correction, gradient)
    total = (loss * plan.row_weights[:, None]).sum(dtype=torch.float64)
    total = (total * (plan.pair_weight.double() * factor(metric, query, value))).float()
    outputs = [gradient, *softmaxes, correction]
    kept = query_needed, *[key_needed or value_needed] * 3
    empty = (query.new_empty(0, dtype=torch.float32) for _ in outputs)
    return total, *(x if needed else nothing for x, needed, nothing in zip(outputs, kept, empty, strict=True))


@aim_forward.register_fake
def _(
    teacher_query, teacher_key, teacher_value, query, key, value, plan, teacher_width, student_width, metric, scale,
    softcap, query_needed, key_needed, value_needed,
):  # fmt: skip
    new = query.new_empty
    rows = (*query.shape[:2], plan[0].shape[-1]) if key_needed or value_needed else (0,)
    softmax = (launch.softmax_numbers(query), *rows) if key_needed or value_needed else (0,)
    gradient = new(query.shape, dtype=gradient_dtype(query)) if query_needed else new(0, dtype=torch.float32)
    return (
        new((), dtype=torch.float32),
        gradient,
        *(new(softmax, dtype=torch.float32) for _ in range(2)),
        new(rows, dtype=torch.float32),
    )


@custom_op("matt_kernels::aim_query_backward", mutates_args=())
def aim_query_backward(gradient: Tensor, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
    """dQ. An op of its own since torch would differentiate a product as if what forward kept were a constant."""
    return (gradient * multiplier).to(dtype)


@aim_query_backward.register_fake
def _(gradient, multiplier, dtype):
    return torch.empty_like(gradient, dtype=dtype)


@custom_op("matt_kernels::aim_backward", mutates_args=())
def aim_backward(
    teacher_query: Tensor, teacher_key: Tensor, teacher_value: Tensor, query: Tensor, key: Tensor, value: Tensor,
    plan: list[Tensor], teacher_width: int, student_width: int, metric: str, scale: float, softcap: float | None,
    teacher_softmax: Tensor, student_softmax: Tensor, correction: Tensor, multiplier: Tensor, key_needed: bool,
    value_needed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dK, dV); empty where not needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim")
    config = _config_of(query, value, metric, plan, softcap)
    options = Options(scale, softcap, metric)
    teacher, student = (teacher_query, teacher_key, teacher_value), (query, key, value)
    # Padding and documents without a segment are in no tile.
    gradients = [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needed else None
        for x, needed in ((key, key_needed), (value, value_needed))
    ]
    with launch.on_device(query):
        factors = aim_factors(teacher_value, value, plan, config, rest=metric == "cosine")
        softmaxes = teacher_softmax, student_softmax
        aim_columns(teacher, student, factors, softmaxes, correction, plan, config, options, multiplier, *gradients)
        aim_long_columns(teacher, student, softmaxes, correction, plan, config, options, multiplier, *gradients)
    return tuple(query.new_empty(0) if x is None else x for x in gradients)


@aim_backward.register_fake
def _(
    teacher_query, teacher_key, teacher_value, query, key, value, plan, teacher_width, student_width, metric, scale,
    softcap, teacher_softmax, student_softmax, correction, multiplier, key_needed, value_needed,
):  # fmt: skip
    sides = (key, key_needed), (value, value_needed)
    return tuple(x.new_empty(x.shape) if needed else query.new_empty(0) for x, needed in sides)


def _save_aim(ctx, inputs, output):
    *tensors, plan, teacher_width, student_width, metric, scale, softcap, _, key_needed, value_needed = inputs
    _, gradient, *rest = output
    needed = key_needed or value_needed
    # Only what backward reads: all of the inputs when keys or values need a gradient, nothing but dQ when they do not.
    ctx.save_for_backward(gradient, plan[5], *((*tensors, *plan, *rest) if needed else ()))
    ctx.options = teacher_width, student_width, metric, scale, softcap
    ctx.needed = key_needed, value_needed
    query, _, value = tensors[3:]
    ctx.factor = factor(metric, query, value) * (2 if metric == "mse" else 1)
    ctx.query_dtype = query.dtype


def _differentiate_aim(ctx, output_gradient, *_):
    gradient, pair_weight, *saved = ctx.saved_tensors
    multiplier = output_gradient.float() * pair_weight * ctx.factor
    query_gradient = aim_query_backward(gradient, multiplier, ctx.query_dtype) if len(gradient.shape) > 1 else None
    others = [None, None]
    if any(ctx.needed):
        tensors, plan, rest = saved[:6], saved[6:14], saved[14:]
        found = aim_backward(*tensors, plan, *ctx.options, *rest, multiplier, *ctx.needed)
        others = [x if needed else None for x, needed in zip(found, ctx.needed, strict=True)]
    return None, None, None, query_gradient, *others, [None] * 8, *[None] * 8


register_autograd(aim_forward, _differentiate_aim, setup_context=_save_aim)


@custom_op("matt_kernels::attend_forward", mutates_args=())
def attend_forward(
    teacher_query: Tensor, teacher_key: Tensor, teacher_value: Tensor, query: Tensor, key: Tensor, value: Tensor,
    plan: list[Tensor], teacher_width: int, student_width: int, metric: str, scale: float, softcap: float | None,
    gradient_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, its derivative by the student's o, softmax, D); all but the loss empty where no gradient is needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim_star")
    config = _config_of(query, value, metric, plan, softcap)
    options = Options(scale, softcap, metric)
    with launch.on_device(query):
        teacher, student = (teacher_query, teacher_key, teacher_value), (query, key, value)
        loss, *kept = attend(teacher, student, plan, config, options, gradient=gradient_needed)
    total = loss.sum(dtype=torch.float64) * (plan.pair_weight.double() * factor(metric, query, value))
    empty = (query.new_empty(0, dtype=torch.float32) for _ in kept)
    return total.float(), *(x if gradient_needed else nothing for x, nothing in zip(kept, empty, strict=True))


@attend_forward.register_fake
def _(
    teacher_query, teacher_key, teacher_value, query, key, value, plan, teacher_width, student_width, metric, scale,
    softcap, gradient_needed,
):  # fmt: skip
    new, rows = query.new_empty, (*query.shape[:2], plan[0].shape[-1])
    shapes = [(*rows, value.shape[-1]), (launch.attend_numbers(query), *rows), rows]
    dtypes = gradient_dtype(query), torch.float32, torch.float32
    kept = [new(x, dtype=y) for x, y in zip(shapes, dtypes, strict=True)]
    kept = kept if gradient_needed else [new(0, dtype=torch.float32) for _ in range(3)]
    return new((), dtype=torch.float32), *kept


@custom_op("matt_kernels::attend_backward", mutates_args=())
def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, plan: list[Tensor], teacher_width: int, student_width: int,
    scale: float, softcap: float | None, change: Tensor, softmax: Tensor, correction: Tensor, multiplier: Tensor,
    query_needed: bool, key_needed: bool, value_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV) of the student; empty where not needed."""
    plan = AimPlan(*plan, (teacher_width, student_width), "aim_star")
    config = _config_of(query, value, "mse", plan, softcap)
    options = Options(scale, softcap)
    needed = query_needed, key_needed, value_needed
    # Tokens that end no segment have no query row; padding is in no tile.
    gradients = [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if wanted else None
        for x, wanted in zip((query, key, value), needed, strict=True)
    ]
    inputs = query, key, value, (change, softmax, correction), plan, config, options, multiplier
    with launch.on_device(query):
        sinks = None
        if query_needed or (key_needed and config.kind == "fp32"):
            sinks = attend_rows(*inputs, gradients[0])
        if key_needed or value_needed:
            attend_columns(*inputs, sinks, *gradients[1:])
    return tuple(query.new_empty(0) if x is None else x for x in gradients)


@attend_backward.register_fake
def _(
    query, key, value, plan, teacher_width, student_width, scale, softcap, change, softmax, correction, multiplier,
    query_needed, key_needed, value_needed,
):  # fmt: skip
    sides = (query, query_needed), (key, key_needed), (value, value_needed)
    return tuple(x.new_empty(x.shape) if needed else query.new_empty(0) for x, needed in sides)


def _save_attend(ctx, inputs, output):
    *_, query, key, value, plan, teacher_width, student_width, metric, scale, softcap, _ = inputs
    ctx.save_for_backward(query, key, value, *plan, *output[1:])
    ctx.options = teacher_width, student_width, scale, softcap
    ctx.factor = factor(metric, query, value) * (2 if metric == "mse" else 1)


def _differentiate_attend(ctx, output_gradient, *_):
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad[3:6]
    plan = saved[3:11]
    multiplier = output_gradient.float() * plan[5] * ctx.factor
    found = attend_backward(*saved[:3], plan, *ctx.options, *saved[11:], multiplier, *needed)
    found = [x if wanted else None for x, wanted in zip(found, needed, strict=True)]
    return None, None, None, *found, [None] * 8, *[None] * 6


register_autograd(attend_forward, _differentiate_attend, setup_context=_save_attend)


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
