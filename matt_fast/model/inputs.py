"""What a forward pass is given: a model that can be run, tensors of one shape, and the document of each token."""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from matt_fast.model.packed import check_packed, documents_of, find_packing, restarted_positions


def check_model(model: nn.Module) -> None:
    """Raise an error for something around a model, and for one whose layers do not have a number each."""
    if not hasattr(model, "config") or hasattr(model, "module"):
        inside = (
            "; give its .module where it only averages gradients over processes, and average them yourself; to spread "
            "weights take fully_shard (FSDP2)"
        )
        advice = inside if hasattr(model, "module") else ""
        raise TypeError(f"model: wanted a transformers model, got {type(model).__name__}{advice}")
    if getattr(model.config, "is_encoder_decoder", False) and model.get_encoder() is not model:
        raise ValueError(
            f"model: wanted a decoder or an encoder, got {type(model).__name__}, which has layers of both, with the "
            "same numbers"
        )


def prepare_inputs(model: PreTrainedModel, documents: torch.Tensor | None, inputs: dict):
    """(the document of each token or None, how to take packed rows apart or None, what the model is to be given)."""
    inputs = dict(inputs)
    tokens = _check_tokens(inputs)
    mask, positions = (_check_places(name, inputs, tokens.shape[:2]) for name in ("attention_mask", "position_ids"))
    if _can_cache(model):
        inputs.setdefault("use_cache", False)
    if documents is None:
        documents = documents_of(mask, positions)
        if mask is not None or documents is None:
            return documents, None, inputs
        if not documents.any():
            return None, None, inputs
        return documents, find_packing(documents), inputs
    check_packed(model, documents, inputs)
    packing = find_packing(documents)
    inputs["position_ids"] = restarted_positions(packing, model).to(tokens.device, non_blocking=True)
    return documents, packing, inputs


def _can_cache(model: PreTrainedModel) -> bool:
    """Whether the model can be told to keep no keys and values: it takes `use_cache`, or hands it on to its decoder."""
    taken = inspect.signature(model.forward).parameters
    if "use_cache" in taken or all(x.kind != x.VAR_KEYWORD for x in taken.values()):
        return "use_cache" in taken
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder not in (None, model) and "use_cache" in inspect.signature(decoder.forward).parameters


def _check_tokens(inputs: dict) -> torch.Tensor:
    for name, shape in (("input_ids", "[B, n]"), ("inputs_embeds", "[B, n, hidden]")):
        tokens = inputs.get(name)
        if tokens is not None:
            _check_tensor(name, tokens, shape)
            if tokens.ndim != len(shape.split()):
                raise ValueError(f"{name}: wanted shape {shape}, got {tuple(tokens.shape)}")
            return tokens
    raise TypeError("inputs: wanted input_ids or inputs_embeds by name, got neither")


def _check_places(name: str, inputs: dict, shape: torch.Size) -> torch.Tensor | None:
    """A mask or positions, for every row of the batch."""
    given = inputs.get(name)
    if given is None:
        return None
    _check_tensor(name, given, "[B, n]")
    if inputs.get("past_key_values") is not None:  # a mask is as long as what went before, too
        return given
    rows = {shape[0], 1} if name == "position_ids" else {shape[0]}
    if given.ndim != 2 or given.shape[0] not in rows or given.shape[1] != shape[1]:
        raise ValueError(f"{name}: wanted shape [B, n] = {tuple(shape)}, got {tuple(given.shape)}")
    return given.expand(shape)


def _check_tensor(name: str, x, shape: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: wanted a tensor {shape}, got {type(x).__name__}")
