"""The loss from what its rows add to it: one sum in a fixed order, and what a unit of the loss weighs in gradients."""

import triton
import triton.language as tl

BLOCK, WARPS = 8192, 16


@triton.jit(do_not_specialize=["batch", "heads", "row_limit", "divisor"])
def total_kernel(
    loss_ptr, row_weights_ptr, pair_weight_ptr, total_ptr, unit_ptr, batch, heads, row_limit, divisor, unit_factor,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a few turns of wide loads are done before a second launch would have begun."""
    places = tl.arange(0, BLOCK)
    # Many short sums in float32, and one long sum of these in float64.
    sums = tl.zeros([BLOCK], tl.float32)
    size = heads * row_limit
    for _ in range(batch):
        for first in range(0, size, BLOCK):
            own = first + places
            loss = tl.load(loss_ptr + own, mask=own < size, other=0.0)
            if WEIGHTED:
                loss *= tl.load(row_weights_ptr + own % row_limit, mask=own < size, other=0.0)
            sums += loss
        loss_ptr += size
        row_weights_ptr += row_limit
    weight = tl.load(pair_weight_ptr).to(tl.float64) / divisor.to(tl.float64)
    tl.store(total_ptr, (tl.sum(sums.to(tl.float64), 0) * weight).to(tl.float32))
    tl.store(unit_ptr, (weight * unit_factor).to(tl.float32))


def add_up(loss, plan, divisor: int, metric: str, *, weighted: bool):
    """(loss, factor on gradients of its rows), float32 scalars, from the rows' [B, H, m]; `weighted` with the plan's
    weights of rows. A pair counts pair_weight / divisor."""
    batch, heads, row_limit = loss.shape
    total, unit = loss.new_empty(()), loss.new_empty(())
    total_kernel[(1,)](
        loss, plan.row_weights, plan.pair_weight, total, unit, batch, heads, row_limit, divisor,
        2.0 if metric == "mse" else 1.0, WEIGHTED=weighted, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return total, unit
