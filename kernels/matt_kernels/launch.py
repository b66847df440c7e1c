"""Arguments that several launchers pass alike."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# Arguments that change with the lengths of a batch: kernels are not compiled again for them.
LENGTHS = ["softmax_size", "row_limit", "tile_limit", "long_limit", "teacher_length", "student_length"]


def row_grid(plan, query, block_m: int) -> tuple[int]:
    """One program per block of rows and head, in the order of row_program."""
    return (triton.cdiv(plan.rows.shape[-1], block_m) * query.shape[0] * query.shape[1],)


def tile_grid(plan, key) -> tuple[int]:
    """One program per tile and key head, in the order of tile_program."""
    return (plan.tiles.shape[-1] * key.shape[0] * key.shape[1],)


# A GPU begins programs in the order of their numbers. Under causal attention the last rows and the first tiles have
# most to do: all heads of these first, so that short ones are left for the end.


@triton.jit
def row_program(row_limit, BLOCK_M: tl.constexpr):
    """(batch row and head, block of rows) of a program."""
    blocks = tl.cdiv(row_limit, BLOCK_M)
    heads = tl.num_programs(0) // blocks
    return (tl.program_id(0) % heads).to(tl.int64), blocks - 1 - tl.program_id(0) // heads


@triton.jit
def tile_program(tile_limit):
    """(tile, batch row and key head) of a program."""
    heads = tl.num_programs(0) // tile_limit
    return tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)


def strides(*tensors) -> list[int]:
    """Those of batch, head and token; the last one is 1."""
    return [x for tensor in tensors for x in tensor.stride()[:3]]


def sizes(plan, teacher, student) -> tuple[int, ...]:
    """heads, group, softmax_size, row_limit, tile_limit, long_limit, teacher_length, student_length."""
    batch, heads = student[0].shape[:2]
    row_limit = plan.rows.shape[-1]
    limits = row_limit, plan.tiles.shape[-1], plan.long.shape[-1]
    return (
        heads,
        heads // student[1].shape[1],
        batch * heads * row_limit,
        *limits,
        *(x[0].shape[2] for x in (teacher, student)),
    )


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(factor on q·k, factor after tanh) such that scores come out in base 2."""
    return (scale * LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def softmax_numbers(x: torch.Tensor) -> int:
    """What is kept of a row's softmax of inputs like x: see attention.store_softmax."""
    return 2 if x.dtype == torch.float32 else 1


def attend_numbers(x: torch.Tensor) -> int:
    """The same for aim_star, which keeps the token of the largest weight beside them for float32."""
    return 3 if x.dtype == torch.float32 else 1


def on_device(x: torch.Tensor):
    """Triton launches on the current CUDA device: make it the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
