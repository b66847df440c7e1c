"""The softmax of every row, and the mean of the keys under it, which dQ needs: one pass over the keys of a side."""

import torch
import triton
import triton.language as tl

from matt_kernels.attention import (
    COUNTS,
    ROWS,
    edge,
    load_row,
    load_vectors,
    masked_scores,
    operand,
    seen_by_some,
    store_softmax,
    store_vectors,
    whole_blocks,
    widen,
)
from matt_kernels.launch import LENGTHS, row_grid, score_factors, softmax_numbers, strides


@triton.jit
def online_softmax(scores, running_max, running_sum):
    """(weights up to the row's final sum, factor for those of earlier blocks, new maximum, new sum)."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    # A row that has seen nothing yet stays at -inf: subtract 0 there.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite_max[:, None])
    factor = tl.exp2(running_max - finite_max)
    return weights, factor, new_max, running_sum * factor + tl.sum(weights, 1)


@triton.jit(do_not_specialize=LENGTHS)
def softmax_kernel(
    query_ptr, key_ptr, rows_ptr, counts_ptr, softmax_ptr, mean_key_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    heads, group, softmax_size, row_limit, scale, softcap,
    SIDE: tl.constexpr, MEAN_KEY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    position, low, high = load_row(rows_ptr + batch * ROWS * row_limit, numbers, used, row_limit, SIDE)
    query_ptr += batch * query_stride_b + head * query_stride_h
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    key_ptr += batch * key_stride_b + (head // group) * key_stride_h
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    if MEAN_KEY:
        mean_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        rounded_sum = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.max(high)
    first, blocks, inner, outer = whole_blocks(low, high, used, BLOCK_N)
    whole = outer - inner
    # First the blocks of which some row sees a part only, then the others, without masks.
    for WHOLE in tl.static_range(2):
        for step in range(whole if WHOLE else blocks - whole):
            block = inner + step if WHOLE else edge(step, inner, outer)
            tokens = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = tokens < stop if WHOLE else seen_by_some(tokens, low, high)
            key = load_vectors(key_ptr, tokens, inside, key_stride_n, HEAD_DIM, BLOCK_D)
            scores, slope = masked_scores(
                query, key, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION, not WHOLE
            )
            weights, factor, running_max, running_sum = online_softmax(scores, running_max, running_sum)
            if MEAN_KEY:
                # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                weights = operand(weights * slope, KIND)
                mean_key = tl.dot(weights, widen(key), mean_key * factor[:, None], input_precision=PRECISION)
                rounded_sum = rounded_sum * factor + tl.sum(weights.to(tl.float32), 1)
    outputs = batch_head * row_limit + numbers
    store_softmax(softmax_ptr, outputs, numbers < row_limit, softmax_size, running_max, running_sum, KIND)
    if MEAN_KEY:
        # What all keys have in common must cancel in dQ: the weights that were added up have to sum to 1.
        total = running_sum if SOFTCAP else rounded_sum
        mean_key /= tl.where(total == 0, 1.0, total)[:, None]
        store_vectors(mean_key_ptr, outputs, mean_key, used, HEAD_DIM, BLOCK_D)


def softmax_rows(query, key, plan, config, scale, softcap, *, side: int, mean_key=None) -> torch.Tensor:
    """[1 or 2, B, H, m] float32 as store_softmax has it; side 0 teacher, 1 student. Writes `mean_key`, [B, H, m, d], if
    there is one: Σ a k of every row in use, times the derivative of soft-capping."""
    batch, heads, _, head_dim = query.shape
    row_limit = plan.rows.shape[-1]
    softmax = query.new_empty(softmax_numbers(query), batch, heads, row_limit, dtype=torch.float32)
    softmax_kernel[row_grid(plan, query, config.softmax.block_m)](
        query, key, plan.rows, plan.counts, softmax, mean_key, *strides(query, key),
        heads, heads // key.shape[1], batch * heads * row_limit, row_limit, *score_factors(scale, softcap),
        SIDE=side, MEAN_KEY=mean_key is not None, SOFTCAP=softcap is not None,
        BLOCK_M=config.softmax.block_m, BLOCK_N=config.softmax.block_n,
        HEAD_DIM=head_dim, BLOCK_D=config.block_d, KIND=config.kind, SCORE_PRECISION=config.score_precision,
        PRECISION=config.product_precision,
        num_warps=config.softmax.warps, num_stages=config.softmax.stages,
    )  # fmt: skip
    return softmax
