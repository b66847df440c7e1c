"""What all kernels share: rows, keys, masked scores, one online-softmax step."""

import triton
import triton.language as tl


@triton.jit
def load_vectors(ptr, positions, wanted, stride_n, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of [n, SIZE] at `positions`, [len(positions), BLOCK], zeros where not wanted and beyond SIZE."""
    columns = tl.arange(0, BLOCK)
    offsets = positions.to(tl.int64)[:, None] * stride_n + columns[None, :]
    if SIZE == BLOCK:
        return tl.load(ptr + offsets, mask=wanted[:, None], other=0.0)
    return tl.load(ptr + offsets, mask=wanted[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def row_fields(rows_ptr, numbers, used, row_limit):
    """AimPlan.rows of a block: (teacher query, student query, teacher low, teacher high, student low, student high).
    An unused row sees the empty interval [0, 0)."""
    teacher_query = tl.load(rows_ptr + numbers, mask=used, other=0)
    student_query = tl.load(rows_ptr + row_limit + numbers, mask=used, other=0)
    teacher_low = tl.load(rows_ptr + 2 * row_limit + numbers, mask=used, other=0)
    teacher_high = tl.load(rows_ptr + 3 * row_limit + numbers, mask=used, other=0)
    student_low = tl.load(rows_ptr + 4 * row_limit + numbers, mask=used, other=0)
    student_high = tl.load(rows_ptr + 5 * row_limit + numbers, mask=used, other=0)
    return teacher_query, student_query, teacher_low, teacher_high, student_low, student_high


@triton.jit
def tile_range(rows_ptr, numbers, used, row_limit, tile_limit):
    """Tiles that some row of a block sees."""
    low = tl.load(rows_ptr + 6 * row_limit + numbers, mask=used, other=tile_limit)
    high = tl.load(rows_ptr + 7 * row_limit + numbers, mask=used, other=0)
    return tl.min(low), tl.max(high)


@triton.jit
def tile_tokens(tiles_ptr, tile, tile_limit, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """(teacher tokens, where they stop, student tokens, where they stop) of a tile."""
    teacher_tokens = tl.load(tiles_ptr + tile) + tl.arange(0, BLOCK_T)
    student_tokens = tl.load(tiles_ptr + 2 * tile_limit + tile) + tl.arange(0, BLOCK_S)
    teacher_stop = tl.load(tiles_ptr + tile_limit + tile)
    return teacher_tokens, teacher_stop, student_tokens, tl.load(tiles_ptr + 3 * tile_limit + tile)


@triton.jit
def masked_scores(query, key, tokens, stop, low, high, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """(scores in base 2 with -inf where a row does not see a token, derivative of soft-capping)."""
    # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK] -> [BLOCK_M, BLOCK]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    slope = 1.0
    if SOFTCAP:
        # scale is that of plain logits over the cap here; the base changes after the cap
        capped = tanh(scores)
        slope = 1.0 - capped * capped
        scores = capped * softcap
    seen = (tokens[None, :] >= low[:, None]) & (tokens[None, :] < tl.minimum(high, stop)[:, None])
    return tl.where(seen, scores, float("-inf")), slope


@triton.jit
def tanh(x):
    """To float32 rounding: the quotient cancels near zero, where the series does not."""
    decay = tl.exp2(-2.8853900817779268 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def online_softmax(scores, running_max, running_sum):
    """(weights up to the row's final sum, factor for those of earlier tiles, new maximum, new sum). The maximum is
    rounded up to an integer, so that the factors are powers of 2 and change no digit."""
    new_max = tl.maximum(running_max, tl.ceil(tl.max(scores, 1)))
    # A row that has seen nothing yet stays at -inf: subtract 0 there.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite_max[:, None])
    factor = tl.exp2(running_max - finite_max)
    return weights, factor, new_max, running_sum * factor + tl.sum(weights, 1)


@triton.jit
def softmax_weights(scores, final_max, inverse_sum):
    """From what store_softmax kept; a log-sum-exp would cost 3 bits."""
    return tl.exp2(scores - final_max[:, None]) * inverse_sum[:, None]


@triton.jit
def store_softmax(softmax_ptr, offsets, stored, size, running_max, running_sum):
    """[2, B, H, m]: maximum and inverse sum; a row that saw nothing gets (0, 0)."""
    seen = running_sum > 0
    tl.store(softmax_ptr + offsets, tl.where(seen, running_max, 0.0), mask=stored)
    inverse = tl.where(seen, 1.0 / tl.where(seen, running_sum, 1.0), 0.0)
    tl.store(softmax_ptr + size + offsets, inverse, mask=stored)


@triton.jit
def load_softmax(softmax_ptr, offsets, used, size):
    final_max = tl.load(softmax_ptr + offsets, mask=used, other=0.0)
    return final_max, tl.load(softmax_ptr + size + offsets, mask=used, other=0.0)
