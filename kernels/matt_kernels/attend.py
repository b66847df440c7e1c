"""Attention outputs o[i] of the rows alone, for variant aim_star: flash attention with a row per segment."""

import torch
import triton
import triton.language as tl

from matt_kernels.attention import (
    COUNTS,
    ROWS,
    TILES,
    load_row,
    load_softmax,
    load_tile,
    load_vectors,
    masked_scores,
    operand,
    softmax_weights,
    store_softmax,
    store_vectors,
    widen,
)
from matt_kernels.launch import LENGTHS, row_grid, score_factors, strides, tile_grid
from matt_kernels.softmax import online_softmax


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, counts_ptr, softmax_ptr, output_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, heads, group, softmax_size, row_limit, scale, softcap,
    SIDE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    position, low, high = load_row(rows_ptr + batch * ROWS * row_limit, numbers, used, row_limit, SIDE)
    query_ptr += batch * query_stride_b + head * query_stride_h
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    key_ptr += batch * key_stride_b + (head // group) * key_stride_h
    value_ptr += batch * value_stride_b + (head // group) * value_stride_h
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    stop = tl.max(high)
    for first in range(tl.min(low), stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        key = load_vectors(key_ptr, tokens, tokens < stop, key_stride_n, HEAD_DIM, BLOCK_D)
        scores, _ = masked_scores(query, key, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION)
        weights, factor, running_max, running_sum = online_softmax(scores, running_max, running_sum)
        values = widen(load_vectors(value_ptr, tokens, tokens < stop, value_stride_n, VALUE_DIM, BLOCK_DV))
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_DV] -> [BLOCK_M, BLOCK_DV]
        output = tl.dot(operand(weights, KIND), values, output * factor[:, None], input_precision=PRECISION)
    output /= tl.where(running_sum > 0, running_sum, 1.0)[:, None]
    offsets = batch_head * row_limit + numbers
    stored = numbers < row_limit
    store_softmax(softmax_ptr, offsets, stored, softmax_size, running_max, running_sum)
    store_vectors(output_ptr, offsets, output, stored, VALUE_DIM, BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def attend_rows_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, counts_ptr, softmax_ptr, change_ptr, correction_ptr, gradient_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, heads, group, softmax_size, row_limit, student_length,
    scale, softcap, gradient_scale,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D and dQ, in one pass: Σ a h k and Σ a k are kept apart, as in aim.py."""
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    position, low, high = load_row(rows_ptr + batch * ROWS * row_limit, numbers, used, row_limit, 1)
    query_ptr += batch * query_stride_b + head * query_stride_h
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    offsets = batch_head * row_limit + numbers
    final_max, inverse_sum = load_softmax(softmax_ptr, offsets, used, softmax_size)
    change = operand(load_vectors(change_ptr, offsets, used, VALUE_DIM, VALUE_DIM, BLOCK_DV), KIND)
    key_ptr += batch * key_stride_b + (head // group) * key_stride_h
    value_ptr += batch * value_stride_b + (head // group) * value_stride_h
    correction = tl.zeros([BLOCK_M], tl.float32)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mean_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = tl.max(high)
    for first in range(tl.min(low), stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        key = load_vectors(key_ptr, tokens, tokens < stop, key_stride_n, HEAD_DIM, BLOCK_D)
        scores, slope = masked_scores(query, key, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION)
        weights = softmax_weights(scores, final_max, inverse_sum)
        values = widen(load_vectors(value_ptr, tokens, tokens < stop, value_stride_n, VALUE_DIM, BLOCK_DV))
        # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        products = weights * tl.dot(change, tl.trans(values), input_precision=PRECISION)
        correction += tl.sum(products, 1)
        if GRADIENT:
            key = widen(key)
            # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
            gradient = tl.dot(operand(products * slope, KIND), key, gradient, input_precision=PRECISION)
            mean_key = tl.dot(operand(weights * slope, KIND), key, mean_key, input_precision=PRECISION)
    tl.store(correction_ptr + offsets, correction, mask=numbers < row_limit)
    if GRADIENT:
        gradient = (gradient - correction[:, None] * mean_key) * gradient_scale
        gradient_ptr += batch_head * student_length * HEAD_DIM
        store_vectors(gradient_ptr, position, gradient, used, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def attend_columns_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, tiles_ptr, counts_ptr, softmax_ptr, change_ptr, correction_ptr,
    key_gradient_ptr, value_gradient_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, heads, group, softmax_size, row_limit, tile_limit,
    student_length, scale, softcap, gradient_scale,
    KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of the student's tokens of one tile."""
    tile, kv_index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    if tile < tl.load(counts_ptr + batch * COUNTS + 1):
        tiles_ptr += batch * TILES * tile_limit
        start, stop = load_tile(tiles_ptr, tile, tile_limit, 1)
        row_start, row_stop = tl.load(tiles_ptr + 4 * tile_limit + tile), tl.load(tiles_ptr + 5 * tile_limit + tile)
        tokens = start + tl.arange(0, BLOCK_S)
        inside = tokens < stop
        key_ptr += batch * key_stride_b + kv_head * key_stride_h
        value_ptr += batch * value_stride_b + kv_head * value_stride_h
        key = load_vectors(key_ptr, tokens, inside, key_stride_n, HEAD_DIM, BLOCK_D)
        values = widen(load_vectors(value_ptr, tokens, inside, value_stride_n, VALUE_DIM, BLOCK_DV))
        query_ptr += batch * query_stride_b + kv_head * group * query_stride_h
        rows_ptr += batch * ROWS * row_limit
        key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        value_gradient = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
        blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
        for step in range(0, blocks * group):
            head = step // blocks
            numbers = row_start + (step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            used = numbers < row_stop
            position, low, high = load_row(rows_ptr, numbers, used, row_limit, 1)
            offsets = (batch * heads + kv_head * group + head) * row_limit + numbers
            final_max, inverse_sum = load_softmax(softmax_ptr, offsets, used, softmax_size)
            query = load_vectors(query_ptr + head * query_stride_h, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
            scores, slope = masked_scores(query, key, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION)
            weights = softmax_weights(scores, final_max, inverse_sum)
            change = operand(load_vectors(change_ptr, offsets, used, VALUE_DIM, VALUE_DIM, BLOCK_DV), KIND)
            if VALUE_GRADIENT:
                # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_DV] -> [BLOCK_S, BLOCK_DV]
                transposed = tl.trans(operand(weights, KIND))
                value_gradient = tl.dot(transposed, change, value_gradient, input_precision=PRECISION)
            if KEY_GRADIENT:
                correction = tl.load(correction_ptr + offsets, mask=used, other=0.0)
                # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                products = tl.dot(change, tl.trans(values), input_precision=PRECISION)
                score_gradient = tl.trans(operand(weights * (products - correction[:, None]) * slope, KIND))
                # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_S, BLOCK_D]
                key_gradient = tl.dot(score_gradient, widen(query), key_gradient, input_precision=PRECISION)
        if KEY_GRADIENT:
            key_gradient_ptr += kv_index * student_length * HEAD_DIM
            store_vectors(key_gradient_ptr, tokens, key_gradient * gradient_scale, inside, HEAD_DIM, BLOCK_D)
        if VALUE_GRADIENT:
            value_gradient_ptr += kv_index * student_length * VALUE_DIM
            store_vectors(value_gradient_ptr, tokens, value_gradient, inside, VALUE_DIM, BLOCK_DV)


def attend(query, key, value, plan, config, options, *, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [B, H, m, d_v] float32, zeros beyond the rows in use; softmax as softmax_rows gives it) of one side."""
    batch, heads = query.shape[:2]
    row_limit = plan.rows.shape[-1]
    softmax = torch.empty(2, batch, heads, row_limit, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, heads, row_limit, value.shape[-1], dtype=torch.float32, device=query.device)
    attend_kernel[row_grid(plan, query, config.attend.block_m)](
        query, key, value, plan.rows, plan.counts, softmax, output, *strides(query, key, value),
        heads, heads // key.shape[1], batch * heads * row_limit, row_limit,
        *score_factors(options.scale, options.softcap), SIDE=side, BLOCK_N=config.attend.block_n,
        **_constants(query, value, config, options, config.attend),
    )  # fmt: skip
    return output, softmax


def attend_rows(query, key, value, softmax, change, plan, config, options, query_gradient) -> torch.Tensor:
    """D [B, H, m]; writes dQ at the queries of rows unless it is None. `change` [B, H, m, d_v] is the gradient of o."""
    batch, heads, length, _ = query.shape
    row_limit = plan.rows.shape[-1]
    correction = torch.empty(batch, heads, row_limit, dtype=torch.float32, device=query.device)
    attend_rows_kernel[row_grid(plan, query, config.attend_rows.block_m)](
        query, key, value, plan.rows, plan.counts, softmax, change, correction, query_gradient,
        *strides(query, key, value), heads, heads // key.shape[1], batch * heads * row_limit, row_limit, length,
        *score_factors(options.scale, options.softcap), options.scale,
        GRADIENT=query_gradient is not None, BLOCK_N=config.attend_rows.block_n,
        **_constants(query, value, config, options, config.attend_rows),
    )  # fmt: skip
    return correction


def attend_columns(
    query, key, value, softmax, change, correction, plan, config, options, key_gradient, value_gradient
) -> None:
    """Writes dK and dV of all tokens in tiles; None for those not needed."""
    batch, heads, length, _ = query.shape
    row_limit = plan.rows.shape[-1]
    attend_columns_kernel[tile_grid(plan, key)](
        query, key, value, plan.rows, plan.tiles, plan.counts, softmax, change, correction, key_gradient,
        value_gradient, *strides(query, key, value), heads, heads // key.shape[1], batch * heads * row_limit,
        row_limit, plan.tiles.shape[-1], length, *score_factors(options.scale, options.softcap), options.scale,
        KEY_GRADIENT=key_gradient is not None, VALUE_GRADIENT=value_gradient is not None, BLOCK_S=plan.widths[1],
        **_constants(query, value, config, options, config.attend_columns),
    )  # fmt: skip


def _constants(query, value, config, options, launch) -> dict:
    return {
        "SOFTCAP": options.softcap is not None,
        "BLOCK_M": launch.block_m,
        "HEAD_DIM": query.shape[-1],
        "BLOCK_D": config.block_d,
        "VALUE_DIM": value.shape[-1],
        "BLOCK_DV": config.block_dv,
        "KIND": config.kind,
        "SCORE_PRECISION": config.score_precision,
        "PRECISION": config.product_precision,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
