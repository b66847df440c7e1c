"""What the grouped kernels share: the keys and factors of a tile, weights, sums within threads."""

import triton
import triton.language as tl
from matt_kernels.attention import tanh

# Rows of the factors of a column; teacher tokens before the student's: c01 is of the first teacher and the second
# student token.
FACTORS = tl.constexpr(13)
G00, G01, G11 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
C00, C01, C10, C11 = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
M00, M01, M11 = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
HALF = tl.constexpr(10)  # 1 / 2, 0 where a column is no pair: twice a distance counts by it
LOW00, LOW10 = tl.constexpr(11), tl.constexpr(12)  # what float32 has not of C00 and C10


@triton.jit
def load_block(ptr, first, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first to first + ROWS of a contiguous [n, SIZE], zeros beyond SIZE."""
    columns = tl.arange(0, BLOCK)
    ptr += first.to(tl.int64) * SIZE
    offsets = tl.arange(0, ROWS)[:, None] * SIZE + columns[None, :]
    if SIZE == BLOCK:
        return tl.load(ptr + offsets)
    return tl.load(ptr + offsets, mask=(columns < SIZE)[None, :], other=0.0)


@triton.jit
def weights_of(
    queries, keys, shift, factor, seen, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    KIND: tl.constexpr, SCORE_PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights, derivative of soft-capping) from what store_softmax kept, spread to the shape of queries @ keys'. They
    are never above 1 by more than rounding: a tile is only seen without masks if all of its columns are."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=SCORE_PRECISION) * scale
    slope = 1.0
    if SOFTCAP:
        # scale is that of plain logits over the cap here; the base changes after the cap
        capped = tanh(scores)
        slope = 1.0 - capped * capped
        scores = capped * softcap
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - shift)
    if KIND == "fp32":
        weights *= factor
    return weights, slope


@triton.jit
def narrow(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] summed to [ROWS, 4], each a sum of what one thread has of an accumulator on NVIDIA's tensor
    cores: lanes are only added at the end of a loop."""
    return tl.sum(tl.sum(tl.reshape(x, [ROWS, COLUMNS // 8, 4, 2]), 1), 2)
