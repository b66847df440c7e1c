"""Variant aim: dK and dV of a tile; the formulas are those of aim_rows.py."""

import triton
import triton.language as tl

from matt_kernels.attention import (
    COUNTS,
    ROWS,
    TILES,
    edge,
    in_parts,
    load_block_row,
    load_block_softmax,
    load_block_vectors,
    load_full_blocks,
    load_ids,
    load_numbers,
    load_tile,
    load_vectors,
    masked_scores,
    operand,
    rounded,
    same_segment,
    softmax_weights,
    store_vectors,
    widen,
)
from matt_kernels.cosine import cosine_terms, last_of_segment, norm_parts, segment_sums
from matt_kernels.factors import load_slice, remainder
from matt_kernels.launch import LENGTHS, score_factors, sizes, strides, tile_grid, tile_program


@triton.jit(do_not_specialize=LENGTHS)
def aim_columns_kernel(
    teacher_query_ptr, teacher_key_ptr, teacher_value_ptr, student_query_ptr, student_key_ptr, student_value_ptr,
    mixture_ptr, gram_ptr, rest_ptr, low_ptr, teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, counts_ptr,
    row_weights_ptr, multiplier_ptr, teacher_softmax_ptr, student_softmax_ptr, correction_ptr,
    key_gradient_ptr, value_gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    sk_stride_b, sk_stride_h, sk_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, long_limit, teacher_length, student_length, scale, softcap,
    gradient_scale,
    METRIC: tl.constexpr, KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, KIND: tl.constexpr, FACTORS: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, FACTOR_PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, kv_index = tile_program(tile_limit)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    tiles_ptr += batch * TILES * tile_limit
    is_long = tl.load(tiles_ptr + 6 * tile_limit + tile) >= 0
    if (tile < tl.load(counts_ptr + batch * COUNTS + 1)) & (is_long == 0):
        rows_ptr += batch * ROWS * row_limit
        row_weights_ptr += batch * row_limit
        teacher_start, teacher_stop = load_tile(tiles_ptr, tile, tile_limit, 0)
        student_start, student_stop = load_tile(tiles_ptr, tile, tile_limit, 1)
        row_start, row_stop = tl.load(tiles_ptr + 4 * tile_limit + tile), tl.load(tiles_ptr + 5 * tile_limit + tile)
        teacher_tokens, student_tokens = teacher_start + tl.arange(0, BLOCK_T), student_start + tl.arange(0, BLOCK_S)
        in_teacher, in_student = teacher_tokens < teacher_stop, student_tokens < student_stop
        teacher_ids = load_ids(teacher_ids_ptr + batch * teacher_length, teacher_tokens, teacher_stop)
        student_ids = load_ids(student_ids_ptr + batch * student_length, student_tokens, student_stop)
        teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
        student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
        teacher_key = load_vectors(teacher_key_ptr, teacher_tokens, in_teacher, tk_stride_n, HEAD_DIM, BLOCK_D)
        student_key = load_vectors(student_key_ptr, student_tokens, in_student, sk_stride_n, HEAD_DIM, BLOCK_D)
        teacher_keys = in_parts(
            teacher_key, teacher_key_ptr, teacher_tokens, in_teacher, tk_stride_n, HEAD_DIM, SCORE_PRECISION
        )
        student_keys = in_parts(
            student_key, student_key_ptr, student_tokens, in_student, sk_stride_n, HEAD_DIM, SCORE_PRECISION
        )
        mixture_ptr += kv_index * teacher_length * BLOCK_S
        gram_ptr += kv_index * student_length * BLOCK_S
        mixture = load_vectors(mixture_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
        low = mixture
        if FACTORS == "fp32":
            low_ptr += kv_index * teacher_length * BLOCK_S
            low = load_vectors(low_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
        gram = load_vectors(gram_ptr, student_tokens, in_student, BLOCK_S, BLOCK_S, BLOCK_S)
        if METRIC == "cosine":
            rest_ptr += kv_index * teacher_length * BLOCK_T
            rest_gram = load_vectors(rest_ptr, teacher_tokens, in_teacher, BLOCK_T, BLOCK_T, BLOCK_T)
            to_teacher = same_segment(student_ids, teacher_ids)
            to_teacher = to_teacher & last_of_segment(rows_ptr, row_limit, student_ids, student_tokens)[:, None]
        teacher_query_ptr += batch * tq_stride_b + kv_head * group * tq_stride_h
        student_query_ptr += batch * sq_stride_b + kv_head * group * sq_stride_h

        # Sums of positive numbers: what tensor cores cut off would add up.
        OWN: tl.constexpr = EXACT if KIND == "fp32" else PRECISION
        key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        own_sums = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
        across_sums = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
        first_row, blocks, low_block, high_block = load_full_blocks(
            tiles_ptr, tile, tile_limit, row_start, row_stop, BLOCK_M
        )
        whole = high_block - low_block
        # First the blocks in which some row sees a part of the tile only, then the others, without masks.
        for WHOLE in tl.static_range(2):
            turns = whole if WHOLE else blocks - whole
            for number in range(group):
                head = tl.cast(number, tl.int64)
                for step in tl.range(turns, num_stages=None if WHOLE else 1):
                    block = low_block + step if WHOLE else edge(step, low_block, high_block)
                    begin = first_row + block * BLOCK_M
                    used = begin + tl.arange(0, BLOCK_M) >= row_start
                    outputs = (batch * heads + kv_head * group + head) * row_limit + begin
                    teacher_row, teacher_low, teacher_high = load_block_row(rows_ptr + begin, used, row_limit, 0, WHOLE)
                    student_row, student_low, student_high = load_block_row(rows_ptr + begin, used, row_limit, 1, WHOLE)
                    shift, factor = load_block_softmax(teacher_softmax_ptr + outputs, used, softmax_size, WHOLE, KIND)
                    query_ptr = teacher_query_ptr + head * tq_stride_h
                    query = load_block_vectors(query_ptr, teacher_row, used, tq_stride_n, WHOLE, HEAD_DIM, BLOCK_D)
                    queries = in_parts(query, query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, SCORE_PRECISION)
                    scores, _ = masked_scores(
                        queries, teacher_keys, teacher_tokens, teacher_stop, teacher_low, teacher_high, scale, softcap,
                        SOFTCAP, SCORE_PRECISION, not WHOLE,
                    )  # fmt: skip
                    weights = softmax_weights(scores, shift, factor, KIND)
                    teacher = operand(weights, FACTORS)
                    # [BLOCK_M, BLOCK_T] @ [BLOCK_T, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                    mixed = tl.dot(teacher, mixture, input_precision=FACTOR_PRECISION)
                    if FACTORS == "fp32":
                        mixed = tl.dot(teacher, low, mixed, input_precision=FACTOR_PRECISION)
                    if METRIC == "cosine":
                        rest = tl.dot(teacher, rest_gram, input_precision=FACTOR_PRECISION) * weights
                        shared = same_segment(teacher_ids, student_ids)
                        outside = segment_sums(rest, shared, norm_parts(False, FACTORS))
                        teacher_weights = weights
                    shift, factor = load_block_softmax(student_softmax_ptr + outputs, used, softmax_size, WHOLE, KIND)
                    query_ptr = student_query_ptr + head * sq_stride_h
                    query = load_block_vectors(query_ptr, student_row, used, sq_stride_n, WHOLE, HEAD_DIM, BLOCK_D)
                    queries = in_parts(query, query_ptr, student_row, used, sq_stride_n, HEAD_DIM, SCORE_PRECISION)
                    scores, slope = masked_scores(
                        queries, student_keys, student_tokens, student_stop, student_low, student_high, scale, softcap,
                        SOFTCAP, SCORE_PRECISION, not WHOLE,
                    )  # fmt: skip
                    weights = softmax_weights(scores, shift, factor, KIND)
                    if METRIC == "mse":
                        f = operand(rounded(weights, FACTORS) - mixed, FACTORS)
                        # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                        h = tl.dot(f, gram, input_precision=FACTOR_PRECISION)
                    else:
                        _, f, h, factors = cosine_terms(
                            weights, mixed, outside, gram, student_ids, False, FACTORS, FACTOR_PRECISION
                        )
                        f = operand(f, KIND)
                        # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_T] -> [BLOCK_M, BLOCK_T]
                        teacher = operand(
                            teacher_weights * segment_sums(factors, to_teacher, 3 if FACTORS == "fp32" else 1), KIND
                        )
                    row_weights = load_numbers(row_weights_ptr + begin, used, 0.0, WHOLE)
                    weights *= row_weights[:, None]
                    if VALUE_GRADIENT:
                        transposed = tl.trans(operand(weights, KIND))
                        # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK] -> [BLOCK_S, BLOCK]
                        own_sums = tl.dot(transposed, f, own_sums, input_precision=OWN)
                        across_sums = tl.dot(transposed, teacher, across_sums, input_precision=PRECISION)
                    if KEY_GRADIENT:
                        correction = load_numbers(correction_ptr + outputs, used, 0.0, WHOLE)
                        change = weights * (h - correction[:, None]) * slope
                        # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_S, BLOCK_D]
                        key_gradient = tl.dot(
                            tl.trans(operand(change, KIND)), widen(query), key_gradient, input_precision=PRECISION
                        )

        multiplier = tl.load(multiplier_ptr)
        if KEY_GRADIENT:
            key_gradient_ptr += kv_index * student_length * HEAD_DIM
            key_gradient *= multiplier * gradient_scale
            store_vectors(key_gradient_ptr, student_tokens, key_gradient, in_student, HEAD_DIM, BLOCK_D)
        if VALUE_GRADIENT:
            # Read again: registers are what the loop lacks.
            teacher_ids = load_ids(teacher_ids_ptr + batch * teacher_length, teacher_tokens, teacher_stop)
            student_ids = load_ids(student_ids_ptr + batch * student_length, student_tokens, student_stop)
            mixture = load_vectors(mixture_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
            low = mixture
            if FACTORS == "fp32":
                low = load_vectors(low_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
            own_sums = tl.where(same_segment(student_ids, student_ids), own_sums, 0.0) * multiplier
            across_sums = tl.where(same_segment(student_ids, teacher_ids), across_sums, 0.0) * multiplier
            teacher_value_ptr += batch * tv_stride_b + kv_head * tv_stride_h
            student_value_ptr += batch * sv_stride_b + kv_head * sv_stride_h
            value_gradient_ptr += kv_index * student_length * VALUE_DIM
            for first in range(0, VALUE_DIM, BLOCK_V):
                student_values = load_slice(
                    student_value_ptr, student_tokens, student_ids, sv_stride_n, first, VALUE_DIM, BLOCK_V
                )
                teacher_values = load_slice(
                    teacher_value_ptr, teacher_tokens, teacher_ids, tv_stride_n, first, VALUE_DIM, BLOCK_V
                )
                left = remainder(teacher_values, student_values, mixture.to(tl.float32), low, FACTORS == "fp32", EXACT)
                # [BLOCK_S, BLOCK] @ [BLOCK, BLOCK_V] -> [BLOCK_S, BLOCK_V]
                value_gradient = tl.dot(own_sums, student_values, input_precision=EXACT)
                value_gradient -= tl.dot(across_sums, left, input_precision=EXACT)
                columns = first + tl.arange(0, BLOCK_V)
                offsets = student_tokens.to(tl.int64)[:, None] * VALUE_DIM + columns[None, :]
                stored = in_student[:, None] & (columns < VALUE_DIM)[None, :]
                gradient = value_gradient.to(value_gradient_ptr.dtype.element_ty)
                tl.store(value_gradient_ptr + offsets, gradient, mask=stored)


def aim_columns(
    teacher, student, factors, softmaxes, correction, plan, config, options, multiplier, key_gradient, value_gradient
) -> None:
    """Writes dK and dV of all tokens in tiles but those of long segments; None for those not needed."""
    aim_columns_kernel[tile_grid(plan, student[1])](
        *teacher, *student, *factors, plan.teacher_segments, plan.student_segments,
        plan.rows, plan.tiles, plan.counts, plan.row_weights, multiplier, *softmaxes, correction,
        key_gradient, value_gradient,
        *strides(*teacher, *student), *sizes(plan, teacher, student),
        *score_factors(options.scale, options.softcap), options.scale,
        METRIC=options.metric, KEY_GRADIENT=key_gradient is not None, VALUE_GRADIENT=value_gradient is not None,
        SOFTCAP=options.softcap is not None,
        BLOCK_M=config.columns.block_m, BLOCK_T=plan.widths[0], BLOCK_S=plan.widths[1],
        HEAD_DIM=student[0].shape[-1], BLOCK_D=config.block_d, VALUE_DIM=student[2].shape[-1],
        BLOCK_V=config.block_v, KIND=config.kind,
        FACTORS=config.factor_kind, SCORE_PRECISION=config.score_precision, PRECISION=config.product_precision,
        FACTOR_PRECISION=config.factor_precision, EXACT=config.exact_precision,
        num_warps=config.columns.warps, num_stages=config.columns.stages,
    )  # fmt: skip
