"""Per tile: the teacher's values as mixtures of the student's, and inner products of what the loss is made of.

Inside a segment write the teacher's values as v_T = C v_S + r, C the least-squares mixture of the student's values of
the same segment. Then, with e = a_S - a_T C,

    s_S - s_T = e V_S - a_T R,    |s_S - s_T|² = e G e' + a_T R R' a_T',    v_S · (s_S - s_T) = G e',    G = V_S V_S'

because R is orthogonal to V_S. The difference of the two sides is taken between weights, before anything is squared:
expanding |s_T - s_S|² into inner products (aim-math.md §2) costs as much and loses its digits once the sides agree.
Linear in n: one program per tile, rows of `width` numbers per token. Values pass in slices of the head dimension.
"""

import torch
import triton
import triton.language as tl

from matt_kernels.attention import COUNTS, TILES, load_ids, load_tile, operand, same_segment
from matt_kernels.launch import LENGTHS, strides, tile_grid, tile_program

# A value that adds less than this part of itself (squared) to the span of the others of its segment is left to the
# remainders: as small a part of it as this is then lost, and C, whose entries are as large as this is small, loses as
# much to its own rounding. Below the last one the pivots themselves are rounding. Not a part of the longest one: tokens
# that attention sinks into have short values, and those are most of the loss.
DEPENDENT_BF16, DEPENDENT_TF32, DEPENDENT_FP32 = tl.constexpr(2e-3), tl.constexpr(2.5e-4), tl.constexpr(4e-6)
# Below it a square has no inverse in float32.
SMALLEST = tl.constexpr(1e-37)


@triton.jit
def load_slice(value_ptr, tokens, ids, stride_n, first, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """Columns from `first` of the values of one tile, float32, zeros outside segments."""
    columns = first + tl.arange(0, BLOCK_V)
    offsets = tokens.to(tl.int64)[:, None] * stride_n + columns[None, :]
    mask = (ids >= 0)[:, None] & (columns < VALUE_DIM)[None, :]
    return tl.load(value_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def stored(x, KIND: tl.constexpr):
    """As operand() has it, but a NaN stays one, of whatever bits: what a value had reaches the loss."""
    return tl.where(x == x, operand(x, KIND), float("nan"))


@triton.jit
def store_left(ptrs, gram, inside, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """What rounding leaves of the squares of a tile, the diagonal of its Gram matrix."""
    places = tl.arange(0, BLOCK)
    squares = tl.sum(tl.where(places[:, None] == places[None, :], gram, 0.0), 1)
    tl.store(ptrs, squares - operand(squares, KIND).to(tl.float32), mask=inside)


@triton.jit
def invert_by_segment(gram, ids, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """Inverse of a Gram matrix of segments, block by block; values that depend on others of their segment get zeros.

    The sweep operator on all segments at once, the longest remaining value of each first: no products, all in
    registers. Pivoting keeps rounding of the diagonal at that of its largest entry, far below what is dependent.
    """
    DEPENDENT: tl.constexpr = DEPENDENT_BF16 if KIND == "bf16" else DEPENDENT_TF32 if KIND == "tf32" else DEPENDENT_FP32
    places = tl.arange(0, BLOCK)
    same = same_segment(ids, ids)
    diagonal = places[:, None] == places[None, :]
    size = tl.sum(same.to(tl.int32), 0)
    lengths = tl.sum(tl.where(diagonal, gram, 0.0), 0)
    waiting = (size > 0).to(tl.int32)
    for _ in range(0, tl.max(size)):
        pivots = tl.where(waiting > 0, tl.maximum(tl.sum(tl.where(diagonal, gram, 0.0), 0), 0.0), -1.0)
        pivot = tl.max(tl.where(same, pivots[None, :], -1.0), 1)
        # of equal ones the first
        is_pivot = same & (pivots[None, :] == pivot[:, None]) & (waiting > 0)[None, :]
        place = tl.min(tl.where(is_pivot, places[None, :], BLOCK), 1)
        at_column = (place[:, None] == places[None, :]).to(tl.int32)
        column_chosen = tl.max(at_column, 0) > 0
        row_chosen = place == places
        # gram is zero between segments: at most one chosen column or row per segment reaches these sums
        column = tl.sum(tl.where(column_chosen[None, :], gram, 0.0), 1)
        row = tl.sum(tl.where(row_chosen[:, None], gram, 0.0), 0)
        own = tl.sum(tl.where(at_column > 0, lengths[None, :], 0.0), 1)
        kept = pivot > tl.maximum(DEPENDENT * own, SMALLEST)
        inverse = tl.where(kept, 1.0 / tl.where(kept, pivot, 1.0), 0.0)
        swept = tl.where(column_chosen[None, :], 1.0, -row[None, :]) * (column * inverse)[:, None]
        rest = tl.where(column_chosen[None, :] & same, 0.0, gram)
        chosen = tl.where(column_chosen[None, :], -1.0, row[None, :]) * inverse[:, None]
        gram = tl.where(row_chosen[:, None], tl.where(same, chosen, 0.0), rest + tl.where(same, swept, 0.0))
        waiting = tl.where(column_chosen, 0, waiting)
    return -gram


@triton.jit
def remainder(teacher_values, student_values, mixture, low, LOW: tl.constexpr, EXACT: tl.constexpr):
    # [BLOCK_T, BLOCK_S] @ [BLOCK_S, BLOCK_V] -> [BLOCK_T, BLOCK_V]
    left = teacher_values - tl.dot(mixture, student_values, input_precision=EXACT)
    if LOW:
        left -= tl.dot(low, student_values, input_precision=EXACT)
    return left


@triton.jit(do_not_specialize=LENGTHS)
def aim_factors_kernel(
    teacher_value_ptr, student_value_ptr, teacher_ids_ptr, student_ids_ptr, tiles_ptr, counts_ptr,
    mixture_ptr, gram_ptr, rest_ptr, low_ptr, gram_left_ptr, rest_left_ptr,
    teacher_stride_b, teacher_stride_h, teacher_stride_n, student_stride_b, student_stride_h, student_stride_n,
    kv_heads, tile_limit, teacher_length, student_length,
    LOW: tl.constexpr, LEFT: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, kv_index = tile_program(tile_limit)
    batch, head = kv_index // kv_heads, kv_index % kv_heads
    if tile < tl.load(counts_ptr + batch * COUNTS + 1):
        tiles_ptr += batch * TILES * tile_limit
        teacher_start, teacher_stop = load_tile(tiles_ptr, tile, tile_limit, 0)
        student_start, student_stop = load_tile(tiles_ptr, tile, tile_limit, 1)
        teacher_tokens, student_tokens = (
            teacher_start + tl.arange(0, BLOCK_T),
            student_start + tl.arange(0, BLOCK_S),
        )
        # long segments have kernels of their own: their tiles hold zeros
        is_long = tl.load(tiles_ptr + 6 * tile_limit + tile) >= 0
        teacher_ids = load_ids(teacher_ids_ptr + batch * teacher_length, teacher_tokens, teacher_stop)
        student_ids = load_ids(student_ids_ptr + batch * student_length, student_tokens, student_stop)
        teacher_ids, student_ids = tl.where(is_long, -1, teacher_ids), tl.where(is_long, -1, student_ids)
        across = same_segment(teacher_ids, student_ids)
        teacher_value_ptr += batch * teacher_stride_b + head * teacher_stride_h
        student_value_ptr += batch * student_stride_b + head * student_stride_h

        gram = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
        products = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for first in range(0, VALUE_DIM, BLOCK_V):
            student = load_slice(
                student_value_ptr, student_tokens, student_ids, student_stride_n, first, VALUE_DIM, BLOCK_V
            )
            teacher = load_slice(
                teacher_value_ptr, teacher_tokens, teacher_ids, teacher_stride_n, first, VALUE_DIM, BLOCK_V
            )
            transposed = tl.trans(student)
            # [BLOCK, BLOCK_V] @ [BLOCK_V, BLOCK_S] -> [BLOCK, BLOCK_S]
            gram = tl.dot(student, transposed, gram, input_precision=EXACT)
            products = tl.dot(teacher, transposed, products, input_precision=EXACT)
        gram = tl.where(same_segment(student_ids, student_ids), gram, 0.0)
        inverse = invert_by_segment(gram, student_ids, BLOCK_S, KIND)
        # [BLOCK_T, BLOCK_S] @ [BLOCK_S, BLOCK_S] -> [BLOCK_T, BLOCK_S]
        mixture = tl.dot(tl.where(across, products, 0.0), inverse, input_precision=EXACT)
        # Corrected by what is left: orthogonal to rounding, however ill-conditioned the Gram matrix. Where 24 bits of
        # C are not enough its lower digits are kept apart: once the sides agree, C is 1 and what counts is 1 - C.
        low = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for _ in range(2 + LOW):
            if LOW:
                total = mixture + low
                mixture = operand(total, "tf32")
                low = total - mixture
            products = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
            for first in range(0, VALUE_DIM, BLOCK_V):
                student = load_slice(
                    student_value_ptr, student_tokens, student_ids, student_stride_n, first, VALUE_DIM, BLOCK_V
                )
                teacher = load_slice(
                    teacher_value_ptr, teacher_tokens, teacher_ids, teacher_stride_n, first, VALUE_DIM, BLOCK_V
                )
                left = remainder(teacher, student, mixture, low, LOW, EXACT)
                products = tl.dot(left, tl.trans(student), products, input_precision=EXACT)
            correction = tl.dot(tl.where(across, products, 0.0), inverse, input_precision=EXACT)
            if LOW:
                low += correction
            else:
                mixture += correction

        student_columns = tl.arange(0, BLOCK_S)[None, :]
        rows = (kv_index * student_length + student_tokens)[:, None] * BLOCK_S + student_columns
        in_student = student_tokens < student_stop
        tl.store(gram_ptr + rows, stored(gram, KIND), mask=in_student[:, None])
        if LEFT:
            store_left(gram_left_ptr + kv_index * student_length + student_tokens, gram, in_student, BLOCK_S, KIND)
        in_teacher = teacher_tokens < teacher_stop
        rows = (kv_index * teacher_length + teacher_tokens)[:, None]
        tl.store(mixture_ptr + rows * BLOCK_S + student_columns, stored(mixture, KIND), mask=in_teacher[:, None])
        if LOW:
            tl.store(low_ptr + rows * BLOCK_S + student_columns, low, mask=in_teacher[:, None])
        rest = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for first in range(0, VALUE_DIM, BLOCK_V):
            student = load_slice(
                student_value_ptr, student_tokens, student_ids, student_stride_n, first, VALUE_DIM, BLOCK_V
            )
            teacher = load_slice(
                teacher_value_ptr, teacher_tokens, teacher_ids, teacher_stride_n, first, VALUE_DIM, BLOCK_V
            )
            left = remainder(teacher, student, mixture, low, LOW, EXACT)
            rest = tl.dot(left, tl.trans(left), rest, input_precision=EXACT)
        rest = tl.where(same_segment(teacher_ids, teacher_ids), rest, 0.0)
        teacher_columns = tl.arange(0, BLOCK_T)[None, :]
        tl.store(rest_ptr + rows * BLOCK_T + teacher_columns, stored(rest, KIND), mask=in_teacher[:, None])
        if LEFT:
            store_left(rest_left_ptr + kv_index * teacher_length + teacher_tokens, rest, in_teacher, BLOCK_T, KIND)


def empty_factors(teacher_value, student_value, widths, kind: str) -> tuple[torch.Tensor | None, ...]:
    """(C [B, H_kv, n_T, w_S], G [B, H_kv, n_S, w_S], R R' [B, H_kv, n_T, w_T], lower digits of C or None), w the widths
    of a tile, `kind` the config's factor_kind."""
    block_t, block_s = widths
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    sizes = (teacher_value, block_s), (student_value, block_s), (teacher_value, block_t)
    mixture, gram, rest = (x.new_empty(*x.shape[:3], width, dtype=dtype) for x, width in sizes)
    return mixture, gram, rest, torch.empty_like(mixture) if kind == "fp32" else None


def aim_factors(teacher_value, student_value, plan, config, metric: str) -> tuple[torch.Tensor | None, ...]:
    """The factors of all tiles, as empty_factors has them, and what rounding left of the diagonals of G [B, H_kv, n_S]
    and R R' [B, H_kv, n_T], float32: None where the value does without."""
    block_t, block_s = plan.widths
    outputs = empty_factors(teacher_value, student_value, plan.widths, config.factor_kind)
    left = metric == "mse" and config.factor_kind != "fp32"
    sides = student_value, teacher_value
    outputs += tuple(x.new_empty(x.shape[:3], dtype=torch.float32) if left else None for x in sides)
    aim_factors_kernel[tile_grid(plan, student_value)](
        teacher_value, student_value, plan.teacher_segments, plan.student_segments, plan.tiles, plan.counts, *outputs,
        *strides(teacher_value, student_value),
        student_value.shape[1], plan.tiles.shape[-1], teacher_value.shape[2], student_value.shape[2],
        LOW=outputs[3] is not None, LEFT=left, KIND=config.factor_kind, BLOCK_T=block_t, BLOCK_S=block_s,
        VALUE_DIM=student_value.shape[-1], BLOCK_V=config.block_v, EXACT=config.exact_precision,
        num_warps=config.factors.warps, num_stages=config.factors.stages,
    )  # fmt: skip
    return outputs
