"""AIM with the mean squared error: forward, dQ, and dK with dV. See basis.py for the coordinates.

Forward passes over the tiles once, with an online softmax on both sides. Let x_S and x_T be a tile's segment vectors
before normalisation, in the student's basis, o the teacher's part outside, and ρ = Z_S / Z_T the ratio of the sums so
far. Kept per row are |u|², u·x_T, |x_T|² and |o|² with u = x_S - ρ x_T. When later tiles rescale x_S by f_S and x_T by
f_T (powers of 2) and ρ becomes ρ', u becomes f_S u + (f_S ρ - f_T ρ') x_T: the difference of the two sides is taken
before squaring, never recovered from two large squares. At the end the loss of a row is |u|² / Z_S² + |o|² / Z_T², and
the softmax backward needs D = u·x_S / Z_S² = (|u|² + ρ u·x_T) / Z_S².

Backward forms dL/da_S = 2 (a_S G_SS - a_T G_TS) from inner products of values within a segment (aim-math.md §2):
linear in the difference, so nothing more accurate is needed. dQ is owned by row blocks, dK and dV by tiles; no atomics.
"""

import torch
import triton
import triton.language as tl

from matt_kernels.attention import (
    load_softmax,
    load_vectors,
    masked_scores,
    online_softmax,
    row_fields,
    store_softmax,
    tile_range,
    tile_tokens,
)
from matt_kernels.basis import aim_basis, aim_gram, same_segment, tile_values
from matt_kernels.launch import row_grid, row_options, score_factors, sizes, strides
from matt_kernels.long import aim_mse_long_fwd, aim_mse_long_keys, aim_mse_long_queries

LENGTHS = ["softmax_size", "row_limit", "tile_limit", "teacher_length", "student_length"]


@triton.jit(do_not_specialize=LENGTHS)
def aim_mse_fwd_kernel(
    teacher_query_ptr, teacher_key_ptr, student_query_ptr, student_key_ptr, own_ptr, shared_ptr, outside_ptr,
    rows_ptr, tiles_ptr, counts_ptr, teacher_softmax_ptr, student_softmax_ptr, loss_ptr, correction_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    sq_stride_b, sq_stride_h, sq_stride_n, sk_stride_b, sk_stride_h, sk_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, teacher_length, student_length, scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    kv_index = batch * (heads // group) + kv_head
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * 3)
    rows_ptr += batch * 8 * row_limit
    teacher_row, student_row, teacher_low, teacher_high, student_low, student_high = row_fields(
        rows_ptr, numbers, used, row_limit
    )
    teacher_query_ptr += batch * tq_stride_b + head * tq_stride_h
    student_query_ptr += batch * sq_stride_b + head * sq_stride_h
    teacher_query = load_vectors(teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D)
    student_query = load_vectors(student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D)
    teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
    student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
    own_ptr += kv_index * student_length * BLOCK_S
    shared_ptr += kv_index * teacher_length * BLOCK_S
    outside_ptr += kv_index * teacher_length * BLOCK_T
    tiles_ptr += batch * 7 * tile_limit

    teacher_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    student_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    teacher_sum = tl.zeros([BLOCK_M], tl.float32)
    student_sum = tl.zeros([BLOCK_M], tl.float32)
    # |u|², u·x_T, |x_T|², |o|²
    difference = tl.zeros([BLOCK_M], tl.float32)
    cross = tl.zeros([BLOCK_M], tl.float32)
    ratio = tl.zeros([BLOCK_M], tl.float32)
    shared_square = tl.zeros([BLOCK_M], tl.float32)
    outside_square = tl.zeros([BLOCK_M], tl.float32)
    first_tile, last_tile = tile_range(rows_ptr, numbers, used, row_limit, tile_limit)
    for tile in range(first_tile, last_tile):
        teacher_tokens, teacher_stop, student_tokens, student_stop = tile_tokens(
            tiles_ptr, tile, tile_limit, BLOCK_T, BLOCK_S
        )
        in_teacher, in_student = teacher_tokens < teacher_stop, student_tokens < student_stop
        key = load_vectors(teacher_key_ptr, teacher_tokens, in_teacher, tk_stride_n, HEAD_DIM, BLOCK_D)
        scores, _ = masked_scores(
            teacher_query, key, teacher_tokens, teacher_stop, teacher_low, teacher_high, scale, softcap, SOFTCAP,
            SCORE_PRECISION,
        )  # fmt: skip
        weights, teacher_factor, teacher_max, teacher_sum = online_softmax(scores, teacher_max, teacher_sum)
        shared = load_vectors(shared_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
        outside = load_vectors(outside_ptr, teacher_tokens, in_teacher, BLOCK_T, BLOCK_T, BLOCK_T)
        weights = weights.to(shared.dtype)
        # [BLOCK_M, BLOCK_T] @ [BLOCK_T, BLOCK_T] -> [BLOCK_M, BLOCK_T]
        teacher_outside = tl.dot(weights, outside, input_precision=PRECISION)
        outside_square *= teacher_factor * teacher_factor
        outside_square += tl.sum(teacher_outside * teacher_outside, 1)
        # [BLOCK_M, BLOCK_T] @ [BLOCK_T, BLOCK_S] -> [BLOCK_M, BLOCK_S]
        teacher_own = tl.dot(weights, shared, input_precision=PRECISION)

        key = load_vectors(student_key_ptr, student_tokens, in_student, sk_stride_n, HEAD_DIM, BLOCK_D)
        scores, _ = masked_scores(
            student_query, key, student_tokens, student_stop, student_low, student_high, scale, softcap, SOFTCAP,
            SCORE_PRECISION,
        )  # fmt: skip
        weights, student_factor, student_max, student_sum = online_softmax(scores, student_max, student_sum)
        own = load_vectors(own_ptr, student_tokens, in_student, BLOCK_S, BLOCK_S, BLOCK_S)
        # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
        student_own = tl.dot(weights.to(own.dtype), own, input_precision=PRECISION)
        new_ratio = tl.where(teacher_sum > 0, student_sum / tl.where(teacher_sum > 0, teacher_sum, 1.0), 0.0)
        change = student_own - new_ratio[:, None] * teacher_own

        drift = student_factor * ratio - teacher_factor * new_ratio
        ratio = new_ratio
        both = student_factor * cross + drift * shared_square
        difference = student_factor * (student_factor * difference + drift * cross) + drift * both
        difference += tl.sum(change * change, 1)
        cross = teacher_factor * both + tl.sum(change * teacher_own, 1)
        shared_square = teacher_factor * teacher_factor * shared_square + tl.sum(teacher_own * teacher_own, 1)

    outputs = batch_head * row_limit + numbers
    stored = numbers < row_limit
    store_softmax(teacher_softmax_ptr, outputs, stored, softmax_size, teacher_max, teacher_sum)
    store_softmax(student_softmax_ptr, outputs, stored, softmax_size, student_max, student_sum)
    teacher_inverse = tl.where(teacher_sum > 0, 1.0 / tl.where(teacher_sum > 0, teacher_sum, 1.0), 0.0)
    inverse = tl.where(student_sum > 0, 1.0 / tl.where(student_sum > 0, student_sum, 1.0), 0.0)
    loss = tl.maximum(difference, 0.0) * inverse * inverse + outside_square * teacher_inverse * teacher_inverse
    tl.store(loss_ptr + outputs, loss, mask=stored)
    tl.store(correction_ptr + outputs, (difference + ratio * cross) * inverse * inverse, mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def aim_mse_bwd_query_kernel(
    teacher_query_ptr, teacher_key_ptr, student_query_ptr, student_key_ptr, own_ptr, across_ptr,
    rows_ptr, tiles_ptr, counts_ptr, row_weights_ptr, multiplier_ptr,
    teacher_softmax_ptr, student_softmax_ptr, correction_ptr, gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    sq_stride_b, sq_stride_h, sq_stride_n, sk_stride_b, sk_stride_h, sk_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, teacher_length, student_length, scale, softcap, gradient_scale,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    kv_index = batch * (heads // group) + kv_head
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * 3)
    rows_ptr += batch * 8 * row_limit
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
    correction = tl.load(correction_ptr + row_outputs, mask=used, other=0.0)
    teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
    student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
    own_ptr += kv_index * student_length * BLOCK_S
    across_ptr += kv_index * teacher_length * BLOCK_S
    tiles_ptr += batch * 7 * tile_limit

    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_tile, last_tile = tile_range(rows_ptr, numbers, used, row_limit, tile_limit)
    for tile in range(first_tile, last_tile):
        teacher_tokens, teacher_stop, student_tokens, student_stop = tile_tokens(
            tiles_ptr, tile, tile_limit, BLOCK_T, BLOCK_S
        )
        in_teacher, in_student = teacher_tokens < teacher_stop, student_tokens < student_stop
        key = load_vectors(teacher_key_ptr, teacher_tokens, in_teacher, tk_stride_n, HEAD_DIM, BLOCK_D)
        scores, _ = masked_scores(
            teacher_query, key, teacher_tokens, teacher_stop, teacher_low, teacher_high, scale, softcap, SOFTCAP,
            SCORE_PRECISION,
        )  # fmt: skip
        across = load_vectors(across_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
        # Rounded before they are normalised: the same digits as in the forward pass, which D comes from.
        weights = tl.exp2(scores - teacher_max[:, None])
        # [BLOCK_M, BLOCK_T] @ [BLOCK_T, BLOCK_S] -> [BLOCK_M, BLOCK_S]
        teacher_products = tl.dot(weights.to(across.dtype), across, input_precision=PRECISION)
        teacher_products *= teacher_inverse[:, None]
        key = load_vectors(student_key_ptr, student_tokens, in_student, sk_stride_n, HEAD_DIM, BLOCK_D)
        scores, slope = masked_scores(
            student_query, key, student_tokens, student_stop, student_low, student_high, scale, softcap, SOFTCAP,
            SCORE_PRECISION,
        )  # fmt: skip
        own = load_vectors(own_ptr, student_tokens, in_student, BLOCK_S, BLOCK_S, BLOCK_S)
        weights = tl.exp2(scores - student_max[:, None])
        # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
        products = tl.dot(weights.to(own.dtype), own, input_precision=PRECISION) * student_inverse[:, None]
        products -= teacher_products
        score_gradient = weights * student_inverse[:, None] * (products - correction[:, None]) * slope
        # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_D] -> [BLOCK_M, BLOCK_D]
        gradient = tl.dot(score_gradient.to(own.dtype), key.to(own.dtype), gradient, input_precision=PRECISION)

    row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
    gradient *= row_weights[:, None] * (tl.load(multiplier_ptr) * gradient_scale)
    columns = tl.arange(0, BLOCK_D)
    offsets = (batch_head * student_length + student_row)[:, None] * HEAD_DIM + columns[None, :]
    stored = used[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def aim_mse_bwd_key_kernel(
    teacher_query_ptr, teacher_key_ptr, teacher_value_ptr, student_query_ptr, student_key_ptr, student_value_ptr,
    own_ptr, across_ptr, teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, counts_ptr, row_weights_ptr,
    multiplier_ptr, teacher_softmax_ptr, student_softmax_ptr, correction_ptr, key_gradient_ptr, value_gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    sk_stride_b, sk_stride_h, sk_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, teacher_length, student_length, scale, softcap, gradient_scale,
    KEY_GRADIENT: tl.constexpr, VALUE_GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, kv_index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    tiles_ptr += batch * 7 * tile_limit
    teacher_tokens, teacher_stop, student_tokens, student_stop = tile_tokens(
        tiles_ptr, tile, tile_limit, BLOCK_T, BLOCK_S
    )
    in_teacher, in_student = teacher_tokens < teacher_stop, student_tokens < student_stop
    row_start, row_stop = tl.load(tiles_ptr + 4 * tile_limit + tile), tl.load(tiles_ptr + 5 * tile_limit + tile)
    # The tiles of a long segment have a kernel of their own.
    is_long = tl.load(tiles_ptr + 6 * tile_limit + tile) >= 0
    row_stop = tl.where(is_long | (tile >= tl.load(counts_ptr + batch * 3 + 1)), row_start, row_stop)
    in_student = student_tokens < tl.where(row_start < row_stop, student_stop, 0)
    teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
    student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
    teacher_key = load_vectors(teacher_key_ptr, teacher_tokens, in_teacher, tk_stride_n, HEAD_DIM, BLOCK_D)
    student_key = load_vectors(student_key_ptr, student_tokens, in_student, sk_stride_n, HEAD_DIM, BLOCK_D)
    own_ptr += kv_index * student_length * BLOCK_S
    across_ptr += kv_index * teacher_length * BLOCK_S
    own = load_vectors(own_ptr, student_tokens, in_student, BLOCK_S, BLOCK_S, BLOCK_S)
    across = load_vectors(across_ptr, teacher_tokens, in_teacher, BLOCK_S, BLOCK_S, BLOCK_S)
    teacher_query_ptr += batch * tq_stride_b + kv_head * group * tq_stride_h
    student_query_ptr += batch * sq_stride_b + kv_head * group * sq_stride_h
    rows_ptr += batch * 8 * row_limit

    key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    own_sums = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    across_sums = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
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
        scores, _ = masked_scores(
            teacher_query, teacher_key, teacher_tokens, teacher_stop, teacher_low, teacher_high, scale, softcap,
            SOFTCAP, SCORE_PRECISION,
        )  # fmt: skip
        teacher_weights = tl.exp2(scores - teacher_max[:, None])
        student_query = load_vectors(
            student_query_ptr + head * sq_stride_h, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D
        )
        scores, slope = masked_scores(
            student_query, student_key, student_tokens, student_stop, student_low, student_high, scale, softcap,
            SOFTCAP, SCORE_PRECISION,
        )  # fmt: skip
        weights = tl.exp2(scores - student_max[:, None])
        row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
        weighted = weights * (student_inverse * row_weights)[:, None]
        if VALUE_GRADIENT:
            transposed = tl.trans(weighted.to(own.dtype))
            # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK] -> [BLOCK_S, BLOCK]
            normalised = (weights * student_inverse[:, None]).to(own.dtype)
            own_sums = tl.dot(transposed, normalised, own_sums, input_precision=PRECISION)
            normalised = (teacher_weights * teacher_inverse[:, None]).to(own.dtype)
            across_sums = tl.dot(transposed, normalised, across_sums, input_precision=PRECISION)
        if KEY_GRADIENT:
            correction = tl.load(correction_ptr + row_outputs, mask=used, other=0.0)
            # [BLOCK_M, BLOCK_T] @ [BLOCK_T, BLOCK_S] -> [BLOCK_M, BLOCK_S]
            teacher_products = tl.dot(teacher_weights.to(own.dtype), across, input_precision=PRECISION)
            # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
            products = tl.dot(weights.to(own.dtype), own, input_precision=PRECISION) * student_inverse[:, None]
            products -= teacher_products * teacher_inverse[:, None]
            score_gradient = weighted * (products - correction[:, None]) * slope
            # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_S, BLOCK_D]
            key_gradient = tl.dot(
                tl.trans(score_gradient.to(own.dtype)), student_query.to(own.dtype), key_gradient,
                input_precision=PRECISION,
            )  # fmt: skip

    multiplier = tl.load(multiplier_ptr)
    if KEY_GRADIENT:
        columns = tl.arange(0, BLOCK_D)
        offsets = (kv_index * student_length + student_tokens)[:, None] * HEAD_DIM + columns[None, :]
        stored = in_student[:, None] & (columns < HEAD_DIM)[None, :]
        key_gradient *= multiplier * gradient_scale
        tl.store(key_gradient_ptr + offsets, key_gradient.to(key_gradient_ptr.dtype.element_ty), mask=stored)
    if VALUE_GRADIENT:
        _, teacher_ids, teacher_values = tile_values(
            teacher_value_ptr + batch * tv_stride_b + kv_head * tv_stride_h, teacher_ids_ptr + batch * teacher_length,
            tl.load(tiles_ptr + tile), teacher_stop, tv_stride_n, BLOCK_T, VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        _, student_ids, student_values = tile_values(
            student_value_ptr + batch * sv_stride_b + kv_head * sv_stride_h, student_ids_ptr + batch * student_length,
            tl.load(tiles_ptr + 2 * tile_limit + tile), student_stop, sv_stride_n, BLOCK_S, VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        own_sums = tl.where(same_segment(student_ids, student_ids), own_sums, 0.0)
        across_sums = tl.where(same_segment(student_ids, teacher_ids), across_sums, 0.0)
        # [BLOCK_S, BLOCK] @ [BLOCK, BLOCK_DV] -> [BLOCK_S, BLOCK_DV]
        value_gradient = tl.dot(own_sums, student_values.to(tl.float32), input_precision=EXACT)
        value_gradient -= tl.dot(across_sums, teacher_values.to(tl.float32), input_precision=EXACT)
        columns = tl.arange(0, BLOCK_DV)
        offsets = (kv_index * student_length + student_tokens)[:, None] * VALUE_DIM + columns[None, :]
        stored = in_student[:, None] & (columns < VALUE_DIM)[None, :]
        value_gradient *= multiplier
        tl.store(value_gradient_ptr + offsets, value_gradient.to(value_gradient_ptr.dtype.element_ty), mask=stored)


def aim_mse_fwd(teacher, student, plan, config, scale, softcap):
    """(sum of squared distances of each row, [B, H, m]; what backward needs: maximum and inverse sum of the teacher's
    and of the student's softmax, [2, B, H, m], and u·x_S, [B, H, m]), float32."""
    coordinates = aim_basis(teacher[2], student[2], plan, config)
    shape = (*student[0].shape[:2], plan.rows.shape[-1])
    shapes = (2, *shape), (2, *shape), shape, shape
    saved = [torch.empty(x, dtype=torch.float32, device=student[0].device) for x in shapes]
    teacher_softmax, student_softmax, loss, correction = saved
    aim_mse_fwd_kernel[row_grid(plan, student, config)](
        teacher[0], teacher[1], student[0], student[1], *coordinates, plan.rows, plan.tiles, plan.counts, *saved,
        *strides(*teacher[:2], *student[:2]), *sizes(plan, teacher, student), *score_factors(scale, softcap),
        **row_options(config, student, plan, softcap), num_warps=config.forward_warps, num_stages=config.stages,
    )  # fmt: skip
    aim_mse_long_fwd(teacher, student, plan, config, scale, softcap, *saved)
    return loss, teacher_softmax, student_softmax, correction


def aim_mse_bwd(teacher, student, plan, config, scale, softcap, saved, multiplier, needed):
    """Gradients of the student's q, k, v, None for those not needed, in their dtypes. `multiplier`: float32 [1]."""
    gradients = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if y else None
        for x, y in zip(student, needed, strict=True)
    ]
    query_gradient, key_gradient, value_gradient = gradients
    grams = aim_gram(teacher[2], student[2], plan, config)
    if query_gradient is not None:
        aim_mse_bwd_query_kernel[row_grid(plan, student, config)](
            teacher[0], teacher[1], student[0], student[1], *grams, plan.rows, plan.tiles, plan.counts,
            plan.row_weights, multiplier, *saved, query_gradient, *strides(*teacher[:2], *student[:2]),
            *sizes(plan, teacher, student), *score_factors(scale, softcap), scale,
            **row_options(config, student, plan, softcap), num_warps=config.query_warps, num_stages=config.stages,
        )  # fmt: skip
        aim_mse_long_queries(teacher, student, plan, config, scale, softcap, saved, multiplier, query_gradient)
    if key_gradient is not None or value_gradient is not None:
        batch, kv_heads = student[1].shape[:2]
        aim_mse_bwd_key_kernel[(plan.tiles.shape[-1], batch * kv_heads)](
            *teacher, *student, *grams, plan.teacher_segments, plan.student_segments, plan.rows, plan.tiles,
            plan.counts, plan.row_weights, multiplier, *saved, key_gradient, value_gradient,
            *strides(*teacher, *student), *sizes(plan, teacher, student), *score_factors(scale, softcap), scale,
            KEY_GRADIENT=key_gradient is not None, VALUE_GRADIENT=value_gradient is not None,
            VALUE_DIM=student[2].shape[-1], BLOCK_DV=config.block_dv, EXACT=config.exact_precision,
            **row_options(config, student, plan, softcap), num_warps=config.key_warps, num_stages=config.stages,
        )  # fmt: skip
        aim_mse_long_keys(
            teacher, student, plan, config, scale, softcap, saved, multiplier, key_gradient, value_gradient
        )
    return gradients


class AimMse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, teacher, plan, config, scale, softcap):
        student = query, key, value
        loss, *saved = aim_mse_fwd(teacher, student, plan, config, scale, softcap)
        factor = plan.pair_weight / (query.shape[1] * value.shape[-1])
        ctx.save_for_backward(*student, *teacher, *saved, factor)
        ctx.options = plan, config, scale, softcap
        row_sums = loss.sum(1, dtype=torch.float64) * plan.row_weights
        return (row_sums.sum() * factor).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient):
        *tensors, factor = ctx.saved_tensors
        student, teacher, saved = tensors[:3], tensors[3:6], tensors[6:]
        multiplier = (2 * factor * output_gradient).float().reshape(1)
        needed = ctx.needs_input_grad[:3]
        gradients = aim_mse_bwd(teacher, student, *ctx.options, saved, multiplier, needed)
        return (*gradients, None, None, None, None, None)
