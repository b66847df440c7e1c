"""A plan on the device, second part: from segments to tiles, rows and weights. See device_plan.py."""

import triton
import triton.language as tl

from matt_kernels.attention import COUNTS, LONG, ROWS, TILES
from matt_kernels.plan_tokens import FLAGS, LENGTHS, SEGMENT_FIELDS, TOKEN_FIELDS, load_count, search


@triton.jit(do_not_specialize=LENGTHS)
def tiles_kernel(
    tokens_ptr, segments_ptr, tiles_ptr, long_ptr, counts_ptr, teacher_length, student_length, row_limit, tile_limit,
    long_limit, space,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the first segment on: as many as fit into both widths, the next tile from the next one."""
    batch = tl.program_id(0).to(tl.int64)
    count = load_count(tokens_ptr, batch, space, student_length, row_limit)
    teacher_ptr = segments_ptr + batch * 2 * SEGMENT_FIELDS * row_limit + 6 * row_limit
    student_ptr = teacher_ptr + SEGMENT_FIELDS * row_limit
    tiles_ptr += batch * TILES * tile_limit
    long_ptr += batch * LONG * long_limit
    places = tl.arange(0, BLOCK)
    segment, tile, long_count = count * 0, count * 0, count * 0
    while segment < count:
        own = segment + places
        teacher_start, student_start = tl.load(teacher_ptr + segment), tl.load(student_ptr + segment)
        teacher_stops = tl.load(teacher_ptr + row_limit + own, mask=own < count, other=2147483647)
        student_stops = tl.load(student_ptr + row_limit + own, mask=own < count, other=2147483647)
        fits = (teacher_stops <= teacher_start + BLOCK_T) & (student_stops <= student_start + BLOCK_S)
        fitting = tl.min(tl.where(fits, BLOCK, places), 0)
        is_long = fitting == 0
        following = tl.minimum(segment + tl.maximum(fitting, 1), count)
        teacher_stop = tl.load(teacher_ptr + row_limit + following - 1)
        student_stop = tl.load(student_ptr + row_limit + following - 1)
        pieces = tl.cdiv(teacher_stop - teacher_start, BLOCK_T)
        pieces = tl.maximum(tl.maximum(pieces, tl.cdiv(student_stop - student_start, BLOCK_S)), 1)
        if is_long & (long_count < long_limit):
            tl.store(long_ptr + long_count, segment)
            tl.store(long_ptr + long_limit + long_count, teacher_start)
            tl.store(long_ptr + 2 * long_limit + long_count, teacher_stop)
            tl.store(long_ptr + 3 * long_limit + long_count, student_start)
            tl.store(long_ptr + 4 * long_limit + long_count, student_stop)
        for piece in range(pieces):
            if tile < tile_limit:
                low = tl.minimum(teacher_start + piece * BLOCK_T, teacher_stop)
                tl.store(tiles_ptr + tile, low)
                tl.store(tiles_ptr + tile_limit + tile, tl.minimum(low + BLOCK_T, teacher_stop))
                low = tl.minimum(student_start + piece * BLOCK_S, student_stop)
                tl.store(tiles_ptr + 2 * tile_limit + tile, low)
                tl.store(tiles_ptr + 3 * tile_limit + tile, tl.minimum(low + BLOCK_S, student_stop))
                tl.store(tiles_ptr + 6 * tile_limit + tile, tl.where(is_long, long_count, -1))
                tl.store(tiles_ptr + 9 * tile_limit + tile, segment)
                tl.store(tiles_ptr + 10 * tile_limit + tile, following)
                tile += 1
        long_count += is_long.to(tl.int32)
        segment = following
    for first in range(0, tile_limit, BLOCK):
        own = first + places
        unused = (own >= tile) & (own < tile_limit)
        teacher_end, student_end = places * 0 + teacher_length, places * 0 + student_length
        tl.store(tiles_ptr + own, teacher_end, mask=unused)
        tl.store(tiles_ptr + tile_limit + own, teacher_end, mask=unused)
        tl.store(tiles_ptr + 2 * tile_limit + own, student_end, mask=unused)
        tl.store(tiles_ptr + 3 * tile_limit + own, student_end, mask=unused)
        tl.store(tiles_ptr + 6 * tile_limit + own, places * 0 - 1, mask=unused)
        tl.store(tiles_ptr + 9 * tile_limit + own, places * 0, mask=unused)
        tl.store(tiles_ptr + 10 * tile_limit + own, places * 0, mask=unused)
    tl.store(counts_ptr + batch * COUNTS, count)
    tl.store(counts_ptr + batch * COUNTS + 1, tile)
    tl.store(counts_ptr + batch * COUNTS + 2, tl.minimum(long_count, long_limit))


@triton.jit
def seen_tiles(tiles_ptr, low, high, tile_limit, steps):
    """(first tile of which a row sees a token of one side, where they stop, first one that it sees whole, where these
    stop) of rows that see tokens from `low` to `high`; the side's first and last tokens of tiles are at tiles_ptr."""
    some = search(tiles_ptr + tile_limit, low, tile_limit, steps, True)
    stop = search(tiles_ptr, high, tile_limit, steps, False)
    whole = search(tiles_ptr, low, tile_limit, steps, False)
    return some, stop, whole, search(tiles_ptr + tile_limit, high, tile_limit, steps, True)


@triton.jit
def store_tiles(rows_ptr, teacher, student, used, stored, row_limit, tile_limit):
    """Fields of rows from both sides' seen_tiles."""
    low, high = tl.minimum(teacher[0], student[0]), tl.maximum(teacher[1], student[1])
    tl.store(rows_ptr + 6 * row_limit, tl.where(used, low, tile_limit), mask=stored)
    tl.store(rows_ptr + 7 * row_limit, tl.where(used, high, 0), mask=stored)
    tl.store(rows_ptr + 10 * row_limit, tl.maximum(teacher[2], student[2]), mask=stored)
    tl.store(rows_ptr + 11 * row_limit, tl.minimum(teacher[3], student[3]), mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    segments_ptr, tiles_ptr, counts_ptr, rows_ptr, row_limit, tile_limit, steps,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = numbers < row_limit
    count = tl.load(counts_ptr + batch * COUNTS)
    used = numbers < count
    teacher_ptr = segments_ptr + batch * 2 * SEGMENT_FIELDS * row_limit
    student_ptr = teacher_ptr + SEGMENT_FIELDS * row_limit
    tiles_ptr += batch * TILES * tile_limit
    rows_ptr += batch * ROWS * row_limit + numbers
    low = tl.load(teacher_ptr + 2 * row_limit + numbers, mask=stored, other=0)
    high = tl.load(teacher_ptr + 3 * row_limit + numbers, mask=stored, other=0)
    tl.store(rows_ptr, tl.load(teacher_ptr + row_limit + numbers, mask=stored, other=0), mask=stored)
    tl.store(rows_ptr + 2 * row_limit, low, mask=stored)
    tl.store(rows_ptr + 3 * row_limit, high, mask=stored)
    teacher_tiles = seen_tiles(tiles_ptr, low, high, tile_limit, steps)
    low = tl.load(student_ptr + 2 * row_limit + numbers, mask=stored, other=0)
    high = tl.load(student_ptr + 3 * row_limit + numbers, mask=stored, other=0)
    last = tl.load(student_ptr + row_limit + numbers, mask=stored, other=0)
    tl.store(rows_ptr + row_limit, last, mask=stored)
    tl.store(rows_ptr + 12 * row_limit, last, mask=stored)
    tl.store(rows_ptr + 4 * row_limit, low, mask=stored)
    tl.store(rows_ptr + 5 * row_limit, high, mask=stored)
    student_tiles = seen_tiles(tiles_ptr + 2 * tile_limit, low, high, tile_limit, steps)
    store_tiles(rows_ptr, teacher_tiles, student_tiles, used, stored, row_limit, tile_limit)
    start = tl.load(student_ptr + 4 * row_limit + numbers, mask=stored, other=0)
    opener = search(student_ptr + 4 * row_limit, start, row_limit, steps, False)
    following = tl.minimum(search(student_ptr + 4 * row_limit, start, row_limit, steps, True), count)
    tl.store(student_ptr + 8 * row_limit + numbers, following, mask=stored)
    tl.store(rows_ptr + 8 * row_limit, opener, mask=stored)
    tl.store(rows_ptr + 9 * row_limit, numbers + 1 if CAUSAL else following, mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def columns_kernel(
    segments_ptr, tiles_ptr, counts_ptr, row_limit, tile_limit, steps, BLOCK: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = numbers < tile_limit
    teacher_ptr = segments_ptr + batch * 2 * SEGMENT_FIELDS * row_limit + 2 * row_limit
    student_ptr = teacher_ptr + SEGMENT_FIELDS * row_limit
    tiles_ptr += batch * TILES * tile_limit + numbers
    start = tl.load(tiles_ptr, mask=stored, other=0)
    stop = tl.load(tiles_ptr + tile_limit, mask=stored, other=0)
    whole_low = search(teacher_ptr + row_limit, stop, row_limit, steps, False)
    whole_high = search(teacher_ptr, start, row_limit, steps, True)
    start = tl.load(tiles_ptr + 2 * tile_limit, mask=stored, other=0)
    stop = tl.load(tiles_ptr + 3 * tile_limit, mask=stored, other=0)
    whole_low = tl.maximum(whole_low, search(student_ptr + row_limit, stop, row_limit, steps, False))
    whole_high = tl.minimum(whole_high, search(student_ptr, start, row_limit, steps, True))
    # Only what the student sees has a gradient.
    row_low = search(student_ptr + row_limit, start, row_limit, steps, True)
    row_high = tl.minimum(search(student_ptr, stop, row_limit, steps, False), tl.load(counts_ptr + batch * COUNTS))
    tl.store(tiles_ptr + 4 * tile_limit, row_low, mask=stored)
    tl.store(tiles_ptr + 5 * tile_limit, row_high, mask=stored)
    tl.store(tiles_ptr + 7 * tile_limit, whole_low, mask=stored)
    tl.store(tiles_ptr + 8 * tile_limit, whole_high, mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def documents_kernel(
    teacher_documents_ptr, student_documents_ptr, segments_ptr, names_ptr, counts_ptr, flags_ptr, teacher_length,
    student_length, row_limit, space,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether a document lies in two places, or is another on the other side, or a segment lies in two."""
    batch = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    broken = tl.zeros([BLOCK], tl.int32)
    teacher_names = names_ptr + batch * 2 * (space + 1)
    student_names = teacher_names + space + 1
    size = tl.load(teacher_names + space).to(tl.int32)
    broken |= (places * 0 + size != tl.load(student_names + space).to(tl.int32)).to(tl.int32)
    size = tl.minimum(size, tl.load(student_names + space).to(tl.int32))
    for first in range(0, size, BLOCK):
        own = first + places
        names = tl.load(teacher_names + own, mask=own < size, other=-1)
        broken |= (names != tl.load(student_names + own, mask=own < size, other=-1)).to(tl.int32)
        for place in range(size):
            again = (names == tl.load(teacher_names + place)) & (own != place) & (own < size)
            broken |= again.to(tl.int32)
    teacher_ptr = segments_ptr + batch * 2 * SEGMENT_FIELDS * row_limit
    student_ptr = teacher_ptr + SEGMENT_FIELDS * row_limit
    count = tl.load(counts_ptr + batch * COUNTS)
    for first in range(0, count, BLOCK):
        own = first + places
        used = own < count
        for_teacher = tl.load(teacher_ptr + row_limit + own, mask=used, other=0)
        for_student = tl.load(student_ptr + row_limit + own, mask=used, other=0)
        owner = tl.load(teacher_documents_ptr + batch * teacher_length + for_teacher, mask=used, other=0)
        other = tl.load(student_documents_ptr + batch * student_length + for_student, mask=used, other=0)
        broken |= (used & (owner.to(tl.int64) != other.to(tl.int64))).to(tl.int32)
        for pointer in tl.static_range(2):
            side_ptr = student_ptr if pointer else teacher_ptr
            begin = tl.load(side_ptr + own, mask=used, other=0)
            broken |= (begin < tl.load(side_ptr + 4 * row_limit + own, mask=used, other=0)).to(tl.int32)
    tl.store(flags_ptr + batch * FLAGS + 2, tl.max(broken, 0))


@triton.jit
def pair_numbers(rows_ptr, following_ptr, numbers, used, row_limit, STAR: tl.constexpr, CAUSAL: tl.constexpr):
    """(pairs of each row, pairs of its document, whether it is the document's first)."""
    opener = tl.load(rows_ptr + 8 * row_limit + numbers, mask=used, other=0)
    size = (tl.load(following_ptr + numbers, mask=used, other=0) - opener).to(tl.int64)
    place = (numbers - opener).to(tl.int64)
    if STAR:
        mine, total = size * 0 + 1, size
    elif CAUSAL:
        mine, total = place + 1, size * (size + 1) // 2
    else:
        mine, total = size, size * size
    return mine, tl.maximum(total, 1), used & (place == 0)


@triton.jit(do_not_specialize=LENGTHS)
def weights_kernel(
    rows_ptr, segments_ptr, tokens_ptr, counts_ptr, flags_ptr, row_weights_ptr, pair_weight_ptr, batches,
    teacher_length, student_length, row_limit, space,
    DOCUMENTS: tl.constexpr, BY_DOCUMENT: tl.constexpr, STAR: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.arange(0, BLOCK)
    pairs, opened = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    largest = tl.zeros([BLOCK], tl.float64)
    broken, all_counts = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for batch in range(batches):
        count = tl.load(counts_ptr + batch * COUNTS)
        all_counts += count
        ends = tokens_ptr + batch * 2 * TOKEN_FIELDS * space
        broken |= (places * 0 + tl.load(ends + teacher_length - 1) + 1 != count).to(tl.int32)
        broken |= (places * 0 + tl.load(ends + TOKEN_FIELDS * space + student_length - 1) + 1 != count).to(tl.int32)
        broken |= tl.load(flags_ptr + batch * FLAGS) + tl.load(flags_ptr + batch * FLAGS + 1)
        if DOCUMENTS:
            broken |= tl.load(flags_ptr + batch * FLAGS + 2)
        own_rows = rows_ptr + batch * ROWS * row_limit
        following = segments_ptr + ((batch * 2 + 1) * SEGMENT_FIELDS + 8) * row_limit
        for first in range(0, count, BLOCK):
            own = first + places
            mine, total, opens = pair_numbers(own_rows, following, own, own < count, row_limit, STAR, CAUSAL)
            pairs += tl.where(own < count, mine, 0)
            opened += opens.to(tl.int64)
            largest = tl.maximum(largest, tl.where(own < count, 1.0 / total.to(tl.float64), 0.0))
    largest = tl.max(largest, 0)
    if BY_DOCUMENT:
        weight = largest / tl.maximum(tl.sum(opened, 0), 1).to(tl.float64)
    else:
        weight = 1.0 / tl.maximum(tl.sum(pairs, 0), 1).to(tl.float64)
    lost = (tl.max(broken, 0) > 0) | (tl.max(all_counts, 0) == 0)
    tl.store(pair_weight_ptr, tl.where(lost, float("nan"), weight.to(tl.float32)))
    for batch in range(batches):
        count = tl.load(counts_ptr + batch * COUNTS)
        own_rows = rows_ptr + batch * ROWS * row_limit
        following = segments_ptr + ((batch * 2 + 1) * SEGMENT_FIELDS + 8) * row_limit
        for first in range(0, row_limit, BLOCK):
            own = first + places
            found = tl.where(own < count, 1.0, 0.0)
            if BY_DOCUMENT:
                _, total, _ = pair_numbers(own_rows, following, own, own < count, row_limit, STAR, CAUSAL)
                found = tl.where(own < count, ((1.0 / total.to(tl.float64)) / largest).to(tl.float32), 0.0)
            tl.store(row_weights_ptr + batch * row_limit + own, found, mask=own < row_limit)
