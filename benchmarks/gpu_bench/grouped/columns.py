"""dK and dV of a tile of columns of one shape: everything transposed, so that factors are two registers of a thread
and gradients of scores come out as tensor cores take them."""

import triton
import triton.language as tl
from gpu_bench.grouped.cosine import (
    inverses,
    products,
    square_of_one,
    square_of_two,
    terms_of_one,
    terms_of_two,
)
from gpu_bench.grouped.layout import TILE
from gpu_bench.grouped.parts import (
    C00,
    C01,
    C10,
    C11,
    FACTORS,
    G00,
    G01,
    G11,
    LOW00,
    LOW10,
    M00,
    M01,
    M11,
    load_block,
    narrow,
    weights_of,
)
from matt_kernels.attention import (
    ROWS,
    edge,
    load_block_softmax,
    load_block_vectors,
    load_numbers,
    operand,
    widen,
    within,
)
from matt_kernels.cosine import COSINE_EPSILON, positive
from matt_kernels.launch import score_factors, strides

LENGTHS = ["each", "softmax_size", "row_limit", "capacity", "student_length"]


@triton.jit
def load_rows_of(columns_ptr, capacity, LISTS: tl.constexpr):
    """(first row that sees each column, where they stop) of the teacher's first and second token and the student's."""
    lows, highs = (), ()
    for NUMBER in tl.static_range(4):
        own = columns_ptr + (4 + 2 * (NUMBER if LISTS == 4 else 0)) * capacity
        lows += (tl.load(own)[:, None],)
        highs += (tl.load(own + capacity)[:, None],)
    return lows, highs


@triton.jit
def seeing_rows(numbers, low, high):
    return (numbers[None, :] >= low) & (numbers[None, :] < high)


@triton.jit
def load_factor(factors_ptr, capacity, columns, NUMBER: tl.constexpr):
    return tl.load(factors_ptr + NUMBER * capacity + columns)[:, None]


@triton.jit
def store_columns(ptr, positions, vectors, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    offsets = positions.to(tl.int64)[:, None] * SIZE + columns[None, :]
    mask = (positions >= 0)[:, None] & (columns < SIZE)[None, :]
    tl.store(ptr + offsets, vectors.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_values(ptr, positions, wanted, stride_n, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    offsets = positions.to(tl.int64)[:, None] * stride_n + columns[None, :]
    return tl.load(ptr + offsets, mask=wanted[:, None] & (columns < SIZE)[None, :], other=0.0).to(tl.float32)


@triton.jit
def columns_of_shape(
    teacher_query_ptr, student_query_ptr, teacher_value_ptr, student_value_ptr, teacher_columns_ptr,
    student_columns_ptr, factors_ptr, columns_ptr, rows_ptr, row_weights_ptr, teacher_softmax_ptr, student_softmax_ptr,
    correction_ptr, key_gradient_ptr, value_gradient_ptr, tq_stride_h, tq_stride_n, sq_stride_h, sq_stride_n,
    tv_stride_n, sv_stride_n, place, row_low, row_high, whole_low, whole_high, first_head, each, softmax_size,
    row_limit, capacity, scale, softcap, key_factor, value_factor,
    METRIC: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    LISTS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dK and dV of one tile, whose segments have T x S tokens, for `each` query heads from `first_head` on."""
    columns = place + tl.arange(0, TILE)
    size = capacity.to(tl.int64) * HEAD_DIM
    columns_ptr += columns
    lows, highs = load_rows_of(columns_ptr, capacity, LISTS)
    teacher0 = load_block(teacher_columns_ptr, place, TILE, HEAD_DIM, BLOCK_D)
    student0 = load_block(student_columns_ptr, place, TILE, HEAD_DIM, BLOCK_D)
    g00 = load_factor(factors_ptr, capacity, columns, G00)
    c00 = load_factor(factors_ptr, capacity, columns, C00)
    dk0 = tl.zeros([TILE, BLOCK_D], tl.float32)
    own00 = tl.zeros([TILE, 4], tl.float32)
    across00 = own00
    if T == 2:
        teacher1 = load_block(teacher_columns_ptr + size, place, TILE, HEAD_DIM, BLOCK_D)
        c10 = load_factor(factors_ptr, capacity, columns, C10)
        across01 = own00
    if S == 2:
        student1 = load_block(student_columns_ptr + size, place, TILE, HEAD_DIM, BLOCK_D)
        c01 = load_factor(factors_ptr, capacity, columns, C01)
        g01 = load_factor(factors_ptr, capacity, columns, G01)
        g11 = load_factor(factors_ptr, capacity, columns, G11)
        dk1 = dk0
        own01, own10, own11, across10 = own00, own00, own00, own00
    if (T == 2) & (S == 2):
        c11 = load_factor(factors_ptr, capacity, columns, C11)
        across11 = own00
    if METRIC == "cosine":
        # C G C' + R R': squares of all that the teacher's tokens add to its vector.
        q00 = load_factor(factors_ptr, capacity, columns, M00) + c00 * (c00 * g00)
        if S == 2:
            q00 += c01 * (2.0 * c00 * g01 + c01 * g11)
        if T == 2:
            q01 = load_factor(factors_ptr, capacity, columns, M01) + c00 * (c10 * g00)
            q11 = load_factor(factors_ptr, capacity, columns, M11) + c10 * (c10 * g00)
            if S == 2:
                q01 += c00 * (c11 * g01) + c01 * (c10 * g01 + c11 * g11)
                q11 += c11 * (2.0 * c10 * g01 + c11 * g11)
    # Blocks end at row_high: only the first, seen in part anyway, may begin before row_low.
    blocks = tl.cdiv(row_high - row_low, BLOCK_M)
    first_row = row_high - blocks * BLOCK_M
    inner = tl.cdiv(tl.maximum(whole_low - first_row, 0), BLOCK_M)
    inner, outer = within(inner, (whole_high - first_row) // BLOCK_M, 0, blocks)
    whole = outer - inner
    for WHOLE in tl.static_range(2):
        turns = whole if WHOLE else blocks - whole
        for other in range(each):
            head = tl.cast(other, tl.int64)
            for step in tl.range(turns, num_stages=None if WHOLE else 1):
                block = inner + step if WHOLE else edge(step, inner, outer)
                begin = first_row + block * BLOCK_M
                numbers = begin + tl.arange(0, BLOCK_M)
                used = numbers >= row_low
                outputs = (first_head + head) * row_limit + begin
                teacher_row = load_numbers(rows_ptr + begin, used, 0, WHOLE)
                student_row = load_numbers(rows_ptr + row_limit + begin, used, 0, WHOLE)
                shift, factor = load_block_softmax(teacher_softmax_ptr + outputs, used, softmax_size, WHOLE, KIND)
                query = load_block_vectors(
                    teacher_query_ptr + head * tq_stride_h, teacher_row, used, tq_stride_n, WHOLE, HEAD_DIM,
                    BLOCK_D,
                )  # fmt: skip
                seen = seeing_rows(numbers, lows[0], highs[0])
                t0, _ = weights_of(
                    teacher0, query, shift[None, :], factor[None, :], seen, scale, softcap, not WHOLE, SOFTCAP,
                    KIND, SCORE_PRECISION,
                )  # fmt: skip
                if T == 2:
                    seen = seeing_rows(numbers, lows[1], highs[1])
                    t1, _ = weights_of(
                        teacher1, query, shift[None, :], factor[None, :], seen, scale, softcap, not WHOLE, SOFTCAP,
                        KIND, SCORE_PRECISION,
                    )  # fmt: skip
                shift, factor = load_block_softmax(student_softmax_ptr + outputs, used, softmax_size, WHOLE, KIND)
                correction = load_numbers(correction_ptr + outputs, used, 0.0, WHOLE)[None, :]
                query = load_block_vectors(
                    student_query_ptr + head * sq_stride_h, student_row, used, sq_stride_n, WHOLE, HEAD_DIM,
                    BLOCK_D,
                )  # fmt: skip
                seen = seeing_rows(numbers, lows[2], highs[2])
                s0, slope0 = weights_of(
                    student0, query, shift[None, :], factor[None, :], seen, scale, softcap, not WHOLE, SOFTCAP,
                    KIND, SCORE_PRECISION,
                )  # fmt: skip
                if S == 2:
                    seen = seeing_rows(numbers, lows[3], highs[3])
                    s1, slope1 = weights_of(
                        student1, query, shift[None, :], factor[None, :], seen, scale, softcap, not WHOLE, SOFTCAP,
                        KIND, SCORE_PRECISION,
                    )  # fmt: skip
                if METRIC == "mse":
                    f0 = s0 - c00 * t0
                    if T == 2:
                        f0 -= c10 * t1
                    h0 = tl.fma(tl.broadcast_to(g00, f0.shape), f0, tl.broadcast_to(-correction, f0.shape))
                    if S == 2:
                        f1 = s1 - c01 * t0
                        if T == 2:
                            f1 -= c11 * t1
                        h0 += g01 * f1
                        h1 = g01 * f0 + g11 * f1 - correction
                else:
                    teacher_squares = square_of_one(t0, q00) if T == 1 else square_of_two(t0, t1, q00, q01, q11)
                    if S == 1:
                        squares = square_of_one(s0, g00)
                    else:
                        own0, own1 = products(s0, s1, g00, g01, g11)
                        squares = positive(s0 * own0 + s1 * own1) + COSINE_EPSILON
                    inverse, _, product = inverses(squares, teacher_squares)
                    t0 *= product
                    mixed0 = c00 * t0
                    if T == 2:
                        t1 *= product
                        mixed0 += c10 * t1
                    if S == 1:
                        f0, _ = terms_of_one(s0, mixed0, squares, inverse, g00)
                        h0 = g00 * f0
                    else:
                        mixed1 = c01 * t0
                        if T == 2:
                            mixed1 += c11 * t1
                        other0, other1 = products(mixed0, mixed1, g00, g01, g11)
                        f0, f1, h0, h1, _ = terms_of_two(
                            s0, s1, own0, own1, mixed0, mixed1, other0, other1, squares, inverse
                        )
                        h1 -= correction
                    h0 -= correction
                if WEIGHTED:
                    row_weights = load_numbers(row_weights_ptr + begin, used, 0.0, WHOLE)[None, :]
                    s0 *= row_weights
                if T == 2:
                    across01 += narrow(s0 * t1, TILE, BLOCK_M)
                across00 += narrow(s0 * t0, TILE, BLOCK_M)
                own00 += narrow(s0 * f0, TILE, BLOCK_M)
                if S == 2:
                    if WEIGHTED:
                        s1 *= row_weights
                    if T == 2:
                        across11 += narrow(s1 * t1, TILE, BLOCK_M)
                    across10 += narrow(s1 * t0, TILE, BLOCK_M)
                    own01 += narrow(s0 * f1, TILE, BLOCK_M)
                    own10 += narrow(s1 * f0, TILE, BLOCK_M)
                    own11 += narrow(s1 * f1, TILE, BLOCK_M)
                    dk1 = tl.dot(operand(s1 * h1 * slope1, KIND), widen(query), dk1, input_precision=PRECISION)
                # [TILE, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [TILE, BLOCK_D]
                dk0 = tl.dot(operand(s0 * h0 * slope0, KIND), widen(query), dk0, input_precision=PRECISION)

    t0_at, s0_at = tl.load(columns_ptr), tl.load(columns_ptr + 2 * capacity)
    store_columns(key_gradient_ptr, s0_at, dk0 * key_factor, 0, HEAD_DIM, BLOCK_D)
    own, across = tl.sum(own00, 1)[:, None], tl.sum(across00, 1)[:, None]
    if T == 2:
        t1_at = tl.load(columns_ptr + capacity)
        across_1 = tl.sum(across01, 1)[:, None]
    if S == 2:
        s1_at = tl.load(columns_ptr + 3 * capacity)
        store_columns(key_gradient_ptr, s1_at, dk1 * key_factor, 0, HEAD_DIM, BLOCK_D)
        own_01, own_10 = tl.sum(own01, 1)[:, None], tl.sum(own10, 1)[:, None]
        own_11, across_10 = tl.sum(own11, 1)[:, None], tl.sum(across10, 1)[:, None]
    if (T == 2) & (S == 2):
        across_11 = tl.sum(across11, 1)[:, None]
    for first in range(0, VALUE_DIM, BLOCK_V):
        # A special token has no partner and no part in the loss.
        paired = t0_at >= 0
        v0 = load_values(student_value_ptr, s0_at, paired, sv_stride_n, first, VALUE_DIM, BLOCK_V)
        left = load_values(teacher_value_ptr, t0_at, paired, tv_stride_n, first, VALUE_DIM, BLOCK_V)
        left -= c00 * v0
        if METRIC == "cosine" and S == 1:
            # f was written down for remainders orthogonal to the value: these are, whatever C is rounded to.
            left -= load_factor(factors_ptr, capacity, columns, LOW00) * v0
        if S == 2:
            v1 = load_values(student_value_ptr, s1_at, s1_at >= 0, sv_stride_n, first, VALUE_DIM, BLOCK_V)
            left -= c01 * v1
        dv0 = own * v0 - across * left
        if S == 2:
            dv0 += own_01 * v1
            dv1 = own_10 * v0 + own_11 * v1 - across_10 * left
        if T == 2:
            left = load_values(teacher_value_ptr, t1_at, t1_at >= 0, tv_stride_n, first, VALUE_DIM, BLOCK_V)
            left -= c10 * v0
            if METRIC == "cosine" and S == 1:
                left -= load_factor(factors_ptr, capacity, columns, LOW10) * v0
            if S == 2:
                left -= c11 * v1
                dv1 -= across_11 * left
            dv0 -= across_1 * left
        store_columns(value_gradient_ptr, s0_at, dv0 * value_factor, first, VALUE_DIM, BLOCK_V)
        if S == 2:
            store_columns(value_gradient_ptr, s1_at, dv1 * value_factor, first, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=LENGTHS)
def grouped_columns_kernel(
    teacher_query_ptr, student_query_ptr, teacher_value_ptr, student_value_ptr,
    teacher_columns_ptr, student_columns_ptr, factors_ptr, columns_ptr, rows_ptr, tiles_ptr, order_ptr,
    row_weights_ptr, multiplier_ptr, teacher_softmax_ptr, student_softmax_ptr, correction_ptr, key_gradient_ptr,
    value_gradient_ptr, tq_stride_b, tq_stride_h, tq_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sv_stride_b, sv_stride_h, sv_stride_n,
    heads, group, kv_total, each, softmax_size, row_limit, capacity, student_length, scale, softcap, gradient_scale,
    METRIC: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr, LISTS: tl.constexpr,
    SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """`each`: query heads of a program; the programs of a key head have gradients of their own."""
    # All heads of a tile, then the next: those with most work begin first.
    share, kv_index = tl.program_id(0) // kv_total, (tl.program_id(0) % kv_total).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    limit = capacity // TILE
    tile = tl.load(order_ptr + batch * limit + tl.program_id(1))
    tiles_ptr += batch * 5 * limit + tile
    number = tl.load(tiles_ptr)
    row_low, row_high = tl.load(tiles_ptr + limit), tl.load(tiles_ptr + 2 * limit)
    whole_low, whole_high = tl.load(tiles_ptr + 3 * limit), tl.load(tiles_ptr + 4 * limit)
    place = tile * TILE
    size = capacity.to(tl.int64) * HEAD_DIM
    teacher_columns_ptr += kv_index * 2 * size
    student_columns_ptr += kv_index * 2 * size
    factors_ptr += kv_index * FACTORS * capacity
    columns_ptr += batch * (4 + 2 * LISTS) * capacity
    row_weights_ptr += batch * row_limit
    rows_ptr += batch * ROWS * row_limit
    first_head = kv_head * group + share * each
    teacher_query_ptr += batch * tq_stride_b + first_head * tq_stride_h
    student_query_ptr += batch * sq_stride_b + first_head * sq_stride_h
    part = share.to(tl.int64) * kv_total + kv_index
    key_gradient_ptr += part * student_length * HEAD_DIM
    value_gradient_ptr += part * student_length * VALUE_DIM
    teacher_value_ptr += batch * tv_stride_b + kv_head * tv_stride_h
    student_value_ptr += batch * sv_stride_b + kv_head * sv_stride_h
    multiplier = tl.load(multiplier_ptr)

    for GROUP in tl.static_range(4):
        if (GROUPS >> GROUP) % 2 == 1:  # noqa: SIM102
            if number == GROUP:
                columns_of_shape(
                    teacher_query_ptr, student_query_ptr, teacher_value_ptr, student_value_ptr, teacher_columns_ptr,
                    student_columns_ptr, factors_ptr, columns_ptr, rows_ptr, row_weights_ptr, teacher_softmax_ptr,
                    student_softmax_ptr, correction_ptr, key_gradient_ptr, value_gradient_ptr, tq_stride_h,
                    tq_stride_n, sq_stride_h, sq_stride_n, tv_stride_n, sv_stride_n, place, row_low, row_high,
                    whole_low, whole_high, batch * heads + first_head, each, softmax_size, row_limit, capacity, scale,
                    softcap, multiplier * gradient_scale, multiplier, METRIC, 1 + GROUP % 2, 1 + GROUP // 2,
                    BLOCK_1 if GROUP < 2 else BLOCK_2, TILE, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, LISTS, SOFTCAP,
                    WEIGHTED, KIND, SCORE_PRECISION, PRECISION,
                )  # fmt: skip


def grouped_columns(
    teacher, student, columns, softmaxes, correction, plan, config, launch, options, multiplier, gradients, groups=15
) -> None:
    """Writes dK and dV of the tokens of all columns, [share, B, H_kv, n_S, d] each."""
    query, _, value = student
    batch, heads, length, head_dim = query.shape
    kv_heads, rows, capacity = value.shape[1], plan.plan.rows, plan.columns.shape[-1]
    block_1, block_2 = launch.block_n
    share = gradients[0].shape[0]
    tensors = teacher[0], query, teacher[2], value
    grouped_columns_kernel[batch * kv_heads * share, capacity // TILE](
        *tensors, *columns, plan.columns, rows, plan.tiles, plan.order, plan.plan.row_weights, multiplier,
        *softmaxes, correction, *gradients, *strides(*tensors), heads, heads // kv_heads, batch * kv_heads,
        heads // kv_heads // share, batch * heads * rows.shape[-1], rows.shape[-1], capacity, length,
        *score_factors(options.scale, options.softcap), options.scale,
        METRIC=options.metric, BLOCK_1=block_1, BLOCK_2=block_2, TILE=TILE, HEAD_DIM=head_dim, BLOCK_D=config.block_d,
        VALUE_DIM=value.shape[-1], BLOCK_V=16, KIND=config.kind, SCORE_PRECISION=config.score_precision,
        PRECISION=config.product_precision, GROUPS=groups, LISTS=plan.lists,
        SOFTCAP=options.softcap is not None, WEIGHTED=plan.weighted,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
