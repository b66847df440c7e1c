"""AdamW on some rows of a table in one pass: gather, both moments, update, scatter.

Of a row's element (float32) this reads 16 bytes and writes 12, in one launch. The same as torch operations moves 144 in
26 launches (`make cost-model`).
"""

import math

import triton
import triton.language as tl

from matt_kernels.configs import row_launch

# From here to 0 the series of exp(x) - 1 below is exact to float32, and below it the subtraction is.
SERIES_FROM = tl.constexpr(-0.5)


@triton.jit
def bias_correction(updates, log_beta):
    """1 - beta ** updates, exact where it is small: 1 - 0.999 in float32 has five digits."""
    x = updates.to(tl.float32) * log_beta
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(x > SERIES_FROM, -x * series, 1 - tl.exp(x))


@triton.jit
def adamw_rows_kernel(
    table_ptr, first_ptr, second_ptr, updates_ptr, slots_ptr, gradient_ptr,
    lr, weight1, beta2, weight2, log_beta1, log_beta2, eps,
    HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    # Atomic not for other programs, whose rows are others: of this one's threads one counts, and all learn the result.
    updates = tl.atomic_add(updates_ptr + slot, 1, sem="relaxed") + 1
    rate, scale = lr / bias_correction(updates, log_beta1), 1 / bias_correction(updates, log_beta2)
    for start in range(0, HIDDEN, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        used = columns < HIDDEN
        places = slot * HIDDEN + columns
        gradient = tl.load(gradient_ptr + row * HIDDEN + columns, mask=used, other=0.0)
        first = tl.load(first_ptr + places, mask=used, other=0.0)
        second = tl.load(second_ptr + places, mask=used, other=0.0)
        value = tl.load(table_ptr + places, mask=used, other=0.0)
        first += weight1 * (gradient - first)
        second = beta2 * second + weight2 * gradient * gradient
        value -= rate * first / (tl.sqrt(second * scale) + eps)
        tl.store(first_ptr + places, first, mask=used)
        tl.store(second_ptr + places, second, mask=used)
        tl.store(table_ptr + places, value, mask=used)


def adamw_rows(table, first_moment, second_moment, updates, slots, gradient, lr, betas, eps) -> None:
    """One step of the rows `slots`, all distinct; everything but `slots` and `gradient` changes in place."""
    for x in (table, first_moment, second_moment, updates, slots, gradient):
        assert x.is_contiguous()
    hidden = table.shape[1]
    shape = row_launch(hidden)
    weights = [1 - betas[0], betas[1], 1 - betas[1]]
    adamw_rows_kernel[(len(slots),)](
        table, first_moment, second_moment, updates, slots, gradient,
        lr, *weights, *map(math.log, betas), eps,
        HIDDEN=hidden, BLOCK_D=shape.block_n, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
