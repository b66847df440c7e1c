"""Tiles of whole segments, and a small orthonormal basis per segment.

A tile holds at most `width` tokens of whole segments on each side, so that both sides of a segment meet in it. Inside
a segment all values v_T and v_S span at most as many dimensions as the segment has tokens. Written in an orthonormal
basis of that span, s_T - s_S is a handful of numbers instead of d, and its norm is exact: the difference is taken
before squaring. (Expanding |s_T - s_S|² into inner products costs as much and loses its digits once the sides agree.)
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from matt_fast.loss.documents import Document, Side

WIDTHS = (8, 12, 16, 32, 64)
SAMPLE, HEAD_DIM = 64, 64  # segments that the choice of widths looks at, and the head dimension that it counts with


@dataclass(frozen=True)
class Packing:
    """Tiles of one document. Column c of a side belongs to tile c // width; unused columns hold token -1."""

    teacher_width: int
    student_width: int
    count: int
    first_tile: np.ndarray  # [m] first tile of each segment
    last_tile: np.ndarray  # [m] its last tile: another one only where the segment is longer than a tile
    teacher_tokens: np.ndarray  # [count * teacher_width] token of each column
    student_tokens: np.ndarray  # [count * student_width]
    segments: np.ndarray  # [count, most segments of a tile] the segments of each tile that fit, then -1
    long: list[int]  # segments that do not fit in a tile; they have their tiles to themselves


def pack(document: Document, widths: tuple[int, int] | None = None) -> Packing:
    """Pack greedily in order. Special tokens travel with the segment before them, those at the front with the first."""
    teacher, student = unit_starts(document.teacher), unit_starts(document.student)
    teacher_width, student_width = widths or _choose_widths(teacher, student)
    groups = _group(teacher, student, teacher_width, student_width)
    starts = np.array([start for start, _, _ in groups])
    tiles = np.array([tile for _, tile, _ in groups])
    counts = np.array([count for _, _, count in groups])
    group_of_segment = np.searchsorted(starts, np.arange(document.segment_count), side="right") - 1
    is_long = (np.diff(teacher)[starts] > teacher_width) | (np.diff(student)[starts] > student_width)
    total = int(tiles[-1] + counts[-1])
    sizes = np.diff(starts, append=document.segment_count)
    segments = np.full((total, sizes.max()), -1)
    places = np.arange(sizes.max())
    segments[tiles] = np.where((places < sizes[:, None]) & ~is_long[:, None], starts[:, None] + places, -1)
    return Packing(
        teacher_width,
        student_width,
        total,
        first_tile=tiles[group_of_segment],
        last_tile=(tiles + counts - 1)[group_of_segment],
        teacher_tokens=_columns(teacher, starts, tiles, teacher_width, total),
        student_tokens=_columns(student, starts, tiles, student_width, total),
        segments=segments,
        long=starts[is_long].tolist(),
    )


def unit_starts(side: Side) -> np.ndarray:
    """Where each segment's share of the document starts, and where the last one ends: [m + 1]."""
    return np.concatenate([[0], side.first[1:], [side.stop - side.start]])


def _group(teacher, student, teacher_width: int, student_width: int) -> list[tuple[int, int, int]]:
    """(first segment, first tile, number of tiles): a tile of several segments, or the tiles of one long segment."""
    teacher, student = teacher.tolist(), student.tolist()
    groups, segment, tile, last = [], 0, 0, len(teacher) - 1
    while segment < last:
        stop = min(
            bisect_right(teacher, teacher[segment] + teacher_width, segment),
            bisect_right(student, student[segment] + student_width, segment),
        )
        count = 1
        if stop - 1 == segment:
            stop = segment + 2
            count = max(
                -((teacher[segment] - teacher[segment + 1]) // teacher_width),
                -((student[segment] - student[segment + 1]) // student_width),
            )
        groups.append((segment, tile, count))
        segment, tile = stop - 1, tile + count
    return groups


def _columns(unit_starts, starts, tiles, width: int, total: int) -> np.ndarray:
    columns = np.full(total * width, -1)
    tokens = np.arange(unit_starts[-1])
    group = np.searchsorted(unit_starts[starts], tokens, side="right") - 1
    columns[tiles[group] * width + tokens - unit_starts[starts][group]] = tokens
    return columns


def _choose_widths(teacher, student) -> tuple[int, int]:
    """The widths with the least work by a rough count of nanoseconds per query row, on the first segments."""
    teacher, student = teacher[: SAMPLE + 1], student[: SAMPLE + 1]
    teacher_sizes, student_sizes = np.diff(teacher), np.diff(student)
    best = (float("inf"), (0, 0))
    for teacher_width, student_width in product(WIDTHS, WIDTHS):
        if max(teacher_width, student_width) > 4 * min(teacher_width, student_width):
            continue
        groups = _group(teacher, student, teacher_width, student_width)
        tile_count = groups[-1][1] + groups[-1][2]
        long = (teacher_sizes > teacher_width) | (student_sizes > student_width)
        both = teacher_width + student_width
        per_tile = teacher_width * 1.8 + student_width * 4.2
        per_tile += 0.022 * (teacher_width * both + 2 * student_width**2 + student_width * both)
        per_long = 75 * long.sum() + 0.012 * HEAD_DIM * (teacher_sizes[long].sum() + 3 * student_sizes[long].sum())
        best = min(best, (tile_count * per_tile + per_long, (teacher_width, student_width)))
    return best[1]


def segment_basis(*inputs, chunk_elements: int = 1 << 17):
    """_segment_basis a few tiles at a time, so that its float64 copies stay small."""
    heads, _, width, size = inputs[0].shape
    chunk = max(1, chunk_elements // (heads * width * size))
    # values have tiles in dimension 1, segments in dimension 0
    parts = zip(*(x.split(chunk, dim=x.dim() // 2 - 1) for x in inputs), strict=True)
    return [torch.cat(x, 1) for x in zip(*(_segment_basis(*part) for part in parts), strict=True)]


def _segment_basis(teacher_values, student_values, teacher_segments, student_segments):
    """Coordinates of every value in an orthonormal basis of its segment's span.

    values [H_kv, tiles, width, d] with zeros where a column is in no segment, segments [tiles, width] (negative: none).
    Returns (student coordinates [H_kv, tiles, w_S, w_S], teacher coordinates [H_kv, tiles, w_T, w_S + w_T], the basis
    [H_kv, tiles, w_S + w_T, d]), all in the dtype of the values and zero between segments.

    The student's tokens come first: what is left of the teacher's outside their span reaches the loss but not the
    student's weights. It is found by explicit projection, so it is small and accurate when the sides nearly agree, and
    exactly zero when they do. Worked out in float64, tile by tile, linear in n.
    """
    dtype = teacher_values.dtype
    exact = dtype == torch.float64
    teacher_values, student_values = teacher_values.double(), student_values.double()
    student_same = _same(student_segments, student_segments)
    teacher_same = _same(teacher_segments, teacher_segments)
    across_same = _same(teacher_segments, student_segments)
    student_basis, _ = _orthonormal(student_values, student_same, exact)
    own = (student_values @ student_basis.mT).mul_(student_same)  # as `shared` below: equal where the sides are
    shared = (teacher_values @ student_basis.mT).mul_(across_same)
    rest = _minus_product(teacher_values, shared, student_basis)
    if exact:
        again = (rest @ student_basis.mT).mul_(across_same)
        shared += again
        rest = _minus_product(rest, again, student_basis)
    noise = (1e-14 if exact else 1e-8) * teacher_values.norm(dim=-1, keepdim=True)
    rest.mul_(rest.norm(dim=-1, keepdim=True) > noise)
    rest_basis, outside = _orthonormal(rest, teacher_same, exact)
    if exact:
        # Those of the factorisation lose half of the digits of dependent vectors.
        outside = (rest @ rest_basis.mT).mul_(teacher_same)
    coordinates, basis = torch.cat((shared, outside), -1), torch.cat((student_basis, rest_basis), -2)
    return tuple(x.to(dtype) for x in (own, coordinates, basis))


def _minus_product(x, left, right):
    """x - left @ right, without a copy of the product."""
    return torch.baddbmm(*(y.flatten(0, 1) for y in (x, left, right)), alpha=-1).view(x.shape)


def _same(rows, columns):
    return (rows[:, :, None] == columns[:, None, :]) & (rows[:, :, None] >= 0)


def _orthonormal(vectors, same, exact: bool):
    """(rows that span each segment's vectors, the vectors' coordinates in them), by Cholesky of the masked Gram matrix.

    One pass is orthogonal far beyond float32's rounding, the second one (exact) to float64's.
    """
    identity = torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
    coordinates = None
    for _ in range(2 if exact else 1):
        gram = (vectors @ vectors.mT).mul_(same)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        # Dependent vectors would stop the factorisation; a relative 1e-13 keeps it going.
        diagonal.mul_(1 + 1e-13).masked_fill_(diagonal == 0, 1)
        factor = torch.linalg.cholesky_ex(gram).L
        vectors = torch.linalg.solve_triangular(factor, identity, upper=False) @ vectors
        # What a vector adds to the span of those before it is lost below 3e-7 of its length: such rows come out short.
        long = vectors.norm(dim=-1, keepdim=True) >= 0.7
        vectors.mul_(long)  # many times faster than masked_fill_ on a CPU
        factor.mul_(long.mT)
        coordinates = factor if coordinates is None else coordinates @ factor
    return vectors, coordinates
