"""Segments that span more than 2 x 2 tokens: their tokens moved together, and the kernels that ship on these."""

import torch
import triton
import triton.language as tl
from matt_kernels.aim_columns import aim_columns
from matt_kernels.aim_rows import aim_rows
from matt_kernels.attention import load_vectors
from matt_kernels.factors import aim_factors
from matt_kernels.launch import strides
from matt_kernels.long import aim_long_columns, aim_long_rows

BLOCK = 32


@triton.jit(do_not_specialize=["heads", "most"])
def move_kernel(
    from_ptr, to_ptr, places_ptr, counts_ptr, from_stride_b, from_stride_h, from_stride_n, to_stride_b, to_stride_h,
    to_stride_n, heads, most, SIDE: tl.constexpr, BACK: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = numbers < tl.load(counts_ptr + batch * 2 + SIDE)
    places = tl.load(places_ptr + batch * most + numbers, mask=wanted, other=0)
    sources, targets = (numbers, places) if BACK else (places, numbers)
    from_ptr += batch * from_stride_b + head * from_stride_h
    vectors = load_vectors(from_ptr, sources, wanted, from_stride_n, SIZE, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)[None, :]
    to_ptr += batch * to_stride_b + head * to_stride_h + targets.to(tl.int64)[:, None] * to_stride_n
    tl.store(to_ptr + columns, vectors.to(to_ptr.dtype.element_ty), mask=wanted[:, None] & (columns < SIZE))


def move(x: torch.Tensor, to: torch.Tensor, plan, side: int, *, back: bool = False) -> torch.Tensor:
    """Tokens of [B, H, n, d] that the plan moves, on one side, together into `to`, of the same shape, whose other
    tokens are not written; `back`: from there to where they were."""
    batch, heads, _, size = x.shape
    places = plan.moved[side]
    most = places.shape[1]
    move_kernel[triton.cdiv(most, BLOCK), batch * heads](
        x, to, places, plan.moved_counts, *strides(x, to), heads, most,
        SIDE=side, BACK=back, SIZE=size, BLOCK_D=triton.next_power_of_2(size), BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return to


def rows_of_others(teacher, student, softmaxes, mean_key, plan, config, options, outputs):
    """Writes what they add to loss, correction and dQ; what columns_of_others needs."""
    sides = [
        (side[0], *(move(x, x.new_empty(x.shape), plan, number) for x in side[1:]))
        for number, side in enumerate((teacher, student))
    ]
    factors = aim_factors(sides[0][2], sides[1][2], plan.others, config, options.metric)
    if plan.others.long_segments:
        aim_long_rows(*sides, softmaxes, mean_key, plan.others, config, options, *outputs)
    aim_rows(*sides, factors, softmaxes, mean_key, plan.others, config, options, *outputs)
    return *sides, factors[:4]


def columns_of_others(sides, softmaxes, correction, plan, config, options, multiplier, gradients) -> None:
    """Writes dK and dV of their tokens into [B, H_kv, n_S, d]."""
    teacher, student, factors = sides
    found = [torch.empty_like(x) for x in student[1:]]
    common = softmaxes, correction, plan.others, config, options, multiplier, *found
    aim_columns(teacher, student, factors, *common)
    if plan.others.long_segments:
        aim_long_columns(teacher, student, *common)
    for own, gradient in zip(found, gradients, strict=True):
        move(own, gradient, plan, 1, back=True)
