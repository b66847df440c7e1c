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
    lengths = teacher_segments.shape[1], student_segments.shape[1]
    plan = empty_plan(len(teacher_segments), lengths, widths, variant, teacher_segments.device)
    documents = [x if x is None else x.contiguous() for x in (teacher_documents, student_documents)]
    scratch = Scratch(plan, documents)
    read_ids(plan, scratch, (teacher_segments, student_segments), causal=causal, sliding_window=sliding_window)
    batch, _, row_limit = plan.rows.shape
    tile_limit, long_limit, space, steps = plan.tiles.shape[-1], plan.long.shape[-1], scratch.space, scratch.steps
    tokens, segments, blocks = scratch.tokens, scratch.segments, triton.cdiv(row_limit, BLOCK)
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
    weigh(plan, scratch, causal=causal, reduction=reduction)
    return plan


def empty_plan(batch: int, lengths, widths: tuple[int, int], variant: str, device) -> AimPlan:
    tensors = (torch.empty(x, dtype=y, device=device) for x, y in layout(batch, lengths, widths))
    return AimPlan(*tensors, widths, variant)


class Scratch:
    """What launches leave for those behind them."""

    def __init__(self, plan: AimPlan, documents):
        (batch, _, row_limit), device = plan.rows.shape, plan.rows.device
        self.lengths = plan.teacher_segments.shape[1], plan.student_segments.shape[1]
        self.documents, self.has_documents = documents, documents[0] is not None
        self.space = max(self.lengths)
        self.steps = max(self.space, plan.tiles.shape[-1]).bit_length()
        integers = {"dtype": torch.int32, "device": device}
        self.tokens = torch.empty(batch, 2, TOKEN_FIELDS.value, self.space, **integers)
        self.segments = torch.empty(batch, 2, SEGMENT_FIELDS.value, row_limit, **integers)
        self.flags = torch.empty(batch, FLAGS.value, **integers)
        self.names = None
        if self.has_documents:
            self.names = torch.empty(batch, 2, self.space + 1, dtype=torch.int64, device=device)


def read_ids(plan: AimPlan, scratch: Scratch, ids, *, causal: bool, sliding_window: int | None) -> None:
    """The first two launches: all that is known of tokens and segments."""
    batch, _, row_limit = plan.rows.shape
    tokens_kernel[batch, 2](
        *(x.contiguous() for x in ids), *scratch.documents, plan.teacher_segments, plan.student_segments,
        scratch.tokens, scratch.names, scratch.flags, *scratch.lengths, scratch.space,
        DOCUMENTS=scratch.has_documents, BLOCK=LONG_BLOCK, **LAUNCH,
    )  # fmt: skip
    segments_kernel[triton.cdiv(row_limit, BLOCK), batch, 2](
        scratch.tokens, scratch.segments, *scratch.lengths, row_limit, scratch.space, scratch.steps,
        sliding_window or 0, DOCUMENTS=scratch.has_documents, CAUSAL=causal, WINDOW=sliding_window is not None,
        BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip


def weigh(plan: AimPlan, scratch: Scratch, *, causal: bool, reduction: str) -> None:
    """The last ones: whether documents are the same on both sides, and the weights."""
    batch, _, row_limit = plan.rows.shape
    if scratch.has_documents:
        documents_kernel[batch,](
            *scratch.documents, scratch.segments, scratch.names, plan.counts, scratch.flags, *scratch.lengths,
            row_limit, scratch.space, BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
    weights_kernel[1,](
        plan.rows, scratch.segments, scratch.tokens, plan.counts, scratch.flags, plan.row_weights, plan.pair_weight,
        batch, *scratch.lengths, row_limit, scratch.space, DOCUMENTS=scratch.has_documents,
        BY_DOCUMENT=reduction == "documents", STAR=plan.variant == "aim_star", CAUSAL=causal, BLOCK=LONG_BLOCK,
        **LAUNCH,
    )  # fmt: skip
