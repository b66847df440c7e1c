"""Variant aim_star: flash attention with a row per segment, and the distance of its outputs o on the two sides.

D is known before backward starts: the product of o with the derivative by it. Blocks of tokens that all rows see
entirely need no masks: each kernel has a loop for them and one for the others.

A row that sinks into one token has p - D = 0 there but for rounding, p being the product of the token's value with that
derivative: 1e-7 of numbers that are large, where the true difference is as small as all other weights together. float32
therefore keeps the token of each row's largest weight, and the kernel of dQ forms its difference from the others':
p* - D = Σ a_t (p* - p_t). float16 and bfloat16 have too few digits to show it.
"""

import functools

import torch
import triton
import triton.language as tl

from matt_kernels.attention import (
    COUNTS,
    ROWS,
    dot_of_parts,
    edge,
    in_parts,
    load_row,
    load_vectors,
    operand,
    seen_by_some,
    store_softmax,
    store_vectors,
    tanh,
    whole_blocks,
    widen,
)
from matt_kernels.cosine import COSINE_EPSILON
from matt_kernels.launch import LENGTHS, attend_numbers, row_grid, row_program, score_factors, strides


@triton.jit
def logits(
    left, right, tokens, low, high, scale, softcap,
    SOFTCAP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(logits, -inf where not seen; the factor that makes them scores in base 2; derivative of soft-capping) of left
    and right as in_parts has them."""
    found = dot_of_parts(left, right, PRECISION)
    factor = scale
    slope = 1.0
    if SOFTCAP:
        found = tanh(found * scale)
        factor = softcap
        slope = 1.0 - found * found
    if EDGE:
        found = tl.where((tokens >= low) & (tokens < high), found, float("-inf"))
    return found, factor, slope


@triton.jit
def attend_block(
    queries, key_ptr, value_ptr, tokens, low, high, running_max, running_sum, output, sink, key_stride_n,
    value_stride_n, scale, softcap,
    EDGE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    inside = seen_by_some(tokens, low, high) if EDGE else tl.full(tokens.shape, True, tl.int1)
    key = load_vectors(key_ptr, tokens, inside, key_stride_n, HEAD_DIM, BLOCK_D)
    keys = in_parts(key, key_ptr, tokens, inside, key_stride_n, HEAD_DIM, SCORE_PRECISION)
    found, factor, _ = logits(
        queries, keys, tokens[None, :], low[:, None], high[:, None], scale, softcap, SOFTCAP, EDGE, SCORE_PRECISION
    )
    block_max = tl.max(found, 1)
    new_max = tl.maximum(running_max, block_max * factor)
    if KIND == "fp32":
        largest = tl.max(tl.where(found == block_max[:, None], tokens[None, :], -1), 1)
        sink = tl.where(new_max > running_max, largest, sink)
    # A row that has seen nothing yet stays at -inf: subtract 0 there.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(tl.fma(found, factor, -finite_max[:, None]))
    decay = tl.exp2(running_max - finite_max)
    values = widen(load_vectors(value_ptr, tokens, inside, value_stride_n, VALUE_DIM, BLOCK_DV))
    # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_DV] -> [BLOCK_M, BLOCK_DV]
    output = tl.dot(operand(weights, KIND), values, output * decay[:, None], input_precision=PRECISION)
    return new_max, running_sum * decay + tl.sum(weights, 1), output, sink


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, counts_ptr, output_ptr, softmax_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, heads, group, softmax_size, row_limit, scale, softcap,
    SIDE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and softmax of one side's rows; for float32 the token of the largest weight, -1 where a row sees none."""
    batch_head, block = row_program(row_limit, BLOCK_M)
    batch, head = batch_head // heads, batch_head % heads
    numbers = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    position, low, high = load_row(rows_ptr + batch * ROWS * row_limit, numbers, used, row_limit, SIDE)
    query_ptr += batch * query_stride_b + head * query_stride_h
    query = load_vectors(query_ptr, position, used, query_stride_n, HEAD_DIM, BLOCK_D)
    queries = in_parts(query, query_ptr, position, used, query_stride_n, HEAD_DIM, SCORE_PRECISION)
    key_ptr += batch * key_stride_b + (head // group) * key_stride_h
    value_ptr += batch * value_stride_b + (head // group) * value_stride_h
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    sink = tl.full([BLOCK_M], -1, tl.int32)
    first, blocks, inner, outer = whole_blocks(low, high, used, BLOCK_N)
    tokens = first + tl.arange(0, BLOCK_N)
    for step in range(inner, outer):
        running_max, running_sum, output, sink = attend_block(
            queries, key_ptr, value_ptr, tokens + step * BLOCK_N, low, high, running_max, running_sum, output, sink,
            key_stride_n, value_stride_n, scale, softcap,
            False, SOFTCAP, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
    for step in range(0, blocks - (outer - inner)):
        running_max, running_sum, output, sink = attend_block(
            queries, key_ptr, value_ptr, tokens + edge(step, inner, outer) * BLOCK_N, low, high, running_max,
            running_sum, output, sink, key_stride_n, value_stride_n, scale, softcap,
            True, SOFTCAP, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, KIND, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
    output /= tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    offsets = batch_head * row_limit + numbers
    stored = numbers < row_limit
    store_vectors(output_ptr, offsets, output, stored, VALUE_DIM, BLOCK_DV)
    store_softmax(softmax_ptr, offsets, stored, softmax_size, running_max, running_sum, KIND)
    if KIND == "fp32":
        tl.store(softmax_ptr + 2 * softmax_size + offsets, sink.to(tl.float32), mask=stored)


@triton.jit
def unit_vectors(vectors):
    """(unit vectors, inverse lengths), rounded: a compiler that merged the product with the difference of the sides
    would leave something of equal ones."""
    inverse = tl.rsqrt(tl.sum(vectors * vectors, 1) + COSINE_EPSILON)
    return tl.where(inverse[:, None] == 0, 0.0, vectors * inverse[:, None]), inverse


@triton.jit
def vector_terms(student, teacher, METRIC: tl.constexpr):
    """(distance of a pair, derivative of it by s_S; half of that for mse)."""
    if METRIC == "mse":
        change = student - teacher
        return tl.sum(change * change, 1), change
    else:
        unit, student_inverse = unit_vectors(student)
        teacher_unit, teacher_inverse = unit_vectors(teacher)
        change = unit - teacher_unit
        epsilons = student_inverse * student_inverse + teacher_inverse * teacher_inverse
        distance = 0.5 * (tl.sum(change * change, 1) + COSINE_EPSILON * epsilons)
        return distance, (change - distance[:, None] * unit) * student_inverse[:, None]


@triton.jit(do_not_specialize=LENGTHS)
def attend_distance_kernel(
    teacher_ptr, student_ptr, counts_ptr, row_weights_ptr, loss_ptr, change_ptr, correction_ptr, heads, row_limit,
    METRIC: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Weighted distance of the sides' o, its derivative by the student's (half of it for mse), and D."""
    batch_head, block = row_program(row_limit, BLOCK_M)
    batch = batch_head // heads
    numbers = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = numbers < tl.load(counts_ptr + batch * COUNTS)
    stored = numbers < row_limit
    offsets = batch_head * row_limit + numbers
    teacher = load_vectors(teacher_ptr, offsets, used, VALUE_DIM, VALUE_DIM, BLOCK_DV)
    student = load_vectors(student_ptr, offsets, used, VALUE_DIM, VALUE_DIM, BLOCK_DV)
    row_weights = tl.load(row_weights_ptr + batch * row_limit + numbers, mask=used, other=0.0)
    distance, change = vector_terms(student, teacher, METRIC)
    tl.store(loss_ptr + offsets, distance * row_weights, mask=stored)
    if GRADIENT:
        change = operand(change * row_weights[:, None], KIND)
        store_vectors(change_ptr, offsets, change, stored, VALUE_DIM, BLOCK_DV)
        tl.store(correction_ptr + offsets, tl.sum(change.to(tl.float32) * student, 1), mask=stored)


def attend(teacher, student, plan, config, options, *, gradient: bool) -> tuple[torch.Tensor, ...]:
    """(weighted distance [B, H, m] of each row, and for backward: its derivative by o [B, H, m, d_v], half of it for
    mse; log-sum-exp or, for float32, maximum and inverse sum of the softmax and the token of the largest weight, exact
    below 2^24; D [B, H, m])."""
    batch, heads = student[0].shape[:2]
    rows, value_dim = (batch, heads, plan.rows.shape[-1]), student[2].shape[-1]
    new = functools.partial(torch.empty, dtype=torch.float32, device=student[0].device)
    loss, outputs = new(rows), [new(*rows, value_dim) for _ in range(2)]
    softmax = new(attend_numbers(student[0]), *rows)  # in the end the student's
    for side, (query, key, value) in enumerate((teacher, student)):
        attend_kernel[row_grid(plan, query, config.attend.block_m)](
            query, key, value, plan.rows, plan.counts, outputs[side], softmax, *strides(query, key, value),
            heads, heads // key.shape[1], loss.numel(), rows[-1], *score_factors(options.scale, options.softcap),
            SIDE=side, BLOCK_N=config.attend.block_n, **attend_constants(query, value, config, options, config.attend),
        )  # fmt: skip
    change = correction = None
    if gradient:
        dtype = torch.bfloat16 if config.kind == "bf16" else torch.float32
        change, correction = new(*rows, value_dim, dtype=dtype), new(rows)
    launch = config.attend_distance
    attend_distance_kernel[row_grid(plan, query, launch.block_m)](
        *outputs, plan.counts, plan.row_weights, loss, change, correction, heads, rows[-1], METRIC=options.metric,
        GRADIENT=gradient, BLOCK_M=launch.block_m, VALUE_DIM=value_dim, BLOCK_DV=config.block_dv, KIND=config.kind,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return loss, change, softmax, correction


def attend_constants(query, value, config, options, launch) -> dict:
    return {
        "SOFTCAP": options.softcap is not None,
        "BLOCK_M": launch.block_m,
        "HEAD_DIM": query.shape[-1],
        "BLOCK_D": config.block_d,
        "VALUE_DIM": value.shape[-1],
        "BLOCK_DV": config.block_dv,
        "KIND": config.kind,
        "SCORE_PRECISION": config.score_precision,
        "PRECISION": config.product_precision,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
