"""Columns grouped by the shape of their segment: which token stands where, which rows see which columns.

A column is a segment of at most 2 x 2 tokens, or a special token of the student (a key without a partner). Columns of
one shape form a group, in order of the text, and groups begin at whole tiles. Under causal attention a row sees the
same columns of a group on both sides: an interval. Tokens of other segments form rows of their own, for the kernels
that ship. Made on the CPU, as in a data worker.
"""

from dataclasses import dataclass, fields, replace

import torch
from matt_kernels import AimPlan, aim_plan
from matt_kernels.configs import is_lopsided

TILE = 64  # columns; groups begin at multiples of it
SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2))  # teacher and student tokens of a segment, by number of the group
# Fields of GroupedPlan.tiles; the kernels read them by number.
TILE_FIELDS = ("group", "row_low", "row_high", "whole_row_low", "whole_row_high")


@dataclass(frozen=True)
class GroupedPlan:
    """Columns of one batch, beside the plan of its rows."""

    plan: AimPlan
    columns: torch.Tensor  # int32 [B, 6, C] teacher's first and second token, student's (or -1), rows from and to
    starts: torch.Tensor  # int32 [B, 4] first column of each group
    bounds: torch.Tensor  # int32 [B, 8, m] of each group the first column that a row sees, and where they stop
    tiles: torch.Tensor  # int32 [B, 5, C / TILE], group -1: no column
    order: torch.Tensor  # int32 [B, C / TILE] tiles, those with most work first
    others: AimPlan | None  # of all rows, and of the tokens of other segments, moved together; None: there is none
    moved: tuple[torch.Tensor, torch.Tensor] | None  # int64 [B, most of them] which tokens these are, by side, or n
    moved_counts: tuple[int, ...]  # of the student, by row

    def to(self, device, non_blocking: bool = False) -> "GroupedPlan":
        def on_device(x):
            if isinstance(x, tuple):
                return tuple(map(on_device, x))
            return x if x is None or isinstance(x, int) else x.to(device, non_blocking=non_blocking)

        return GroupedPlan(*(on_device(getattr(self, x.name)) for x in fields(self)))


def grouped_plan(teacher_segments, student_segments, teacher_documents=None, student_documents=None) -> GroupedPlan:
    """From ids [B, n] as aim_loss takes them, causal, reduction "pairs"."""
    ids, documents = (teacher_segments, student_segments), (teacher_documents, student_documents)
    plan = aim_plan(*ids, teacher_documents=documents[0], student_documents=documents[1])
    counts, rows = plan.counts[:, 0].tolist(), plan.rows.long()
    sizes = [_sizes(x, rows.shape[2]) for x in ids]
    small = (sizes[0] <= 2) & (sizes[1] <= 2)
    capacity = (-(-student_segments.shape[1] // TILE) + len(SHAPES)) * TILE
    kept = torch.zeros_like(ids[1]) if documents[1] is None else documents[1]
    of_rows = *ids, kept, rows, counts, *sizes, small
    made = [_columns_of_row(*x, capacity) for x in zip(*of_rows, strict=True)]
    tensors = (torch.stack(x).int() for x in zip(*made, strict=True))
    return GroupedPlan(plan, *tensors, *_others(plan, ids, documents, counts, ~small))


def _sizes(ids, most):
    """Tokens of each segment, [B, m]."""
    inside = ids >= 0
    return torch.zeros(len(ids), most + 1, dtype=torch.long).scatter_add(1, ids.where(inside, most), inside.long())[
        :, :most
    ]


def _columns_of_row(teacher_ids, student_ids, documents, rows, count, teacher_sizes, student_sizes, small, capacity):
    segments = small[:count].nonzero()[:, 0]
    first, stop = segments, torch.searchsorted(rows[8, :count].contiguous(), rows[8, segments], right=True)
    tokens = torch.cat([_tokens(x, segments) for x in (teacher_ids, student_ids)])
    shape = teacher_sizes[segments] - 1 + 2 * (student_sizes[segments] - 1)
    # Special tokens of the student, from the first row that sees them on: columns of the first group.
    special = ((student_ids < 0) & (documents >= 0)).nonzero()[:, 0]
    seen_from = torch.searchsorted(rows[5, :count].contiguous(), special, right=True)
    seen = (seen_from < count) & (rows[4, seen_from.clamp(max=count - 1)] <= special)
    special, seen_from = special[seen], seen_from[seen]
    alone = torch.full((4, len(special)), -1)
    alone[2] = special
    tokens, shape = torch.cat([tokens, alone], 1), torch.cat([shape, torch.zeros_like(special)])
    stops = torch.searchsorted(rows[8, :count].contiguous(), rows[8, seen_from], right=True)
    columns = torch.cat([tokens, torch.stack([torch.cat([first, seen_from]), torch.cat([stop, stops])])])

    placed = torch.full((6, capacity), -1)
    tiles = torch.zeros(len(TILE_FIELDS), capacity // TILE, dtype=torch.long)
    tiles[0] = -1
    starts, bounds, start = [], [], 0
    every, openers = torch.arange(rows.shape[1]), rows[8].clamp(max=count)
    for group in range(len(SHAPES)):
        own = columns[:, shape == group]
        own = own[:, own[2].argsort()]
        placed[:, start : start + own.shape[1]] = own
        for place in range(0, own.shape[1], TILE):
            tiles[:, (start + place) // TILE] = _tile(group, *own[4:, place : place + TILE])
        seen_from = own[4].contiguous()
        bounds += [start + torch.searchsorted(seen_from, x, right=y) for x, y in ((openers, False), (every, True))]
        starts.append(start)
        start += -(-own.shape[1] // TILE) * TILE
    work = (tiles[2] - tiles[1]) * torch.tensor([0, *(2 * a + 3 * b for a, b in SHAPES)])[tiles[0] + 1]
    return placed, torch.tensor(starts), torch.stack(bounds), tiles, work.argsort(descending=True, stable=True)


def _tokens(ids, segments):
    """Positions of the first and second token of some segments, [2, s], -1 where there is none."""
    tokens = (ids >= 0).nonzero()[:, 0]
    firsts = torch.searchsorted(ids[tokens].contiguous(), segments)
    seconds = (firsts + 1).clamp(max=len(tokens) - 1)
    return torch.stack([tokens[firsts], torch.where(ids[tokens[seconds]] == segments, tokens[seconds], -1)]).where(
        torch.tensor([[True], [len(tokens) > 1]]), -1
    )


def _tile(group, seen_from, seen_to):
    # An incomplete tile is nowhere seen whole: what stands beyond its columns has no weight.
    low, high = (seen_from.max(), seen_to.min()) if len(seen_from) == TILE else (seen_from.min(), seen_from.min())
    return torch.stack([torch.tensor(group), seen_from.min(), seen_to.max(), low, torch.maximum(low, high)])


def _others(plan, ids, documents, counts, large):
    """Fields of GroupedPlan from `others` on."""
    if not any(bool(x[:count].any()) for x, count in zip(large, counts, strict=True)):
        return None, None, ()
    segments = [[], []]
    in_documents = [[], []]
    moved = [[], []]
    for row, count in enumerate(counts):
        number = torch.where(large[row, :count], large[row, :count].cumsum(0) - 1, -1)
        for side in range(2):
            own = ids[side][row]
            found = torch.where(own >= 0, number[own.clamp(min=0)], -1)
            places = (found >= 0).nonzero()[:, 0]
            missing = len(own) - len(places)
            document = torch.zeros_like(own) if documents[side] is None else documents[side][row]
            segments[side].append(torch.cat([found[places], torch.full((missing,), -100)]))
            in_documents[side].append(torch.cat([document[places], torch.full((missing,), -1)]))
            moved[side].append(torch.cat([places, torch.full((missing,), len(own))]))
    segments, in_documents, moved = ([torch.stack(x) for x in y] for y in (segments, in_documents, moved))
    found = [(x < y.shape[1]).sum(1).tolist() for x, y in zip(moved, ids, strict=True)]
    # Most are long on the teacher's side.
    widths = (32, 16) if is_lopsided(*map(sum, found)) else (32, 32)
    options = dict(zip(("teacher_documents", "student_documents"), in_documents, strict=True))
    made = aim_plan(*segments, widths=widths, **options)
    rows, tiles = plan.rows.clone().long(), made.tiles.clone().long()
    for row, count in enumerate(counts):
        _see_others(rows[row], tiles[row], made.rows[row].long(), large[row, :count], int(made.counts[row, 1]))
    of_both = torch.cat([plan.counts[:, :1], made.counts[:, 1:]], 1)
    weights = {x: getattr(plan, x) for x in ("row_weights", "pair_weight")}
    others = replace(made, rows=rows.int(), tiles=tiles.int(), counts=of_both, **weights)
    return others, tuple(x[:, : max(y)] for x, y in zip(moved, found, strict=True)), tuple(found[1])


def _see_others(rows, tiles, own_rows, large, tile_count):
    """Fields of rows and tiles, in place: a row sees what the last other segment of its document before it sees."""
    count, segments = len(large), large.nonzero()[:, 0]
    last = large.long().cumsum(0) - 1
    openers = rows[8, :count].clone()
    sees = (last >= 0) & (segments[last.clamp(min=0)] >= openers) if len(segments) else last >= 0
    empty = torch.zeros(10, 1, dtype=torch.long)
    empty[4] = tiles.shape[1]
    rows[2:, :count] = torch.where(sees, own_rows[2:, last.clamp(min=0)], empty)
    stops = torch.searchsorted(openers, openers, right=True)
    for low, high in ((4, 5), (7, 8)):
        bounds = tiles[[low, high], :tile_count]
        some = bounds[1] > bounds[0]
        start = torch.searchsorted(last, bounds[0])
        stop = torch.searchsorted(last, bounds[1])
        if low == 7:
            # Rows behind the document see nothing of it.
            stop = torch.minimum(stop, stops[start.clamp(max=count - 1)])
        tiles[[low, high], :tile_count] = torch.stack([start, torch.where(some, stop, start)])
