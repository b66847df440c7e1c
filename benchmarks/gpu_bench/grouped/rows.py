"""Value and dQ over columns grouped by shape; formulas as in aim_rows.py, with products of scalars."""

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
from gpu_bench.grouped.parts import (
    C00,
    C01,
    C10,
    C11,
    FACTORS,
    G00,
    G01,
    G11,
    HALF,
    M00,
    M01,
    M11,
    load_block,
    narrow,
    weights_of,
)
from matt_kernels.attention import (
    COUNTS,
    ROWS,
    edge,
    load_softmax,
    load_vectors,
    operand,
    store_vectors,
    widen,
    within,
)
from matt_kernels.cosine import COSINE_EPSILON, positive
from matt_kernels.launch import score_factors, strides

LENGTHS = ["softmax_size", "row_limit", "capacity", "student_length"]


@triton.jit
def load_bounds(ptr, used, row_limit, LISTS: tl.constexpr):
    """(first column that each row sees, where they stop) of the teacher's first and second token and the student's."""
    lows, highs = (), ()
    for NUMBER in tl.static_range(4):
        own = ptr + 2 * (NUMBER if LISTS == 4 else 0) * row_limit
        lows += (tl.load(own, mask=used, other=2147483647),)
        highs += (tl.load(own + row_limit, mask=used, other=0),)
    return lows, highs


@triton.jit
def tiles_seen(lows, highs, start, used, BLOCK_N: tl.constexpr, LISTS: tl.constexpr):
    """Tiles of a group, from `start`: (first, where they stop, first that all rows see whole, where these stop)."""
    low, high = tl.min(lows[0]), tl.max(highs[0])
    inner, outer = tl.max(tl.where(used, lows[0], 0)), tl.min(tl.where(used, highs[0], 2147483647))
    for NUMBER in tl.static_range(1, LISTS):
        low, high = tl.minimum(low, tl.min(lows[NUMBER])), tl.maximum(high, tl.max(highs[NUMBER]))
        inner = tl.maximum(inner, tl.max(tl.where(used, lows[NUMBER], 0)))
        outer = tl.minimum(outer, tl.min(tl.where(used, highs[NUMBER], 2147483647)))
    first = tl.maximum(tl.minimum(low, high) - start, 0) // BLOCK_N
    last = tl.maximum(tl.cdiv(high - start, BLOCK_N), first)
    inner, outer = within(tl.cdiv(inner - start, BLOCK_N), (outer - start) // BLOCK_N, first, last)
    return first, last, inner, outer


@triton.jit
def seen_columns(columns, low, high):
    return (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])


@triton.jit
def counted_columns(lows, highs, LISTS: tl.constexpr):
    """(first column of which each row sees some token, where they stop): those between are pairs of the row too."""
    low, high = lows[0], highs[0]
    for NUMBER in tl.static_range(1, LISTS):
        low, high = tl.minimum(low, lows[NUMBER]), tl.maximum(high, highs[NUMBER])
    return low, high


@triton.jit
def load_factor(factors_ptr, capacity, place, NUMBER: tl.constexpr, BLOCK_N: tl.constexpr):
    # The address of the first one on its own: the others' are then the same in each turn.
    return tl.load(factors_ptr + (NUMBER * capacity + place) + tl.arange(0, BLOCK_N))[None, :]


@triton.jit
def add_rounded(sums, x, SOFTCAP: tl.constexpr, KIND: tl.constexpr):
    """Row sums of an operand, 16 times over: a product with ones takes what is packed for it already. Soft-capping has
    no use for them."""
    if SOFTCAP:
        return sums
    elif KIND == "bf16":
        return tl.dot(x, tl.full([x.shape[1], 16], 1.0, tl.bfloat16), sums)
    else:
        return sums + tl.sum(x, 1)[:, None]


@triton.jit
def add_group(
    loss, correction, rounded_sum, gradient, teacher_query, student_query, teacher_columns_ptr, student_columns_ptr,
    factors_ptr, capacity, start, lows, highs, used, teacher_shift, teacher_factor, student_shift, student_factor,
    scale, softcap, METRIC: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LISTS: tl.constexpr, SOFTCAP: tl.constexpr,
    KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the columns of one shape, T x S, add to a block of rows, which sees those from `lows` to `highs`."""
    size = capacity.to(tl.int64) * HEAD_DIM
    first, last, inner, outer = tiles_seen(lows, highs, start, used, BLOCK_N, LISTS)
    whole = outer - inner
    # First the tiles of which some row sees a part only, then the others, without masks.
    for WHOLE in tl.static_range(2):
        for step in range(whole if WHOLE else last - first - whole):
            tile = inner + step if WHOLE else first + edge(step, inner - first, outer - first)
            place = start + tile * BLOCK_N
            columns = place + tl.arange(0, BLOCK_N)
            # Only the value needs these, no product: nothing fetches them ahead, so they are loaded before others wait.
            m00 = load_factor(factors_ptr, capacity, place, M00, BLOCK_N)
            if T == 2:
                m01 = load_factor(factors_ptr, capacity, place, M01, BLOCK_N)
                m11 = load_factor(factors_ptr, capacity, place, M11, BLOCK_N)
            key = load_block(teacher_columns_ptr, place, BLOCK_N, HEAD_DIM, BLOCK_D)
            seen = seen_columns(columns, lows[0], highs[0])
            t0, _ = weights_of(
                teacher_query, key, teacher_shift[:, None], teacher_factor[:, None], seen, scale, softcap, not WHOLE,
                SOFTCAP, KIND, SCORE_PRECISION,
            )  # fmt: skip
            if METRIC == "mse":
                rest = t0 * m00
            e0 = -t0 * load_factor(factors_ptr, capacity, place, C00, BLOCK_N)
            if S == 2:
                e1 = -t0 * load_factor(factors_ptr, capacity, place, C01, BLOCK_N)
            if T == 2:
                key = load_block(teacher_columns_ptr + size, place, BLOCK_N, HEAD_DIM, BLOCK_D)
                seen = seen_columns(columns, lows[1], highs[1])
                t1, _ = weights_of(
                    teacher_query, key, teacher_shift[:, None], teacher_factor[:, None], seen, scale, softcap,
                    not WHOLE, SOFTCAP, KIND, SCORE_PRECISION,
                )  # fmt: skip
                if METRIC == "mse":
                    rest += 2.0 * t1 * m01
                    loss += narrow(t1 * (t1 * m11), BLOCK_M, BLOCK_N)
                else:
                    outside = square_of_two(t0, t1, m00, m01, m11)
                e0 -= t1 * load_factor(factors_ptr, capacity, place, C10, BLOCK_N)
                if S == 2:
                    e1 -= t1 * load_factor(factors_ptr, capacity, place, C11, BLOCK_N)
            if METRIC == "mse":
                loss += narrow(t0 * rest, BLOCK_M, BLOCK_N)
            elif T == 1:
                outside = square_of_one(t0, m00)
            key0 = load_block(student_columns_ptr, place, BLOCK_N, HEAD_DIM, BLOCK_D)
            seen = seen_columns(columns, lows[2], highs[2])
            s0, slope0 = weights_of(
                student_query, key0, student_shift[:, None], student_factor[:, None], seen, scale, softcap, not WHOLE,
                SOFTCAP, KIND, SCORE_PRECISION,
            )  # fmt: skip
            g00 = load_factor(factors_ptr, capacity, place, G00, BLOCK_N)
            if METRIC == "mse":
                e0 += s0
                h0 = e0 * g00
            elif S == 1:
                squares = square_of_one(s0, g00)
                inverse, teacher_inverse, product = inverses(squares, outside + e0 * (e0 * g00))
                f0, distance = terms_of_one(s0, -e0 * product, squares, inverse, g00)
                h0 = f0 * g00
            if S == 2:
                key1 = load_block(student_columns_ptr + size, place, BLOCK_N, HEAD_DIM, BLOCK_D)
                seen = seen_columns(columns, lows[3], highs[3])
                s1, slope1 = weights_of(
                    student_query, key1, student_shift[:, None], student_factor[:, None], seen, scale, softcap,
                    not WHOLE, SOFTCAP, KIND, SCORE_PRECISION,
                )  # fmt: skip
                across = load_factor(factors_ptr, capacity, place, G01, BLOCK_N)
                if METRIC == "mse":
                    e1 += s1
                    h0 += e1 * across
                    h1 = e0 * across + e1 * load_factor(factors_ptr, capacity, place, G11, BLOCK_N)
                    loss += narrow(e1 * h1, BLOCK_M, BLOCK_N)
                else:
                    g11 = load_factor(factors_ptr, capacity, place, G11, BLOCK_N)
                    own0, own1 = products(s0, s1, g00, across, g11)
                    other0, other1 = products(e0, e1, g00, across, g11)
                    squares = positive(s0 * own0 + s1 * own1) + COSINE_EPSILON
                    mixed = positive(e0 * other0 + e1 * other1) + outside
                    inverse, teacher_inverse, product = inverses(squares, mixed)
                    _, _, h0, h1, distance = terms_of_two(
                        s0, s1, own0, own1, e0, e1, other0, other1, -squares * product, inverse
                    )
                score_gradient = operand(s1 * h1 * slope1, KIND)
                correction += narrow(s1 * h1, BLOCK_M, BLOCK_N)
                rounded_sum = add_rounded(rounded_sum, score_gradient, SOFTCAP, KIND)
                # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                gradient = tl.dot(score_gradient, widen(key1), gradient, input_precision=PRECISION)
            if METRIC == "mse":
                loss += narrow(e0 * h0, BLOCK_M, BLOCK_N)
            else:
                distance += outside * teacher_inverse
                distance *= load_factor(factors_ptr, capacity, place, HALF, BLOCK_N)
                if not WHOLE:
                    distance = tl.where(seen_columns(columns, *counted_columns(lows, highs, LISTS)), distance, 0.0)
                loss += narrow(distance, BLOCK_M, BLOCK_N)
            score_gradient = operand(s0 * h0 * slope0, KIND)
            correction += narrow(s0 * h0, BLOCK_M, BLOCK_N)
            rounded_sum = add_rounded(rounded_sum, score_gradient, SOFTCAP, KIND)
            gradient = tl.dot(score_gradient, widen(key0), gradient, input_precision=PRECISION)
    return loss, correction, rounded_sum, gradient


@triton.jit(do_not_specialize=LENGTHS)
def grouped_rows_kernel(
    teacher_query_ptr, student_query_ptr, teacher_columns_ptr, student_columns_ptr, factors_ptr, rows_ptr, counts_ptr,
    bounds_ptr, starts_ptr, row_weights_ptr, teacher_softmax_ptr, student_softmax_ptr, mean_key_ptr, loss_ptr,
    correction_ptr, gradient_ptr, hidden_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, sq_stride_b, sq_stride_h, sq_stride_n,
    heads, group, softmax_size, row_limit, capacity, student_length, scale, softcap, gradient_scale,
    METRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, GROUPS: tl.constexpr, ADDED: tl.constexpr, LISTS: tl.constexpr, SOFTCAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    kv_index = batch * (heads // group) + head // group
    # The last rows have most to do, and begin first, of all heads.
    numbers = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    rows_ptr += batch * ROWS * row_limit
    teacher_row = tl.load(rows_ptr + numbers, mask=used, other=0)
    student_row = tl.load(rows_ptr + row_limit + numbers, mask=used, other=0)
    teacher_query_ptr += batch * tq_stride_b + head * tq_stride_h
    student_query_ptr += batch * sq_stride_b + head * sq_stride_h
    teacher_query = load_vectors(teacher_query_ptr, teacher_row, used, tq_stride_n, HEAD_DIM, BLOCK_D)
    student_query = load_vectors(student_query_ptr, student_row, used, sq_stride_n, HEAD_DIM, BLOCK_D)
    outputs = batch_head * row_limit + numbers
    teacher_shift, teacher_factor = load_softmax(teacher_softmax_ptr, outputs, used, softmax_size, KIND)
    student_shift, student_factor = load_softmax(student_softmax_ptr, outputs, used, softmax_size, KIND)
    size = capacity.to(tl.int64) * HEAD_DIM
    teacher_columns_ptr += kv_index * 2 * size
    student_columns_ptr += kv_index * 2 * size
    factors_ptr += kv_index * FACTORS * capacity
    bounds_ptr += batch * 8 * LISTS * row_limit + numbers

    loss = tl.zeros([BLOCK_M, 4], tl.float32)
    correction = tl.zeros([BLOCK_M, 4], tl.float32)
    rounded_sum = tl.zeros([BLOCK_M, 16], tl.float32)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for GROUP in tl.static_range(4):
        if (GROUPS >> GROUP) % 2 == 1:
            start = tl.load(starts_ptr + batch * 4 + GROUP)
            lows, highs = load_bounds(bounds_ptr + 2 * GROUP * LISTS * row_limit, used, row_limit, LISTS)
            loss, correction, rounded_sum, gradient = add_group(
                loss, correction, rounded_sum, gradient, teacher_query, student_query, teacher_columns_ptr,
                student_columns_ptr, factors_ptr, capacity, start, lows, highs, used, teacher_shift, teacher_factor,
                student_shift, student_factor, scale, softcap, METRIC, 1 + GROUP % 2, 1 + GROUP // 2, BLOCK_M,
                BLOCK_1 if GROUP == 0 else BLOCK_2, HEAD_DIM, BLOCK_D, LISTS, SOFTCAP, KIND, SCORE_PRECISION, PRECISION,
            )  # fmt: skip

    stored = numbers < row_limit
    broken = (teacher_shift != teacher_shift) | (student_shift != student_shift)
    total = tl.sum(loss, 1)
    if METRIC == "cosine":
        # A pair that no column shows is one of two zero vectors: it costs 1. A row that is none sees such in all tiles.
        if LISTS == 4:
            total += tl.load(hidden_ptr + batch * row_limit + numbers, mask=used, other=0).to(tl.float32)
        total = tl.where(used, total, 0.0)
    total = tl.where(broken, float("nan"), tl.where(total < 0, 0.0, total))
    mean = tl.where(broken, float("nan"), tl.sum(correction, 1))
    gradient_ptr += batch_head * student_length * HEAD_DIM
    if ADDED:
        total += tl.load(loss_ptr + outputs, mask=used, other=0.0)
        mean += tl.load(correction_ptr + outputs, mask=used, other=0.0)
    tl.store(loss_ptr + outputs, total, mask=stored)
    tl.store(correction_ptr + outputs, mean, mask=stored)
    mean_key = load_vectors(mean_key_ptr, outputs, used, HEAD_DIM, HEAD_DIM, BLOCK_D)
    # What all keys have in common must cancel: the sum is that of the rounded numbers, as in the mean key.
    common = tl.sum(correction, 1) if SOFTCAP else tl.sum(rounded_sum, 1) / 16
    gradient = (gradient - common[:, None] * mean_key) * gradient_scale
    if WEIGHTED:
        gradient *= tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)[:, None]
    if ADDED:
        gradient += load_vectors(gradient_ptr, student_row, used, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    store_vectors(gradient_ptr, student_row, gradient, used, HEAD_DIM, BLOCK_D)


def grouped_rows(
    teacher, student, columns, softmaxes, mean_key, plan, config, launch, options, outputs, groups=15
) -> None:
    """Writes loss and correction, [B, H, m] float32, and dQ before multiplication, [B, H, n_S, d]; adds to what is
    there where the plan has other segments."""
    query, rows = student[0], plan.plan.rows
    batch, heads, length, head_dim = query.shape
    block_1, block_2 = launch.block_n
    grid = batch * heads, triton.cdiv(rows.shape[-1], launch.block_m)
    grouped_rows_kernel[grid](
        teacher[0], query, *columns, rows, plan.plan.counts, plan.bounds, plan.starts, plan.plan.row_weights,
        *softmaxes, mean_key, *outputs, plan.hidden,
        *strides(teacher[0], query), heads, heads // student[1].shape[1], batch * heads * rows.shape[-1],
        rows.shape[-1], plan.columns.shape[-1], length, *score_factors(options.scale, options.softcap), options.scale,
        METRIC=options.metric, BLOCK_M=launch.block_m, BLOCK_1=block_1, BLOCK_2=block_2, HEAD_DIM=head_dim,
        BLOCK_D=config.block_d, KIND=config.kind, SCORE_PRECISION=config.score_precision,
        PRECISION=config.product_precision, GROUPS=groups, ADDED=plan.others is not None, LISTS=plan.lists,
        SOFTCAP=options.softcap is not None, WEIGHTED=plan.weighted, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
