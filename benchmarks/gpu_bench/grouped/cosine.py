"""One minus the cosine of a segment's two sides and its derivatives, column by column: the formulas of aim_rows.py.

With X² = a_S G a_S' + ε, Y² = a_T (C G C' + R R') a_T' + ε and m = a_T C / (X Y), the derivative of 1 - cos is h = G f,
f = (1 - (1 - cos)) a_S / X² - m. That of a single token is what is left of two numbers that cancel but for ε: it is
written down as that. Of two tokens a_S h is known, -ε cos / X²: 1 - cos comes from it, so that what rounding puts along
a_S cancels.
"""

import triton
import triton.language as tl
from matt_kernels.cosine import COSINE_EPSILON, positive


@triton.jit
def square_of_one(weights, own):
    """The square of the vector of one token, of square `own`, and ε."""
    return tl.fma(weights * weights, tl.broadcast_to(own, weights.shape), COSINE_EPSILON)


@triton.jit
def square_of_two(weights0, weights1, own0, across, own1):
    found = weights0 * (weights0 * own0 + 2.0 * weights1 * across) + weights1 * (weights1 * own1)
    return positive(found) + COSINE_EPSILON


@triton.jit
def inverses(squares, teacher_squares):
    """(1 / X², 1 / Y², 1 / (X Y))"""
    student, teacher = tl.rsqrt(squares), tl.rsqrt(teacher_squares)
    return student * student, teacher * teacher, student * teacher


@triton.jit
def terms_of_one(weights, mixed, squares, inverse, gram):
    """(f, square of the difference that the student's token spans, and ε, over X²); `mixed` is m."""
    change = weights - squares * mixed
    return -mixed * (COSINE_EPSILON * inverse), (change * (change * gram) + COSINE_EPSILON) * inverse


@triton.jit
def products(x0, x1, g00, g01, g11):
    """G x"""
    return g00 * x0 + g01 * x1, g01 * x0 + g11 * x1


@triton.jit
def terms_of_two(weights0, weights1, own0, own1, mixed0, mixed1, other0, other1, ratio, inverse):
    """(f of both, h of both, the same square); `ratio` times `mixed` is X² m, own and other are products of G with
    weights and with `mixed`."""
    change0, change1 = weights0 - ratio * mixed0, weights1 - ratio * mixed1
    h0, h1 = own0 - ratio * other0, own1 - ratio * other1
    square = (change0 * h0 + change1 * h1 + COSINE_EPSILON) * inverse
    along = (weights0 * h0 + weights1 * h1 + COSINE_EPSILON) * inverse
    f0, f1 = (change0 - along * weights0) * inverse, (change1 - along * weights1) * inverse
    return f0, f1, (h0 - along * own0) * inverse, (h1 - along * own1) * inverse, square
