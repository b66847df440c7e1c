"""The grouped loss: softmax and total of matt_kernels, rows and columns of this folder."""

from dataclasses import dataclass

import torch
from gpu_bench.grouped.columns import grouped_columns
from gpu_bench.grouped.factors import make_columns
from gpu_bench.grouped.others import columns_of_others, rows_of_others
from gpu_bench.grouped.rows import grouped_rows
from matt_kernels.launch import softmax_numbers
from matt_kernels.ops import Options, config_for, gradient_dtype
from matt_kernels.softmax import softmax_rows
from matt_kernels.total import add_up


@dataclass(frozen=True)
class Launch:
    block_m: int
    block_n: tuple[int, int]  # rows: columns of group 1-1, of the others; columns: rows of 1-1 and 2-1, of the others
    warps: int
    stages: int


@dataclass(frozen=True)
class Launches:
    rows: Launch = Launch(64, (64, 32), 4, 3)
    columns: Launch = Launch(64, (64, 32), 4, 3)
    share: int = 2  # programs that the query heads of a key head are divided among


def launches_for(head_dim: int) -> Launches:
    """At 128 two stages: of three, a multiprocessor of Hopper has shared memory for one program only."""
    if head_dim <= 64:
        return Launches()
    return Launches(Launch(64, (64, 32), 4, 2), Launch(64, (64, 32), 4, 2))


def value_and_gradients(
    teacher, student, plan, launches: Launches | None = None, softcap: float | None = None, metric: str = "mse"
):
    """(loss, dQ, dK, dV) of aim_loss, variant "aim", from (q, k, v) of both sides and a grouped_plan."""
    query, key, value = student
    launches = launches or launches_for(query.shape[-1])
    scale = query.shape[-1] ** -0.5
    config = config_for(query, value, "aim", metric, softcap=softcap is not None)
    rows = *query.shape[:2], plan.plan.rows.shape[-1]
    loss = query.new_empty(rows, dtype=torch.float32)
    correction = torch.empty_like(loss)
    softmaxes = loss.new_empty(2, softmax_numbers(query), *rows).unbind()
    gradient = torch.zeros(query.shape, dtype=gradient_dtype(query), device=query.device)
    mean_key = loss.new_empty(*rows, query.shape[-1])
    options = Options(scale, softcap, metric)
    softmax_rows(teacher, student, softmaxes, plan.plan, config, options, mean_key)
    columns = make_columns(teacher, student, plan, config)
    outputs = loss, correction, gradient
    if plan.others is not None:
        lopsided = plan.others.widths[0] > plan.others.widths[1]
        of_others = config_for(query, value, "aim", metric, lopsided=lopsided, softcap=softcap is not None)
        others = rows_of_others(teacher, student, softmaxes, mean_key, plan, of_others, options, outputs)
    grouped_rows(teacher, student, columns, softmaxes, mean_key, plan, config, launches.rows, options, outputs)
    divisor = query.shape[1] * (value.shape[-1] if metric == "mse" else 1)
    total, unit = add_up(loss, plan.plan, divisor, metric, weighted=plan.weighted)
    share = launches.share
    dtype = key.dtype if share == 1 else torch.float32
    gradients = [torch.zeros(share, *x.shape, dtype=dtype, device=x.device) for x in (key, value)]
    common = softmaxes, correction, plan, config, launches.columns, options, unit, gradients
    grouped_columns(teacher, student, columns, *common)
    if plan.others is not None:
        into = [x[0] for x in gradients]
        columns_of_others(others, softmaxes, correction, plan, of_others, options, unit, into)
    dk, dv = (x[0] if share == 1 else x.sum(0).to(key.dtype) for x in gradients)
    return total, (gradient * unit).to(query.dtype), dk, dv
