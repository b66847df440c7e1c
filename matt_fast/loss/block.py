"""A block of the torch engine: a few query rows against the columns they can see, and what these are made of."""

from dataclasses import dataclass
from math import e, log2
from typing import TYPE_CHECKING

import numpy as np
import torch

from matt_fast.loss.eager import visible
from matt_fast.loss.workspace import PIECE

if TYPE_CHECKING:
    from matt_fast.loss.blockwise import DocumentLoss

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

COSINE_EPSILON = 1e-12  # torch.nn.functional.cosine_embedding_loss adds it to each squared norm
NO_POSITION = 1 << 40
LOG2_E = log2(e)


@dataclass(frozen=True)
class Options:
    variant: str
    metric: str
    scale: float
    sliding_window: int | None
    softcap: float | None
    causal: bool


class SideLayout:
    """Query rows and key columns of one side of a document; a column without a token is never seen."""

    def __init__(self, side, tokens: np.ndarray, options: Options, inputs: Tensors, dtype: torch.dtype):
        self.query, key, value = inputs
        self.dtype, device = dtype, key.device
        present = tokens >= 0
        segments = np.where(present, side.segments[tokens], -1)
        self.unused = np.flatnonzero(~present)
        self.unused_columns = torch.as_tensor(self.unused, device=device)
        self.positions = torch.as_tensor(np.where(present, tokens, NO_POSITION), device=device)
        self.segments = torch.as_tensor(segments, device=device)
        self.rows = torch.as_tensor(side.last, device=device)
        self.start, self.stop = side.start, side.stop
        column_of_token = np.empty(side.stop - side.start, np.int64)
        column_of_token[tokens[present]] = np.flatnonzero(present)
        self.column_of_token = torch.as_tensor(column_of_token, device=device)
        sources = torch.as_tensor(np.where(present, tokens, 0) + side.start, device=device)
        self.query_tokens = self.rows + side.start
        self.keys = key.index_select(1, sources).to(dtype)
        counted = present if options.variant == "aim_star" else segments >= 0
        # Special tokens take their share of the softmax, but their values reach no pair.
        self.uncounted = torch.as_tensor(np.flatnonzero(~counted), device=device)
        self.values = value.index_select(1, sources).to(dtype).index_fill_(1, self.uncounted, 0)

    def queries(self, start: int, stop: int) -> torch.Tensor:
        """Of segments [start, stop): [H_kv, rows, d], the query heads of a key head as rows of the same products."""
        queries = self.query.index_select(1, self.query_tokens[start:stop]).to(self.dtype)
        return queries.view(len(self.keys), -1, queries.shape[-1])


@dataclass(frozen=True)
class Extent:
    """Query rows of segments [start, stop), all heads of a few key heads, and the columns that some of them can see."""

    start: int
    stop: int
    tiles: slice | None
    columns: tuple[slice, slice]  # teacher's, student's
    whole: bool  # not cut short by the end of the document
    groups: int
    heads: int  # key heads at a time

    @property
    def rows(self) -> int:
        return (self.stop - self.start) * self.groups

    @property
    def elements(self) -> int:
        return self.heads * self.rows * max(x.stop - x.start for x in self.columns)


class Block:
    """Query rows [start, stop) of a document against the columns they can see."""

    def __init__(self, parent: "DocumentLoss", extent: Extent, factor: float):
        self.parent, self.options, self.packing, self.factor = parent, parent.options, parent.packing, factor
        self.start, self.stop, self.tiles, self.columns = extent.start, extent.stop, extent.tiles, extent.columns
        self.rows, self.piece = extent.rows, PIECE // extent.rows if extent.whole else NO_POSITION
        sides = parent.teacher, parent.student
        self.masks = [self._mask(*x) for x in zip(sides, self.columns, self._first_hidden(), strict=True)]
        self.queries = [x.queries(self.start, self.stop) for x in sides]
        self.keys = [x.keys[:, columns] for x, columns in zip(sides, self.columns, strict=True)]
        self.unseen_pairs = 0
        if self.options.metric == "cosine":
            self._prepare_pairs()

    def _first_hidden(self):
        """First column, on each side, that some row may not see; columns before it need no mask."""
        if self.options.sliding_window is not None:
            return [x.start for x in self.columns]
        if not self.options.causal:
            return [x.stop for x in self.columns]
        if self.packing is None:
            return [int(units[self.start]) for units in self.parent.units]
        tile = int(self.packing.first_tile[self.start])
        return [tile * self.packing.teacher_width, tile * self.packing.student_width]

    def _mask(self, side: SideLayout, columns: slice, first_hidden: int):
        """Unused columns, then the first column of [columns, segments] 0 and -inf to add: adding is 10 times faster
        than masked_fill_ on a CPU, and all heads share it."""
        low, high = np.searchsorted(side.unused, [columns.start, first_hidden])
        positions = side.positions[first_hidden : columns.stop, None]
        rows = side.rows[self.start : self.stop]
        seen = visible(rows, positions, self.options.sliding_window, self.options.causal)
        bias = torch.where(seen, 0.0, float("-inf"))
        return side.unused_columns[low:high] - columns.start, first_hidden - columns.start, bias

    # -- pairs (cosine only: with MSE a hidden pair adds nothing) ------------------------------------------------------

    def _prepare_pairs(self):
        """Which (segment, row) pairs count, and how many of those that count are outside this block's columns."""
        if self.packing is None:
            return
        rows = np.arange(self.start, self.stop)
        segments = self.packing.segments[self.tiles]
        counted = (segments >= 0)[..., None] & self._counted(segments[..., None], rows)
        device = self.parent.workspace.device
        # [tiles, segments of a tile, rows of all heads of a key head]
        self.pair_mask = torch.as_tensor(counted, device=device).repeat(1, 1, self.parent.groups)
        total = int((rows + 1).sum()) if self.options.causal else len(rows) * self.parent.count
        in_long = sum(int(self._counted(segment, rows).sum()) for segment, _ in self._long_columns())
        self.unseen_pairs = total - int(counted.sum()) - in_long

    def _counted(self, segment, rows):
        return (segment <= rows) | (not self.options.causal)

    def _long_columns(self):
        """(segment, (teacher columns, student columns)) of the long segments in sight, relative to the block."""
        packing, tiles = self.packing, self.tiles
        for segment in packing.long:
            low = max(int(packing.first_tile[segment]), tiles.start) - tiles.start
            high = min(int(packing.last_tile[segment]) + 1, tiles.stop) - tiles.start
            if low < high:
                widths = packing.teacher_width, packing.student_width
                yield segment, tuple(slice(low * width, high * width) for width in widths)

    # -- a few key heads -----------------------------------------------------------------------------------------------

    def add(self, heads: slice) -> torch.Tensor:
        """Add this block's gradients of some key heads to the document's; return their part of the sum of distances."""
        self.heads = heads
        parent = self.parent
        teacher, _ = self._weights("teacher", 0)
        student, tanh = self._weights("student", 1)
        gradient = parent.workspace.take("gradient", *student.shape) if parent.needs_scores else None
        if self.packing is None:
            everything = tuple(slice(0, x.shape[1]) for x in (teacher, student))
            total = self._direct(teacher, student, gradient, everything, None)
        else:
            total = self._tiled(teacher, student, gradient)
            for segment, columns in self._long_columns():
                total = total + self._direct(teacher, student, gradient, columns, segment)
        if parent.needs_scores:
            self._score_gradients(student, gradient, tanh)
        return total

    def _weights(self, name: str, side: int):
        """Softmax weights of the block, [heads, columns, rows], and with a cap the tanh they came from."""
        take, options = self.parent.workspace.take, self.options
        queries, keys = self.queries[side][self.heads], self.keys[side][self.heads]
        shape = *keys.shape[:2], self.rows
        logits = take(name, *shape)
        for piece in self.parent.workspace.pieces(shape[1], self.piece):
            # [heads, columns, d] @ [heads, d, rows] -> [heads, columns, rows]
            torch.bmm(keys[:, piece], queries.mT, out=logits[:, piece])
        scale, tanh = options.scale, None
        if options.softcap is not None:
            tanh = torch.tanh(logits.mul_(scale / options.softcap), out=take("tanh", *shape))
            scale = options.softcap
            logits.copy_(tanh)
        unused, first, bias = self.masks[side]
        if len(unused):
            logits.index_fill_(1, unused, float("-inf"))
        if first < shape[1]:
            logits[:, first:].unflatten(2, (self.parent.groups, -1)).add_(bias[:, None])
        # torch.softmax takes 1.6 times as long on a CPU, for its exp
        bits = scale * LOG2_E
        weights = torch.add(logits.amax(1, keepdim=True).mul_(-bits), logits, alpha=bits, out=logits).exp2_()
        return weights.mul_(weights.sum(1, keepdim=True).reciprocal_()), tanh

    def _tiled(self, teacher, student, gradient) -> torch.Tensor:
        """Segments that fit in a tile: coordinates [tiles, dimensions of the basis, rows], distance, its gradients.

        Tiles here are those of all heads in hand.
        """
        parent, take, rows = self.parent, self.parent.workspace.take, self.rows
        part = self.heads, self.tiles
        own, coordinates = (x[part].flatten(0, 1) for x in (parent.own, parent.teacher_coordinates))
        tiles, width, _ = own.shape
        teacher, student = (x.view(tiles, -1, rows) for x in (teacher, student))
        # [tiles, dimensions, columns] @ [tiles, columns, rows] -> [tiles, dimensions, rows]
        states = take("states", tiles, coordinates.shape[2], rows)
        torch.bmm(coordinates.mT, teacher, out=states)
        student_states = torch.bmm(own.mT, student, out=take("gradient", *student.shape))
        if self.options.metric == "mse":
            states[:, :width].sub_(student_states)
            total = _squares(states)
        else:
            total = self._tiled_cosine(states, student_states)
        if gradient is not None:
            # [tiles, columns, dimensions] @ [tiles, dimensions, rows] -> [tiles, columns, rows]
            torch.bmm(own, states[:, :width], out=gradient.view(student.shape))
        if parent.products is not None:
            products = parent.products[part]
            # [tiles, columns, rows] @ [tiles, rows, dimensions] -> [tiles, columns, dimensions]
            products.add_(torch.bmm(student.to(products), states.mT.to(products)).view(products.shape))
        return total

    def _tiled_cosine(self, states, student_states):
        """The sum of 1 - cos; the teacher's states become the gradients of the student's."""
        heads, width = self.heads.stop - self.heads.start, student_states.shape[1]
        both = self.parent.indicators[self.tiles].repeat(heads, 1, 1)
        own = both[..., :width]
        # [tiles, segments, dimensions] @ [tiles, dimensions, rows] -> [tiles, segments, rows]
        teacher_squares, student_squares = both @ states.square(), own @ student_states.square()
        products = own @ (states[:, :width] * student_states)
        mask = self.pair_mask.repeat(heads, 1, 1)
        total, teacher_factor, student_factor = _cosine(teacher_squares, products, student_squares, mask)
        states.mul_(both.mT @ teacher_factor)
        states[:, :width].add_(student_states.mul_(own.mT @ student_factor))
        return total

    def _direct(self, teacher, student, gradient, columns, segment: int | None) -> torch.Tensor:
        """One long segment, or everything a row sees for aim_star: the segment vectors themselves, [heads, d, rows]."""
        parent, heads = self.parent, self.heads
        sources = [slice(x.start + y.start, x.start + y.stop) for x, y in zip(self.columns, columns, strict=True)]
        teacher, student = teacher[:, columns[0]], student[:, columns[1]]
        values = parent.student.values[heads, sources[1]]
        # [heads, d, columns] @ [heads, columns, rows] -> [heads, d, rows]
        teacher_states = parent.teacher.values[heads, sources[0]].mT @ teacher
        student_states = values.mT @ student
        if self.options.metric == "mse":
            state_gradient = teacher_states.sub_(student_states)
            total = _squares(state_gradient.flatten(0, 1))
        else:
            pairs = (teacher_states, teacher_states), (teacher_states, student_states), (student_states, student_states)
            sums = [(x * y).sum(1, keepdim=True) for x, y in pairs]
            total, teacher_factor, student_factor = _cosine(*sums, self._row_mask(segment))
            state_gradient = teacher_states.mul_(teacher_factor).add_(student_states.mul_(student_factor))
        if gradient is not None:
            # [heads, columns, d] @ [heads, d, rows] -> [heads, columns, rows]
            torch.bmm(values, state_gradient, out=gradient[:, columns[1]])
        if parent.value_gradient is not None:
            sums = parent.value_gradient[heads, sources[1]]
            # [heads, columns, rows] @ [heads, rows, d] -> [heads, columns, d]
            sums.baddbmm_(student.to(sums), state_gradient.mT.to(sums))
        return total

    def _row_mask(self, segment: int | None) -> torch.Tensor:
        rows = np.arange(self.start, self.stop)
        counted = np.ones(len(rows), bool) if segment is None else self._counted(segment, rows)
        return torch.as_tensor(np.tile(counted, self.parent.groups), device=self.parent.workspace.device)

    def _score_gradients(self, weights, gradient, tanh):
        parent, heads, columns = self.parent, self.heads, self.columns[1]
        # weights * (gradient - sum(weights * gradient))
        scores = gradient.mul_(weights)
        scores.addcmul_(weights, scores.sum(1, keepdim=True), value=-1)
        if tanh is not None:
            # d(cap * tanh(x / cap)) = 1 - tanh²
            scores.mul_(tanh.square_().neg_().add_(1))
        queries, keys = self.queries[1][heads], self.keys[1][heads]
        query_output, factor = parent.outputs[0], self.factor * self.options.scale
        rows = torch.empty_like(queries) if query_output is not None else None
        key_gradient = parent.key_gradient[heads, columns] if parent.key_gradient is not None else None
        for piece in parent.workspace.pieces(keys.shape[1], self.piece):
            if rows is not None:
                # [heads, rows, columns] @ [heads, columns, d] -> [heads, rows, d]
                rows.baddbmm_(scores[:, piece].mT, keys[:, piece], beta=min(piece.start, 1), alpha=factor)
            if key_gradient is not None:
                # [heads, columns, rows] @ [heads, rows, d] -> [heads, columns, d]
                key_gradient[:, piece].baddbmm_(scores[:, piece], queries, alpha=factor)
        if rows is not None:
            # [H_kv, groups * segments, d] -> [H, segments, d]
            rows = rows.view(-1, self.stop - self.start, rows.shape[-1])
            query_heads = slice(heads.start * parent.groups, heads.stop * parent.groups)
            query_output[query_heads].index_copy_(1, parent.student.query_tokens[self.start : self.stop], rows)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares, in float64 beyond the first dimension: a float32 sum of millions of terms would be the error."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).double().square().sum()


def _cosine(teacher_squares, products, student_squares, mask):
    """(sum of 1 - cos, gradient factors of the teacher's and the student's vector) for pairs in mask, else zero."""
    student_squares = student_squares + COSINE_EPSILON
    inverse = ((teacher_squares + COSINE_EPSILON) * student_squares).rsqrt_()
    cosine = products * inverse
    total = (1 - cosine).mul_(mask).sum(dtype=torch.float64)
    return total, inverse.neg_().mul_(mask), cosine.div_(student_squares).mul_(mask)
