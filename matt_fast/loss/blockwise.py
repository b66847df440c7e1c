"""The torch engine: value and gradients of the AIM loss in one pass over blocks of query rows, memory linear in n.

Only the m query rows that end a segment are computed, only keys that a block can see are touched, and no vector of size
d is formed per pair: inside a tile of whole segments (see tiles.py) the weights a_T, a_S turn into the coordinates of
s_S - s_T in a small basis. Scores are kept keys-major, [keys, rows], so that a tile is one contiguous small matrix.

The loss is a scalar, so its gradient is known up to the factor that comes in backward: it is computed with the value,
and nothing of size m × n is kept or computed twice. Four products of that size remain: two for the weights, dQ and dK.
"""

import numpy as np
import torch

from matt_fast.loss.block import Block, Extent, Options, SideLayout, Tensors
from matt_fast.loss.documents import Document
from matt_fast.loss.tiles import pack, segment_basis, unit_starts
from matt_fast.loss.workspace import ONEDNN, Workspace

# Scores of one side and one block, all key heads in hand: the middle of a flat optimum, timed on one thread.
BLOCK_ELEMENTS = 3 << 17
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 96, 192


def torch_loss(
    teacher: Tensors, student: Tensors, documents: list[Document], pair_weights: list[float], **options
) -> torch.Tensor:
    """Same contract as eager_loss. No double backward."""
    teacher = tuple(x.detach() for x in teacher)
    needed = tuple(torch.is_grad_enabled() and x.requires_grad for x in student)
    return BlockwiseAim.apply(*student, teacher, documents, pair_weights, Options(**options), needed)


class BlockwiseAim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, teacher, documents, pair_weights, options, needed):
        student = query, key, value
        loss, gradients = blockwise_loss(teacher, student, documents, pair_weights, options, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = tuple(x.dtype for x in student)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # In the working dtype until here: float16 would lose gradients this small before a gradient scaler lifts them.
        scaled = (None if x is None else (x * output_gradient).to(dtype) for x, dtype in gradients)
        return (*scaled, None, None, None, None, None)


def blockwise_loss(teacher, student, documents, pair_weights, options: Options, needed):
    """The loss and the gradients of the student's q, k, v in the working dtype, None for those not needed."""
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    gradients = tuple(
        torch.zeros(x.shape, dtype=dtype, device=x.device) if wanted else None
        for x, wanted in zip(student, needed, strict=True)
    )
    half = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (*teacher, *student))
    workspace = Workspace(dtype, student[0].device, ONEDNN if half else None)
    losses = []
    for document, weight in zip(documents, pair_weights, strict=True):
        inputs = [tuple(x[document.row] for x in side) for side in (teacher, student)]
        outputs = [None if x is None else x[document.row] for x in gradients]
        losses.append(weight * DocumentLoss(document, *inputs, options, workspace, outputs).run(weight))
    return torch.stack(losses).sum().to(dtype), gradients


class DocumentLoss:
    """One document: prepare both sides, then add up value and gradients by block and by a few key heads at a time."""

    def __init__(self, document, teacher, student, options: Options, workspace: Workspace, outputs):
        self.document, self.options, self.workspace, self.outputs = document, options, workspace, outputs
        self.count = document.segment_count
        self.packing = None
        if options.variant == "aim":
            self.packing = pack(document)
            tokens = self.packing.teacher_tokens, self.packing.student_tokens
        else:
            tokens = tuple(np.arange(side.stop - side.start) for side in (document.teacher, document.student))
        dtype = workspace.dtype
        self.teacher = SideLayout(document.teacher, tokens[0], options, teacher, dtype)
        self.student = SideLayout(document.student, tokens[1], options, student, dtype)
        self.units = unit_starts(document.teacher), unit_starts(document.student)
        self.kv_heads = len(self.student.keys)
        self.groups = len(self.student.query) // self.kv_heads
        if self.packing:
            self._prepare_tiles()
        self._prepare_gradients()

    def _prepare_tiles(self):
        tiles, widths = self.packing.count, (self.packing.teacher_width, self.packing.student_width)
        long = torch.zeros(self.count + 1, dtype=torch.bool)
        long[self.packing.long] = True
        values, segments = [], []
        for side, width in zip((self.teacher, self.student), widths, strict=True):
            ids = side.segments.view(tiles, width)
            # Segments longer than a tile take the direct path.
            ids = ids.masked_fill(long.to(ids.device)[ids.clamp(min=0)], -1) if self.packing.long else ids
            segments.append(ids)
            values.append(side.values.view(self.kv_heads, tiles, width, -1))
            if self.packing.long:
                values[-1] = values[-1] * (ids >= 0)[..., None]
        self.own, self.teacher_coordinates, self.basis = segment_basis(*values, *segments)
        # [tiles, dimensions of the basis]: the student's, then what the teacher adds
        self.dimension_segments = torch.cat(segments[::-1], 1)
        if self.options.metric == "cosine":
            of_tile = torch.as_tensor(self.packing.segments, device=self.workspace.device)[..., None]
            # [tiles, segments of a tile, dimensions of the basis]
            indicators = (of_tile == self.dimension_segments[:, None]) & (of_tile >= 0)
            self.indicators = indicators.to(self.workspace.dtype)

    def _prepare_gradients(self):
        # Cosine gradients of all rows weigh alike, so a float32 product over many rows shows; with MSE it does not.
        tiled = self.packing is not None
        sums = torch.float64 if tiled and self.options.metric == "cosine" else self.workspace.dtype

        def zeros(like, dtype=None):
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)

        query, key, value = (x is not None for x in self.outputs)
        self.needs_scores = query or key
        self.key_gradient = zeros(self.student.keys) if key else None
        direct = value and not (tiled and not self.packing.long)
        self.value_gradient = zeros(self.student.values, sums) if direct else None
        self.products = None
        if value and tiled:
            shape = *self.own.shape[:3], self.basis.shape[2]
            self.products = torch.zeros(shape, dtype=sums, device=self.workspace.device)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def run(self, weight: float) -> torch.Tensor:
        factor = weight * (-2 if self.options.metric == "mse" else 1)  # of s_T - s_S
        total = torch.zeros((), dtype=torch.float64, device=self.workspace.device)
        extents = list(self._extents())
        self.workspace.reserve(max(x.elements for x in extents))
        for extent in extents:
            block = Block(self, extent, factor)
            for head in range(0, self.kv_heads, extent.heads):
                total += block.add(slice(head, min(head + extent.heads, self.kv_heads)))
            total += block.unseen_pairs * self.kv_heads * self.groups
        self._write_gradients(factor)
        return total

    def _extents(self):
        """Blocks as wide as BLOCK_ELEMENTS allows, all key heads at once where they fit, in a few numbers of rows:
        products of one shape come again. From the end, so that the rows left over see few columns."""
        stop = self.count
        while stop:
            columns = self._columns(stop - 1, stop)[1]
            width = max(x.stop - x.start for x in columns)
            rows, heads = MAX_BLOCK_ROWS, self.kv_heads
            while rows > MIN_BLOCK_ROWS and rows * heads * width > BLOCK_ELEMENTS:
                rows //= 2
            if rows * heads * width > BLOCK_ELEMENTS:
                heads = 1
            count = max(rows // self.groups, 1)
            start = max(stop - count, 0)
            yield Extent(start, stop, *self._columns(start, stop), stop - start == count, self.groups, heads)
            stop = start

    def _seen_units(self, start: int, stop: int) -> tuple[int, int]:
        """Segments, with their special tokens, of which some row sees some token on either side."""
        window, causal = self.options.sliding_window, self.options.causal
        low, high = 0, stop if causal else self.count
        if window is not None:
            reach = window - 1 if causal else window
            sides = list(zip((self.document.teacher, self.document.student), self.units, strict=True))
            low = min(int(np.searchsorted(units[1:], x.last[start] - reach, side="right")) for x, units in sides)
            if not causal:
                ends = (np.searchsorted(units[:-1], x.last[stop - 1] + reach, side="right") for x, units in sides)
                high = int(max(ends))
        return low, high

    def _columns(self, start: int, stop: int):
        """(tiles or None, (teacher columns, student columns)) as slices."""
        low, high = self._seen_units(start, stop)
        if self.packing is None:
            return None, tuple(slice(int(units[low]), int(units[high])) for units in self.units)
        tiles = slice(int(self.packing.first_tile[low]), int(self.packing.last_tile[high - 1]) + 1)
        widths = self.packing.teacher_width, self.packing.student_width
        return tiles, tuple(slice(tiles.start * width, tiles.stop * width) for width in widths)

    def _write_gradients(self, factor: float):
        _, key, value = self.outputs
        side = self.student
        for output, columns in ((key, self.key_gradient), (value, self._value_columns(factor))):
            if output is not None:
                output[:, side.start : side.stop] = columns.index_select(1, side.column_of_token)

    def _value_columns(self, factor: float):
        if self.value_gradient is not None:
            self.value_gradient.mul_(factor).index_fill_(1, self.student.uncounted, 0)
        if self.outputs[2] is None or self.packing is None:
            return self.value_gradient
        dimensions = self.dimension_segments
        columns = dimensions[:, : self.packing.student_width, None]
        same = (columns == dimensions[:, None]) & (columns >= 0)
        # [H_kv, tiles, w_S, dimensions] @ [H_kv, tiles, dimensions, d] -> [H_kv, tiles, w_S, d]
        columns = self.products.mul_(same).mul_(factor).to(self.basis) @ self.basis
        columns = columns.flatten(1, 2)
        return columns if self.value_gradient is None else columns.add_(self.value_gradient)
