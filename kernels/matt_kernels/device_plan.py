"""The plan of plan.py in a few launches, for ids that are on a GPU: what there are 300 small torch operations.

tokens     scans along the rows: ids reached so far and from behind, where documents start and stop
segments   of each segment first and last token, what its row sees, its document
shares     which tokens go with each segment
tiles      greedy packing, a program per row of the batch
rows       tiles and pairs of each row
columns    rows of each tile
documents  whether both sides have the same ones (only where there are some)
weights    of rows and pairs, NaN where the ids break the rules

Every launch reads what those before it wrote. Searches find nothing out of bounds, whatever the ids are.
"""

import torch
import triton

from matt_kernels.plan import AimPlan, layout
from matt_kernels.plan_tiles import columns_kernel, documents_kernel, rows_kernel, tiles_kernel, weights_kernel
from matt_kernels.plan_tokens import FLAGS, SEGMENT_FIELDS, TOKEN_FIELDS, segments_kernel, shares_kernel, tokens_kernel

BLOCK, LONG_BLOCK = 128, 1024  # of many programs, no less than the widest tile; of one that passes a whole row
LAUNCH = {"num_warps": 4, "num_stages": 1}


def make_device_plan(
    teacher_segments: torch.Tensor,
    student_segments: torch.Tensor,
    teacher_documents: torch.Tensor | None,
    student_documents: torch.Tensor | None,
    *,
    widths: tuple[int, int],
    variant: str,
    causal: bool,
    sliding_window: int | None,
    reduction: str,
) -> AimPlan:
    """As plan.make_plan; what is beyond the counts may be other numbers."""
    device, (batch, teacher_length) = teacher_segments.device, teacher_segments.shape
    lengths = teacher_length, student_segments.shape[1]
    tensors = [torch.empty(x, dtype=y, device=device) for x, y in layout(batch, lengths, widths)]
    plan = AimPlan(*tensors, widths, variant)
    row_limit, tile_limit, long_limit = (x.shape[-1] for x in tensors[:3])
    space, has_documents = max(lengths), teacher_documents is not None
    steps = max(space, tile_limit).bit_length()
    tokens = torch.empty(batch, 2, TOKEN_FIELDS.value, space, dtype=torch.int32, device=device)
    segments = torch.empty(batch, 2, SEGMENT_FIELDS.value, row_limit, dtype=torch.int32, device=device)
    flags = torch.empty(batch, FLAGS.value, dtype=torch.int32, device=device)
    names = torch.empty(batch, 2, space + 1, dtype=torch.int64, device=device) if has_documents else None
    documents = [x if x is None else x.contiguous() for x in (teacher_documents, student_documents)]
    ids = teacher_segments.contiguous(), student_segments.contiguous()
    blocks = triton.cdiv(row_limit, BLOCK)
    tokens_kernel[batch, 2](
        *ids, *documents, plan.teacher_segments, plan.student_segments, tokens, names, flags, *lengths, space,
        DOCUMENTS=has_documents, BLOCK=LONG_BLOCK, **LAUNCH,
    )  # fmt: skip
    segments_kernel[blocks, batch, 2](
        tokens, segments, *lengths, row_limit, space, steps, sliding_window or 0,
        DOCUMENTS=has_documents, CAUSAL=causal, WINDOW=sliding_window is not None, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    shares_kernel[blocks, batch, 2](tokens, segments, *lengths, row_limit, space, BLOCK=BLOCK, **LAUNCH)
    tiles_kernel[batch,](
        tokens, segments, plan.tiles, plan.long, plan.counts, *lengths, row_limit, tile_limit, long_limit, space,
        BLOCK_T=widths[0], BLOCK_S=widths[1], BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    rows_kernel[blocks, batch](
        segments, plan.tiles, plan.counts, plan.rows, row_limit, tile_limit, steps, CAUSAL=causal, BLOCK=BLOCK, **LAUNCH
    )
    columns_kernel[triton.cdiv(tile_limit, BLOCK), batch](
        segments, plan.tiles, plan.counts, row_limit, tile_limit, steps, BLOCK=BLOCK, **LAUNCH
    )
    if has_documents:
        documents_kernel[batch,](
            *documents, segments, names, plan.counts, flags, *lengths, row_limit, space, BLOCK=BLOCK, **LAUNCH
        )
    weights_kernel[1,](
        plan.rows, segments, tokens, plan.counts, flags, plan.row_weights, plan.pair_weight, batch, *lengths,
        row_limit, space, DOCUMENTS=has_documents, BY_DOCUMENT=reduction == "documents",
        STAR=variant == "aim_star", CAUSAL=causal, BLOCK=LONG_BLOCK, **LAUNCH,
    )  # fmt: skip
    return plan
