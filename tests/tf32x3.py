"""Prints what a loop of tf32x3 products compiles to, for test_kernels_digits.py: python tf32x3.py 80"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(left_ptr, right_ptr, output_ptr, count):
    places = tl.arange(0, 32)
    offsets = places[:, None] * 32 + places[None, :]
    total = tl.zeros([32, 32], tl.float32)
    for step in range(count):
        left, right = tl.load(left_ptr + step * 1024 + offsets), tl.load(right_ptr + step * 1024 + offsets)
        total = tl.dot(left, right, total, input_precision="tf32x3")
    tl.store(output_ptr + offsets, total)


if __name__ == "__main__":
    signature = dict.fromkeys(("left_ptr", "right_ptr", "output_ptr"), "*fp32") | {"count": "i32"}
    source = ASTSource(kernel, signature, {})
    print(triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ttgir"])
