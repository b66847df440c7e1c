"""Columns grouped by the shape of their segment: which token stands where, which rows see which columns.

A column is a segment that spans at most 2 x 2 tokens, or a special token of the student (a key without a partner).
Columns of one shape form a group, in order of the text, and groups begin at whole tiles. The rows that see a token, and
the columns whose first (or second) token of one side a row sees, are intervals: the same ones for all tokens of a
segment unless there is a sliding window. Tokens of other segments form rows of their own, for the kernels that ship.
Made on the CPU, as in a data worker; device_layout.py makes the same of ids on a GPU.
"""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
from matt_kernels import AimPlan, aim_plan
from matt_kernels.configs import is_lopsided
from matt_kernels.plan import _meet

TILE = 64  # columns; groups begin at multiples of it
SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2))  # teacher and student tokens of a segment, by number of the group
# Fields of GroupedPlan.tiles; the kernels read them by number.
TILE_FIELDS = ("group", "row_low", "row_high", "whole_row_low", "whole_row_high")


@dataclass(frozen=True)
class GroupedPlan:
    """Columns of one batch, beside the plan of its rows."""

    plan: AimPlan
    # int32 [B, 4 + 2 L, C]: first and second token of the teacher and of the student, rows from and to. -1: no token;
    # -2 - p: none of the teacher's, but the key of p, so that what is nothing's weight is finite
    columns: torch.Tensor
    starts: torch.Tensor  # int32 [B, 4] first column of each group
    bounds: torch.Tensor  # int32 [B, 8 L, m] of each group the first column that a row sees, and where they stop
    tiles: torch.Tensor  # int32 [B, 5, C / TILE], group -1: no column
    order: torch.Tensor  # int32 [B, C / TILE] tiles, those with most work first
    hidden: torch.Tensor  # int32 [B, m] pairs of a row in columns of which it sees no token
    others: AimPlan | None  # of all rows, and of the tokens of other segments, moved together; None: there is none
    moved: tuple[torch.Tensor, torch.Tensor] | None  # int32 [B, most of them] which tokens these are, by side, or n
    moved_counts: torch.Tensor | None  # int32 [B, 2] how many
    weighted: bool  # pairs of some rows count more than others'

    @property
    def lists(self) -> int:
        """L: 4, one for each of the tokens, where rows see them apart, or 1."""
        return self.bounds.shape[1] // 8

    def to(self, device, non_blocking: bool = False) -> "GroupedPlan":
        def on_device(x):
            if isinstance(x, tuple):
                return tuple(map(on_device, x))
            return x if x is None or isinstance(x, bool) else x.to(device, non_blocking=non_blocking)

        return GroupedPlan(*(on_device(getattr(self, x.name)) for x in fields(self)))


def grouped_plan(
    teacher_segments, student_segments, teacher_documents=None, student_documents=None, *, reduction="pairs",
    sliding_window=None, causal=True, metric="mse",
) -> GroupedPlan:  # fmt: skip
    """From ids [B, n] and options as aim_loss takes them; the metric decides the tiles of other segments."""
    ids, documents = (teacher_segments, student_segments), (teacher_documents, student_documents)
    options = {"reduction": reduction, "sliding_window": sliding_window, "causal": causal}
    plan = aim_plan(*ids, teacher_documents=documents[0], student_documents=documents[1], **options)
    counts, rows = plan.counts[:, 0].tolist(), plan.rows.long()
    firsts = [_firsts(x, rows.shape[2]) for x in ids]
    small = (rows[:, 0] <= firsts[0] + 1) & (rows[:, 1] <= firsts[1] + 1)
    capacity = capacity_of(student_segments.shape[1])
    kept = torch.zeros_like(ids[1]) if documents[1] is None else documents[1]
    of_rows = ids[1], kept, rows, counts, *firsts, small
    made = [_columns_of_row(*x, capacity, sliding_window is not None) for x in zip(*of_rows, strict=True)]
    tensors = (torch.stack(x).int() for x in zip(*made, strict=True))
    others = _others(plan, ids, documents, counts, ~small, metric)
    return GroupedPlan(plan, *tensors, *others, reduction == "documents")


def capacity_of(student_tokens: int) -> int:
    """C: no more columns than tokens of the student, and an incomplete tile for each group."""
    return (-(-student_tokens // TILE) + len(SHAPES)) * TILE


def _firsts(ids, most):
    """First token of each segment, [B, m], the last one of the row where there is none."""
    batch, length = ids.shape
    places = torch.arange(length).expand(batch, length)
    found = torch.full((batch, most + 1), length - 1)
    return found.scatter_reduce(1, ids.where(ids >= 0, most), places, "amin")[:, :most]


def _columns_of_row(ids, documents, rows, count, teacher_firsts, student_firsts, small, capacity, apart):
    segments = small[:count].nonzero()[:, 0]
    firsts, lasts = torch.stack([teacher_firsts, student_firsts])[:, segments], rows[:2, segments]
    seconds = torch.where(lasts > firsts, lasts, -1)
    tokens = torch.stack([firsts, seconds], 1).flatten(0, 1)
    shape = (seconds[0] >= 0).long() + 2 * (seconds[1] >= 0).long()
    # Special tokens of the student are columns of the first group.
    special = ((ids < 0) & (documents >= 0)).nonzero()[:, 0]
    alone = torch.full((4, len(special)), -1)
    alone[0], alone[2] = -2 - teacher_firsts[_nearest(ids, documents, count)[special]], special
    tokens, shape = torch.cat([tokens, alone], 1), torch.cat([shape, torch.zeros_like(special)])

    placed = torch.full((12 if apart else 6, capacity), -1)
    tiles = torch.zeros(len(TILE_FIELDS), capacity // TILE, dtype=torch.long)
    tiles[0] = -1
    starts, bounds, start = [], [], 0
    pairs = torch.nn.functional.pad(small.long().cumsum(0), (1, 0))
    hidden = (pairs[rows[9].clamp(max=len(small))] - pairs[rows[8].clamp(max=len(small))]) * apart
    every = torch.arange(rows.shape[1])
    for group in range(len(SHAPES)):
        own = tokens[:, shape == group]
        own = own[:, own[2].argsort()]
        seen = _rows_of_lists(own, rows, count) if apart else torch.stack(_rows_that_see(own[2], rows, count, 1))[None]
        placed[:, start : start + own.shape[1]] = torch.cat([own, seen.flatten(0, 1)])
        for place in range(0, own.shape[1], TILE):
            tiles[:, (start + place) // TILE] = _tile(group, *seen[..., place : place + TILE].unbind(1))
        ends = [[torch.searchsorted(x.contiguous(), every, right=True) for x in (y[1], y[0])] for y in seen]
        bounds += [start + x for y in ends for x in y]
        if apart:
            pairs = torch.nn.functional.pad((own[0] >= 0).long().cumsum(0), (1, 0))
            low, high = (
                f(torch.stack(x), 0) for f, x in zip((torch.amin, torch.amax), zip(*ends, strict=True), strict=True)
            )
            hidden -= pairs[high] - pairs[low]
        starts.append(start)
        start += -(-own.shape[1] // TILE) * TILE
    work = (tiles[2] - tiles[1]) * torch.tensor([0, *(2 * a + 3 * b for a, b in SHAPES)])[tiles[0] + 1]
    order = work.argsort(descending=True, stable=True)
    return placed, torch.tensor(starts), torch.stack(bounds), tiles, order, hidden * (every < count)


def _rows_that_see(tokens, rows, count, side):
    """(first row, where they stop) of those that see each token of a side; both rise with the token."""
    low, high = rows[2 + 2 * side, :count].contiguous(), rows[3 + 2 * side, :count].contiguous()
    seen_from = torch.searchsorted(high, tokens, right=True)
    return seen_from, torch.maximum(seen_from, torch.searchsorted(low, tokens, right=True))


def _rows_of_lists(tokens, rows, count):
    """The same of the columns of a group, [4, 2, columns]. A second token that is none is where the first one is."""
    teacher = tokens[0].where(tokens[0] >= 0, -2 - tokens[0])
    lists = (0, teacher), (0, tokens[1].where(tokens[1] >= 0, teacher)), (1, tokens[2])
    lists = *lists, (1, tokens[3].where(tokens[3] >= 0, tokens[2]))
    return torch.stack([torch.stack(_rows_that_see(x, rows, count, side)) for side, x in lists])


def _nearest(ids, documents, count):
    """Of each token the segment that it is in or behind, or the first one of its document: a row that sees a special
    token sees both sides of that."""
    reached = ids.clamp(min=-1).cummax(0).values
    places = torch.arange(len(ids))
    starts = places.masked_fill(torch.diff(documents, prepend=documents[:1]) == 0, 0).cummax(0).values
    opener = torch.where(starts > 0, reached[starts - 1], -1) + 1
    return torch.maximum(reached, opener).clamp(max=max(count - 1, 0))


def _tile(group, seen_from, seen_to):
    """From [lists, columns]."""
    # An incomplete tile is nowhere seen whole: what stands beyond its columns has no weight.
    whole = seen_from.shape[1] == TILE
    low, high = (seen_from.max(), seen_to.min()) if whole else (seen_from.min(), seen_from.min())
    return torch.stack([torch.tensor(group), seen_from.min(), seen_to.max(), low, torch.maximum(low, high)])


def widths_of_others(metric: str, lopsided: bool) -> tuple[int, int]:
    """Most of these segments are long on the teacher's side."""
    return (32, 16) if lopsided else (16, 16) if metric == "cosine" else (32, 32)


def _others(plan, ids, documents, counts, large, metric):
    """Fields of GroupedPlan from `others` on."""
    if not any(bool(x[:count].any()) for x, count in zip(large, counts, strict=True)):
        return None, None, None
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
    found = torch.stack([(x < y.shape[1]).sum(1) for x, y in zip(moved, ids, strict=True)], 1).int()
    lopsided = is_lopsided(*found.sum(0).tolist())
    options = dict(zip(("teacher_documents", "student_documents"), in_documents, strict=True))
    made = aim_plan(*segments, widths=widths_of_others(metric, lopsided), **options)
    rows, tiles = _see_others(plan, made, moved, large)
    of_both = torch.cat([plan.counts[:, :1], made.counts[:, 1:]], 1)
    weights = {x: getattr(plan, x) for x in ("row_weights", "pair_weight")}
    rows[:, 12] = made.rows[:, 12]
    others = replace(made, rows=rows.int(), tiles=tiles.int(), counts=of_both, **weights)
    return others, tuple(x[:, :y].int() for x, y in zip(moved, found.amax(0).tolist(), strict=True)), found


def _see_others(plan, made, moved, large):
    """(rows, tiles) of `others`: what rows see, counted in tokens and segments that were moved."""
    count, rows = plan.counts[:, :1].long(), plan.rows.long()
    used = torch.arange(rows.shape[2]) < count
    sides = []
    for side, places in enumerate(moved):
        low, high = (torch.searchsorted(places, rows[:, 2 + 2 * side + x].contiguous()) for x in range(2))
        low, high = (x.masked_fill(~used, places.shape[1]) for x in (low, high))
        sides.append(SimpleNamespace(last=rows[:, side], low=low, high=high, used=used))
    before = torch.nn.functional.pad((large & used).long().cumsum(1), (1, 0))
    pairs = [before.gather(1, rows[:, x].clamp(max=rows.shape[2])) for x in (8, 9)]
    return _meet(sides, made.tiles.long()[:, [0, 1, 2, 3, 6, 9, 10]].unbind(1), count, pairs)
