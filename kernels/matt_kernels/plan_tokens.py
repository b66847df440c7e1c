"""A plan on the device, first part: from ids to segments. See device_plan.py."""

import triton
import triton.language as tl

LENGTHS = ["teacher_length", "student_length", "row_limit", "tile_limit", "long_limit", "space", "steps", "batches"]
LENGTHS += ["window"]
# Scratch fields of a token and of a segment, on each side.
TOKEN_FIELDS, SEGMENT_FIELDS = tl.constexpr(4), tl.constexpr(9)
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
