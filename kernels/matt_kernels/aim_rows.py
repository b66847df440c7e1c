"""Variant aim, tile by tile: value and dQ (owned by blocks of rows), dK and dV (owned by tiles). No atomics.

With the factors of factors.py, per row and segment (a_S, a_T softmax weights of the row on the segment's tokens):

    mse     |s_S - s_T|² = e G e' + a_T R R' a_T',  e = a_S - a_T C;  dL/da_S = 2 h,  h = G e'
    cosine  with X² = |s_S|² + ε, Y² = |s_T|² + ε, û = a_S / X, ŵ = a_T C / Y (the sides are brought to one length
            before they are subtracted, so that nothing cancels once they agree):
            1 - cos = (|û - ŵ|²_G + a_T R R' a_T' / Y² + ε/X² + ε/Y²) / 2
            dL/da_S = h = G f',  f = ((û - ŵ) - (1 - cos) û) / X

Softmax backward is dL/dz = a_S (h - D), D = Σ a_S h over all that the row sees. D is only known at the end of a row, so
dQ is Σ a_S h k - D Σ a_S k, and the mean key comes with the softmax: value and dQ take a single pass.
dV_S = Σ_rows (a_S f') V_S - (a_S a_T') R, with f = e for mse and a_T / (X Y) in the place of a_T for cosine.
"""

import triton
import triton.language as tl

from matt_kernels.attention import (
    COUNTS,
    LONG,
    PADDING,
    ROWS,
    TILES,
    edge,
    in_parts,
    load_ids,
    load_numbers,
    load_pair_range,
    load_row,
    load_rows,
    load_softmax,
    load_tile,
    load_tile_range,
    load_vectors,
    load_whole_tiles,
    masked_scores,
    operand,
    rounded,
    same_segment,
    softmax_weights,
    store_vectors,
    widen,
)
from matt_kernels.cosine import cosine_terms, last_of_segment, norm_parts, segment_sums
from matt_kernels.launch import LENGTHS, row_grid, row_program, score_factors, sizes, strides


@triton.jit
def hidden_pairs(pair_low, pair_high, first_tile, last_tile, tiles_ptr, tile_limit, long_ptr, long_count):
    """How many pairs of each row are in none of the tiles that a block passes, nor of a long segment."""
    some = first_tile < last_tile
    low = tl.load(tiles_ptr + 9 * tile_limit + first_tile, mask=some, other=0)
    high = tl.load(tiles_ptr + 10 * tile_limit + last_tile - 1, mask=some, other=0)
    low = tl.minimum(tl.maximum(pair_low, low), pair_high)
    high = tl.maximum(tl.minimum(pair_high, high), low)
    hidden = pair_high - pair_low - (high - low)
    for number in range(long_count):
        segment = tl.load(long_ptr + number)
        outside = (segment < low) | (segment >= high)
        hidden -= ((segment >= pair_low) & (segment < pair_high) & outside).to(tl.int32)
    return hidden


@triton.jit(do_not_specialize=LENGTHS)
def aim_rows_kernel(
    teacher_query_ptr, teacher_key_ptr, student_query_ptr, student_key_ptr, mixture_ptr, gram_ptr, rest_ptr, low_ptr,
    gram_left_ptr, rest_left_ptr, teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, long_ptr, counts_ptr,
    row_weights_ptr, teacher_softmax_ptr, student_softmax_ptr, mean_key_ptr, loss_ptr, correction_ptr, gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    sq_stride_b, sq_stride_h, sq_stride_n, sk_stride_b, sk_stride_h, sk_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, long_limit, teacher_length, student_length, scale, softcap,
    gradient_scale,
    METRIC: tl.constexpr, GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    FACTORS: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head, block = row_program(row_limit, BLOCK_M)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    kv_index = batch * (heads // group) + kv_head
    numbers = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_count, long_count = tl.load(counts_ptr + batch * COUNTS), tl.load(counts_ptr + batch * COUNTS + 2)
    used = numbers < row_count
    rows_ptr += batch * ROWS * row_limit
    tiles_ptr += batch * TILES * tile_limit
    teacher_row, teacher_low, teacher_high = load_row(rows_ptr, numbers, used, row_limit, 0)
    student_row, student_low, student_high = load_row(rows_ptr, numbers, used, row_limit, 1)
    teacher_query_ptr += batch * tq_stride_b + head * tq_stride_h
    student_query_ptr += batch * sq_stride_b + head * sq_stride_h
    teacher_query = load_vectors(teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D)
    student_query = load_vectors(student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D)
    teacher_queries = in_parts(
        teacher_query, teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, SCORE_PRECISION
    )
    student_queries = in_parts(
        student_query, student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, SCORE_PRECISION
    )
    outputs = batch_head * row_limit + numbers
    teacher_shift, teacher_factor = load_softmax(teacher_softmax_ptr, outputs, used, softmax_size, KIND)
    student_shift, student_factor = load_softmax(student_softmax_ptr, outputs, used, softmax_size, KIND)
    teacher_key_ptr += batch * tk_stride_b + kv_head * tk_stride_h
    student_key_ptr += batch * sk_stride_b + kv_head * sk_stride_h
    mixture_ptr += kv_index * teacher_length * BLOCK_S
    if FACTORS == "fp32":
        low_ptr += kv_index * teacher_length * BLOCK_S
    rest_ptr += kv_index * teacher_length * BLOCK_T
    gram_ptr += kv_index * student_length * BLOCK_S
    teacher_ids_ptr += batch * teacher_length
    student_ids_ptr += batch * student_length
    LEFT: tl.constexpr = METRIC == "mse" and FACTORS != "fp32"
    if LEFT:
        gram_left_ptr += kv_index * student_length
        rest_left_ptr += kv_index * teacher_length

    # What long segments add has been stored already; without one nothing has.
    added = numbers < tl.where(long_count > 0, row_count, 0)
    loss = tl.load(loss_ptr + outputs, mask=added, other=0.0)
    correction = tl.zeros([BLOCK_M], tl.float32)
    if GRADIENT:
        gradient_ptr += batch_head * student_length * HEAD_DIM
        gradient = load_vectors(gradient_ptr, student_row, added, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
        rounded_sum = correction
    if METRIC == "cosine":
        pair_low, pair_high = load_pair_range(rows_ptr, numbers, used, row_limit)
    first_tile, last_tile = load_tile_range(rows_ptr, numbers, used, row_limit)
    # Most of the value comes from where rows begin: there squares are exact, and with them tiles have a mask.
    low_tile, high_tile = load_whole_tiles(rows_ptr, numbers, used, row_limit, first_tile + LEFT, last_tile)
    whole = high_tile - low_tile
    # First the tiles of which some row sees a part only, then the others, without masks.
    for WHOLE in tl.static_range(2):
        for step in range(whole if WHOLE else last_tile - first_tile - whole):
            tile = low_tile + step if WHOLE else first_tile + edge(step, low_tile - first_tile, high_tile - first_tile)
            teacher_start, teacher_stop = load_tile(tiles_ptr, tile, tile_limit, 0)
            student_start, student_stop = load_tile(tiles_ptr, tile, tile_limit, 1)
            tokens = teacher_start + tl.arange(0, BLOCK_T)
            inside = tokens < teacher_stop
            key = load_rows(teacher_key_ptr, teacher_start, teacher_stop, tk_stride_n, BLOCK_T, HEAD_DIM, BLOCK_D)
            keys = in_parts(key, teacher_key_ptr, tokens, inside, tk_stride_n, HEAD_DIM, SCORE_PRECISION)
            scores, _ = masked_scores(
                teacher_queries, keys, tokens, teacher_stop, teacher_low, teacher_high, scale, softcap, SOFTCAP,
                SCORE_PRECISION, not WHOLE,
            )  # fmt: skip
            weights = softmax_weights(scores, teacher_shift, teacher_factor, KIND)
            teacher = operand(weights, FACTORS)
            mixture = load_rows(mixture_ptr, teacher_start, teacher_stop, BLOCK_S, BLOCK_T, BLOCK_S, BLOCK_S)
            # [BLOCK_M, BLOCK_T] @ [BLOCK_T, BLOCK] -> [BLOCK_M, BLOCK]
            mixed = tl.dot(teacher, mixture, input_precision=FACTOR_PRECISION)
            if FACTORS == "fp32":
                low = load_rows(low_ptr, teacher_start, teacher_stop, BLOCK_S, BLOCK_T, BLOCK_S, BLOCK_S)
                mixed = tl.dot(teacher, low, mixed, input_precision=FACTOR_PRECISION)
            rest = load_rows(rest_ptr, teacher_start, teacher_stop, BLOCK_T, BLOCK_T, BLOCK_T, BLOCK_T)
            rest = tl.dot(teacher, rest, input_precision=FACTOR_PRECISION)
            if LEFT and not WHOLE:
                rest += weights * load_numbers(rest_left_ptr + teacher_start, inside, 0.0, False)[None, :]
            rest *= weights
            if METRIC == "mse":
                loss += tl.sum(rest, 1)
            else:
                teacher_ids = load_ids(teacher_ids_ptr, tokens, teacher_stop)

            tokens = student_start + tl.arange(0, BLOCK_S)
            inside = tokens < student_stop
            filled = inside if WHOLE else load_ids(student_ids_ptr, tokens, student_stop) > PADDING
            key = load_vectors(student_key_ptr, tokens, inside & filled, sk_stride_n, HEAD_DIM, BLOCK_D)
            keys = in_parts(key, student_key_ptr, tokens, inside & filled, sk_stride_n, HEAD_DIM, SCORE_PRECISION)
            if METRIC == "cosine":
                student_ids = load_ids(student_ids_ptr, tokens, student_stop)
                student_ids = tl.where(tl.load(tiles_ptr + 6 * tile_limit + tile) >= 0, -1, student_ids)
                shared = same_segment(teacher_ids, student_ids)
                outside = segment_sums(rest, shared, norm_parts(True, FACTORS))
            scores, slope = masked_scores(
                student_queries, keys, tokens, student_stop, student_low, student_high, scale, softcap, SOFTCAP,
                SCORE_PRECISION, not WHOLE,
            )  # fmt: skip
            weights = softmax_weights(scores, student_shift, student_factor, KIND)
            gram = load_rows(gram_ptr, student_start, student_stop, BLOCK_S, BLOCK_S, BLOCK_S, BLOCK_S)
            if METRIC == "mse":
                change = rounded(weights, FACTORS) - mixed
                # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                h = tl.dot(operand(change, FACTORS), gram, input_precision=FACTOR_PRECISION)
                if LEFT and not WHOLE:
                    left = load_numbers(gram_left_ptr + student_start, inside, 0.0, False)[None, :]
                    loss += tl.sum(change * (h + change * left), 1)
                else:
                    loss += tl.sum(change * h, 1)
            else:
                distance, _, h, _ = cosine_terms(
                    weights, mixed, outside, gram, student_ids, True, FACTORS, FACTOR_PRECISION
                )
                counted = last_of_segment(rows_ptr, row_limit, student_ids, tokens)[None, :]
                if not WHOLE:
                    paired = (student_ids[None, :] >= pair_low[:, None]) & (student_ids[None, :] < pair_high[:, None])
                    counted = counted & paired
                loss += tl.sum(tl.where(counted, distance, 0.0), 1)
            correction += tl.sum(weights * h, 1)
            if GRADIENT:
                score_gradient = operand(weights * h * slope, KIND)
                # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                gradient = tl.dot(score_gradient, widen(key), gradient, input_precision=PRECISION)
                if not SOFTCAP:
                    rounded_sum += tl.sum(score_gradient.to(tl.float32), 1)

    stored = numbers < row_limit
    if METRIC == "cosine":
        # A pair that no tile shows is one of two zero vectors: it costs 1.
        long_ptr += batch * LONG * long_limit
        loss += hidden_pairs(
            pair_low, pair_high, first_tile, last_tile, tiles_ptr, tile_limit, long_ptr, long_count
        ).to(tl.float32)
    # e G e' is not negative, but its rounding can be. A NaN stays one: rounding by bits may have lost it.
    broken = (teacher_shift != teacher_shift) | (student_shift != student_shift)
    loss = tl.where(broken, float("nan"), tl.where(loss < 0, 0.0, loss))
    correction = tl.where(broken, float("nan"), correction)
    tl.store(loss_ptr + outputs, loss, mask=stored)
    long_correction = tl.load(correction_ptr + outputs, mask=added, other=0.0)
    tl.store(correction_ptr + outputs, correction + long_correction, mask=stored)
    if GRADIENT:
        row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
        mean_key = load_vectors(mean_key_ptr, outputs, used, HEAD_DIM, HEAD_DIM, BLOCK_D)
        # What all keys have in common must cancel: the sum is that of the rounded numbers, as in the mean key.
        total = correction if SOFTCAP else rounded_sum
        gradient = (gradient - total[:, None] * mean_key) * (row_weights * gradient_scale)[:, None]
        store_vectors(gradient_ptr, student_row, gradient, used, HEAD_DIM, BLOCK_D)


def aim_rows(
    teacher, student, factors, softmaxes, mean_key, plan, config, options, loss, correction, query_gradient
) -> None:
    """Adds up loss and correction, [B, H, m] float32, and dQ before multiplication, [B, H, n_S, d] or None. `mean_key`
    is that of softmax_rows, None where dQ is."""
    aim_rows_kernel[row_grid(plan, student[0], config.rows.block_m)](
        *teacher[:2], *student[:2], *factors, plan.teacher_segments, plan.student_segments,
        plan.rows, plan.tiles, plan.long, plan.counts, plan.row_weights, *softmaxes, mean_key, loss, correction,
        query_gradient, *strides(*teacher[:2], *student[:2]), *sizes(plan, teacher, student),
        *score_factors(options.scale, options.softcap), options.scale,
        METRIC=options.metric, GRADIENT=query_gradient is not None, SOFTCAP=options.softcap is not None,
        BLOCK_M=config.rows.block_m, BLOCK_T=plan.widths[0], BLOCK_S=plan.widths[1],
        HEAD_DIM=student[0].shape[-1], BLOCK_D=config.block_d, KIND=config.kind,
        FACTORS=config.factor_kind, SCORE_PRECISION=config.score_precision, PRECISION=config.product_precision,
        FACTOR_PRECISION=config.factor_precision,
        num_warps=config.rows.warps, num_stages=config.rows.stages,
    )  # fmt: skip
