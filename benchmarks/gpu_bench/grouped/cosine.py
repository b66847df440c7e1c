"""One minus the cosine of a segment's two sides and its derivatives, column by column: the formulas of aim_rows.py.

With m = a_T C, X² = a_S G a_S' + ε, Y² = m G m' + a_T R R' a_T' + ε and p = 1 / (X Y), the derivative of 1 - cos is
h = G f, f = (a_S - (1 - cos) a_S) / X² - p m. That of a single token is what is left of two numbers that cancel but
for ε: it is written down as that. Of two tokens a_S h is known, -ε cos / X²: 1 - cos comes from it, so that what
rounding puts along a_S cancels.
"""

import triton
import triton.language as tl
from matt_kernels.cosine import COSINE_EPSILON, positive


@triton.jit
def outside_of_one(weights, own):
    """a_T R R' a_T' + ε where the teacher has one token; `own` is R R'."""
    return tl.fma(weights * weights, tl.broadcast_to(own, weights.shape), COSINE_EPSILON)


@triton.jit
def outside_of_two(weights0, weights1, own0, across, own1):
    found = weights0 * (weights0 * own0 + 2.0 * weights1 * across) + weights1 * (weights1 * own1)
    return positive(found) + COSINE_EPSILON


@triton.jit
def cosine_of_one(weights, mixed, outside, gram):
    """(2 (1 - cos), f, p) where the student has one token; all of one shape, or spread to it."""
    squares = weights * (weights * gram) + COSINE_EPSILON
    student, teacher = tl.rsqrt(squares), tl.rsqrt(mixed * (mixed * gram) + outside)
    product, inverse = student * teacher, student * student
    change = weights - (squares * product) * mixed
    distance = (change * (change * gram) + COSINE_EPSILON) * inverse + outside * (teacher * teacher)
    return distance, -(mixed * product) * (COSINE_EPSILON * inverse), product


@triton.jit
def cosine_of_two(weights0, weights1, mixed0, mixed1, outside, g00, g01, g11):
    """(2 (1 - cos), f of both, h of both, p) where the student has two tokens."""
    own0, own1 = g00 * weights0 + g01 * weights1, g01 * weights0 + g11 * weights1
    other0, other1 = g00 * mixed0 + g01 * mixed1, g01 * mixed0 + g11 * mixed1
    squares = positive(weights0 * own0 + weights1 * own1) + COSINE_EPSILON
    student = tl.rsqrt(squares)
    teacher = tl.rsqrt(positive(mixed0 * other0 + mixed1 * other1) + outside)
    product, inverse = student * teacher, student * student
    ratio = squares * product
    f0, f1 = weights0 - ratio * mixed0, weights1 - ratio * mixed1
    h0, h1 = own0 - ratio * other0, own1 - ratio * other1
    distance = (f0 * h0 + f1 * h1 + COSINE_EPSILON) * inverse + outside * (teacher * teacher)
    along = (weights0 * h0 + weights1 * h1 + COSINE_EPSILON) * inverse
    f0, f1 = (f0 - along * weights0) * inverse, (f1 - along * weights1) * inverse
    return distance, f0, f1, (h0 - along * own0) * inverse, (h1 - along * own1) * inverse, product
