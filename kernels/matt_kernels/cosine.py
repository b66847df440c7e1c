"""One minus the cosine of a segment's two sides and its derivatives, in a tile: see aim_rows.py."""

import triton
import triton.language as tl

from matt_kernels.attention import (
    operand,
    rounded,
    same_segment,
)

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
    """Whether a student's token is the last one of its segment."""
    there = (ids >= 0) & (ids < row_limit)
    return tl.load(rows_ptr + 12 * row_limit + ids, mask=there, other=-1) == tokens
