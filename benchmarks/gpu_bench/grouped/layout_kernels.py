"""The columns of a plan on the device: which tokens form them, and which rows see them. See device_layout.py."""

import triton
import triton.language as tl
from matt_kernels.attention import COUNTS, PADDING, ROWS, TILES
from matt_kernels.plan_tiles import seen_tiles, store_tiles
from matt_kernels.plan_tokens import LENGTHS, SEGMENT_FIELDS, TOKEN_FIELDS, load_count, search

LENGTHS = [*LENGTHS, "capacity"]


@triton.jit
def load_ends(segments_ptr, ids, known, row_limit):
    """(first and last teacher token, first and last student token, whether they span at most 2 x 2) of segments."""
    student_ptr = segments_ptr + SEGMENT_FIELDS * row_limit
    first = tl.load(segments_ptr + ids, mask=known, other=0)
    last = tl.load(segments_ptr + row_limit + ids, mask=known, other=0)
    student_first = tl.load(student_ptr + ids, mask=known, other=0)
    student_last = tl.load(student_ptr + row_limit + ids, mask=known, other=0)
    small = known & (last - first <= 1) & (student_last - student_first <= 1)
    return first, last, student_first, student_last, small


@triton.jit
def load_known(ids_ptr, tokens, length, count):
    ids = tl.load(ids_ptr + tokens, mask=tokens < length, other=PADDING)
    return ids, (ids >= 0) & (ids < count)


@triton.jit
def groups_of(ids_ptr, segments_ptr, tokens, length, count, row_limit):
    """Of each token of the student the group of the column that begins with it, -1 for none; id, and ends as load_ends
    has them."""
    ids, known = load_known(ids_ptr, tokens, length, count)
    ends = load_ends(segments_ptr, ids, known, row_limit)
    group = (ends[1] > ends[0]).to(tl.int32) + 2 * (ends[3] > ends[2]).to(tl.int32)
    group = tl.where(ends[4] & (tokens == ends[2]), group, -1)
    # special tokens of documents
    return tl.where((ids < 0) & (ids > PADDING), 0, group), ids, ends


@triton.jit
def next_start(start, size, TILE: tl.constexpr):
    return start + tl.cdiv(size, TILE) * TILE


@triton.jit
def place_columns(
    ids_ptr, tokens_ptr, segments_ptr, columns_ptr, starts_ptr, pairs_ptr, teacher_length, length, count, row_limit,
    capacity, space,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tokens of each column; starts, then sizes of groups; with a window how many columns of the first group before
    each one are pairs."""
    places = tl.arange(0, BLOCK)
    size0, size1, size2, size3 = count * 0, count * 0, count * 0, count * 0
    for begin in range(0, length, BLOCK):
        group, _, _ = groups_of(ids_ptr, segments_ptr, begin + places, length, count, row_limit)
        size0 += tl.sum((group == 0).to(tl.int32), 0)
        size1 += tl.sum((group == 1).to(tl.int32), 0)
        size2 += tl.sum((group == 2).to(tl.int32), 0)
        size3 += tl.sum((group == 3).to(tl.int32), 0)
    free0 = count * 0
    free1 = next_start(free0, size0, TILE)
    free2 = next_start(free1, size1, TILE)
    free3 = next_start(free2, size2, TILE)
    tl.store(starts_ptr, free0)
    tl.store(starts_ptr + 1, free1)
    tl.store(starts_ptr + 2, free2)
    tl.store(starts_ptr + 3, free3)
    tl.store(starts_ptr + 4, size0)
    tl.store(starts_ptr + 5, size1)
    tl.store(starts_ptr + 6, size2)
    tl.store(starts_ptr + 7, size3)
    pairs = count * 0
    for begin in range(0, length, BLOCK):
        tokens = begin + places
        group, ids, ends = groups_of(ids_ptr, segments_ptr, tokens, length, count, row_limit)
        is0, is1 = (group == 0).to(tl.int32), (group == 1).to(tl.int32)
        is2, is3 = (group == 2).to(tl.int32), (group == 3).to(tl.int32)
        place = tl.where(group == 0, free0 + tl.cumsum(is0, 0), free1 + tl.cumsum(is1, 0))
        place = tl.where(group == 2, free2 + tl.cumsum(is2, 0), place)
        place = tl.where(group == 3, free3 + tl.cumsum(is3, 0), place) - 1
        free0, free1 = free0 + tl.sum(is0, 0), free1 + tl.sum(is1, 0)
        free2, free3 = free2 + tl.sum(is2, 0), free3 + tl.sum(is3, 0)
        special, found = (group == 0) & (ids < 0), group >= 0
        # The segment that a special token is in or behind, or the first one of its document: rows that see the token
        # see both sides of that.
        nearest = tl.load(tokens_ptr + tokens, mask=special, other=0)
        opener = tl.zeros([BLOCK], tl.int32)
        if DOCUMENTS:
            start = tl.load(tokens_ptr + 2 * space + tokens, mask=special, other=0)
            opener = tl.load(tokens_ptr + start - 1, mask=special & (start > 0), other=-1) + 1
        nearest = tl.maximum(tl.minimum(tl.maximum(nearest, opener), count - 1), 0)
        beside = tl.load(segments_ptr + nearest, mask=special, other=0)
        teacher = tl.minimum(tl.where(special, beside, ends[0]), teacher_length - 1)
        tl.store(columns_ptr + place, tl.where(special, -2 - teacher, teacher), mask=found)
        second = tl.where((ends[1] > ends[0]) & (special == 0), ends[1], -1)
        tl.store(columns_ptr + capacity + place, second, mask=found)
        tl.store(columns_ptr + 2 * capacity + place, tokens, mask=found)
        second = tl.where((ends[3] > ends[2]) & (special == 0), ends[3], -1)
        tl.store(columns_ptr + 3 * capacity + place, second, mask=found)
        if WINDOW:
            paired = ((group == 0) & (ids >= 0)).to(tl.int32)
            before = pairs + tl.cumsum(paired, 0) - paired
            tl.store(pairs_ptr + place, before, mask=group == 0)
            pairs += tl.sum(paired, 0)
    if WINDOW:
        tl.store(pairs_ptr + size0, pairs)


@triton.jit
def move_tokens(
    ids_ptr, segments_ptr, moved_ptr, moved_ids_ptr, moved_count_ptr, others_ptr, before_ptr, ends_ptr, length, count,
    row_limit,
    SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens of all other segments, and where each of these begins and ends among them."""
    places = tl.arange(0, BLOCK)
    others_ptr += SIDE * SEGMENT_FIELDS * row_limit
    numbers, moved = count * 0, count * 0
    for begin in range(0, length, BLOCK):
        tokens = begin + places
        ids, known = load_known(ids_ptr, tokens, length, count)
        ends = load_ends(segments_ptr, ids, known, row_limit)
        first, last = (ends[2], ends[3]) if SIDE else (ends[0], ends[1])
        large = known & (ends[4] == 0)
        opens = (large & (tokens == first)).to(tl.int32)
        number = numbers + tl.cumsum(opens, 0)
        if SIDE:
            tl.store(before_ptr + ids, number - opens, mask=known & (tokens == first))
        number -= 1
        there = large & (number >= 0) & (number < row_limit)
        place = moved + tl.cumsum(large.to(tl.int32), 0) - 1
        tl.store(moved_ptr + place, tokens, mask=large)
        tl.store(moved_ids_ptr + place, number, mask=large)
        tl.store(others_ptr + 6 * row_limit + number, place, mask=there & (tokens == first))
        tl.store(others_ptr + 7 * row_limit + number, place + 1, mask=there & (tokens == last))
        if SIDE:
            tl.store(ends_ptr + number, place, mask=there & (tokens == last))
        numbers += tl.sum(opens, 0)
        moved += tl.sum(large.to(tl.int32), 0)
    tl.store(moved_count_ptr, moved)
    for begin in range(0, length, BLOCK):
        own = begin + places
        unused = (own >= moved) & (own < length)
        tl.store(moved_ptr + own, places * 0 + length, mask=unused)
        tl.store(moved_ids_ptr + own, places * 0 + PADDING, mask=unused)
    if SIDE:
        for begin in range(0, row_limit + 1, BLOCK):
            own = begin + places
            tl.store(before_ptr + own, places * 0 + numbers, mask=(own >= count) & (own <= row_limit))
    return numbers


@triton.jit(do_not_specialize=LENGTHS)
def sort_kernel(
    teacher_ids_ptr, student_ids_ptr, tokens_ptr, segments_ptr, columns_ptr, starts_ptr, pairs_ptr, counts_ptr,
    teacher_moved_ptr, student_moved_ptr, teacher_moved_ids_ptr, student_moved_ids_ptr, moved_counts_ptr, others_ptr,
    others_tokens_ptr, before_ptr, others_rows_ptr, teacher_length, student_length, row_limit, capacity, space,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program for the columns of a row of the batch, and one for what is moved on each side."""
    batch = tl.program_id(0).to(tl.int64)
    count = load_count(tokens_ptr, batch, space, student_length, row_limit)
    segments_ptr += batch * 2 * SEGMENT_FIELDS * row_limit
    others_ptr += batch * 2 * SEGMENT_FIELDS * row_limit
    before_ptr += batch * (row_limit + 1)
    ends_ptr = others_rows_ptr + (batch * ROWS + 12) * row_limit
    if tl.program_id(1) == 0:
        move_tokens(
            teacher_ids_ptr + batch * teacher_length, segments_ptr, teacher_moved_ptr + batch * teacher_length,
            teacher_moved_ids_ptr + batch * teacher_length, moved_counts_ptr + batch * 2, others_ptr, before_ptr,
            ends_ptr, teacher_length, count, row_limit, 0, BLOCK,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        numbers = move_tokens(
            student_ids_ptr + batch * student_length, segments_ptr, student_moved_ptr + batch * student_length,
            student_moved_ids_ptr + batch * student_length, moved_counts_ptr + batch * 2 + 1, others_ptr, before_ptr,
            ends_ptr, student_length, count, row_limit, 1, BLOCK,
        )  # fmt: skip
        # where load_count looks for it
        others_tokens_ptr += (batch * 2 + 1) * TOKEN_FIELDS * student_length + student_length - 1
        tl.store(others_tokens_ptr, numbers - 1)
    else:
        place_columns(
            student_ids_ptr + batch * student_length, tokens_ptr + (batch * 2 + 1) * TOKEN_FIELDS * space,
            segments_ptr, columns_ptr + batch * FIELDS * capacity, starts_ptr + batch * 8,
            pairs_ptr + batch * (capacity + 1), teacher_length, student_length, count, row_limit, capacity, space,
            DOCUMENTS, WINDOW, BLOCK, TILE,
        )  # fmt: skip
        tl.store(counts_ptr + batch * COUNTS, count)


@triton.jit
def store_seeing_rows(columns_ptr, rows_ptr, tokens, used, count, row_limit, capacity, steps, SIDE: tl.constexpr):
    """(first row that sees each column's token of one list, where they stop)"""
    own = rows_ptr + (2 + 2 * SIDE) * row_limit
    low = search(own + row_limit, tokens, count, steps, True)
    high = tl.maximum(low, search(own, tokens, count, steps, True))
    tl.store(columns_ptr, tl.where(used, low, -1))
    tl.store(columns_ptr + capacity, tl.where(used, high, -1))
    return low, high


@triton.jit(do_not_specialize=LENGTHS)
def column_tiles_kernel(
    columns_ptr, starts_ptr, rows_ptr, counts_ptr, tiles_ptr, row_limit, capacity, steps,
    LISTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program for each tile: the rows that see its columns."""
    batch, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    starts_ptr += batch * 8
    columns = tile * TILE + tl.arange(0, TILE)
    group, stop = tile * 0 - 1, tile * 0
    for GROUP in tl.static_range(4):
        start = tl.load(starts_ptr + GROUP)
        end = start + tl.load(starts_ptr + 4 + GROUP)
        inside = (tile * TILE >= start) & (tile * TILE < end)
        group, stop = tl.where(inside, GROUP, group), tl.where(inside, end, stop)
    used = columns < stop
    count = tl.load(counts_ptr + batch * COUNTS)
    rows_ptr += batch * ROWS * row_limit
    columns_ptr += batch * (4 + 2 * LISTS) * capacity + columns
    t0 = tl.load(columns_ptr, mask=used, other=-1)
    t1 = tl.load(columns_ptr + capacity, mask=used, other=-1)
    s0 = tl.load(columns_ptr + 2 * capacity, mask=used, other=-1)
    s1 = tl.load(columns_ptr + 3 * capacity, mask=used, other=-1)
    tl.store(columns_ptr, t0)
    tl.store(columns_ptr + capacity, t1)
    tl.store(columns_ptr + 2 * capacity, s0)
    tl.store(columns_ptr + 3 * capacity, s1)
    if LISTS == 1:
        low, high = store_seeing_rows(
            columns_ptr + 4 * capacity, rows_ptr, s0, used, count, row_limit, capacity, steps, 1
        )
        inner, outer = low, high
    else:
        # A second token that is none is where the first one is.
        teacher = tl.where(t0 >= 0, t0, -2 - t0)
        low, high = store_seeing_rows(
            columns_ptr + 4 * capacity, rows_ptr, teacher, used, count, row_limit, capacity, steps, 0
        )
        inner, outer = low, high
        for NUMBER in tl.static_range(1, 4):
            tokens = tl.where(t1 >= 0, t1, teacher) if NUMBER == 1 else tl.where(s1 >= 0, s1, s0) if NUMBER == 3 else s0
            own_low, own_high = store_seeing_rows(
                columns_ptr + (4 + 2 * NUMBER) * capacity, rows_ptr, tokens, used, count, row_limit, capacity, steps,
                NUMBER // 2,
            )  # fmt: skip
            low, high = tl.minimum(low, own_low), tl.maximum(high, own_high)
            inner, outer = tl.maximum(inner, own_low), tl.minimum(outer, own_high)
    lowest, highest = tl.min(tl.where(used, low, 2147483647), 0), tl.max(tl.where(used, high, 0), 0)
    # An incomplete tile is nowhere seen whole: what stands beyond its columns has no weight.
    full = tile * TILE + TILE <= stop
    inner, outer = tl.where(full, tl.max(inner, 0), lowest), tl.where(full, tl.min(outer, 0), lowest)
    limit = capacity // TILE
    tiles_ptr += batch * 5 * limit + tile
    some = group >= 0
    tl.store(tiles_ptr, group)
    tl.store(tiles_ptr + limit, tl.where(some, lowest, 0))
    tl.store(tiles_ptr + 2 * limit, tl.where(some, highest, 0))
    tl.store(tiles_ptr + 3 * limit, tl.where(some, inner, 0))
    tl.store(tiles_ptr + 4 * limit, tl.where(some, tl.maximum(inner, outer), 0))


@triton.jit
def work_of(tiles_ptr, tiles, limit):
    there = tiles < limit
    group = tl.load(tiles_ptr + tiles, mask=there, other=-1)
    rows = tl.load(tiles_ptr + 2 * limit + tiles, mask=there, other=0)
    rows -= tl.load(tiles_ptr + limit + tiles, mask=there, other=0)
    return tl.where(group >= 0, rows * (5 + 2 * (group % 2) + 3 * (group // 2)), 0)


@triton.jit
def order_tiles(tiles_ptr, order_ptr, tiles, limit, BLOCK: tl.constexpr):
    """Those with most work first, in order where it is the same."""
    mine = work_of(tiles_ptr, tiles, limit)
    rank = tl.zeros(tiles.shape, tl.int32)
    for first in range(0, limit, BLOCK):
        others = first + tl.arange(0, BLOCK)
        work = work_of(tiles_ptr, others, limit)
        ahead = (work[None, :] > mine[:, None]) | (
            (work[None, :] == mine[:, None]) & (others[None, :] < tiles[:, None])
        )
        rank += tl.sum((ahead & (others < limit)[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + rank, tiles, mask=tiles < limit)


@triton.jit
def store_moved(
    rows_ptr, moved_ptr, others_rows_ptr, others_ptr, tiles_ptr, used, stored, length, row_limit, tile_limit, steps
):
    """The tokens that rows see on one side, counted in moved ones; tiles as seen_tiles has them."""
    low = search(moved_ptr, tl.load(rows_ptr, mask=stored, other=0), length, steps, False)
    high = search(moved_ptr, tl.load(rows_ptr + row_limit, mask=stored, other=0), length, steps, False)
    low, high = tl.where(used, low, length), tl.where(used, high, length)
    tl.store(others_rows_ptr, low, mask=stored)
    tl.store(others_rows_ptr + row_limit, high, mask=stored)
    tl.store(others_ptr + 2 * row_limit, low, mask=stored)
    tl.store(others_ptr + 3 * row_limit, high, mask=stored)
    return seen_tiles(tiles_ptr, low, high, tile_limit, steps)


@triton.jit
def bound_rows(
    columns_ptr, starts_ptr, pairs_ptr, rows_ptr, counts_ptr, bounds_ptr, hidden_ptr, before_ptr, teacher_moved_ptr,
    student_moved_ptr, others_ptr, others_rows_ptr, others_tiles_ptr, others_counts_ptr, batch, numbers, teacher_length,
    student_length, row_limit, tile_limit, capacity, steps,
    LISTS: tl.constexpr,
):  # fmt: skip
    """Columns, and tiles of other segments, that each row sees."""
    stored = numbers < row_limit
    count = tl.load(counts_ptr + batch * COUNTS)
    used = numbers < count
    starts_ptr += batch * 8
    columns_ptr += batch * (4 + 2 * LISTS) * capacity
    bounds_ptr += batch * 8 * LISTS * row_limit + numbers
    rows_ptr += batch * ROWS * row_limit + numbers
    others_rows_ptr += batch * ROWS * row_limit + numbers
    before_ptr += batch * (row_limit + 1)
    pair_low = tl.load(rows_ptr + 8 * row_limit, mask=used, other=0)
    pair_high = tl.load(rows_ptr + 9 * row_limit, mask=used, other=0)
    others_low = tl.load(before_ptr + pair_low, mask=used, other=0)
    others_high = tl.load(before_ptr + pair_high, mask=used, other=0)
    hidden = pair_high - pair_low - (others_high - others_low)
    for GROUP in tl.static_range(4):
        start, size = tl.load(starts_ptr + GROUP), tl.load(starts_ptr + 4 + GROUP)
        first, last = numbers * 0 + size, numbers * 0
        for NUMBER in tl.static_range(LISTS):
            own = columns_ptr + (4 + 2 * NUMBER) * capacity + start
            low = search(own + capacity, numbers, size, steps, True)
            high = search(own, numbers, size, steps, True)
            first, last = tl.minimum(first, low), tl.maximum(last, high)
            at = bounds_ptr + 2 * (GROUP * LISTS + NUMBER) * row_limit
            tl.store(at, start + low, mask=stored)
            tl.store(at + row_limit, start + high, mask=stored)
        if LISTS == 4:
            if GROUP == 0:
                pairs = pairs_ptr + batch * (capacity + 1)
                first, last = tl.load(pairs + first), tl.load(pairs + last)
            hidden -= last - first
    tl.store(hidden_ptr + batch * row_limit + numbers, tl.where(used & (LISTS == 4), hidden, 0), mask=stored)

    others_ptr += batch * 2 * SEGMENT_FIELDS * row_limit + numbers
    others_tiles_ptr += batch * TILES * tile_limit
    tl.store(others_rows_ptr, tl.load(rows_ptr, mask=stored, other=0), mask=stored)
    tl.store(others_rows_ptr + row_limit, tl.load(rows_ptr + row_limit, mask=stored, other=0), mask=stored)
    moved_ptr = teacher_moved_ptr + batch * teacher_length
    teacher_tiles = store_moved(
        rows_ptr + 2 * row_limit, moved_ptr, others_rows_ptr + 2 * row_limit, others_ptr, others_tiles_ptr, used,
        stored, teacher_length, row_limit, tile_limit, steps,
    )  # fmt: skip
    moved_ptr = student_moved_ptr + batch * student_length
    student_tiles = store_moved(
        rows_ptr + 4 * row_limit, moved_ptr, others_rows_ptr + 4 * row_limit,
        others_ptr + SEGMENT_FIELDS * row_limit, others_tiles_ptr + 2 * tile_limit, used, stored, student_length,
        row_limit, tile_limit, steps,
    )  # fmt: skip
    store_tiles(others_rows_ptr, teacher_tiles, student_tiles, used, stored, row_limit, tile_limit)
    tl.store(others_rows_ptr + 8 * row_limit, others_low, mask=stored)
    tl.store(others_rows_ptr + 9 * row_limit, others_high, mask=stored)
    if tl.program_id(0) == 0:
        tl.store(others_counts_ptr + batch * COUNTS, count)


@triton.jit(do_not_specialize=LENGTHS)
def bounds_kernel(
    columns_ptr, starts_ptr, pairs_ptr, rows_ptr, counts_ptr, tiles_ptr, order_ptr, bounds_ptr, hidden_ptr, before_ptr,
    teacher_moved_ptr, student_moved_ptr, others_ptr, others_rows_ptr, others_tiles_ptr, others_counts_ptr,
    teacher_length, student_length, row_limit, tile_limit, capacity, steps,
    LISTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program for each block of rows, and behind these some that order the tiles."""
    batch, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(row_limit, BLOCK)
    limit = capacity // TILE
    if tl.program_id(0) >= blocks:
        tiles = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        order_tiles(tiles_ptr + batch * 5 * limit, order_ptr + batch * limit, tiles, limit, BLOCK)
    else:
        bound_rows(
            columns_ptr, starts_ptr, pairs_ptr, rows_ptr, counts_ptr, bounds_ptr, hidden_ptr, before_ptr,
            teacher_moved_ptr, student_moved_ptr, others_ptr, others_rows_ptr, others_tiles_ptr, others_counts_ptr,
            batch, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), teacher_length, student_length, row_limit,
            tile_limit, capacity, steps, LISTS,
        )  # fmt: skip
