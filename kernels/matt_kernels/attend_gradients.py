"""Variant aim_star: dQ (owned by blocks of rows), dK and dV (owned by tiles); see attend.py."""

import torch
import triton
import triton.language as tl

from matt_kernels.attend import attend_constants, logits
from matt_kernels.attention import (
    COUNTS,
    ROWS,
    TILES,
    edge,
    in_parts,
    load_row,
    load_softmax,
    load_tile,
    load_vectors,
    load_whole_blocks,
    operand,
    seen_by_some,
    store_vectors,
    whole_blocks,
    widen,
)
from matt_kernels.launch import LENGTHS, row_grid, row_program, score_factors, strides, tile_grid, tile_program


@triton.jit
def score_differences(
    left, right, left_change, right_change, tokens, low, high, shift, inverse_sum, correction, scale, softcap,
    SOFTCAP: tl.constexpr, EDGE: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(softmax weights, p - D, derivative of soft-capping), rows times tokens or the other way round; left and right as
    in_parts has them."""
    found, factor, slope = logits(left, right, tokens, low, high, scale, softcap, SOFTCAP, EDGE, SCORE_PRECISION)
    weights = tl.exp2(tl.fma(found, factor, -shift))
    if KIND == "fp32":
        weights *= inverse_sum
    products = tl.dot(left_change, tl.trans(right_change), input_precision=PRECISION)
    return weights, products - correction, slope


@triton.jit
def times_weights(differences, weights, slope, EDGE: tl.constexpr):
    """Gradient of the scores."""
    gradient = weights * differences * slope
    # values of padding between documents may be anything
    return tl.where(weights == 0, 0.0, gradient) if EDGE else gradient


@triton.jit
def load_sinks(softmax_ptr, offsets, used, size):
    """The token of each row's largest weight, -1 where there is none."""
    return tl.load(softmax_ptr + 2 * size + offsets, mask=used, other=-1.0).to(tl.int32)


@triton.jit
def attend_rows_block(
    queries, change, key_ptr, value_ptr, tokens, low, high, shift, inverse_sum, correction, gradient, sink, sink_weight,
    sink_difference, other_weights, other_differences, key_stride_n, value_stride_n, scale, softcap,
    EDGE: tl.constexpr, GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    inside = seen_by_some(tokens, low, high) if EDGE else tl.full(tokens.shape, True, tl.int1)
    key = load_vectors(key_ptr, tokens, inside, key_stride_n, HEAD_DIM, BLOCK_D)
    keys = in_parts(key, key_ptr, tokens, inside, key_stride_n, HEAD_DIM, SCORE_PRECISION)
    values = widen(load_vectors(value_ptr, tokens, inside, value_stride_n, VALUE_DIM, BLOCK_DV))
    weights, differences, slope = score_differences(
        queries, keys, change, values, tokens[None, :], low[:, None], high[:, None], shift[:, None], inverse_sum,
        correction[:, None], scale, softcap, SOFTCAP, EDGE, KIND, SCORE_PRECISION, PRECISION,
    )  # fmt: skip
    changes = times_weights(differences, weights, slope, EDGE)
    if KIND == "fp32":
        is_sink = tokens[None, :] == sink[:, None]
        sink_weight += tl.sum(tl.where(is_sink, weights * slope, 0.0), 1)
        sink_difference += tl.sum(tl.where(is_sink, differences, 0.0), 1)
        others = tl.where(is_sink, 0.0, weights)
        other_weights += tl.sum(others, 1)
        other_differences += tl.sum(times_weights(differences, others, 1.0, True), 1)
        changes = tl.where(is_sink, 0.0, changes)
    if GRADIENT:
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
        gradient = tl.dot(operand(changes, KIND), widen(key), gradient, input_precision=PRECISION)
    return gradient, sink_weight, sink_difference, other_weights, other_differences


@triton.jit(do_not_specialize=LENGTHS)
def attend_rows_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, counts_ptr, multiplier_ptr, change_ptr, softmax_ptr, correction_ptr,
    sink_ptr, gradient_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, heads, group, softmax_size, row_limit, student_length,
    scale, softcap, gradient_scale,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ; for float32 also p - D at each row's sink."""
    batch_head, block = row_program(row_limit, BLOCK_M)
    batch, head = batch_head // heads, batch_head % heads
    numbers = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    position, low, high = load_row(rows_ptr + batch * ROWS * row_limit, numbers, used, row_limit, 1)
    query_ptr += batch * query_stride_b + head * query_stride_h
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    queries = in_parts(query, query_ptr, position, used, query_stride_n, HEAD_DIM, SCORE_PRECISION)
    offsets = batch_head * row_limit + numbers
    shift, inverse_sum = load_softmax(softmax_ptr, offsets, used, softmax_size, KIND)
    correction = tl.load(correction_ptr + offsets, mask=used, other=0.0)
    change = load_vectors(change_ptr, offsets, used, VALUE_DIM, VALUE_DIM, BLOCK_DV)
    key_ptr += batch * key_stride_b + (head // group) * key_stride_h
    value_ptr += batch * value_stride_b + (head // group) * value_stride_h
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sink = numbers
    sink_weight = tl.zeros([BLOCK_M], tl.float32)
    sink_difference, other_weights, other_differences = sink_weight, sink_weight, sink_weight
    if KIND == "fp32":
        inverse_sum = inverse_sum[:, None]
        sink = load_sinks(softmax_ptr, offsets, used, softmax_size)
    first, blocks, inner, outer = whole_blocks(low, high, used, BLOCK_N)
    tokens = first + tl.arange(0, BLOCK_N)
    for step in range(inner, outer):
        gradient, sink_weight, sink_difference, other_weights, other_differences = attend_rows_block(
            queries, change, key_ptr, value_ptr, tokens + step * BLOCK_N, low, high, shift, inverse_sum, correction,
            gradient, sink, sink_weight, sink_difference, other_weights, other_differences, key_stride_n,
            value_stride_n, scale, softcap, False, GRADIENT, SOFTCAP, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND,
            SCORE_PRECISION, PRECISION,
        )  # fmt: skip
    for step in range(0, blocks - (outer - inner)):
        gradient, sink_weight, sink_difference, other_weights, other_differences = attend_rows_block(
            queries, change, key_ptr, value_ptr, tokens + edge(step, inner, outer) * BLOCK_N, low, high, shift,
            inverse_sum, correction, gradient, sink, sink_weight, sink_difference, other_weights, other_differences,
            key_stride_n, value_stride_n, scale, softcap, True, GRADIENT, SOFTCAP, HEAD_DIM, BLOCK_D, VALUE_DIM,
            BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
    if KIND == "fp32":
        sink_difference = other_weights * sink_difference - other_differences
        tl.store(sink_ptr + offsets, sink_difference, mask=used)
    if GRADIENT:
        if KIND == "fp32":
            there = sink >= 0
            key = load_vectors(key_ptr, tl.where(there, sink, 0), there, key_stride_n, HEAD_DIM, BLOCK_D)
            gradient += (sink_weight * sink_difference)[:, None] * key
        gradient *= tl.load(multiplier_ptr) * gradient_scale
        gradient_ptr += batch_head * student_length * HEAD_DIM
        store_vectors(gradient_ptr, position, gradient, used, HEAD_DIM, BLOCK_D)


@triton.jit
def attend_columns_block(
    keys, values, query_ptr, rows_ptr, softmax_ptr, change_ptr, correction_ptr, sink_ptr, tokens, numbers, row_stop,
    outputs,
    key_gradient, value_gradient, query_stride_n, softmax_size, row_limit, scale, softcap,
    EDGE: tl.constexpr, KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    used = numbers < row_stop
    position, low, high = load_row(rows_ptr, numbers, used, row_limit, 1)
    shift, inverse_sum = load_softmax(softmax_ptr, outputs, used, softmax_size, KIND)
    if KIND == "fp32":
        inverse_sum = inverse_sum[None, :]
    correction = tl.load(correction_ptr + outputs, mask=used, other=0.0)
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    queries = in_parts(query, query_ptr, position, used, query_stride_n, HEAD_DIM, SCORE_PRECISION)
    change = load_vectors(change_ptr, outputs, used, VALUE_DIM, VALUE_DIM, BLOCK_DV)
    # tokens times rows: no transposition before the next products
    weights, differences, slope = score_differences(
        keys, queries, values, change, tokens[:, None], low[None, :], high[None, :], shift[None, :], inverse_sum,
        correction[None, :], scale, softcap, SOFTCAP, EDGE, KIND, SCORE_PRECISION, PRECISION,
    )  # fmt: skip
    if VALUE_GRADIENT:
        # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_DV] -> [BLOCK_S, BLOCK_DV]
        value_gradient = tl.dot(operand(weights, KIND), change, value_gradient, input_precision=PRECISION)
    if KEY_GRADIENT:
        if KIND == "fp32":
            sink = load_sinks(softmax_ptr, outputs, used, softmax_size)
            sink_difference = tl.load(sink_ptr + outputs, mask=used, other=0.0)
            differences = tl.where(tokens[:, None] == sink[None, :], sink_difference[None, :], differences)
        changes = times_weights(differences, weights, slope, EDGE)
        # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_S, BLOCK_D]
        key_gradient = tl.dot(operand(changes, KIND), widen(query), key_gradient, input_precision=PRECISION)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=LENGTHS)
def attend_columns_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, tiles_ptr, counts_ptr, multiplier_ptr, change_ptr, softmax_ptr,
    correction_ptr, sink_ptr, key_gradient_ptr, value_gradient_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, heads, group, softmax_size, row_limit, tile_limit,
    student_length, scale, softcap, gradient_scale,
    KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of the student's tokens of one tile."""
    tile, kv_index = tile_program(tile_limit)
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
        keys = in_parts(key, key_ptr, tokens, inside, key_stride_n, HEAD_DIM, SCORE_PRECISION)
        values = widen(load_vectors(value_ptr, tokens, inside, value_stride_n, VALUE_DIM, BLOCK_DV))
        query_ptr += batch * query_stride_b + kv_head * group * query_stride_h
        rows_ptr += batch * ROWS * row_limit
        first_output = (batch * heads + kv_head * group) * row_limit
        key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        value_gradient = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
        blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
        inner, outer = load_whole_blocks(tiles_ptr, tile, tile_limit, row_start, row_stop, BLOCK_M)
        inside_count, edge_count = outer - inner, blocks - (outer - inner)
        for step in range(0, inside_count * group):
            head, block = (step // inside_count).to(tl.int64), inner + step % inside_count
            numbers = row_start + block * BLOCK_M + tl.arange(0, BLOCK_M)
            key_gradient, value_gradient = attend_columns_block(
                keys, values, query_ptr + head * query_stride_h, rows_ptr, softmax_ptr, change_ptr, correction_ptr,
                sink_ptr, tokens, numbers, row_stop, first_output + head * row_limit + numbers, key_gradient,
                value_gradient,
                query_stride_n, softmax_size, row_limit, scale, softcap, False, KEY_GRADIENT, VALUE_GRADIENT, SOFTCAP,
                HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
        for step in range(0, edge_count * group):
            head, block = (step // edge_count).to(tl.int64), edge(step % edge_count, inner, outer)
            numbers = row_start + block * BLOCK_M + tl.arange(0, BLOCK_M)
            key_gradient, value_gradient = attend_columns_block(
                keys, values, query_ptr + head * query_stride_h, rows_ptr, softmax_ptr, change_ptr, correction_ptr,
                sink_ptr, tokens, numbers, row_stop, first_output + head * row_limit + numbers, key_gradient,
                value_gradient,
                query_stride_n, softmax_size, row_limit, scale, softcap, True, KEY_GRADIENT, VALUE_GRADIENT, SOFTCAP,
                HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
        multiplier = tl.load(multiplier_ptr)
        if KEY_GRADIENT:
            key_gradient_ptr += kv_index * student_length * HEAD_DIM
            key_gradient *= multiplier * gradient_scale
            store_vectors(key_gradient_ptr, tokens, key_gradient, inside, HEAD_DIM, BLOCK_D)
        if VALUE_GRADIENT:
            value_gradient_ptr += kv_index * student_length * VALUE_DIM
            store_vectors(value_gradient_ptr, tokens, value_gradient * multiplier, inside, VALUE_DIM, BLOCK_DV)


def attend_rows(query, key, value, kept, plan, config, options, multiplier, query_gradient) -> torch.Tensor | None:
    """Writes dQ at the queries of rows, or nothing without it; returns p - D at the rows' sinks, [B, H, m], for
    float32."""
    batch, heads, length, _ = query.shape
    row_limit = plan.rows.shape[-1]
    sinks = torch.empty_like(kept[2]) if config.kind == "fp32" else None
    attend_rows_kernel[row_grid(plan, query, config.attend_rows.block_m)](
        query, key, value, plan.rows, plan.counts, multiplier, *kept, sinks, query_gradient,
        *strides(query, key, value), heads, heads // key.shape[1], batch * heads * row_limit, row_limit, length,
        *score_factors(options.scale, options.softcap), options.scale, GRADIENT=query_gradient is not None,
        BLOCK_N=config.attend_rows.block_n, **attend_constants(query, value, config, options, config.attend_rows),
    )  # fmt: skip
    return sinks


def attend_columns(
    query, key, value, kept, plan, config, options, multiplier, sinks, key_gradient, value_gradient
) -> None:
    """Writes dK and dV of all tokens in tiles; None for those not needed. `sinks` as attend_rows returns them."""
    batch, heads, length, _ = query.shape
    row_limit = plan.rows.shape[-1]
    attend_columns_kernel[tile_grid(plan, key)](
        query, key, value, plan.rows, plan.tiles, plan.counts, multiplier, *kept, sinks, key_gradient, value_gradient,
        *strides(query, key, value), heads, heads // key.shape[1], batch * heads * row_limit, row_limit,
        plan.tiles.shape[-1], length, *score_factors(options.scale, options.softcap), options.scale,
        KEY_GRADIENT=key_gradient is not None, VALUE_GRADIENT=value_gradient is not None, BLOCK_S=plan.widths[1],
        **attend_constants(query, value, config, options, config.attend_columns),
    )  # fmt: skip
