"""A model's transformer layers: where they are, and how to have fewer of them."""

import copy

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's transformer layers.

    Raises:
        ValueError: the model has no list with as many modules as its configuration has layers.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        for module in (root or model).modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
    raise ValueError(f"model: {type(model).__name__} has no list of {depth} layers")


def text_model(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a model that text goes through, without its head: (its name in the model, the part).

    It is what the configuration of the text describes; of a model that takes nothing but text, all of it, named "".
    """
    config, layers = model.config.get_text_config(decoder=True), decoder_layers(model)
    for name, module in model.named_modules():
        if getattr(module, "config", None) is config and any(part is layers for part in module.modules()):
            return name, module
    return "", model


def layer_config(config: PreTrainedConfig, n_layers: int) -> PreTrainedConfig:
    """A copy of `config` with the first `n_layers` layers only.

    A model loaded with it holds, reads from disk and moves to the device nothing above them. Fields with one entry per
    layer (layer types, window patterns) are shortened with it.

    Raises:
        ValueError: `n_layers` is not between 1 and the depth of the model.
    """
    shortened = copy.deepcopy(config)
    text_config = shortened.get_text_config(decoder=True)
    depth = text_config.num_hidden_layers
    if not 1 <= n_layers <= depth:
        raise ValueError(f"n_layers: wanted 1 to {depth} for this model, got {n_layers}")
    for name, value in vars(text_config).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text_config, name, value[:n_layers])
    text_config.num_hidden_layers = n_layers
    return shortened
