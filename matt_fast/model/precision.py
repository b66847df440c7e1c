"""What frozen weights are in."""

import os

import torch
from accelerate import Accelerator

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ISA = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"
WITHOUT = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)  # sets that lack it
# oneDNN, and torch before it, keep a compiled product for each of the last 1,024 shapes, MiB each, and batches of text
# are of any shape.
PRODUCTS = 64
CAPACITIES = ("LRU_CACHE_CAPACITY",), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")


def choose_dtype(accelerator: Accelerator, precision: str) -> torch.dtype:
    """The dtype of frozen weights: for "auto" what accelerate is configured with, or bfloat16 on a device that
    multiplies in it.

    Raises:
        ValueError: "auto", and accelerate is configured with fp16 or below.
    """
    chosen = accelerator.mixed_precision if precision == "auto" else precision
    if chosen not in DTYPES:
        raise ValueError(
            f"precision: wanted 'no' or 'bf16' (the gradients of the AIM loss are too small for fp16 and below), but "
            f"accelerate is configured with {chosen!r}"
        )
    if precision == "auto" and chosen == "no" and multiplies_in_bfloat16(accelerator.device):
        chosen = "bf16"
    return DTYPES[chosen]


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for it, which are used: most GPUs, and CPUs with AVX512-BF16, unless oneDNN is
    kept from them (ONEDNN_MAX_CPU_ISA)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    most = next((os.environ[x].upper() for x in ISA if x in os.environ), "")
    return device.type == "cpu" and most not in WITHOUT and torch.cpu._is_avx512_bf16_supported()


def keep_few_products() -> None:
    """Let products of bfloat16 on a CPU keep PRODUCTS shapes, before the first of them, where the environment says no
    other number."""
    for names in CAPACITIES:
        if not any(x in os.environ for x in names):
            os.environ[names[0]] = str(PRODUCTS)
