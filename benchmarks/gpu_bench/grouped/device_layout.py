"""The plan of layout.py in nine launches, ten with documents, for ids that are on a GPU; no synchronisation.

tokens, segments   as of the plan that ships
sort               which tokens form the columns of each group, and which are moved with other segments
tiles              greedy packing of these segments
rows               what rows see, as of the plan that ships; only other segments have its tiles
column tiles       which rows see each column
bounds             columns and tiles that each row sees; tiles with most work first
columns            which rows see each tile of other segments
documents, weights as of the plan that ships

Nobody knows on the host whether there are other segments: their kernels run, and end at once where there is none.
"""

from dataclasses import replace

import torch
import triton
from gpu_bench.grouped.layout import TILE, GroupedPlan, capacity_of, widths_of_others
from gpu_bench.grouped.layout_kernels import bounds_kernel, column_tiles_kernel, sort_kernel
from matt_kernels.device_plan import BLOCK, LAUNCH, LONG_BLOCK, Scratch, empty_plan, read_ids, weigh
from matt_kernels.plan_tiles import columns_kernel, rows_kernel, tiles_kernel

ROW_BLOCK = 64


def make_device_layout(
    teacher_segments, student_segments, teacher_documents=None, student_documents=None, *, reduction="pairs",
    sliding_window=None, causal=True, metric="mse",
) -> GroupedPlan:  # fmt: skip
    """As layout.grouped_plan; what is beyond the counts may be other numbers. The tiles of its plan are not made."""
    device, batch = teacher_segments.device, len(teacher_segments)
    lengths = teacher_segments.shape[1], student_segments.shape[1]
    documents = [x if x is None else x.contiguous() for x in (teacher_documents, student_documents)]
    plan = empty_plan(batch, lengths, (128, 128), "aim", device)
    others = empty_plan(batch, lengths, widths_of_others(metric, True), "aim", device)
    others = replace(others, row_weights=plan.row_weights, pair_weight=plan.pair_weight)
    scratch, window = Scratch(others, documents), sliding_window is not None
    row_limit, tile_limit, capacity = plan.rows.shape[-1], others.tiles.shape[-1], capacity_of(lengths[1])
    steps = max(scratch.space, tile_limit, capacity).bit_length()
    lists, blocks = 4 if window else 1, triton.cdiv(row_limit, BLOCK)

    def empty(*shape):
        return torch.empty(batch, *shape, dtype=torch.int32, device=device)

    columns, starts, bounds = empty(4 + 2 * lists, capacity), empty(8), empty(8 * lists, row_limit)
    tiles, order, hidden = empty(5, capacity // TILE), empty(capacity // TILE), empty(row_limit)
    pairs, before, moved = empty(capacity + 1), empty(row_limit + 1), [empty(x) for x in lengths]
    moved_counts, others_tokens = empty(2), empty(*scratch.tokens.shape[1:3], lengths[1])
    # Where ids break the rules some are not written.
    segments = torch.zeros_like(scratch.segments)
    read_ids(plan, scratch, (teacher_segments, student_segments), causal=causal, sliding_window=sliding_window)
    sort_kernel[batch, 3](
        plan.teacher_segments, plan.student_segments, scratch.tokens, scratch.segments, columns, starts, pairs,
        plan.counts, *moved, others.teacher_segments, others.student_segments, moved_counts, segments, others_tokens,
        before, others.rows, *lengths, row_limit, capacity, scratch.space,
        DOCUMENTS=scratch.has_documents, WINDOW=window, FIELDS=columns.shape[1], BLOCK=LONG_BLOCK, TILE=TILE, **LAUNCH,
    )  # fmt: skip
    tiles_kernel[batch,](
        others_tokens, segments, others.tiles, others.long, others.counts, *lengths, row_limit, tile_limit,
        others.long.shape[-1], lengths[1], BLOCK_T=others.widths[0], BLOCK_S=others.widths[1], BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    rows_kernel[blocks, batch](
        scratch.segments, others.tiles, plan.counts, plan.rows, row_limit, tile_limit, steps,
        CAUSAL=causal, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    column_tiles_kernel[capacity // TILE, batch](
        columns, starts, plan.rows, plan.counts, tiles, row_limit, capacity, steps, LISTS=lists, TILE=TILE, **LAUNCH
    )
    grid = triton.cdiv(row_limit, ROW_BLOCK) + triton.cdiv(capacity // TILE, ROW_BLOCK), batch
    bounds_kernel[grid](
        columns, starts, pairs, plan.rows, plan.counts, tiles, order, bounds, hidden, before, *moved, segments,
        others.rows, others.tiles, others.counts, *lengths, row_limit, tile_limit, capacity, steps,
        LISTS=lists, BLOCK=ROW_BLOCK, TILE=TILE, **LAUNCH,
    )  # fmt: skip
    columns_kernel[triton.cdiv(tile_limit, BLOCK), batch](
        segments, others.tiles, others.counts, row_limit, tile_limit, steps, BLOCK=BLOCK, **LAUNCH
    )
    weigh(plan, scratch, causal=causal, reduction=reduction)
    tensors = plan, columns, starts[:, :4].contiguous(), bounds, tiles, order, hidden, others, tuple(moved)
    return GroupedPlan(*tensors, moved_counts, reduction == "documents")
