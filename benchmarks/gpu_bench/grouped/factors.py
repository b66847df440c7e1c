"""Keys permuted into columns, and the factors of each column: G, C and R R' of factors.py, at most 2 x 2."""

import torch
import triton
import triton.language as tl
from gpu_bench.grouped.layout import TILE
from gpu_bench.grouped.parts import FACTORS
from matt_kernels.attention import load_vectors
from matt_kernels.factors import DEPENDENT_FP32, SMALLEST
from matt_kernels.launch import strides

BLOCK = 16
WARPS = 4


@triton.jit
def inverse_of_two(g00, g01, g11):
    """Of a Gram matrix, the longer value first; a value that depends on the other gets zeros."""
    swapped = g11 > g00
    long, short = tl.where(swapped, g11, g00), tl.where(swapped, g00, g11)
    kept = long > SMALLEST
    inverse = tl.where(kept, 1.0 / tl.where(kept, long, 1.0), 0.0)
    share = g01 * inverse
    left = short - share * g01
    both = left > tl.maximum(DEPENDENT_FP32 * short, SMALLEST)
    other = tl.where(both, 1.0 / tl.where(both, left, 1.0), 0.0)
    of_long, across = inverse + share * share * other, -share * other
    return tl.where(swapped, other, of_long), across, tl.where(swapped, of_long, other)


@triton.jit
def with_rest(x, y):
    """(x + y, what its rounding left), y the smaller one or x zero."""
    total = x + y
    return total, y - (total - x)


@triton.jit
def columns_kernel(
    teacher_key_ptr, student_key_ptr, teacher_value_ptr, student_value_ptr, columns_ptr, tiles_ptr,
    teacher_columns_ptr, student_columns_ptr, factors_ptr,
    tk_stride_b, tk_stride_h, tk_stride_n, sk_stride_b, sk_stride_h, sk_stride_n,
    tv_stride_b, tv_stride_h, tv_stride_n, sv_stride_b, sv_stride_h, sv_stride_n, kv_heads, capacity, position_fields,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    kv_index = tl.program_id(1).to(tl.int64)
    batch, head = kv_index // kv_heads, kv_index % kv_heads
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(tiles_ptr + batch * 5 * (capacity // TILE) + tl.program_id(0) * BLOCK // TILE)
    if group >= 0:
        positions = columns_ptr + batch * position_fields * capacity + columns
        t0, t1 = tl.load(positions), tl.load(positions + capacity)
        s0, s1 = tl.load(positions + 2 * capacity), tl.load(positions + 3 * capacity)
        every = columns >= 0
        teacher_key_ptr += batch * tk_stride_b + head * tk_stride_h
        student_key_ptr += batch * sk_stride_b + head * sk_stride_h
        teacher_columns_ptr += kv_index * 2 * capacity * HEAD_DIM
        student_columns_ptr += kv_index * 2 * capacity * HEAD_DIM
        places, keys = columns.to(tl.int64)[:, None] * HEAD_DIM, tl.arange(0, BLOCK_D)[None, :]
        stored = every[:, None] & (keys < HEAD_DIM)
        second = capacity.to(tl.int64) * HEAD_DIM
        key = load_vectors(teacher_key_ptr, tl.where(t0 < 0, -2 - t0, t0), t0 != -1, tk_stride_n, HEAD_DIM, BLOCK_D)
        tl.store(teacher_columns_ptr + places + keys, key, mask=stored)
        key = load_vectors(student_key_ptr, s0, s0 >= 0, sk_stride_n, HEAD_DIM, BLOCK_D)
        tl.store(student_columns_ptr + places + keys, key, mask=stored)
        if group % 2 == 1:
            key = load_vectors(teacher_key_ptr, t1, t1 >= 0, tk_stride_n, HEAD_DIM, BLOCK_D)
            tl.store(teacher_columns_ptr + second + places + keys, key, mask=stored)
        if group >= 2:
            key = load_vectors(student_key_ptr, s1, s1 >= 0, sk_stride_n, HEAD_DIM, BLOCK_D)
            tl.store(student_columns_ptr + second + places + keys, key, mask=stored)

        teacher_value_ptr += batch * tv_stride_b + head * tv_stride_h
        student_value_ptr += batch * sv_stride_b + head * sv_stride_h
        # A special token has no partner and no part in the loss.
        v0 = load_vectors(student_value_ptr, s0, t0 >= 0, sv_stride_n, VALUE_DIM, BLOCK_DV).to(tl.float32)
        v1 = load_vectors(student_value_ptr, s1, s1 >= 0, sv_stride_n, VALUE_DIM, BLOCK_DV).to(tl.float32)
        r0 = load_vectors(teacher_value_ptr, t0, t0 >= 0, tv_stride_n, VALUE_DIM, BLOCK_DV).to(tl.float32)
        r1 = load_vectors(teacher_value_ptr, t1, t1 >= 0, tv_stride_n, VALUE_DIM, BLOCK_DV).to(tl.float32)
        g00, g01, g11 = tl.sum(v0 * v0, 1), tl.sum(v0 * v1, 1), tl.sum(v1 * v1, 1)
        i00, i01, i11 = inverse_of_two(g00, g01, g11)
        c00, c01, c10, c11 = g00 * 0.0, g00 * 0.0, g00 * 0.0, g00 * 0.0
        low00, low10 = c00, c10
        # Corrected by what is left: orthogonal to rounding.
        for _ in range(3):
            p0, p1 = tl.sum(r0 * v0, 1), tl.sum(r0 * v1, 1)
            d0, d1 = p0 * i00 + p1 * i01, p0 * i01 + p1 * i11
            c00, low00 = with_rest(c00, low00 + d0)
            c01 += d1
            r0 = r0 - d0[:, None] * v0 - d1[:, None] * v1
            p0, p1 = tl.sum(r1 * v0, 1), tl.sum(r1 * v1, 1)
            d0, d1 = p0 * i00 + p1 * i01, p0 * i01 + p1 * i11
            c10, low10 = with_rest(c10, low10 + d0)
            c11 += d1
            r1 = r1 - d0[:, None] * v0 - d1[:, None] * v1
        factors = factors_ptr + kv_index * FACTORS * capacity + columns
        tl.store(factors, g00)
        tl.store(factors + capacity, g01)
        tl.store(factors + 2 * capacity, g11)
        tl.store(factors + 3 * capacity, c00)
        tl.store(factors + 4 * capacity, c01)
        tl.store(factors + 5 * capacity, c10)
        tl.store(factors + 6 * capacity, c11)
        tl.store(factors + 7 * capacity, tl.sum(r0 * r0, 1))
        tl.store(factors + 8 * capacity, tl.sum(r0 * r1, 1))
        tl.store(factors + 9 * capacity, tl.sum(r1 * r1, 1))
        tl.store(factors + 10 * capacity, tl.where(t0 >= 0, 0.5, 0.0))
        tl.store(factors + 11 * capacity, low00)
        tl.store(factors + 12 * capacity, low10)


def make_columns(teacher, student, plan, config):
    """(teacher keys [B, H_kv, 2, C, d], student keys, factors [B, H_kv, 13, C] float32); what no tile has is not
    written."""
    key, value = student[1:]
    batch, kv_heads, _, head_dim = key.shape
    capacity = plan.columns.shape[2]
    keys = [key.new_empty(batch, kv_heads, 2, capacity, head_dim) for _ in range(2)]
    factors = key.new_empty(batch, kv_heads, FACTORS.value, capacity, dtype=torch.float32)
    sides = teacher[1], key, teacher[2], value
    columns_kernel[capacity // BLOCK, batch * kv_heads](
        *sides, plan.columns, plan.tiles, *keys, factors, *strides(*sides), kv_heads, capacity,
        plan.columns.shape[1],
        HEAD_DIM=head_dim, BLOCK_D=config.block_d, VALUE_DIM=value.shape[-1], BLOCK_DV=config.block_dv,
        BLOCK=BLOCK, TILE=TILE, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return *keys, factors
