"""What all kernels share: rows, tiles, operands, masked scores, softmax weights."""

import triton
import triton.language as tl

# Fields of the plan's rows, tiles and long segments by number; see plan.py.
ROWS, TILES, LONG, COUNTS = tl.constexpr(13), tl.constexpr(11), tl.constexpr(5), tl.constexpr(3)


# Numbers of the head dimension that a tensor core adds up in one go for float32: the fewest that Triton 3.6 multiplies.
PART = tl.constexpr(16)
# What the plan has for tokens of no document; special tokens are -1.
PADDING = tl.constexpr(-2)


@triton.jit
def load_vectors(ptr, positions, wanted, stride_n, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of [n, SIZE] at `positions`, [len(positions), BLOCK], zeros where not wanted and beyond SIZE."""
    columns = tl.arange(0, BLOCK)
    offsets = positions.to(tl.int64)[:, None] * stride_n + columns[None, :]
    if SIZE == BLOCK:
        return tl.load(ptr + offsets, mask=wanted[:, None], other=0.0)
    return tl.load(ptr + offsets, mask=wanted[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def load_rows(ptr, start, stop, stride_n, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of [n, SIZE] from `start` on, [ROWS, BLOCK], zeros from `stop` on and beyond SIZE.

    One number depends on the start: all other parts of the addresses are the same in each turn of a loop.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    ptr += start.to(tl.int64) * stride_n
    offsets = rows[:, None] * stride_n + columns[None, :]
    mask = (rows < stop - start)[:, None]
    if SIZE != BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def store_vectors(ptr, positions, vectors, wanted, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The opposite, into a contiguous [n, SIZE]."""
    columns = tl.arange(0, BLOCK)
    offsets = positions.to(tl.int64)[:, None] * SIZE + columns[None, :]
    mask = wanted[:, None] & (columns < SIZE)[None, :]
    tl.store(ptr + offsets, vectors.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(rows_ptr, numbers, used, row_limit, SIDE: tl.constexpr):
    """(position of the query, first token seen, where tokens seen stop) on one side, 0 the teacher's, 1 the student's.
    An unused row sees nothing."""
    position = tl.load(rows_ptr + SIDE * row_limit + numbers, mask=used, other=0)
    low = tl.load(rows_ptr + (2 + 2 * SIDE) * row_limit + numbers, mask=used, other=2147483647)
    high = tl.load(rows_ptr + (3 + 2 * SIDE) * row_limit + numbers, mask=used, other=0)
    return position, low, high


@triton.jit
def load_tile_range(rows_ptr, numbers, used, row_limit):
    """Tiles that some row of a block sees."""
    low = tl.load(rows_ptr + 6 * row_limit + numbers, mask=used, other=2147483647)
    high = tl.load(rows_ptr + 7 * row_limit + numbers, mask=used, other=0)
    return tl.min(low), tl.max(high)


@triton.jit
def whole_blocks(low, high, used, BLOCK_N: tl.constexpr):
    """(first token that some row sees, blocks from there, first block that all rows see whole, where these stop)"""
    first = tl.min(low)
    blocks = tl.cdiv(tl.maximum(tl.max(high) - first, 0), BLOCK_N)
    inner = tl.cdiv(tl.maximum(tl.max(tl.where(used, low, 0)) - first, 0), BLOCK_N)
    outer = (tl.min(tl.where(used, high, 2147483647)) - first) // BLOCK_N
    inner, outer = within(inner, outer, 0, blocks)
    return first, blocks, inner, outer


@triton.jit
def seen_by_some(tokens, low, high):
    """Whether some row sees a token: padding between documents may hold anything."""
    seen = (tokens[None, :] >= low[:, None]) & (tokens[None, :] < high[:, None])
    return tl.max(seen.to(tl.int32), 0) > 0


@triton.jit
def edge(step, inner, outer):
    """Those before inner and those from outer on, numbered in one row."""
    return step + tl.where(step < inner, 0, outer - inner)


@triton.jit
def load_whole_tiles(rows_ptr, numbers, used, row_limit, first, stop):
    """Of the tiles from `first` to `stop` those that all rows of a block see whole."""
    low = tl.max(tl.load(rows_ptr + 10 * row_limit + numbers, mask=used, other=0))
    high = tl.min(tl.load(rows_ptr + 11 * row_limit + numbers, mask=used, other=2147483647))
    return within(low, high, first, stop)


@triton.jit
def load_whole_blocks(tiles_ptr, tile, tile_limit, row_start, row_stop, BLOCK_M: tl.constexpr):
    """Of the blocks of rows from row_start to row_stop those in which all rows see the whole tile."""
    low = tl.load(tiles_ptr + 7 * tile_limit + tile)
    high = tl.load(tiles_ptr + 8 * tile_limit + tile)
    # The last block may have fewer rows.
    high = tl.where(high >= row_stop, row_stop - row_start + BLOCK_M - 1, high - row_start) // BLOCK_M
    return within(tl.cdiv(tl.maximum(low - row_start, 0), BLOCK_M), high, 0, tl.cdiv(row_stop - row_start, BLOCK_M))


@triton.jit
def load_full_blocks(tiles_ptr, tile, tile_limit, row_start, row_stop, BLOCK_M: tl.constexpr):
    """(first row of blocks that end at row_stop, their number, and from and to those which hold rows alone that see the
    whole tile). Only the first block may begin before row_start; the rows there are not used."""
    blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
    first = row_stop - blocks * BLOCK_M
    low, high = tl.load(tiles_ptr + 7 * tile_limit + tile), tl.load(tiles_ptr + 8 * tile_limit + tile)
    low, high = within(tl.cdiv(tl.maximum(low - first, 0), BLOCK_M), (high - first) // BLOCK_M, 0, blocks)
    return first, blocks, low, high


@triton.jit
def load_numbers(ptr, used, other, FULL: tl.constexpr):
    """One number for each row of a block, which begins at `ptr`; FULL: all are used."""
    # The address of the first one on its own: the others' are then the same in each turn of a loop.
    ptrs = ptr + tl.arange(0, used.shape[0])
    if FULL:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=used, other=other)


@triton.jit
def load_block_row(ptr, used, row_limit, SIDE: tl.constexpr, FULL: tl.constexpr):
    """As load_row has it, of a block that begins at `ptr`."""
    position = load_numbers(ptr + SIDE * row_limit, used, 0, FULL)
    low = load_numbers(ptr + (2 + 2 * SIDE) * row_limit, used, 2147483647, FULL)
    return position, low, load_numbers(ptr + (3 + 2 * SIDE) * row_limit, used, 0, FULL)


@triton.jit
def load_block_softmax(ptr, used, size, FULL: tl.constexpr, KIND: tl.constexpr):
    """As load_softmax has it, of a block that begins at `ptr`."""
    shift = load_numbers(ptr, used, float("inf"), FULL)
    if KIND == "fp32":
        return shift, load_numbers(ptr + size, used, 0.0, FULL)
    else:
        return shift, tl.full(shift.shape, 1.0, tl.float32)


@triton.jit
def load_block_vectors(ptr, positions, used, stride_n, FULL: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """As load_vectors has it; FULL: without a mask of rows."""
    if FULL and SIZE == BLOCK:
        return tl.load(ptr + positions.to(tl.int64)[:, None] * stride_n + tl.arange(0, BLOCK)[None, :])
    return load_vectors(ptr, positions, used, stride_n, SIZE, BLOCK)


@triton.jit
def within(low, high, first, stop):
    """The part of [low, high) in [first, stop), never negative in length."""
    low = tl.minimum(tl.maximum(low, first), tl.maximum(first, stop))
    return low, tl.minimum(tl.maximum(low, high), tl.maximum(low, stop))


@triton.jit
def load_pair_range(rows_ptr, numbers, used, row_limit):
    """The segments that each row forms a pair with."""
    low = tl.load(rows_ptr + 8 * row_limit + numbers, mask=used, other=0)
    return low, tl.load(rows_ptr + 9 * row_limit + numbers, mask=used, other=0)


@triton.jit
def load_tile(tiles_ptr, tile, tile_limit, SIDE: tl.constexpr):
    """(first token, where they stop) of a tile on one side."""
    start = tl.load(tiles_ptr + 2 * SIDE * tile_limit + tile)
    return start, tl.load(tiles_ptr + (2 * SIDE + 1) * tile_limit + tile)


@triton.jit
def load_ids(ids_ptr, tokens, stop):
    return tl.load(ids_ptr + tokens, mask=tokens < stop, other=-1)


@triton.jit
def same_segment(ids, others):
    return (ids[:, None] == others[None, :]) & (ids >= 0)[:, None]


@triton.jit
def widen(x):
    """float16 as float32: it does not hold what softmax weights and gradients need."""
    if x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def operand(x, KIND: tl.constexpr):
    """x as a product in a loop takes it: "bf16", "tf32" (float32 with 11 bits) or "fp32".

    Rounded here and not by the tensor core, so that both sides, both passes and the interpreter see the same digits.
    """
    if KIND == "bf16":
        return x.to(tl.bfloat16)
    elif KIND == "tf32":
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        return (bits & -8192).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def in_parts(vectors, ptr, positions, wanted, stride_n, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Queries or keys as dot_of_parts takes them: `vectors`, or where products are made of three the same read again,
    PART numbers of the head dimension at a time."""
    if PRECISION == "tf32x3":
        parts = ()
        for first in tl.static_range(0, SIZE, PART):
            parts += (load_vectors(ptr + first, positions, wanted, stride_n, PART, PART),)
        return parts
    else:
        return (vectors,)


@triton.jit
def dot_of_parts(left, right, PRECISION: tl.constexpr):
    """left @ right', the sums of parts added up in float32. A tensor core rounds towards zero each time that it adds to
    its accumulator: over the whole head dimension scores come out smaller by so much that all gradients show it."""
    total = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    for number in tl.static_range(1, len(left)):
        total += tl.dot(left[number], tl.trans(right[number]), input_precision=PRECISION)
    return total


@triton.jit
def masked_scores(
    queries, keys, tokens, stop, low, high, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr = True,
):  # fmt: skip
    """(scores in base 2 with -inf where a row does not see a token, derivative of soft-capping), queries and keys as
    in_parts has them.

    Without MASKED every row must see every token up to `stop`; zeros from there on are scored as if they were seen.
    """
    # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK] -> [BLOCK_M, BLOCK]
    scores = dot_of_parts(queries, keys, PRECISION) * scale
    slope = 1.0
    if SOFTCAP:
        # scale is that of plain logits over the cap here; the base changes after the cap
        capped = tanh(scores)
        slope = 1.0 - capped * capped
        scores = capped * softcap
    if MASKED:
        seen = (tokens[None, :] >= low[:, None]) & (tokens[None, :] < tl.minimum(high, stop)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        if SOFTCAP:
            slope = tl.where(seen, slope, 0.0)
    return scores, slope


@triton.jit
def tanh(x):
    """To float32 rounding: the quotient cancels near zero, where the series does not."""
    decay = tl.exp2(-2.8853900817779268 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def softmax_weights(scores, shift, factor, KIND: tl.constexpr):
    """From what store_softmax kept. Never above 1, so that what stands beyond a tile's tokens stays finite."""
    weights = tl.exp2(tl.minimum(scores - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL))
    if KIND == "fp32":
        weights *= factor[:, None]
    return weights


@triton.jit
def rounded(weights, KIND: tl.constexpr):
    """Weights as float32, rounded as operand() rounds them."""
    if KIND == "bf16":
        # fewer instructions than by bits, as operand() has them for tf32
        return weights.to(tl.bfloat16).to(tl.float32)
    else:
        return operand(weights, KIND)


@triton.jit
def store_softmax(softmax_ptr, offsets, stored, size, running_max, running_sum, KIND: tl.constexpr):
    """What softmax_weights needs of a row: [1, B, H, m], the log-sum-exp, which costs 3 bits; for float32 maximum and
    inverse sum, [2, B, H, m]. A row that saw nothing gives no weight."""
    seen = running_sum != 0
    some = tl.where(seen, running_sum, 1.0)
    shift = tl.where(some == some, running_max, some)  # a NaN among scores reaches every weight of the row
    if KIND != "fp32":
        shift += tl.log2(some)
    tl.store(softmax_ptr + offsets, tl.where(seen, shift, float("inf")), mask=stored)
    if KIND == "fp32":
        tl.store(softmax_ptr + size + offsets, 1.0 / some, mask=stored)


@triton.jit
def load_softmax(softmax_ptr, offsets, used, size, KIND: tl.constexpr):
    shift = tl.load(softmax_ptr + offsets, mask=used, other=float("inf"))
    if KIND == "fp32":
        return shift, tl.load(softmax_ptr + size + offsets, mask=used, other=0.0)
    else:
        return shift, tl.full(shift.shape, 1.0, tl.float32)
