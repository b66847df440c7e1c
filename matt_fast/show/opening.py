"""The models that pictures are made of."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from matt_fast.model.checkpoint_files import check_weights
from matt_fast.model.teacher import Teacher


def open_model(
    place: str | Path, argument: str, n_layers: int | None, **hub_options
) -> tuple[Teacher, PreTrainedModel]:
    """A model in float32 on the CPU, with only so many of its lower layers.

    Raises:
        ValueError, OSError: it cannot be loaded; the argument is named.
    """
    source = Teacher(place, argument=argument, **hub_options)
    check_weights(source)
    if n_layers is not None and not 1 <= n_layers <= source.depth:
        raise ValueError(f"layer: wanted 1 to {source.depth} for {str(place)!r}, got {n_layers}")
    return source, source.load(torch.float32, max(1, round(source.depth / 3)) if n_layers is None else n_layers)


def open_whole(place: str | Path, argument: str, **hub_options) -> tuple[Teacher, PreTrainedModel]:
    """A causal language model in float32 on the CPU, all of it.

    Raises:
        ValueError, OSError: it cannot be loaded, has no head or is a masked one; the argument is named.
    """
    source = Teacher(place, argument=argument, **hub_options)
    check_weights(source)
    source.check_language_model("show loss")
    if source.masked:
        raise ValueError(f"{argument}: wanted a causal language model, got the masked one {str(place)!r}")
    return source, source.load(torch.float32)
