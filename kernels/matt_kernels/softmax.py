"""The softmax of every row on both sides, and the mean of the student's keys under it, which dQ needs: one launch, one
pass over the keys of each side."""

import triton
import triton.language as tl

from matt_kernels.attention import (
    COUNTS,
    ROWS,
    edge,
    in_parts,
    load_row,
    load_vectors,
    masked_scores,
    operand,
    seen_by_some,
    store_softmax,
    store_vectors,
    whole_blocks,
    widen,
)
from matt_kernels.launch import LENGTHS, row_grid, row_program, score_factors, strides


@triton.jit
def online_softmax(scores, running_max, running_sum):
    """(weights up to the row's final sum, factor for those of earlier blocks, new maximum, new sum)."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    # A row that has seen nothing yet stays at -inf: subtract 0 there.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite_max[:, None])
    factor = tl.exp2(running_max - finite_max)
    return weights, factor, new_max, running_sum * factor + tl.sum(weights, 1)


@triton.jit
def softmax_of_side(
    query_ptr, key_ptr, rows_ptr, softmax_ptr, mean_key_ptr, batch_head, numbers, used, query_stride_n, key_stride_n,
    softmax_size, row_limit, scale, softcap,
    SIDE: tl.constexpr, MEAN_KEY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    position, low, high = load_row(rows_ptr, numbers, used, row_limit, SIDE)
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    queries = in_parts(query, query_ptr, position, used, query_stride_n, HEAD_DIM, SCORE_PRECISION)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    if MEAN_KEY:
        mean_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        rounded_sum = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.max(high)
    first, blocks, inner, outer = whole_blocks(low, high, used, BLOCK_N)
    whole = outer - inner
    # First the blocks of which some row sees a part only, then the others, without masks.
    for WHOLE in tl.static_range(2):
        for step in range(whole if WHOLE else blocks - whole):
            block = inner + step if WHOLE else edge(step, inner, outer)
            tokens = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = tokens < stop if WHOLE else seen_by_some(tokens, low, high)
            key = load_vectors(key_ptr, tokens, inside, key_stride_n, HEAD_DIM, BLOCK_D)
            keys = in_parts(key, key_ptr, tokens, inside, key_stride_n, HEAD_DIM, SCORE_PRECISION)
            scores, slope = masked_scores(
                queries, keys, tokens, stop, low, high, scale, softcap, SOFTCAP, SCORE_PRECISION, not WHOLE
            )
            weights, factor, running_max, running_sum = online_softmax(scores, running_max, running_sum)
            if MEAN_KEY:
                # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                weights = operand(weights * slope, KIND)
                mean_key = tl.dot(weights, widen(key), mean_key * factor[:, None], input_precision=PRECISION)
                rounded_sum = rounded_sum * factor + tl.sum(weights.to(tl.float32), 1)
    outputs = batch_head * row_limit + numbers
    store_softmax(softmax_ptr, outputs, numbers < row_limit, softmax_size, running_max, running_sum, KIND)
    if MEAN_KEY:
        # What all keys have in common must cancel in dQ: the weights that were added up have to sum to 1.
        total = running_sum if SOFTCAP else rounded_sum
        mean_key /= tl.where(total == 0, 1.0, total)[:, None]
        store_vectors(mean_key_ptr, outputs, mean_key, used, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def softmax_kernel(
    teacher_query_ptr, teacher_key_ptr, student_query_ptr, student_key_ptr, rows_ptr, counts_ptr,
    teacher_softmax_ptr, student_softmax_ptr, mean_key_ptr,
    tq_stride_b, tq_stride_h, tq_stride_n, tk_stride_b, tk_stride_h, tk_stride_n,
    sq_stride_b, sq_stride_h, sq_stride_n, sk_stride_b, sk_stride_h, sk_stride_n,
    heads, group, softmax_size, row_limit, scale, softcap,
    MEAN_KEY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head, block = row_program(row_limit, BLOCK_M)
    batch, head = batch_head // heads, batch_head % heads
    numbers = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    rows_ptr += batch * ROWS * row_limit
    # The student's first: with the mean key they take longer.
    if tl.program_id(1) == 0:
        softmax_of_side(
            student_query_ptr + batch * sq_stride_b + head * sq_stride_h,
            student_key_ptr + batch * sk_stride_b + (head // group) * sk_stride_h,
            rows_ptr, student_softmax_ptr, mean_key_ptr, batch_head, numbers, used, sq_stride_n, sk_stride_n,
            softmax_size, row_limit, scale, softcap,
            1, MEAN_KEY, SOFTCAP, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, KIND, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
    else:
        softmax_of_side(
            teacher_query_ptr + batch * tq_stride_b + head * tq_stride_h,
            teacher_key_ptr + batch * tk_stride_b + (head // group) * tk_stride_h,
            rows_ptr, teacher_softmax_ptr, mean_key_ptr, batch_head, numbers, used, tq_stride_n, tk_stride_n,
            softmax_size, row_limit, scale, softcap,
            0, False, SOFTCAP, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, KIND, SCORE_PRECISION, PRECISION,
        )  # fmt: skip


def softmax_rows(teacher, student, softmaxes, plan, config, options, mean_key=None) -> None:
    """Writes the softmax of the teacher's and the student's rows, [1 or 2, B, H, m] float32 each as store_softmax has
    it, and `mean_key`, [B, H, m, d], if there is one: Σ a k of every row in use of the student, times the derivative of
    soft-capping."""
    query, key, _ = student
    batch, heads, _, head_dim = query.shape
    row_limit = plan.rows.shape[-1]
    softmax_kernel[(*row_grid(plan, query, config.softmax.block_m), 2)](
        *teacher[:2], *student[:2], plan.rows, plan.counts, *softmaxes, mean_key, *strides(*teacher[:2], *student[:2]),
        heads, heads // key.shape[1], batch * heads * row_limit, row_limit,
        *score_factors(options.scale, options.softcap),
        MEAN_KEY=mean_key is not None, SOFTCAP=options.softcap is not None,
        BLOCK_M=config.softmax.block_m, BLOCK_N=config.softmax.block_n,
        HEAD_DIM=head_dim, BLOCK_D=config.block_d, KIND=config.kind, SCORE_PRECISION=config.score_precision,
        PRECISION=config.product_precision,
        num_warps=config.softmax.warps, num_stages=config.softmax.stages,
    )  # fmt: skip
