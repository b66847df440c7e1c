"""Rows that hold several documents: attention runs on one document at a time, so that none sees another.

No mask of the size of a row is made: memory is that of the longest document, and pairs across documents cost nothing.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Packing:
    """Where the documents of a batch lie.

    Attributes:
        documents: [B, n] int64, the document of each token, -1 for padding.
        lengths: of the stretches of one document or padding, row after row; their sum is B * n.
        masks: what attention has been given so far, by length, causality and window: layers share them.
    """

    documents: torch.Tensor
    lengths: list[int]
    masks: dict = field(default_factory=dict)


def find_packing(documents: torch.Tensor) -> Packing:
    """Read the stretches from the ids; free of waiting where these are on the CPU."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = starts.flatten().nonzero().flatten()
    return Packing(documents, torch.diff(places, append=places.new_tensor([documents.numel()])).tolist())


def documents_of(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Document ids from padding or from positions that start again, as transformers' own mask reads them."""
    if attention_mask is not None:
        return attention_mask.bool().to(torch.int64) - 1
    if position_ids is None:
        return None
    step = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (step != 1).cumsum(-1)


def check_packed(model: nn.Module, documents: torch.Tensor, inputs: dict) -> None:
    """Raise a ValueError unless `documents` are those of the inputs, and nothing else says what a token sees."""
    for name in ("attention_mask", "position_ids"):
        if inputs.get(name) is not None:
            raise ValueError(f"documents: wanted no {name} beside it, got both")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"documents: wanted a model that takes position_ids, got {type(model).__name__}")
    shape = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None).shape[:2]
    if documents.shape != shape:
        raise ValueError(f"documents: wanted shape [B, n] = {tuple(shape)}, got {tuple(documents.shape)}")


def first_position(model: nn.Module) -> int:
    """What a model counts positions from: 0, or in RoBERTa and its kin the number behind the padding token's id."""
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    return next((x.padding_idx for x in tables if getattr(x, "padding_idx", None) is not None), -1) + 1


def positions_padding(model: nn.Module) -> set[int]:
    """The padding token's id where tables of positions know it: in RoBERTa and its kin, I-BERT and XGLM."""
    tables = (module for name, module in model.named_modules() if "position" in name.rpartition(".")[2])
    return {x.padding_idx for x in tables if getattr(x, "padding_idx", None) is not None}


def restarted_positions(packing: Packing, model: nn.Module) -> torch.Tensor:
    """[B, n] int64: positions that start again at each document, at the number that `model` counts from."""
    first = first_position(model)
    positions = torch.cat([torch.arange(first, first + length) for length in packing.lengths])
    return positions.view(packing.documents.shape)


def attend_by_document(
    attention: Callable,
    make_mask: Callable,
    module: nn.Module,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    packing: Packing,
    *,
    causal: bool,
    sliding_window: int | None,
    options: dict,
) -> tuple[torch.Tensor, None]:
    """What an attention function gives when each document is alone.

    Args:
        attention, make_mask: transformers' functions of one attention implementation.
        module: the attention module.
        states: (query, key, value), [B, H or H_kv, n, d].
        causal, sliding_window: who sees whom in a document, as in `aim_loss`.
        options: other arguments of `attention`.

    Returns:
        [B, n, H, d_v], and None in place of the attention weights.
    """

    def visible(batch, head, query, key):
        distance = query - key
        if causal:
            return (distance >= 0) & (distance < (query + 1 if sliding_window is None else sliding_window))
        return distance.abs() <= (query + key if sliding_window is None else sliding_window)

    def mask(length: int):
        known = length, causal, sliding_window
        if known not in packing.masks:
            packing.masks[known] = make_mask(
                batch_size=1,
                q_length=length,
                kv_length=length,
                mask_function=visible,
                local_size=sliding_window,
                allow_is_causal_skip=causal,
                allow_is_bidirectional_skip=not causal,
                dtype=states[0].dtype,
                device=states[0].device,
                config=module.config,
            )
        return packing.masks[known]

    parts = [x.transpose(0, 1).flatten(1, 2).split(packing.lengths, 1) for x in states]  # [H, length, d] each
    outputs = [
        attention(module, query[None], key[None], value[None], mask(query.shape[1]), **options)[0][0]
        for query, key, value in zip(*parts, strict=True)
    ]
    return torch.cat(outputs).unflatten(0, packing.documents.shape), None
