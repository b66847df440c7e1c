"""Floating-point work, counted while it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# What else scaled_dot_product_attention calls. Key heads may be fewer than query heads, which torch's counts refuse.
_OF_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
# Ops of bitsandbytes that multiply their first argument by a matrix, by name: the package may not be there.
_QUANTIZED = {
    f"bitsandbytes.{name}"
    for name in ("int8_linear_matmul", "int8_mixed_scaled_mm", "int8_scaled_mm", "gemm_4bit", "gemv_4bit")
}


def _attention_flops(query, key, value, *rest, out_val=None, **options) -> int:
    key_shape, value_shape = ((*query.shape[:2], *x.shape[2:]) for x in (key, value))
    return sdpa_flop_count(query.shape, key_shape, value_shape)


def _attention_backward_flops(gradient, query, key, value, *rest, out_val=None, **options) -> int:
    key_shape, value_shape = ((*query.shape[:2], *x.shape[2:]) for x in (key, value))
    return sdpa_backward_flop_count(gradient.shape, query.shape, key_shape, value_shape)


def _quantized_flops(given, *rest, out=None, out_val=None, **options) -> int:
    product = out if out_val is None else out_val[0] if isinstance(out_val, tuple) else out_val
    return 2 * product.numel() * given.shape[-1]


FLOPS: dict[object, Callable] = {
    **flop_registry,
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    **{getattr(torch.ops.aten, name): _attention_flops for name in _OF_ATTENTION},
    **{getattr(torch.ops.aten, f"{name}_backward"): _attention_backward_flops for name in _OF_ATTENTION},
}


class FlopCounter(TorchDispatchMode):
    """Counts the work that is done while it is entered, backward passes and layers that are run again included.

    Attributes:
        flops: multiplications and additions of matrix products, convolutions and attention (masked pairs included),
            those of bitsandbytes too. Elementwise work is left out, as is customary, and so is what a Triton kernel
            does inside: of a training step that is the AIM loss, at the attention of one layer.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        packet = function._overloadpacket
        count = FLOPS.get(packet, _quantized_flops if str(packet) in _QUANTIZED else None)
        if count is not None:
            self.flops += count(*arguments, **(options or {}), out_val=result)
        return result


class Work(Protocol):
    """Where `count_flops` keeps what it knows; a run that is to be resumed keeps it, too.

    Attributes:
        step: steps that are done.
        flops: work of these, see `FlopCounter`.
        counted_flops, counted_tokens: of those steps that were counted.
    """

    step: int
    flops: int
    counted_flops: int
    counted_tokens: int


@contextmanager
def count_flops(work: Work, tokens: int) -> Iterator[None]:
    """Add the work of the training step inside to `work.flops`.

    Steps 1, 2, 4, 8, ... are counted, without torch.compile; the others are estimated by their tokens.

    Args:
        work: its `step` is the number of steps before this one.
        tokens: of the step, padding and both sides included.
    """
    step = work.step + 1
    if step & (step - 1) and work.counted_tokens:
        yield
        work.flops += round(tokens * work.counted_flops / work.counted_tokens)
        return
    # As it is, torch.compile would never compile again what it met first inside a counter.
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        yield
    work.flops += counter.flops
    work.counted_flops += counter.flops
    work.counted_tokens += tokens
