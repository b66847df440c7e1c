"""Segments of more than 2 x 2 tokens: their tokens moved together, and the kernels that ship on these."""

import torch
from matt_kernels.aim_columns import aim_columns
from matt_kernels.aim_rows import aim_rows
from matt_kernels.factors import aim_factors
from matt_kernels.long import aim_long_columns, aim_long_rows


def moved(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens of [B, H, n, d] at `places`, [B, most], in front of [B, H, n, d]; what is behind them is not written."""
    batch, heads, length, size = x.shape
    found = x.new_empty(x.shape)
    index = places.clamp(max=length - 1)[:, None, :, None].expand(batch, heads, -1, size)
    found[:, :, : places.shape[1]] = x.gather(2, index)
    return found


def rows_of_others(teacher, student, softmaxes, mean_key, plan, config, options, outputs):
    """Writes what they add to loss, correction and dQ; what columns_of_others needs."""
    sides = [
        (side[0], *(moved(x, places) for x in side[1:]))
        for side, places in zip((teacher, student), plan.moved, strict=True)
    ]
    factors = aim_factors(sides[0][2], sides[1][2], plan.others, config, options.metric)
    if plan.others.long_segments:
        aim_long_rows(*sides, softmaxes, mean_key, plan.others, config, options, *outputs)
    aim_rows(*sides, factors, softmaxes, mean_key, plan.others, config, options, *outputs)
    return *sides, factors[:4]


def columns_of_others(sides, softmaxes, correction, plan, config, options, multiplier, gradients) -> None:
    """Writes dK and dV of their tokens into [B, H_kv, n_S, d]."""
    teacher, student, factors = sides
    found = [torch.zeros_like(x) for x in student[1:]]
    common = softmaxes, correction, plan.others, config, options, multiplier, *found
    aim_columns(teacher, student, factors, *common)
    if plan.others.long_segments:
        aim_long_columns(teacher, student, *common)
    for own, gradient in zip(found, gradients, strict=True):
        for places, count, x, y in zip(plan.moved[1], plan.moved_counts, own, gradient, strict=True):
            y[:, places[:count]] = x[:, :count].to(y.dtype)
