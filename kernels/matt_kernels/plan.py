"""Which rows see which tokens, and which tokens form a tile: integer work on the segment ids, on their own device.

Everything here is a fixed number of torch operations whose shapes depend only on the shapes of the inputs: no copy to
the host, no synchronisation. A training loop may make the plan in its data workers instead and move it with `to`. For
ids on a GPU device_plan.py does the same in eight launches.
"""

from dataclasses import dataclass, fields

import torch

# Fields of AimPlan.rows and AimPlan.tiles, in order; the kernels read them by number.
ROW_FIELDS = ("teacher_query", "student_query", "teacher_low", "teacher_high", "student_low", "student_high")
ROW_FIELDS += ("tile_low", "tile_high", "pair_low", "pair_high", "whole_tile_low", "whole_tile_high")
ROW_FIELDS += ("segment_end",)
TILE_FIELDS = ("teacher_start", "teacher_stop", "student_start", "student_stop", "row_low", "row_high", "long")
TILE_FIELDS += ("whole_row_low", "whole_row_high", "segment_low", "segment_high")
LONG_FIELDS = ("segment", "teacher_start", "teacher_stop", "student_start", "student_stop")


@dataclass(frozen=True)
class AimPlan:
    """Rows, tiles and weights of one batch. Unused entries are empty ranges; `counts` says how many are used.

    A row is a segment's query: the last token of the segment on each side, and the interval of tokens it sees there
    (documents, causality and sliding windows are intervals), the tiles that hold these, the segments it forms pairs
    with, and the tiles of which it sees every token on both sides. The last field is of segments by number: the last
    token on the student's side. A tile is a range of tokens on each side that holds whole segments, so that both sides
    of a segment meet in it, with the rows that see some and all of it and the range of its segments; a segment longer
    than a tile is cut into tiles of its own, flagged with its place in `long` (others -1).
    """

    rows: torch.Tensor  # int32 [B, 13, m]
    tiles: torch.Tensor  # int32 [B, 11, most tiles]
    long: torch.Tensor  # int32 [B, 5, most long segments]
    counts: torch.Tensor  # int32 [B, 3] used rows, tiles, long segments
    row_weights: torch.Tensor  # float32 [B, m] weight of a pair of this row, relative to the largest
    pair_weight: torch.Tensor  # float32 [] that largest weight; NaN where the ids break the rules
    teacher_segments: torch.Tensor  # int32 [B, n_T], -1: in no segment, -2: padding
    student_segments: torch.Tensor  # int32 [B, n_S]
    widths: tuple[int, int]  # most teacher and student tokens of a tile
    variant: str  # of the loss
    long_segments: bool = True  # False: known to have none longer than a tile, whose kernels are left out then

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in order."""
        return tuple(getattr(self, x) for x in TENSORS)

    def to(self, device, non_blocking: bool = False) -> "AimPlan":
        """The same plan on another device; from pinned memory, and with `non_blocking`, the CPU does not wait."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "AimPlan":
        """The same plan in pinned memory. torch's DataLoader calls it for a plan in a batch when its own `pin_memory`
        is set."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function) -> "AimPlan":
        return AimPlan(*(function(x) for x in self.tensors()), self.widths, self.variant, self.long_segments)


TENSORS = tuple(x.name for x in fields(AimPlan))[:-3]


def make_plan(
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
    """The plan of a batch from ids [B, n] as aim_loss takes them."""
    most = min(teacher_segments.shape[1], student_segments.shape[1])
    # Ids that break the rules give NaN in the end; until then they must not lead out of bounds.
    count = (student_segments.amax(1, keepdim=True) + 1).clamp(min=0, max=most)
    ids = (teacher_segments, teacher_documents), (student_segments, student_documents)
    sides = [_read_side(*x, most, count, causal, sliding_window) for x in ids]
    starts, stops = zip(*(_tiles_of_side(x) for x in sides), strict=True)
    tiles, long, tile_count, long_count = _pack(starts, stops, count, [x.length for x in sides], widths)
    pairs = _pairs(sides[1], count, causal)
    row_weights, pair_weight = _weights(sides[1], *pairs, variant, causal, reduction)
    broken = _broken(sides, count, (teacher_segments, student_segments))
    if teacher_documents is not None:
        broken = broken | _broken_documents(sides, *zip(*ids, strict=True))
    rows, tiles = _meet(sides, tiles, count, pairs[0])
    return AimPlan(
        rows=rows.int(),
        tiles=tiles.int(),
        long=long.int(),
        counts=torch.cat([count, tile_count, long_count], 1).int(),
        row_weights=row_weights.float(),
        pair_weight=pair_weight.masked_fill(broken, float("nan")).float(),
        teacher_segments=_marked(*ids[0]),
        student_segments=_marked(*ids[1]),
        widths=widths,
        variant=variant,
    )


def _marked(segments, documents):
    marked = segments.clamp(min=-1)
    marked = marked if documents is None else marked.masked_fill(documents < 0, -2)
    return marked.to(torch.int32, copy=True, memory_format=torch.contiguous_format)


def limits(lengths, widths) -> tuple[int, int]:
    """Most tiles and most long segments of a row."""
    # Two neighbouring tiles hold more than one width of tokens on some side, a long segment one tile per width.
    tiles = 3 * sum(-(-x // y) for x, y in zip(lengths, widths, strict=True)) + 2
    return tiles, sum(x // (y + 1) for x, y in zip(lengths, widths, strict=True)) + 1


def layout(batch: int, lengths, widths) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of AimPlan.tensors()."""
    rows = torch.sym_min(*lengths)
    tiles, long = limits(lengths, widths)
    integers = (len(ROW_FIELDS), rows), (len(TILE_FIELDS), tiles), (len(LONG_FIELDS), long), (3,)
    return [
        *(((batch, *x), torch.int32) for x in integers),
        ((batch, rows), torch.float32),
        ((), torch.float32),
        *(((batch, x), torch.int32) for x in lengths),
    ]


@dataclass(frozen=True)
class _Side:
    """Per segment, [B, m]; those beyond the count hold n."""

    length: int
    first: torch.Tensor
    last: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    document_start: torch.Tensor
    document_stop: torch.Tensor
    opens: torch.Tensor  # bool: the first segment of its document
    used: torch.Tensor  # bool


def _read_side(segments, documents, most, count, causal, window) -> _Side:
    batch, length = segments.shape
    segments = segments.long()
    position = torch.arange(length, device=segments.device).expand(batch, length)
    numbers = torch.arange(most, device=segments.device).expand(batch, most).contiguous()
    used = numbers < count
    # Ids rise along the row: special tokens take the id before or after them, and bisection finds the ends.
    before = segments.masked_fill(segments < 0, -1).cummax(1).values
    after = segments.masked_fill(segments < 0, length).flip(1).cummin(1).values.flip(1)
    first = torch.searchsorted(before, numbers)
    last = torch.searchsorted(after.contiguous(), numbers, right=True).clamp(min=1) - 1
    if documents is None:
        starts, stops = torch.zeros_like(position), torch.full_like(position, length)
    else:
        cut = torch.ones_like(documents, dtype=torch.bool)
        cut[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = position.masked_fill(~cut, 0).cummax(1).values
        last_of = torch.ones_like(cut)
        last_of[:, :-1] = cut[:, 1:]
        stops = (position + 1).masked_fill(~last_of, length).flip(1).cummin(1).values.flip(1)
    place = last.clamp(0, length - 1)
    start, stop = starts.gather(1, place), stops.gather(1, place)
    low, high = start, stop
    if causal:
        high = last + 1
        low = low if window is None else torch.maximum(low, last - window + 1)
    elif window is not None:
        low, high = torch.maximum(low, last - window), torch.minimum(high, last + window + 1)
    opens = used.clone()
    opens[:, 1:] &= start[:, 1:] != start[:, :-1]
    ends = (x.masked_fill(~used, length) for x in (first, last, low, high, start, stop))
    return _Side(length, *ends, opens=opens, used=used)


def _tiles_of_side(side: _Side):
    """Where each segment's share of the row starts and stops: special tokens go with the segment before them, those at
    the front of a document with its first segment."""
    start = torch.where(side.opens, side.document_start, side.first)
    following = torch.full_like(start, side.length)
    following[:, :-1] = start[:, 1:]
    closes = torch.ones_like(side.opens)
    closes[:, :-1] = side.opens[:, 1:] | ~side.used[:, 1:]
    return start, torch.where(closes, side.document_stop, following)


def _pack(starts, stops, count, lengths, widths):
    """Greedy packing in order. Which segments open a tile: those reached from the first one by 'next that does not
    fit', found for all at once by doubling the jump."""
    batch, most = starts[0].shape
    device = starts[0].device
    numbers = torch.arange(most, device=device).expand(batch, most)
    used = numbers < count
    reach = torch.full_like(numbers, most)
    is_long = torch.zeros_like(used)
    pieces = torch.ones_like(numbers)
    for start, stop, width in zip(starts, stops, widths, strict=True):
        reach = torch.minimum(reach, torch.searchsorted(stop.contiguous(), start + width, right=True))
        is_long = is_long | (stop - start > width)
        pieces = torch.maximum(pieces, -((start - stop) // width))
    reach = torch.maximum(torch.minimum(reach, count), numbers + 1)
    opened = torch.zeros(batch, most + 1, dtype=torch.bool, device=device)
    opened[:, 0] = True
    jump = torch.full((batch, most + 1), most, dtype=torch.long, device=device)
    jump[:, :-1] = torch.where(used, reach, most)
    for _ in range(most.bit_length()):
        opened = opened.scatter(1, jump.masked_fill(~opened, most), True)
        jump = jump.gather(1, jump)
    opens = opened[:, :-1] & used
    is_long = is_long & used
    pieces = torch.where(opens, pieces, 0)
    ends = pieces.cumsum(1)
    most_tiles, most_long = limits(lengths, widths)
    places = torch.arange(most_tiles, device=device).expand(batch, most_tiles).contiguous()
    opener = torch.searchsorted(ends, places, right=True)
    valid = opener < most
    opener = opener.clamp(max=most - 1)
    piece = places - (ends - pieces).gather(1, opener)
    closer = reach.gather(1, opener) - 1
    bounds = []
    for start, stop, width, length in zip(starts, stops, widths, lengths, strict=True):
        high = stop.gather(1, closer)
        low = torch.minimum(start.gather(1, opener) + piece * width, high)
        high = torch.minimum(high, low + width)
        bounds += [low.masked_fill(~valid, length), high.masked_fill(~valid, length)]
    order = is_long.cumsum(1) - 1
    tile_long = torch.where(is_long.gather(1, opener) & valid, order.gather(1, opener), -1)
    wanted = torch.arange(most_long, device=device).expand(batch, most_long).contiguous()
    segment = torch.searchsorted(is_long.cumsum(1), wanted, right=True)
    place = segment.clamp(max=most - 1)
    bounds_of_long = [x.gather(1, place) for pair in zip(starts, stops, strict=True) for x in pair]
    long = torch.stack([segment, *bounds_of_long], 1)
    return [*bounds, tile_long, opener, closer + 1], long, ends[:, -1:], is_long.sum(1, keepdim=True)


def _meet(sides, tiles, count, pairs):
    """Tiles each row sees, some and all of their tokens; rows that see each tile so."""
    *bounds, tile_long, segment_low, segment_high = tiles
    teacher, student = sides
    starts, stops = ([x.contiguous() for x in bounds[first::2]] for first in (0, 1))
    lows, highs = ([x.low.contiguous() for x in sides], [x.high.contiguous() for x in sides])

    def ends(sorted_values, values, *, right: bool, of):
        found = (torch.searchsorted(x, y, right=right) for x, y in zip(sorted_values, values, strict=True))
        return of(*found)

    most_tiles = starts[0].shape[1]
    tile_low = ends(stops, lows, right=True, of=torch.minimum).masked_fill(~student.used, most_tiles)
    tile_high = ends(starts, highs, right=False, of=torch.maximum).masked_fill(~student.used, 0)
    whole_tiles = ends(starts, lows, right=False, of=torch.maximum), ends(stops, highs, right=True, of=torch.minimum)
    # Only what the student sees has a gradient.
    row_low = torch.searchsorted(highs[1], starts[1], right=True)
    row_high = torch.minimum(torch.searchsorted(lows[1], stops[1]), count)
    whole_rows = ends(highs, stops, right=False, of=torch.maximum), ends(lows, starts, right=True, of=torch.minimum)
    fields_of_rows = teacher.last, student.last, teacher.low, teacher.high, student.low, student.high
    rows = torch.stack([*fields_of_rows, tile_low, tile_high, *pairs, *whole_tiles, student.last], 1)
    return rows, torch.stack([*bounds, row_low, row_high, tile_long, *whole_rows, segment_low, segment_high], 1)


def _pairs(side: _Side, count, causal):
    """((first segment, where they stop) of the pairs of each row, place and number of segments in its document)."""
    batch, most = side.first.shape
    numbers = torch.arange(most, device=side.first.device).expand(batch, most)
    opener = numbers.masked_fill(~side.opens, 0).cummax(1).values
    following = torch.full_like(numbers, most)
    following[:, :-1] = numbers[:, 1:].masked_fill(~side.opens[:, 1:], most)
    following = torch.minimum(following.flip(1).cummin(1).values.flip(1), count)
    stop = numbers + 1 if causal else following
    return (opener, stop), numbers - opener, following - opener


def _weights(side: _Side, pairs, place, size, variant, causal, reduction):
    """Weight of one pair of each row: relative to the largest one, and the largest one. Zero rows weigh nothing."""
    if variant == "aim_star":
        mine, total = torch.ones_like(size), size
    else:
        mine, total = (place + 1, size * (size + 1) // 2) if causal else (size, size * size)
    if reduction == "pairs":
        return side.used.double(), 1 / (mine * side.used).sum().clamp(min=1).double()
    weights = torch.where(side.used, 1 / total.clamp(min=1).double(), 0.0)
    largest = weights.amax()
    return weights / largest, largest / side.opens.sum().clamp(min=1)


def _broken(sides, count, segments):
    """Whether ids are not 0..m-1 in order with the same m on both sides, or there is none at all."""
    broken = count.sum() == 0
    for ids in segments:
        ids = ids.long()
        reached = ids.masked_fill(ids < 0, -1).cummax(1).values
        steps = torch.diff(reached, dim=1, prepend=torch.full_like(reached[:, :1], -1))
        broken = (
            broken | ((ids >= 0) & (ids != reached)).any() | (steps > 1).any() | (reached[:, -1:] + 1 != count).any()
        )
    return broken


def _broken_documents(sides, segments, documents):
    """Whether there are ids in padding, documents below -1, segments in two documents, documents in two places, or
    documents and their numbers of segments that are not the same on both sides."""
    size = max(x.shape[1] for x in documents)
    broken, names, owners = [], [], []
    for side, ids, document in zip(sides, segments, (x.long() for x in documents), strict=True):
        broken += [(ids >= 0) & (document < 0), document < -1, side.first < side.document_start]
        opens = document >= 0
        opens[:, 1:] &= document[:, 1:] != document[:, :-1]
        place = (opens.cumsum(1) - 1).masked_fill(~opens, size)
        names.append(document.new_full((len(document), size + 1), -1).scatter(1, place, document)[:, :size])
        ordered = names[-1].sort(1).values
        broken.append((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
        owners.append(document.gather(1, side.last.clamp(max=side.length - 1)))
    broken += [names[0] != names[1], (owners[0] != owners[1]) & sides[1].used]
    return torch.stack([x.any() for x in broken]).any()
