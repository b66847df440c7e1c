"""Segments longer than a tile: exact, and rare enough to be simple.

Other kernels cut such a segment into tiles without coordinates: it takes its share of the softmax there and forms no
pair. Here its vectors s_T and s_S are summed up in d dimensions from the final weights, and what its pairs add to loss,
correction and gradients is added. Without a long segment every program ends at once.
"""

import triton
import triton.language as tl

from matt_kernels.attention import load_softmax, load_vectors, masked_scores, row_fields, softmax_weights, tile_tokens
from matt_kernels.basis import tile_values
from matt_kernels.launch import row_grid, row_options, score_factors, sizes, strides

LENGTHS = ["softmax_size", "row_limit", "tile_limit", "long_limit", "teacher_length", "student_length"]


@triton.jit
def segment_vectors(
    query, final_max, inverse_sum, low, high, segment, start, stop, key_ptr, value_ptr, ids_ptr, key_stride,
    value_stride, scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of weight times value over the tokens of one segment, [BLOCK_M, BLOCK_DV]."""
    vectors = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first in range(start, stop, BLOCK):
        tokens, ids, values = tile_values(
            value_ptr, ids_ptr, first, stop, value_stride, BLOCK, VALUE_DIM, BLOCK_DV
        )  # fmt: skip
        key = load_vectors(key_ptr, tokens, tokens < stop, key_stride, HEAD_DIM, BLOCK_D)
        scores, _ = masked_scores(query, key, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION)
        weights = tl.where((ids == segment)[None, :], softmax_weights(scores, final_max, inverse_sum), 0.0)
        if values.dtype == tl.float16:
            values = values.to(tl.float32)
        # [BLOCK_M, BLOCK] @ [BLOCK, BLOCK_DV] -> [BLOCK_M, BLOCK_DV]
        vectors = tl.dot(weights.to(values.dtype), values, vectors, input_precision=PRECISION)
    return vectors


@triton.jit(do_not_specialize=LENGTHS)
def aim_mse_long_row_kernel(
    teacher_query_ptr, teacher_key_ptr, teacher_value_ptr, student_query_ptr, student_key_ptr, student_value_ptr,
    teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, long_ptr, counts_ptr, row_weights_ptr, multiplier_ptr,
    teacher_softmax_ptr, student_softmax_ptr, loss_ptr, correction_ptr, gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    sk_stride_b, sk_stride_h, sk_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, teacher_length, student_length, scale, softcap, long_limit,
    gradient_scale,
    BACKWARD: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward: adds to loss and correction of a block of rows. Backward: adds to dQ."""
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * 3)
    long_count = tl.load(counts_ptr + batch * 3 + 2)
    rows_ptr += batch * 8 * row_limit
    long_ptr += batch * 5 * long_limit
    if (long_count > 0) & (tl.program_id(0) * BLOCK_M < tl.load(counts_ptr + batch * 3)):
        teacher_row, student_row, teacher_low, teacher_high, student_low, student_high = row_fields(
            rows_ptr, numbers, used, row_limit
        )
        teacher_query_ptr += batch * tq_stride_b + head * tq_stride_h
        student_query_ptr += batch * sq_stride_b + head * sq_stride_h
        teacher_query = load_vectors(teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D)
        student_query = load_vectors(student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D)
        row_outputs = batch_head * row_limit + numbers
        teacher_max, teacher_inverse = load_softmax(teacher_softmax_ptr, row_outputs, used, softmax_size)
        student_max, student_inverse = load_softmax(student_softmax_ptr, row_outputs, used, softmax_size)
        teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
        student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
        teacher_value_ptr += batch * tv_stride_b + kv_head * tv_stride_h
        student_value_ptr += batch * sv_stride_b + kv_head * sv_stride_h
        teacher_ids_ptr += batch * teacher_length
        student_ids_ptr += batch * student_length
        loss = tl.zeros([BLOCK_M], tl.float32)
        correction = tl.zeros([BLOCK_M], tl.float32)
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        teacher_end, student_end = tl.max(teacher_high), tl.max(student_high)
        for number in range(long_count):
            segment = tl.load(long_ptr + number)
            teacher_start, teacher_stop = (
                tl.load(long_ptr + long_limit + number),
                tl.load(long_ptr + 2 * long_limit + number),
            )
            student_start, student_stop = (
                tl.load(long_ptr + 3 * long_limit + number),
                tl.load(long_ptr + 4 * long_limit + number),
            )
            teacher_vectors = segment_vectors(
                teacher_query, teacher_max, teacher_inverse, teacher_low, teacher_high, segment, teacher_start,
                tl.minimum(teacher_stop, teacher_end), teacher_key_ptr, teacher_value_ptr, teacher_ids_ptr,
                tk_stride_n, tv_stride_n, scale, softcap, SOFTCAP, BLOCK_M, BLOCK_S, HEAD_DIM, BLOCK_D,
                VALUE_DIM, BLOCK_DV, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
            vectors = segment_vectors(
                student_query, student_max, student_inverse, student_low, student_high, segment, student_start,
                tl.minimum(student_stop, student_end), student_key_ptr, student_value_ptr, student_ids_ptr,
                sk_stride_n, sv_stride_n, scale, softcap, SOFTCAP, BLOCK_M, BLOCK_S, HEAD_DIM, BLOCK_D,
                VALUE_DIM, BLOCK_DV, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
            change = vectors - teacher_vectors
            if BACKWARD:
                for first in range(student_start, tl.minimum(student_stop, student_end), BLOCK_S):
                    tokens, ids, values = tile_values(
                        student_value_ptr, student_ids_ptr, first, student_stop, sv_stride_n, BLOCK_S, VALUE_DIM,
                        BLOCK_DV,
                    )  # fmt: skip
                    kept = tokens < student_stop
                    key = load_vectors(student_key_ptr, tokens, kept, sk_stride_n, HEAD_DIM, BLOCK_D)
                    scores, slope = masked_scores(
                        student_query, key, tokens, student_stop, student_low, student_high, scale, softcap, SOFTCAP,
                        SCORE_PRECISION,
                    )  # fmt: skip
                    if values.dtype == tl.float16:
                        values, key = values.to(tl.float32), key.to(tl.float32)
                    weights = tl.where(
                        (ids == segment)[None, :], softmax_weights(scores, student_max, student_inverse), 0.0
                    )
                    # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                    products = tl.dot(change.to(values.dtype), tl.trans(values), input_precision=PRECISION)
                    score_gradient = weights * products * slope
                    # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                    gradient = tl.dot(score_gradient.to(key.dtype), key, gradient, input_precision=PRECISION)
            else:
                loss += tl.sum(change * change, 1)
                correction += tl.sum(change * vectors, 1)
        if BACKWARD:
            row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
            gradient *= row_weights[:, None] * (tl.load(multiplier_ptr) * gradient_scale)
            columns = tl.arange(0, BLOCK_D)
            offsets = (batch_head * student_length + student_row)[:, None] * HEAD_DIM + columns[None, :]
            stored = used[:, None] & (columns < HEAD_DIM)[None, :]
            gradient += tl.load(gradient_ptr + offsets, mask=stored, other=0.0)
            tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=stored)
        else:
            loss += tl.load(loss_ptr + row_outputs, mask=used, other=0.0)
            correction += tl.load(correction_ptr + row_outputs, mask=used, other=0.0)
            tl.store(loss_ptr + row_outputs, loss, mask=used)
            tl.store(correction_ptr + row_outputs, correction, mask=used)


@triton.jit(do_not_specialize=LENGTHS)
def aim_mse_long_key_kernel(
    teacher_query_ptr, teacher_key_ptr, teacher_value_ptr, student_query_ptr, student_key_ptr, student_value_ptr,
    teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, long_ptr, counts_ptr, row_weights_ptr, multiplier_ptr,
    teacher_softmax_ptr, student_softmax_ptr, correction_ptr, key_gradient_ptr, value_gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    sk_stride_b, sk_stride_h, sk_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, teacher_length, student_length, scale, softcap, long_limit,
    gradient_scale,
    KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of a long segment; each block of rows forms its segment vectors again."""
    tile, kv_index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    tiles_ptr += batch * 7 * tile_limit
    number = tl.load(tiles_ptr + 6 * tile_limit + tile)
    if number >= 0:
        _, _, tokens, stop = tile_tokens(tiles_ptr, tile, tile_limit, BLOCK_T, BLOCK_S)
        in_tile = tokens < stop
        row_start, row_stop = tl.load(tiles_ptr + 4 * tile_limit + tile), tl.load(tiles_ptr + 5 * tile_limit + tile)
        long_ptr += batch * 5 * long_limit + number
        segment = tl.load(long_ptr)
        teacher_start, teacher_stop = tl.load(long_ptr + long_limit), tl.load(long_ptr + 2 * long_limit)
        student_start, student_stop = tl.load(long_ptr + 3 * long_limit), tl.load(long_ptr + 4 * long_limit)
        teacher_query_ptr += batch * tq_stride_b + kv_head * group * tq_stride_h
        student_query_ptr += batch * sq_stride_b + kv_head * group * sq_stride_h
        teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
        student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
        teacher_value_ptr += batch * tv_stride_b + kv_head * tv_stride_h
        student_value_ptr += batch * sv_stride_b + kv_head * sv_stride_h
        teacher_ids_ptr += batch * teacher_length
        student_ids_ptr += batch * student_length
        rows_ptr += batch * 8 * row_limit
        _, ids, values = tile_values(
            student_value_ptr, student_ids_ptr, tl.load(tiles_ptr + 2 * tile_limit + tile), stop, sv_stride_n, BLOCK_S,
            VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        if values.dtype == tl.float16:
            values = values.to(tl.float32)
        key = load_vectors(student_key_ptr, tokens, in_tile, sk_stride_n, HEAD_DIM, BLOCK_D)
        key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        value_gradient = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
        blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
        for step in range(0, blocks * group):
            head = step // blocks
            numbers = row_start + (step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            used = numbers < row_stop
            teacher_row, student_row, teacher_low, teacher_high, student_low, student_high = row_fields(
                rows_ptr, numbers, used, row_limit
            )
            row_outputs = (batch * heads + kv_head * group + head) * row_limit + numbers
            teacher_max, teacher_inverse = load_softmax(teacher_softmax_ptr, row_outputs, used, softmax_size)
            student_max, student_inverse = load_softmax(student_softmax_ptr, row_outputs, used, softmax_size)
            teacher_query = load_vectors(
                teacher_query_ptr + head * tq_stride_h, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D
            )
            student_query = load_vectors(
                student_query_ptr + head * sq_stride_h, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D
            )
            vectors = segment_vectors(
                student_query, student_max, student_inverse, student_low, student_high, segment, student_start,
                tl.minimum(student_stop, tl.max(student_high)), student_key_ptr, student_value_ptr, student_ids_ptr,
                sk_stride_n, sv_stride_n, scale, softcap, SOFTCAP, BLOCK_M, BLOCK_S, HEAD_DIM, BLOCK_D,
                VALUE_DIM, BLOCK_DV, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
            change = vectors - segment_vectors(
                teacher_query, teacher_max, teacher_inverse, teacher_low, teacher_high, segment, teacher_start,
                tl.minimum(teacher_stop, tl.max(teacher_high)), teacher_key_ptr, teacher_value_ptr, teacher_ids_ptr,
                tk_stride_n, tv_stride_n, scale, softcap, SOFTCAP, BLOCK_M, BLOCK_S, HEAD_DIM, BLOCK_D,
                VALUE_DIM, BLOCK_DV, SCORE_PRECISION, PRECISION,
            )  # fmt: skip
            scores, slope = masked_scores(
                student_query, key, tokens, stop, student_low, student_high, scale, softcap, SOFTCAP, SCORE_PRECISION
            )
            row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
            weights = softmax_weights(scores, student_max, student_inverse) * row_weights[:, None]
            change = change.to(values.dtype)
            if VALUE_GRADIENT:
                # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_DV] -> [BLOCK_S, BLOCK_DV]
                transposed = tl.trans(weights.to(values.dtype))
                value_gradient = tl.dot(transposed, change, value_gradient, input_precision=PRECISION)
            if KEY_GRADIENT:
                correction = tl.load(correction_ptr + row_outputs, mask=used, other=0.0)
                # [BLOCK_M, BLOCK_DV] @ [BLOCK_DV, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                products = tl.dot(change, tl.trans(values), input_precision=PRECISION)
                products = tl.where((ids == segment)[None, :], products, 0.0)
                score_gradient = weights * (products - correction[:, None]) * slope
                # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_S, BLOCK_D]
                key_gradient = tl.dot(
                    tl.trans(score_gradient.to(values.dtype)), student_query.to(values.dtype), key_gradient,
                    input_precision=PRECISION,
                )  # fmt: skip
        multiplier = tl.load(multiplier_ptr)
        if KEY_GRADIENT:
            columns = tl.arange(0, BLOCK_D)
            offsets = (kv_index * student_length + tokens)[:, None] * HEAD_DIM + columns[None, :]
            stored = in_tile[:, None] & (columns < HEAD_DIM)[None, :]
            key_gradient *= multiplier * gradient_scale
            tl.store(key_gradient_ptr + offsets, key_gradient.to(key_gradient_ptr.dtype.element_ty), mask=stored)
        if VALUE_GRADIENT:
            columns = tl.arange(0, BLOCK_DV)
            offsets = (kv_index * student_length + tokens)[:, None] * VALUE_DIM + columns[None, :]
            stored = (in_tile & (ids == segment))[:, None] & (columns < VALUE_DIM)[None, :]
            value_gradient *= multiplier
            tl.store(value_gradient_ptr + offsets, value_gradient.to(value_gradient_ptr.dtype.element_ty), mask=stored)


def aim_mse_long_fwd(
    teacher, student, plan, config, scale, softcap, teacher_softmax, student_softmax, loss, correction
):
    """Adds the pairs of long segments to loss and correction, [B, H, m]."""
    outputs = teacher_softmax, student_softmax, loss, correction, None
    _launch_rows(teacher, student, plan, config, scale, softcap, None, outputs, backward=False)


def aim_mse_long_queries(teacher, student, plan, config, scale, softcap, saved, multiplier, query_gradient):
    """Adds the pairs of long segments to dQ."""
    teacher_softmax, student_softmax, correction = saved
    outputs = teacher_softmax, student_softmax, None, correction, query_gradient
    _launch_rows(teacher, student, plan, config, scale, softcap, multiplier, outputs, backward=True)


def _launch_rows(teacher, student, plan, config, scale, softcap, multiplier, outputs, *, backward: bool):
    aim_mse_long_row_kernel[row_grid(plan, student, config)](
        *teacher, *student, plan.teacher_segments, plan.student_segments, plan.rows, plan.tiles, plan.long,
        plan.counts, plan.row_weights, multiplier, *outputs, *strides(*teacher, *student),
        *sizes(plan, teacher, student), *score_factors(scale, softcap), plan.long.shape[-1], scale,
        BACKWARD=backward, **_options(config, student, plan, softcap),
    )  # fmt: skip


def aim_mse_long_keys(
    teacher, student, plan, config, scale, softcap, saved, multiplier, key_gradient, value_gradient
):  # fmt: skip
    """Writes dK and dV of the tokens of long segments; None for those not needed."""
    batch, kv_heads = student[1].shape[:2]
    aim_mse_long_key_kernel[(plan.tiles.shape[-1], batch * kv_heads)](
        *teacher, *student, plan.teacher_segments, plan.student_segments, plan.rows, plan.tiles, plan.long,
        plan.counts, plan.row_weights, multiplier, *saved, key_gradient, value_gradient, *strides(*teacher, *student),
        *sizes(plan, teacher, student), *score_factors(scale, softcap), plan.long.shape[-1], scale,
        KEY_GRADIENT=key_gradient is not None, VALUE_GRADIENT=value_gradient is not None,
        **_options(config, student, plan, softcap),
    )  # fmt: skip


def _options(config, student, plan, softcap) -> dict:
    return {
        **row_options(config, student, plan, softcap),
        "VALUE_DIM": student[2].shape[-1],
        "BLOCK_DV": config.block_dv,
        "num_warps": config.long_warps,
        "num_stages": 1,
    }
