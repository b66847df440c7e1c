"""What frozen weights are in."""

import torch
from accelerate import Accelerator

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def choose_dtype(accelerator: Accelerator, precision: str) -> torch.dtype:
    """The dtype of frozen weights: what accelerate is configured with, but bfloat16 for "auto" on a GPU that has it.

    Raises:
        ValueError: accelerate is configured with fp16 or below.
    """
    chosen = accelerator.mixed_precision
    if chosen not in DTYPES:
        raise ValueError(
            f"precision: wanted 'no' or 'bf16' (the gradients of the AIM loss are too small for fp16 and below), but "
            f"accelerate is configured with {chosen!r}"
        )
    on_cuda = accelerator.device.type == "cuda"
    if precision == "auto" and chosen == "no" and on_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        chosen = "bf16"
    return DTYPES[chosen]
