"""Another attention implementation for the length of a block: of one thread at a time, and afterwards as it was."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# By the input embedding, which a model shares with the one that it is a part of.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)  # which has none of the threads that hold them


@contextmanager
def alone(model: PreTrainedModel) -> Iterator[None]:
    """No other thread is in such a block for the same model, or one that it is a part of."""
    with _locks.setdefault(model.get_input_embeddings(), threading.RLock()):
        yield


@contextmanager
def switched(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model runs an attention implementation, in this thread alone."""
    with alone(model):
        parts = (x.config for x in model.modules() if isinstance(x, PreTrainedModel))
        configs = {id(x): x for part in (model.config, *parts) for x in _with_sub_configs(part)}  # they have no hash
        before = [(config, config._attn_implementation) for config in configs.values()]
        try:
            model.set_attn_implementation(implementation)
            yield
        finally:
            for config, name in before:  # parts may have had several; the property would set those below too
                config._attn_implementation_internal = name


def _with_sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_sub_configs(part)
