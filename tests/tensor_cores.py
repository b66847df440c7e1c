"""Tensor cores in Triton's interpreter: they round what they add to an accumulator towards zero, which it does not.

As a Hopper has it: what one instruction adds is cut off two bits below the float32 digits of the largest of it, and the
sum to float32. With it the whole loss at 1,024 tokens errs by as much as on an H200 (docs/kernels.md).
"""

import numpy as np
import triton.language as tl
from matt_kernels import configs, ops
from triton.runtime import interpreter

STEP = 8  # products that one instruction adds up
DIGITS = 24 + 2  # to which it cuts them, and the accumulator, before that


def towards_zero(x):
    """float64 as float32."""
    found = x.astype(np.float32)
    beyond = np.abs(found.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(found, np.float32(0)), found)


def to_tf32(x):
    return ((x.view(np.int32) + 0x1000) & -8192).view(np.float32)


def cut_to_tf32(x):
    return (x.view(np.int32) & -8192).view(np.float32)


def chained(products, total):
    """`total` with the products [(left, right)] added, all of the first ones, then all of the second ones, …"""
    for left, right in products:
        left, right = left.astype(np.float64), right.astype(np.float64)
        for first in range(0, left.shape[1], STEP):
            part = slice(first, first + STEP)
            terms = np.concatenate([total[None].astype(np.float64), left.T[part, :, None] * right[part, None, :]])
            _, exponents = np.frexp(np.abs(terms).max(0))
            unit = np.ldexp(1.0, exponents - DIGITS)
            total = towards_zero(np.trunc(terms / unit).sum(0) * unit)
    return total


def three_products(left, right):
    """tf32x3, as Triton makes it: the tensor core cuts off what the small parts have beyond their digits, and what is
    lost of their own product is below float32."""
    left, right = (np.ascontiguousarray(x) for x in (left, right))
    big_left, big_right = to_tf32(left), to_tf32(right)
    small_left, small_right = cut_to_tf32(left - big_left), cut_to_tf32(right - big_right)
    return (small_left, big_right), (big_left, small_right), (big_left, big_right)


def emulate(monkeypatch, *, carried: bool = False) -> None:
    """Kernels run with the tiles and precisions of an A100. tf32x3 starts from zero and is added to the accumulator in
    float32, as Triton has it (test_tf32x3_starts_from_zero); `carried`: it starts from the accumulator."""
    monkeypatch.setattr(configs, "target_of", lambda device: "cuda:80")
    monkeypatch.setattr(ops, "TUNED", {})
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, left, right, total, precision, most):
        kind = str(precision).lower()
        if left.dtype.scalar != tl.float32 or "ieee" in kind:
            return plain(self, left, right, total, precision, most)
        a, b, c = (np.ascontiguousarray(x.data) for x in (left, right, total))
        if "x3" not in kind:
            return interpreter.TensorHandle(chained([(to_tf32(a), to_tf32(b))], c), tl.float32)
        products = three_products(a, b)
        found = chained(products, c) if carried else chained(products, np.zeros_like(c)) + c
        return interpreter.TensorHandle(found, tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
