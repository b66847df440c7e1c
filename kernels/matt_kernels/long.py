"""Segments longer than a tile: exact, and rare enough to be simple.

Other kernels cut such a segment into tiles of zeros: it takes its share of the softmax there and forms no pair. Here
its vectors s_T and s_S are summed up in d dimensions from the final weights, and what its pairs add to loss, correction
and gradients comes from these. Without a long segment every program ends at once.
"""

import triton
import triton.language as tl

from matt_kernels.attend import logits, vector_terms
from matt_kernels.attention import (
    COUNTS,
    LONG,
    ROWS,
    TILES,
    in_parts,
    load_ids,
    load_pair_range,
    load_row,
    load_softmax,
    load_tile,
    load_vectors,
    masked_scores,
    operand,
    softmax_weights,
    store_vectors,
    widen,
)
from matt_kernels.launch import LENGTHS, row_grid, row_program, score_factors, sizes, strides, tile_grid, tile_program


@triton.jit
def segment_vectors(
    queries, shift, inverse_sum, low, high, segment, start, stop, key_ptr, value_ptr, ids_ptr, key_stride,
    value_stride, scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of weight times value over the tokens of one segment, [BLOCK_M, BLOCK_DV]."""
    vectors = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    stop = tl.minimum(stop, tl.max(high))
    for first in range(start, stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        inside = load_ids(ids_ptr, tokens, stop) == segment
        key = load_vectors(key_ptr, tokens, inside, key_stride, HEAD_DIM, BLOCK_D)
        keys = in_parts(key, key_ptr, tokens, inside, key_stride, HEAD_DIM, SCORE_PRECISION)
        scores, _ = masked_scores(queries, keys, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION)
        weights = tl.where(inside[None, :], softmax_weights(scores, shift, inverse_sum, KIND), 0.0)
        values = widen(load_vectors(value_ptr, tokens, inside, value_stride, VALUE_DIM, BLOCK_DV))
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_DV] -> [BLOCK_M, BLOCK_DV]
        vectors = tl.dot(operand(weights, KIND), values, vectors, input_precision=PRECISION)
    return vectors


@triton.jit(do_not_specialize=LENGTHS)
def aim_long_rows_kernel(
    teacher_query_ptr, teacher_key_ptr, teacher_value_ptr, student_query_ptr, student_key_ptr, student_value_ptr,
    teacher_ids_ptr, student_ids_ptr, rows_ptr, long_ptr, counts_ptr,
    teacher_softmax_ptr, student_softmax_ptr, mean_key_ptr, loss_ptr, correction_ptr, gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    sk_stride_b, sk_stride_h, sk_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, long_limit, teacher_length, student_length, scale, softcap,
    METRIC: tl.constexpr, GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores what long segments add to loss, correction and dQ of a block of rows; aim_rows starts from it."""
    batch_head, block = row_program(row_limit, BLOCK_M)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    row_count = tl.load(counts_ptr + batch * COUNTS)
    long_count = tl.load(counts_ptr + batch * COUNTS + 2)
    if (long_count > 0) & (block * BLOCK_M < row_count):
        numbers = block * BLOCK_M + tl.arange(0, BLOCK_M)
        used = numbers < row_count
        rows_ptr += batch * ROWS * row_limit
        long_ptr += batch * LONG * long_limit
        teacher_row, teacher_low, teacher_high = load_row(rows_ptr, numbers, used, row_limit, 0)
        student_row, student_low, student_high = load_row(rows_ptr, numbers, used, row_limit, 1)
        pair_low, pair_high = load_pair_range(rows_ptr, numbers, used, row_limit)
        teacher_query_ptr += batch * tq_stride_b + head * tq_stride_h
        student_query_ptr += batch * sq_stride_b + head * sq_stride_h
        outputs = batch_head * row_limit + numbers
        teacher_shift, teacher_inverse = load_softmax(teacher_softmax_ptr, outputs, used, softmax_size, KIND)
        student_shift, student_inverse = load_softmax(student_softmax_ptr, outputs, used, softmax_size, KIND)
        teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
        student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
        teacher_value_ptr += batch * tv_stride_b + kv_head * tv_stride_h
        student_value_ptr += batch * sv_stride_b + kv_head * sv_stride_h
        teacher_ids_ptr += batch * teacher_length
        student_ids_ptr += batch * student_length
        loss = tl.zeros([BLOCK_M], tl.float32)
        correction = tl.zeros([BLOCK_M], tl.float32)
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        rounded_sum = tl.zeros([BLOCK_M], tl.float32)
        for number in range(long_count):
            segment = tl.load(long_ptr + number)
            teacher_start = tl.load(long_ptr + long_limit + number)
            teacher_stop = tl.load(long_ptr + 2 * long_limit + number)
            start = tl.load(long_ptr + 3 * long_limit + number)
            stop = tl.load(long_ptr + 4 * long_limit + number)
            query = load_vectors(teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D)
            queries = in_parts(query, teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, SCORE_PRECISION)
            teacher = segment_vectors(
                queries, teacher_shift, teacher_inverse, teacher_low, teacher_high, segment, teacher_start,
                teacher_stop, teacher_key_ptr, teacher_value_ptr, teacher_ids_ptr, tk_stride_n, tv_stride_n, scale,
                softcap, SOFTCAP, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION,
                PRECISION,
            )  # fmt: skip
            query = load_vectors(student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D)
            queries = in_parts(query, student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, SCORE_PRECISION)
            student = segment_vectors(
                queries, student_shift, student_inverse, student_low, student_high, segment, start, stop,
                student_key_ptr, student_value_ptr, student_ids_ptr, sk_stride_n, sv_stride_n, scale, softcap,
                SOFTCAP, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
            distance, change = vector_terms(student, teacher, METRIC)
            paired = (segment >= pair_low) & (segment < pair_high)
            loss += tl.where(paired, distance, 0.0)
            change = operand(tl.where(paired[:, None], change, 0.0), KIND)
            if not GRADIENT:
                correction += tl.sum(student * change.to(tl.float32), 1)
            else:
                seen = tl.minimum(stop, tl.max(student_high))
                for first in range(start, seen, BLOCK_N):
                    tokens = first + tl.arange(0, BLOCK_N)
                    inside = load_ids(student_ids_ptr, tokens, seen) == segment
                    key = load_vectors(student_key_ptr, tokens, inside, sk_stride_n, HEAD_DIM, BLOCK_D)
                    keys = in_parts(key, student_key_ptr, tokens, inside, sk_stride_n, HEAD_DIM, SCORE_PRECISION)
                    scores, slope = masked_scores(
                        queries, keys, tokens, seen, student_low, student_high, scale, softcap, SOFTCAP, SCORE_PRECISION
                    )
                    weights = softmax_weights(scores, student_shift, student_inverse, KIND)
                    weights = tl.where(inside[None, :], weights, 0.0)
                    values = widen(load_vectors(student_value_ptr, tokens, inside, sv_stride_n, VALUE_DIM, BLOCK_DV))
                    # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_N] -> [BLOCK_M, BLOCK_N]
                    products = weights * tl.dot(change, tl.trans(values), input_precision=PRECISION)
                    score_gradient = operand(products * slope, KIND)
                    correction += tl.sum(products, 1)
                    rounded_sum += tl.sum(score_gradient.to(tl.float32), 1)
                    # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                    gradient = tl.dot(score_gradient, widen(key), gradient, input_precision=PRECISION)
        tl.store(loss_ptr + outputs, loss, mask=used)
        tl.store(correction_ptr + outputs, correction, mask=used)
        if GRADIENT:
            # As in aim_rows; before it is rounded, since what cancels here may be all that there is.
            total = correction if SOFTCAP else rounded_sum
            mean_key = load_vectors(mean_key_ptr, outputs, used, HEAD_DIM, HEAD_DIM, BLOCK_D)
            gradient -= total[:, None] * mean_key
            gradient_ptr += batch_head * student_length * HEAD_DIM
            store_vectors(gradient_ptr, student_row, gradient, used, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def aim_long_columns_kernel(
    teacher_query_ptr, teacher_key_ptr, teacher_value_ptr, student_query_ptr, student_key_ptr, student_value_ptr,
    teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, long_ptr, counts_ptr, row_weights_ptr, multiplier_ptr,
    teacher_softmax_ptr, student_softmax_ptr, correction_ptr, key_gradient_ptr, value_gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    sk_stride_b, sk_stride_h, sk_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, long_limit, teacher_length, student_length, scale, softcap,
    gradient_scale,
    METRIC: tl.constexpr, KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of a long segment; each block of rows forms its segment vectors again."""
    tile, kv_index = tile_program(tile_limit)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    tiles_ptr += batch * TILES * tile_limit
    number = tl.load(tiles_ptr + 6 * tile_limit + tile)
    if (tile < tl.load(counts_ptr + batch * COUNTS + 1)) & (number >= 0):
        tile_start, tile_stop = load_tile(tiles_ptr, tile, tile_limit, 1)
        own_tokens = tile_start + tl.arange(0, BLOCK_S)
        in_tile = own_tokens < tile_stop
        row_start, row_stop = tl.load(tiles_ptr + 4 * tile_limit + tile), tl.load(tiles_ptr + 5 * tile_limit + tile)
        long_ptr += batch * LONG * long_limit + number
        segment = tl.load(long_ptr)
        teacher_start, teacher_stop = tl.load(long_ptr + long_limit), tl.load(long_ptr + 2 * long_limit)
        start, stop = tl.load(long_ptr + 3 * long_limit), tl.load(long_ptr + 4 * long_limit)
        teacher_query_ptr += batch * tq_stride_b + kv_head * group * tq_stride_h
        student_query_ptr += batch * sq_stride_b + kv_head * group * sq_stride_h
        teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
        student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
        teacher_value_ptr += batch * tv_stride_b + kv_head * tv_stride_h
        student_value_ptr += batch * sv_stride_b + kv_head * sv_stride_h
        teacher_ids_ptr += batch * teacher_length
        student_ids_ptr += batch * student_length
        rows_ptr += batch * ROWS * row_limit
        inside = load_ids(student_ids_ptr, own_tokens, tile_stop) == segment
        key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        value_gradient = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
        blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
        for step in range(0, blocks * group):
            head = (step // blocks).to(tl.int64)
            numbers = row_start + (step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            used = numbers < row_stop
            teacher_row, teacher_low, teacher_high = load_row(rows_ptr, numbers, used, row_limit, 0)
            student_row, student_low, student_high = load_row(rows_ptr, numbers, used, row_limit, 1)
            pair_low, pair_high = load_pair_range(rows_ptr, numbers, used, row_limit)
            outputs = (batch * heads + kv_head * group + head) * row_limit + numbers
            teacher_shift, teacher_inverse = load_softmax(teacher_softmax_ptr, outputs, used, softmax_size, KIND)
            student_shift, student_inverse = load_softmax(student_softmax_ptr, outputs, used, softmax_size, KIND)
            query_ptr = teacher_query_ptr + head * tq_stride_h
            query = load_vectors(query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D)
            queries = in_parts(query, query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, SCORE_PRECISION)
            teacher = segment_vectors(
                queries, teacher_shift, teacher_inverse, teacher_low, teacher_high, segment, teacher_start,
                teacher_stop, teacher_key_ptr, teacher_value_ptr, teacher_ids_ptr, tk_stride_n, tv_stride_n, scale,
                softcap, SOFTCAP, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION,
                PRECISION,
            )  # fmt: skip
            query_ptr = student_query_ptr + head * sq_stride_h
            query = load_vectors(query_ptr, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D)
            queries = in_parts(query, query_ptr, student_row, used, sq_stride_n, HEAD_DIM, SCORE_PRECISION)
            student = segment_vectors(
                queries, student_shift, student_inverse, student_low, student_high, segment, start, stop,
                student_key_ptr, student_value_ptr, student_ids_ptr, sk_stride_n, sv_stride_n, scale, softcap,
                SOFTCAP, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
            _, change = vector_terms(student, teacher, METRIC)
            paired = (segment >= pair_low) & (segment < pair_high)
            change = operand(tl.where(paired[:, None], change, 0.0), KIND)
            key = load_vectors(student_key_ptr, own_tokens, in_tile, sk_stride_n, HEAD_DIM, BLOCK_D)
            keys = in_parts(key, student_key_ptr, own_tokens, in_tile, sk_stride_n, HEAD_DIM, SCORE_PRECISION)
            # tokens times rows: no transposition before the products that follow
            found, factor, slope = logits(
                keys, queries, own_tokens[:, None], student_low[None, :], student_high[None, :], scale, softcap,
                SOFTCAP, True, SCORE_PRECISION,
            )  # fmt: skip
            row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
            weights = tl.exp2(tl.fma(found, factor, -student_shift[None, :])) * (student_inverse * row_weights)[None, :]
            if VALUE_GRADIENT:
                mine = operand(tl.where(inside[:, None], weights, 0.0), KIND)
                # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_DV] -> [BLOCK_S, BLOCK_DV]
                value_gradient = tl.dot(mine, change, value_gradient, input_precision=PRECISION)
            if KEY_GRADIENT:
                correction = tl.load(correction_ptr + outputs, mask=used, other=0.0)
                values = widen(load_vectors(student_value_ptr, own_tokens, inside, sv_stride_n, VALUE_DIM, BLOCK_DV))
                # [BLOCK_S, BLOCK_DV] @ [BLOCK_DV, BLOCK_M] -> [BLOCK_S, BLOCK_M]
                products = tl.dot(values, tl.trans(change), input_precision=PRECISION)
                score_gradient = operand(weights * (products - correction[None, :]) * slope, KIND)
                # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_S, BLOCK_D]
                key_gradient = tl.dot(score_gradient, widen(query), key_gradient, input_precision=PRECISION)
        multiplier = tl.load(multiplier_ptr)
        if KEY_GRADIENT:
            key_gradient_ptr += kv_index * student_length * HEAD_DIM
            key_gradient *= multiplier * gradient_scale
            store_vectors(key_gradient_ptr, own_tokens, key_gradient, in_tile, HEAD_DIM, BLOCK_D)
        if VALUE_GRADIENT:
            value_gradient_ptr += kv_index * student_length * VALUE_DIM
            value_gradient *= multiplier
            store_vectors(value_gradient_ptr, own_tokens, value_gradient, in_tile, VALUE_DIM, BLOCK_DV)


def aim_long_rows(
    teacher, student, softmaxes, mean_key, plan, config, options, loss, correction, query_gradient
) -> None:
    """Stores the part of long segments in loss and correction, [B, H, m], and in dQ as aim_rows expects it."""
    aim_long_rows_kernel[row_grid(plan, student[0], config.long_rows.block_m)](
        *teacher, *student, plan.teacher_segments, plan.student_segments, plan.rows, plan.long, plan.counts,
        *softmaxes, mean_key, loss, correction, query_gradient, *strides(*teacher, *student),
        *sizes(plan, teacher, student),
        *score_factors(options.scale, options.softcap), GRADIENT=query_gradient is not None,
        **_constants(student, config, options, config.long_rows),
    )  # fmt: skip


def aim_long_columns(
    teacher, student, softmaxes, correction, plan, config, options, multiplier, key_gradient, value_gradient
) -> None:
    """Writes dK and dV of the tokens of long segments; None for those not needed."""
    aim_long_columns_kernel[tile_grid(plan, student[1])](
        *teacher, *student, plan.teacher_segments, plan.student_segments, plan.rows, plan.tiles, plan.long,
        plan.counts, plan.row_weights, multiplier, *softmaxes, correction, key_gradient, value_gradient,
        *strides(*teacher, *student), *sizes(plan, teacher, student),
        *score_factors(options.scale, options.softcap), options.scale,
        KEY_GRADIENT=key_gradient is not None, VALUE_GRADIENT=value_gradient is not None, BLOCK_S=plan.widths[1],
        **_constants(student, config, options, config.long_columns),
    )  # fmt: skip


def _constants(student, config, options, launch) -> dict:
    return {
        "METRIC": options.metric,
        "SOFTCAP": options.softcap is not None,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "HEAD_DIM": student[0].shape[-1],
        "BLOCK_D": config.block_d,
        "VALUE_DIM": student[2].shape[-1],
        "BLOCK_DV": config.block_dv,
        "KIND": config.kind,
        "SCORE_PRECISION": config.score_precision,
        "PRECISION": config.product_precision,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
