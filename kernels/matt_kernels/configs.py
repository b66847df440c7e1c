"""Every tile shape in one place. They are first guesses: no report and no GPU has chosen them yet."""

from dataclasses import dataclass, replace

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Shapes and options of all kernels for one head dimension, dtype and target."""

    block_m: int  # query rows
    block_t: int  # teacher tokens of a tile
    block_s: int  # student tokens of a tile
    block_d: int  # head dimension of queries and keys, padded
    block_dv: int  # head dimension of values, padded
    coordinate_dtype: torch.dtype  # of what is kept per token, and of softmax weights in products
    score_precision: str  # input_precision of q·k
    product_precision: str  # of all other products in the loops
    exact_precision: str  # of what is done once per tile
    forward_warps: int = 4
    query_warps: int = 4
    key_warps: int = 4
    long_warps: int = 4
    basis_warps: int = 4
    stages: int = 2

    def with_blocks(self, block_m: int, block_t: int, block_s: int) -> "Config":
        return replace(self, block_m=block_m, block_t=block_t, block_s=block_s)


def choose_config(head_dim: int, value_dim: int, dtype: torch.dtype, target: str) -> Config:
    """`target` is "cuda:90"-like: backend and compute capability, "hip" or "cpu" (the interpreter).

    bfloat16 keeps bfloat16 operands, as flash attention does. float16 does not hold the small weights and gradients of
    long rows, so its loops use tf32, which has the same 11 bits. float32 uses three tf32 products.
    """
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    exact = "tf32x3" if target.startswith("cuda") else "ieee"
    half = dtype in (torch.bfloat16, torch.float16)
    product = "ieee" if target.startswith("hip") else "tf32"
    large = max(block_d, block_dv) > 128
    return Config(
        block_m=32 if large and not half else 64,
        block_t=32,
        block_s=32,
        block_d=block_d,
        block_dv=block_dv,
        coordinate_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        score_precision=product if half else exact,
        product_precision=product if half else exact,
        exact_precision=exact,
        query_warps=8 if large else 4,
        key_warps=8 if large else 4,
        long_warps=8 if large else 4,
    )


def target_of(device: torch.device) -> str:
    """What choose_config calls the device that tensors live on."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"
