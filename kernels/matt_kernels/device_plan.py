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
import triton.language as tl

from matt_kernels.plan import LONG_FIELDS, ROW_FIELDS, TILE_FIELDS, AimPlan, layout

BLOCK = 128  # at least the widest tile
LAUNCH = {"num_warps": 4, "num_stages": 1}
LENGTHS = ["teacher_length", "student_length", "row_limit", "tile_limit", "long_limit", "space", "steps", "batches"]
LENGTHS += ["window"]
# Scratch fields of a token and of a segment, on each side.
TOKEN_FIELDS, SEGMENT_FIELDS = tl.constexpr(4), tl.constexpr(9)
ROWS, TILES, LONG = (tl.constexpr(len(x)) for x in (ROW_FIELDS, TILE_FIELDS, LONG_FIELDS))
# Flags that ids break the rules: three of each side from the tokens, one of the documents.
FLAGS = tl.constexpr(8)


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def search(ptr, values, size, steps, RIGHT: tl.constexpr):
    """torch.searchsorted of each value in ptr[:size], which 2 ** steps exceeds."""
    low = tl.zeros(values.shape, tl.int32)
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        found = tl.load(ptr + middle, mask=low < high, other=0)
        behind = found <= values if RIGHT else found < values
        behind = behind & (low < high)
        high = tl.where(behind | (low >= high), high, middle)
        low = tl.where(behind, middle + 1, low)
    return low


@triton.jit
def load_count(tokens_ptr, batch, space, student_length, row_limit):
    """Segments of a row of the batch: the largest id of the student's side tells."""
    reached = tl.load(tokens_ptr + (batch * 2 + 1) * TOKEN_FIELDS * space + student_length - 1)
    return tl.minimum(reached + 1, row_limit)


@triton.jit(do_not_specialize=LENGTHS)
def tokens_kernel(
    teacher_ids_ptr, student_ids_ptr, teacher_documents_ptr, student_documents_ptr, teacher_marked_ptr,
    student_marked_ptr, tokens_ptr, names_ptr, flags_ptr, teacher_length, student_length, space,
    DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if side == 0:
        tokens_of_side(
            teacher_ids_ptr, teacher_documents_ptr, teacher_marked_ptr, tokens_ptr, names_ptr, flags_ptr, batch, 0,
            teacher_length, space, DOCUMENTS, BLOCK,
        )  # fmt: skip
    else:
        tokens_of_side(
            student_ids_ptr, student_documents_ptr, student_marked_ptr, tokens_ptr, names_ptr, flags_ptr, batch, 1,
            student_length, space, DOCUMENTS, BLOCK,
        )  # fmt: skip


@triton.jit
def tokens_of_side(
    ids_ptr, documents_ptr, marked_ptr, tokens_ptr, names_ptr, flags_ptr, batch, SIDE: tl.constexpr, length, space,
    DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ids_ptr += batch * length
    marked_ptr += batch * length
    tokens_ptr += (batch * 2 + SIDE) * TOKEN_FIELDS * space
    places = tl.arange(0, BLOCK)
    reached_before = tl.full([1], -1, tl.int32)
    broken = tl.zeros([BLOCK], tl.int32)
    if DOCUMENTS:
        documents_ptr += batch * length
        names_ptr += (batch * 2 + SIDE) * (space + 1)
        start_before, name_count = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    for first in range(0, length, BLOCK):
        tokens = first + places
        inside = tokens < length
        # An id above all that may be is one that breaks the rules, however large.
        ids = tl.load(ids_ptr + tokens, mask=inside, other=-1)
        ids = tl.minimum(tl.maximum(ids, -1), length + 1).to(tl.int32)
        previous = tl.load(ids_ptr + tokens - 1, mask=inside & (tokens > 0), other=-1)
        previous = tl.minimum(tl.maximum(previous, -1), length + 1).to(tl.int32)
        reached = tl.maximum(tl.associative_scan(ids, 0, larger), reached_before)
        lately = tl.maximum(tl.associative_scan(tl.where(places == 0, -1, previous), 0, larger), reached_before)
        broken |= (inside & (ids >= 0) & ((ids != reached) | (reached - lately > 1))).to(tl.int32)
        tl.store(tokens_ptr + tokens, reached, mask=inside)
        marked = ids
        if DOCUMENTS:
            document = tl.load(documents_ptr + tokens, mask=inside, other=-1)
            other = tl.load(documents_ptr + tokens - 1, mask=inside & (tokens > 0), other=-1)
            cut = inside & ((document != other) | (tokens == 0))
            starts = tl.associative_scan(tl.where(cut, tokens, 0), 0, larger)
            starts = tl.maximum(starts, start_before)
            tl.store(tokens_ptr + 2 * space + tokens, starts, mask=inside)
            start_before = tl.maximum(start_before, tl.max(starts, 0))
            opens = (cut & (document >= 0)).to(tl.int32)
            name = name_count + tl.cumsum(opens, 0) - 1
            tl.store(names_ptr + name, document.to(tl.int64), mask=opens > 0)
            name_count += tl.sum(opens, 0)
            broken |= (inside & (((ids >= 0) & (document < 0)) | (document < -1))).to(tl.int32)
            marked = tl.where(document < 0, -2, marked)
        tl.store(marked_ptr + tokens, marked, mask=inside)
        reached_before = tl.maximum(reached_before, tl.max(tl.where(inside, reached, -1), 0))
    if DOCUMENTS:
        tl.store(names_ptr + space + tl.zeros([1], tl.int32), name_count.to(tl.int64))
    tl.store(flags_ptr + batch * FLAGS + SIDE, tl.max(broken, 0))
    after_behind, stop_behind = tl.zeros([1], tl.int32) + length, tl.zeros([1], tl.int32) + length
    for step in range(tl.cdiv(length, BLOCK)):
        tokens = (tl.cdiv(length, BLOCK) - 1 - step) * BLOCK + places
        inside = tokens < length
        ids = tl.load(ids_ptr + tokens, mask=inside, other=-1)
        ids = tl.minimum(ids, length + 1).to(tl.int32)
        after = tl.associative_scan(tl.where(ids < 0, length, ids), 0, smaller, reverse=True)
        after = tl.minimum(after, after_behind)
        tl.store(tokens_ptr + space + tokens, after, mask=inside)
        after_behind = tl.minimum(after_behind, tl.min(after, 0))
        if DOCUMENTS:
            document = tl.load(documents_ptr + tokens, mask=inside, other=-1)
            other = tl.load(documents_ptr + tokens + 1, mask=tokens + 1 < length, other=-1)
            last = (document != other) | (tokens + 1 >= length)
            stops = tl.associative_scan(tl.where(last & inside, tokens + 1, length), 0, smaller, reverse=True)
            stops = tl.minimum(stops, stop_behind)
            tl.store(tokens_ptr + 3 * space + tokens, stops, mask=inside)
            stop_behind = tl.minimum(stop_behind, tl.min(stops, 0))


@triton.jit(do_not_specialize=LENGTHS)
def segments_kernel(
    tokens_ptr, segments_ptr, teacher_length, student_length, row_limit, space, steps, window,
    DOCUMENTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = numbers < load_count(tokens_ptr, batch, space, student_length, row_limit)
    length = tl.where(side == 0, teacher_length, student_length)
    tokens_ptr += (batch * 2 + side) * TOKEN_FIELDS * space
    first = search(tokens_ptr, numbers, length, steps, False)
    last = tl.maximum(search(tokens_ptr + space, numbers, length, steps, True), 1) - 1
    start, stop = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + length
    if DOCUMENTS:
        place = tl.minimum(last, length - 1)
        start, stop = tl.load(tokens_ptr + 2 * space + place), tl.load(tokens_ptr + 3 * space + place)
    low, high = start, stop
    if CAUSAL:
        high = last + 1
        if WINDOW:
            low = tl.maximum(low, last - window + 1)
    elif WINDOW:
        low, high = tl.maximum(low, last - window), tl.minimum(high, last + window + 1)
    segments_ptr += (batch * 2 + side) * SEGMENT_FIELDS * row_limit + numbers
    stored = numbers < row_limit
    tl.store(segments_ptr, tl.where(used, first, length), mask=stored)
    tl.store(segments_ptr + row_limit, tl.where(used, last, length), mask=stored)
    tl.store(segments_ptr + 2 * row_limit, tl.where(used, low, length), mask=stored)
    tl.store(segments_ptr + 3 * row_limit, tl.where(used, high, length), mask=stored)
    tl.store(segments_ptr + 4 * row_limit, tl.where(used, start, length), mask=stored)
    tl.store(segments_ptr + 5 * row_limit, tl.where(used, stop, length), mask=stored)


@triton.jit
def share_start(segments_ptr, numbers, count, row_limit, length):
    """(whether a segment opens its document, where its share of the tokens starts): n beyond the last one."""
    used = (numbers < count) & (numbers >= 0)
    first = tl.load(segments_ptr + numbers, mask=used, other=0)
    start = tl.load(segments_ptr + 4 * row_limit + numbers, mask=used, other=0)
    other = tl.load(segments_ptr + 4 * row_limit + numbers - 1, mask=used & (numbers > 0), other=-1)
    opens = used & (start != other)
    return opens, tl.where(used, tl.where(opens, start, first), length)


@triton.jit(do_not_specialize=LENGTHS)
def shares_kernel(
    tokens_ptr, segments_ptr, teacher_length, student_length, row_limit, space, BLOCK: tl.constexpr
):  # fmt: skip
    batch, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = load_count(tokens_ptr, batch, space, student_length, row_limit)
    length = tl.where(side == 0, teacher_length, student_length)
    segments_ptr += (batch * 2 + side) * SEGMENT_FIELDS * row_limit
    _, start = share_start(segments_ptr, numbers, count, row_limit, length)
    opens, following = share_start(segments_ptr, numbers + 1, count, row_limit, length)
    closes = opens | (numbers + 1 >= count)
    stop = tl.load(segments_ptr + 5 * row_limit + numbers, mask=closes & (numbers < row_limit), other=0)
    tl.store(segments_ptr + 6 * row_limit + numbers, start, mask=numbers < row_limit)
    tl.store(segments_ptr + 7 * row_limit + numbers, tl.where(closes, stop, following), mask=numbers < row_limit)


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
    tl.store(counts_ptr + batch * 3, count)
    tl.store(counts_ptr + batch * 3 + 1, tile)
    tl.store(counts_ptr + batch * 3 + 2, tl.minimum(long_count, long_limit))


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    segments_ptr, tiles_ptr, counts_ptr, rows_ptr, row_limit, tile_limit, steps,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = numbers < row_limit
    count = tl.load(counts_ptr + batch * 3)
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
    tile_low = search(tiles_ptr + tile_limit, low, tile_limit, steps, True)
    tile_high = search(tiles_ptr, high, tile_limit, steps, False)
    whole_low = search(tiles_ptr, low, tile_limit, steps, False)
    whole_high = search(tiles_ptr + tile_limit, high, tile_limit, steps, True)
    low = tl.load(student_ptr + 2 * row_limit + numbers, mask=stored, other=0)
    high = tl.load(student_ptr + 3 * row_limit + numbers, mask=stored, other=0)
    tl.store(rows_ptr + row_limit, tl.load(student_ptr + row_limit + numbers, mask=stored, other=0), mask=stored)
    tl.store(rows_ptr + 4 * row_limit, low, mask=stored)
    tl.store(rows_ptr + 5 * row_limit, high, mask=stored)
    tiles_ptr += 2 * tile_limit
    tile_low = tl.minimum(tile_low, search(tiles_ptr + tile_limit, low, tile_limit, steps, True))
    tile_high = tl.maximum(tile_high, search(tiles_ptr, high, tile_limit, steps, False))
    whole_low = tl.maximum(whole_low, search(tiles_ptr, low, tile_limit, steps, False))
    whole_high = tl.minimum(whole_high, search(tiles_ptr + tile_limit, high, tile_limit, steps, True))
    tl.store(rows_ptr + 6 * row_limit, tl.where(used, tile_low, tile_limit), mask=stored)
    tl.store(rows_ptr + 7 * row_limit, tl.where(used, tile_high, 0), mask=stored)
    start = tl.load(student_ptr + 4 * row_limit + numbers, mask=stored, other=0)
    opener = search(student_ptr + 4 * row_limit, start, row_limit, steps, False)
    following = tl.minimum(search(student_ptr + 4 * row_limit, start, row_limit, steps, True), count)
    tl.store(student_ptr + 8 * row_limit + numbers, following, mask=stored)
    tl.store(rows_ptr + 8 * row_limit, opener, mask=stored)
    tl.store(rows_ptr + 9 * row_limit, numbers + 1 if CAUSAL else following, mask=stored)
    tl.store(rows_ptr + 10 * row_limit, whole_low, mask=stored)
    tl.store(rows_ptr + 11 * row_limit, whole_high, mask=stored)


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
    row_high = tl.minimum(search(student_ptr, stop, row_limit, steps, False), tl.load(counts_ptr + batch * 3))
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
    count = tl.load(counts_ptr + batch * 3)
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
        count = tl.load(counts_ptr + batch * 3)
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
        count = tl.load(counts_ptr + batch * 3)
        own_rows = rows_ptr + batch * ROWS * row_limit
        following = segments_ptr + ((batch * 2 + 1) * SEGMENT_FIELDS + 8) * row_limit
        for first in range(0, row_limit, BLOCK):
            own = first + places
            found = tl.where(own < count, 1.0, 0.0)
            if BY_DOCUMENT:
                _, total, _ = pair_numbers(own_rows, following, own, own < count, row_limit, STAR, CAUSAL)
                found = tl.where(own < count, ((1.0 / total.to(tl.float64)) / largest).to(tl.float32), 0.0)
            tl.store(row_weights_ptr + batch * row_limit + own, found, mask=own < row_limit)


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
        DOCUMENTS=has_documents, BLOCK=BLOCK, **LAUNCH,
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
        STAR=variant == "aim_star", CAUSAL=causal, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    return plan
