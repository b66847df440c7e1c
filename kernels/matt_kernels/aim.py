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
    load_ids,
    load_pair_range,
    load_row,
    load_rows,
    load_softmax,
    load_tile,
    load_tile_range,
    load_vectors,
    load_whole_blocks,
    load_whole_tiles,
    masked_scores,
    operand,
    rounded,
    same_segment,
    softmax_weights,
    store_vectors,
    widen,
)
from matt_kernels.factors import load_slice, remainder
from matt_kernels.launch import LENGTHS, row_grid, score_factors, sizes, strides, tile_grid

# torch.nn.functional.cosine_embedding_loss adds it to each squared norm.
COSINE_EPSILON = tl.constexpr(1e-12)


@triton.jit
def segment_sums(x, same, PARTS: tl.constexpr):
    """Sums over the columns of each segment, at every column of `same` (whether two tokens are of one segment), of as
    many bfloat16 parts of x, 8 bits each: the other operand is exact."""
    same = same.to(tl.float32).to(tl.bfloat16)
    part = x.to(tl.bfloat16)
    # [BLOCK_M, BLOCK] @ [BLOCK, BLOCK_S] -> [BLOCK_M, BLOCK_S]
    sums = tl.dot(part, same)
    for _ in tl.static_range(PARTS - 1):
        x -= part.to(tl.float32)
        part = x.to(tl.bfloat16)
        sums = tl.dot(part, same, sums)
    return sums


@triton.jit
def positive(x):
    """Not below 0, where rounding of a square has put it; NaN stays."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.constexpr_function
def norm_parts(VALUE: tl.constexpr, KIND: tl.constexpr):
    """bfloat16 parts in sums of squares: their rounding shows in the VALUE, in the gradients it is taken out."""
    return 3 if KIND == "fp32" else 2 if VALUE else 1


@triton.jit
def cosine_terms(
    weights, mixed, outside, gram, student_ids, VALUE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr
):
    """(1 - cos, f, h, 1 / (X Y)) at every student token of a tile, [BLOCK_M, BLOCK_S] each; `outside` is the segment's
    a_T R R' a_T'.

    Differences are those of a_S and (X / Y) a_T C, exact zeros for equal sides however the compiler fuses products.
    """
    PARTS: tl.constexpr = 3 if KIND == "fp32" else 1
    NORM_PARTS: tl.constexpr = norm_parts(VALUE, KIND)
    own = same_segment(student_ids, student_ids)
    weights, mixed = rounded(weights, KIND), operand(mixed, KIND)
    # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
    student_products = tl.dot(weights, gram, input_precision=PRECISION)
    teacher_products = tl.dot(mixed, gram, input_precision=PRECISION)
    squares = segment_sums(weights * student_products, own, NORM_PARTS)
    student_squares = positive(squares) + COSINE_EPSILON
    outside = positive(outside) + COSINE_EPSILON
    teacher_squares = positive(segment_sums(mixed * teacher_products, own, NORM_PARTS)) + outside
    student_inverse, teacher_inverse = tl.rsqrt(student_squares), tl.rsqrt(teacher_squares)
    ratio = student_squares * student_inverse * teacher_inverse
    ratio = tl.where(student_squares == teacher_squares, 1.0, ratio)
    f, h = weights - ratio * mixed, student_products - ratio * teacher_products
    inverse = student_inverse * student_inverse
    distance = (segment_sums(f * h, own, PARTS) + COSINE_EPSILON) * inverse
    distance = 0.5 * (distance + outside * teacher_inverse * teacher_inverse)
    f -= distance * weights
    h -= distance * student_products
    # a_S h is known: -cos ε. What is off comes from rounding, of `distance` and the norms: taken out.
    off = segment_sums(weights * h, own, PARTS) + (1.0 - distance) * COSINE_EPSILON
    off = tl.where(squares * inverse > 0.5, off * inverse, 0.0)
    f -= off * weights
    h -= off * student_products
    return distance, f * inverse, h * inverse, student_inverse * teacher_inverse


@triton.jit
def last_of_segment(rows_ptr, row_limit, ids, tokens):
    """Whether a student's token is the last one of its segment, the query of its row."""
    there = (ids >= 0) & (ids < row_limit)
    return tl.load(rows_ptr + row_limit + ids, mask=there, other=-1) == tokens


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
    teacher_ids_ptr, student_ids_ptr, rows_ptr, tiles_ptr, long_ptr, counts_ptr, row_weights_ptr,
    teacher_softmax_ptr, student_softmax_ptr, mean_key_ptr, loss_ptr, correction_ptr, gradient_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    sq_stride_b, sq_stride_h, sq_stride_n, sk_stride_b, sk_stride_h, sk_stride_n,
    heads, group, softmax_size, row_limit, tile_limit, long_limit, teacher_length, student_length, scale, softcap,
    gradient_scale,
    METRIC: tl.constexpr, GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    FACTORS: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    kv_index = batch * (heads // group) + kv_head
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    low_tile, high_tile = load_whole_tiles(rows_ptr, numbers, used, row_limit, first_tile, last_tile)
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
            scores, _ = masked_scores(
                teacher_query, key, tokens, teacher_stop, teacher_low, teacher_high, scale, softcap, SOFTCAP,
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
            rest = tl.dot(teacher, rest, input_precision=FACTOR_PRECISION) * weights
            if METRIC == "mse":
                loss += tl.sum(rest, 1)
            else:
                teacher_ids = load_ids(teacher_ids_ptr, tokens, teacher_stop)

            tokens = student_start + tl.arange(0, BLOCK_S)
            inside = tokens < student_stop
            filled = inside if WHOLE else load_ids(student_ids_ptr, tokens, student_stop) > PADDING
            key = load_vectors(student_key_ptr, tokens, inside & filled, sk_stride_n, HEAD_DIM, BLOCK_D)
            if METRIC == "cosine":
                student_ids = load_ids(student_ids_ptr, tokens, student_stop)
                student_ids = tl.where(tl.load(tiles_ptr + 6 * tile_limit + tile) >= 0, -1, student_ids)
                shared = same_segment(teacher_ids, student_ids)
                outside = segment_sums(rest, shared, norm_parts(True, FACTORS))
            scores, slope = masked_scores(
                student_query, key, tokens, student_stop, student_low, student_high, scale, softcap, SOFTCAP,
                SCORE_PRECISION, not WHOLE,
            )  # fmt: skip
            weights = softmax_weights(scores, student_shift, student_factor, KIND)
            gram = load_rows(gram_ptr, student_start, student_stop, BLOCK_S, BLOCK_S, BLOCK_S, BLOCK_S)
            if METRIC == "mse":
                change = rounded(weights, FACTORS) - mixed
                # [BLOCK_M, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_M, BLOCK_S]
                h = tl.dot(operand(change, FACTORS), gram, input_precision=FACTOR_PRECISION)
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
    tile, kv_index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    tiles_ptr += batch * TILES * tile_limit
    is_long = tl.load(tiles_ptr + 6 * tile_limit + tile) >= 0
    if (tile < tl.load(counts_ptr + batch * COUNTS + 1)) & (is_long == 0):
        rows_ptr += batch * ROWS * row_limit
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

        key_gradient = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        own_sums = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
        across_sums = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
        blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
        low_block, high_block = load_whole_blocks(tiles_ptr, tile, tile_limit, row_start, row_stop, BLOCK_M)
        whole = high_block - low_block
        # First the blocks in which some row sees a part of the tile only, then the others, without masks.
        for WHOLE in tl.static_range(2):
            turns = whole if WHOLE else blocks - whole
            for step in range(turns * group):
                head, block = (step // turns).to(tl.int64), step % turns
                block = low_block + block if WHOLE else edge(block, low_block, high_block)
                numbers = row_start + block * BLOCK_M + tl.arange(0, BLOCK_M)
                used = numbers < row_stop
                teacher_row, teacher_low, teacher_high = load_row(rows_ptr, numbers, used, row_limit, 0)
                student_row, student_low, student_high = load_row(rows_ptr, numbers, used, row_limit, 1)
                outputs = (batch * heads + kv_head * group + head) * row_limit + numbers
                shift, factor = load_softmax(teacher_softmax_ptr, outputs, used, softmax_size, KIND)
                query = load_vectors(
                    teacher_query_ptr + head * tq_stride_h, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D
                )
                scores, _ = masked_scores(
                    query, teacher_key, teacher_tokens, teacher_stop, teacher_low, teacher_high, scale, softcap,
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
                shift, factor = load_softmax(student_softmax_ptr, outputs, used, softmax_size, KIND)
                query = load_vectors(
                    student_query_ptr + head * sq_stride_h, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D
                )
                scores, slope = masked_scores(
                    query, student_key, student_tokens, student_stop, student_low, student_high, scale, softcap,
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
                row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
                weights *= row_weights[:, None]
                if VALUE_GRADIENT:
                    transposed = tl.trans(operand(weights, KIND))
                    # [BLOCK_S, BLOCK_M] @ [BLOCK_M, BLOCK] -> [BLOCK_S, BLOCK]
                    own_sums = tl.dot(transposed, f, own_sums, input_precision=PRECISION)
                    across_sums = tl.dot(transposed, teacher, across_sums, input_precision=PRECISION)
                if KEY_GRADIENT:
                    correction = tl.load(correction_ptr + outputs, mask=used, other=0.0)
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
