"""Work in the state that torch starts in, whatever a notebook has set, and without a trace of the work behind it."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState


@contextmanager
def own_state() -> Iterator[None]:
    """Gradients are kept, products are not autocast, new tensors are float32 and on the CPU.

    Behind it all this is as it was, and so are the random states of Python, NumPy and torch, and accelerate's state,
    which would keep the next Accelerator or Trainer of this process from a precision of its own.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - others draw from it
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device() != torch.device("cpu"):
            stack.callback(torch.set_default_device, torch.get_default_device())
            torch.set_default_device(None)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for state in (PartialState, AcceleratorState):
            if not state._shared_state:  # transformers' TrainingArguments forgets it in the same way
                stack.callback(_forget, state)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _forget(state: type) -> None:
    """Let accelerate begin anew; processes stay together."""
    if not torch.distributed.is_initialized():
        state._shared_state.clear()
