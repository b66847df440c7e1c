"""Per tile: every value in a small orthonormal basis of its segment's span, and inner products of values.

Inside a segment all values v_T and v_S span at most as many dimensions as it has tokens. In an orthonormal basis of
that span s_T - s_S is a handful of numbers instead of d, and the difference is taken before squaring: expanding
|s_T - s_S|² into inner products costs as much and loses its digits once the sides agree. The student's tokens come
first; what is left of the teacher's outside their span reaches the loss but no gradient of the student's weights.
Linear in n: one program per tile, buffers of one row of `width` numbers per token.
"""

import torch
import triton
import triton.language as tl

from matt_kernels.plan import AimPlan

# Of its length, what a vector must add to the span of those before it: below this it is rounding.
TOLERANCE = tl.constexpr(1e-6)


@triton.jit
def tile_values(value_ptr, ids_ptr, start, stop, stride_n, BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """(token offsets, ids, values [BLOCK, BLOCK_DV] with zeros outside segments) of one tile."""
    tokens = start + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_DV)
    ids = tl.load(ids_ptr + tokens, mask=tokens < stop, other=-1)
    offsets = tokens.to(tl.int64)[:, None] * stride_n + columns[None, :]
    values = tl.load(value_ptr + offsets, mask=(ids >= 0)[:, None] & (columns < VALUE_DIM)[None, :], other=0.0)
    return tokens, ids, values


@triton.jit
def same_segment(ids, others):
    return (ids[:, None] == others[None, :]) & (ids >= 0)[:, None]


@triton.jit
def rank_in_segment(same, BLOCK: tl.constexpr):
    """How many tokens of its segment lie before each token."""
    places = tl.arange(0, BLOCK)
    return tl.sum((same & (places[None, :] < places[:, None])).to(tl.int32), 1)


@triton.jit
def coordinates(vectors, basis, same, PRECISION: tl.constexpr):
    """(coordinates in the basis of its own segment, what is left); projected twice, which is orthogonal to rounding."""
    # [BLOCK, BLOCK_DV] @ [BLOCK_DV, BLOCK_S] -> [BLOCK, BLOCK_S]
    first = tl.where(same, tl.dot(vectors, tl.trans(basis), input_precision=PRECISION), 0.0)
    # [BLOCK, BLOCK_S] @ [BLOCK_S, BLOCK_DV] -> [BLOCK, BLOCK_DV]
    rest = vectors - tl.dot(first, basis, input_precision=PRECISION)
    again = tl.where(same, tl.dot(rest, tl.trans(basis), input_precision=PRECISION), 0.0)
    rest -= tl.dot(again, basis, input_precision=PRECISION)
    return first + again, rest


@triton.jit
def normalised(vectors, lengths, wanted):
    """Unit rows where wanted and where more than rounding is left of the length, else zero."""
    norms = tl.sqrt(tl.sum(vectors * vectors, 1))
    keep = wanted & (norms > TOLERANCE * lengths)
    return tl.where(keep[:, None], vectors / tl.where(keep, norms, 1.0)[:, None], 0.0)


@triton.jit
def orthonormal(vectors, same, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Rows that span each segment's vectors: Gram-Schmidt on all segments of the tile at once, token by token."""
    rank = rank_in_segment(same, BLOCK)
    lengths = tl.sqrt(tl.sum(vectors * vectors, 1))
    basis = normalised(vectors, lengths, rank == 0)
    for step in range(1, tl.max(rank) + 1):
        _, rest = coordinates(vectors, basis, same, PRECISION)
        basis += normalised(rest, lengths, rank == step)
    return basis


@triton.jit
def aim_basis_kernel(
    teacher_value_ptr, student_value_ptr, teacher_ids_ptr, student_ids_ptr, tiles_ptr, own_ptr, shared_ptr, outside_ptr,
    teacher_stride_b, teacher_stride_h, teacher_stride_n, student_stride_b, student_stride_h, student_stride_n,
    kv_heads, teacher_length, student_length, tile_limit,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // kv_heads, batch_head % kv_heads
    tiles_ptr += batch * 7 * tile_limit + tile
    teacher_start, teacher_stop = tl.load(tiles_ptr), tl.load(tiles_ptr + tile_limit)
    student_start, student_stop = tl.load(tiles_ptr + 2 * tile_limit), tl.load(tiles_ptr + 3 * tile_limit)
    is_long = tl.load(tiles_ptr + 6 * tile_limit) >= 0
    if (teacher_start < teacher_stop) | (student_start < student_stop):
        teacher_value_ptr += batch * teacher_stride_b + head * teacher_stride_h
        student_value_ptr += batch * student_stride_b + head * student_stride_h
        teacher_tokens, teacher_ids, teacher_values = tile_values(
            teacher_value_ptr, teacher_ids_ptr + batch * teacher_length, teacher_start,
            teacher_stop, teacher_stride_n, BLOCK_T, VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        student_tokens, student_ids, student_values = tile_values(
            student_value_ptr, student_ids_ptr + batch * student_length, student_start,
            student_stop, student_stride_n, BLOCK_S, VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        teacher_ids = tl.where(is_long, -1, teacher_ids)
        student_ids = tl.where(is_long, -1, student_ids)
        teacher_values = teacher_values.to(tl.float32)
        same = same_segment(student_ids, student_ids)
        basis = orthonormal(student_values.to(tl.float32), same, BLOCK_S, PRECISION)
        own, _ = coordinates(student_values.to(tl.float32), basis, same, PRECISION)
        shared, rest = coordinates(teacher_values, basis, same_segment(teacher_ids, student_ids), PRECISION)
        rest_norms = tl.sqrt(tl.sum(rest * rest, 1))
        some = rest_norms > TOLERANCE * tl.sqrt(tl.sum(teacher_values * teacher_values, 1))
        rest = tl.where(some[:, None], rest, 0.0)
        same = same_segment(teacher_ids, teacher_ids)
        basis = orthonormal(rest, same, BLOCK_T, PRECISION)
        outside, _ = coordinates(rest, basis, same, PRECISION)
        student_columns, teacher_columns = tl.arange(0, BLOCK_S)[None, :], tl.arange(0, BLOCK_T)[None, :]
        rows = (batch_head * student_length + student_tokens)[:, None] * BLOCK_S + student_columns
        tl.store(own_ptr + rows, own.to(own_ptr.dtype.element_ty), mask=(student_tokens < student_stop)[:, None])
        kept = (teacher_tokens < teacher_stop)[:, None]
        rows = (batch_head * teacher_length + teacher_tokens)[:, None] * BLOCK_S + student_columns
        tl.store(shared_ptr + rows, shared.to(shared_ptr.dtype.element_ty), mask=kept)
        rows = (batch_head * teacher_length + teacher_tokens)[:, None] * BLOCK_T + teacher_columns
        tl.store(outside_ptr + rows, outside.to(outside_ptr.dtype.element_ty), mask=kept)


@triton.jit
def aim_gram_kernel(
    teacher_value_ptr, student_value_ptr, teacher_ids_ptr, student_ids_ptr, tiles_ptr, own_ptr, across_ptr,
    teacher_stride_b, teacher_stride_h, teacher_stride_n, student_stride_b, student_stride_h, student_stride_n,
    kv_heads, teacher_length, student_length, tile_limit,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // kv_heads, batch_head % kv_heads
    tiles_ptr += batch * 7 * tile_limit + tile
    teacher_start, teacher_stop = tl.load(tiles_ptr), tl.load(tiles_ptr + tile_limit)
    student_start, student_stop = tl.load(tiles_ptr + 2 * tile_limit), tl.load(tiles_ptr + 3 * tile_limit)
    is_long = tl.load(tiles_ptr + 6 * tile_limit) >= 0
    if (teacher_start < teacher_stop) | (student_start < student_stop):
        teacher_value_ptr += batch * teacher_stride_b + head * teacher_stride_h
        student_value_ptr += batch * student_stride_b + head * student_stride_h
        teacher_tokens, teacher_ids, teacher_values = tile_values(
            teacher_value_ptr, teacher_ids_ptr + batch * teacher_length, teacher_start,
            teacher_stop, teacher_stride_n, BLOCK_T, VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        student_tokens, student_ids, student_values = tile_values(
            student_value_ptr, student_ids_ptr + batch * student_length, student_start,
            student_stop, student_stride_n, BLOCK_S, VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        student_ids = tl.where(is_long, -1, student_ids)
        transposed = tl.trans(student_values)
        # [BLOCK, BLOCK_DV] @ [BLOCK_DV, BLOCK_S] -> [BLOCK, BLOCK_S]
        own = tl.dot(student_values, transposed, input_precision=PRECISION)
        own = tl.where(same_segment(student_ids, student_ids), own, 0.0)
        across = tl.dot(teacher_values, transposed.to(teacher_values.dtype), input_precision=PRECISION)
        across = tl.where(same_segment(teacher_ids, student_ids), across, 0.0)
        columns = tl.arange(0, BLOCK_S)[None, :]
        rows = (batch_head * student_length + student_tokens)[:, None] * BLOCK_S + columns
        tl.store(own_ptr + rows, own.to(own_ptr.dtype.element_ty), mask=(student_tokens < student_stop)[:, None])
        rows = (batch_head * teacher_length + teacher_tokens)[:, None] * BLOCK_S + columns
        kept = (teacher_tokens < teacher_stop)[:, None]
        tl.store(across_ptr + rows, across.to(across_ptr.dtype.element_ty), mask=kept)


def aim_basis(teacher_value: torch.Tensor, student_value: torch.Tensor, plan: AimPlan, config):
    """(own [B, H_kv, n_S, w_S], shared [B, H_kv, n_T, w_S], outside [B, H_kv, n_T, w_T]): coordinates of the student's
    values, of the teacher's in the same basis, and of what is left of the teacher's."""
    shapes = [(x.shape[:3], width) for x, width in _row_widths(teacher_value, student_value, plan)]
    own, shared, outside = (
        torch.empty(*s, w, dtype=config.coordinate_dtype, device=plan.rows.device) for s, w in shapes
    )
    _launch(aim_basis_kernel, teacher_value, student_value, plan, config, own, shared, outside)
    return own, shared, outside


def aim_gram(teacher_value: torch.Tensor, student_value: torch.Tensor, plan: AimPlan, config):
    """(own [B, H_kv, n_S, w_S], across [B, H_kv, n_T, w_S]): inner products with the student's values of the tile that
    belong to the same segment."""
    shapes = [(x.shape[:3], width) for x, width in _row_widths(teacher_value, student_value, plan)[:2]]
    own, across = (torch.empty(*s, w, dtype=config.coordinate_dtype, device=plan.rows.device) for s, w in shapes)
    _launch(aim_gram_kernel, teacher_value, student_value, plan, config, own, across)
    return own, across


def _row_widths(teacher_value, student_value, plan):
    block_t, block_s = plan.widths
    return (student_value, block_s), (teacher_value, block_s), (teacher_value, block_t)


def _launch(kernel, teacher_value, student_value, plan, config, *outputs):
    batch, kv_heads, student_length, value_dim = student_value.shape
    tile_limit = plan.tiles.shape[-1]
    kernel[(tile_limit, batch * kv_heads)](
        teacher_value, student_value, plan.teacher_segments, plan.student_segments, plan.tiles, *outputs,
        *teacher_value.stride()[:3], *student_value.stride()[:3],
        kv_heads, teacher_value.shape[2], student_length, tile_limit,
        BLOCK_T=plan.widths[0], BLOCK_S=plan.widths[1], VALUE_DIM=value_dim,
        BLOCK_DV=config.block_dv, PRECISION=config.exact_precision,
        num_warps=config.basis_warps, num_stages=1,
    )  # fmt: skip
