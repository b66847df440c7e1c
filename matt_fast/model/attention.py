"""What an attention function received, as the AIM loss takes it."""

from dataclasses import dataclass

import torch

# What an attention function may be given that changes the softmax in a way the AIM loss does not model.
UNSUPPORTED_ATTENTION_ARGUMENTS = ("s_aux", "sinks", "position_bias", "alibi")


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention function received (paper §3.2, eq. 1 and 2).

    Attributes:
        query: [B, H, n, d], after rotary embedding and query/key normalisation, in the model's dtype.
        key: [B, H_kv, n, d], likewise.
        value: [B, H_kv, n, d_v].
        scale: factor on the logits.
        sliding_window: as `aim_loss` takes it: with `causal` the number of keys a query sees, itself included,
            otherwise the largest distance to a key that it sees; None without a window.
        softcap: bound of the tanh soft-capping of the logits; None without.
        causal: whether a query sees only keys at or before its own position.
        documents: [B, n] int64, the document of each token, counted per row, and -1 for padding; None where no mask
            was given, and no positions that start again: every row is one document.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    sliding_window: int | None
    softcap: float | None
    causal: bool
    documents: torch.Tensor | None

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(query, key, value), the form that `aim_loss` takes."""
        return self.query, self.key, self.value

    @property
    def options(self) -> dict:
        """How this attention weighs and who sees whom, by the names of `aim_loss`'s arguments."""
        return {name: getattr(self, name) for name in ("scale", "sliding_window", "softcap", "causal")}


def attention_inputs(arguments: dict, documents: torch.Tensor | None, layer: int) -> AttentionInputs:
    """The inputs of a layer's attention function.

    Args:
        arguments: of the function, by name.
        documents: as in `AttentionInputs`.
        layer: counted from 0.

    Raises:
        ValueError: the attention is of a kind that the AIM loss does not describe.
    """
    module, query = arguments["module"], arguments["query"]
    for name in UNSUPPORTED_ATTENTION_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"layer: the attention of layer {layer} uses {name}, which the AIM loss does not describe")
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types is not None and layer_types[layer] not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"layer: wanted a layer with full or sliding attention, but layer {layer} has {layer_types[layer]}"
        )
    scale = arguments.get("scaling")
    causal = arguments.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    window = arguments.get("sliding_window")
    if window is not None and not causal:
        window -= 1  # attention functions are given the first distance that is hidden (as flash attention takes it)
    return AttentionInputs(
        query=query,
        key=arguments["key"],
        value=arguments["value"],
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        sliding_window=window,
        softcap=arguments.get("softcap"),
        causal=causal,
        documents=documents,
    )
