"""A pretrained model cut to its lower layers, with a trainable embedding: what `MATT.train` takes for each side."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from matt_fast.model.capture import capture
from matt_fast.model.checkpoint_files import check_loaded
from matt_fast.model.folders import check_model_place
from matt_fast.model.layers import decoder_layers, layer_config
from matt_fast.model.switching import switched
from matt_fast.model.teacher import only_errors
from matt_fast.model.trust import check_implementations, no_pickles
from matt_fast.model.weight_values import check_finite
from matt_fast.modeling.embeddings import Gemma3TextScaledPartlyFrozenWordEmbedding, PartlyFrozenEmbeddings
from matt_fast.support.checks import check_type

ARGUMENT = "pretrained_model_name_or_path"
# Arguments of from_pretrained that configuration and weights both need.
HUB = ("cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class AIMOutput(ModelOutput):
    """What `PreTrainedModelForAIM.forward` gives.

    Attributes:
        aim_loss: always None; `MATT.train` and `aim_loss` compute it without attention weights.
        ntp_loss: scalar, if a model with `with_ntp` was given labels; else None.
        attentions: [B, H, n, n], the attention weights of layer `n_layers`.
        value_states: [B, H_kv, n, head_dim], the values of that layer.
    """

    aim_loss: torch.Tensor | None = None
    ntp_loss: torch.Tensor | None = None
    attentions: torch.Tensor | None = None
    value_states: torch.Tensor | None = None


class PreTrainedModelForAIM(nn.Module):
    """A model for one side of a transfer, after the reference library's class of that name.

    Works as it is for every decoder on the attention interface of transformers. One that names its parts otherwise
    is a subclass that overrides `get_base_model`, `get_layers`, `set_layers` and `create_partly_frozen_embeddings`.

    Args:
        model: a causal language model, which this object takes over. Without `with_ntp` its layers above `n_layers` are
            cut off.
        n_layers: the target layer, counted from 1.
        frozen_embeddings_mask: [tokens] bool, True for rows that stay as they are; a table may have more rows than that
            (padding), which are never used. None trains all rows.
        with_ntp: keep the whole model, and train its output rows too.

    Attributes:
        model: the decoder without its head, whole or cut.
        causal_model: the whole model, head included; None without `with_ntp`.
        config: of the (text) model.
        tied: whether its output head has the input embedding's rows.
        n_layers, frozen_embeddings_mask, with_ntp: as given.

    Raises:
        ValueError: `n_layers` is beyond the model, the mask beyond its embedding, or the embedding of a kind that only
            a subclass can split.
        TypeError: the mask is no bool tensor, or another argument of another type.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        n_layers: int = 1,
        frozen_embeddings_mask: torch.Tensor | None = None,
        with_ntp: bool = False,
    ):
        super().__init__()
        _check_types(n_layers, with_ntp)
        self.config = model.config.get_text_config(decoder=True)
        if not 1 <= n_layers <= self.config.num_hidden_layers:
            raise ValueError(f"n_layers: wanted 1 to {self.config.num_hidden_layers} for this model, got {n_layers}")
        self.n_layers, self.with_ntp, self.frozen_embeddings_mask = n_layers, with_ntp, frozen_embeddings_mask
        head = model.get_output_embeddings()
        self.tied = head is None or head.weight is model.get_input_embeddings().weight
        self.model = self.get_base_model(model)
        self.causal_model = model if with_ntp else None
        if not with_ntp:
            self.set_layers(list(self.get_layers())[:n_layers])
        if frozen_embeddings_mask is not None:
            self.set_input_embeddings(self.create_partly_frozen_embeddings(frozen_embeddings_mask))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        n_layers: int,
        frozen_embeddings_mask: torch.Tensor | None = None,
        with_ntp: bool = False,
        **kwargs,
    ) -> Self:
        """Load from a folder or the hub.

        Layers above `n_layers` are not read from disk, unless `with_ntp`, or a subclass has its own idea of layers.

        Args:
            **kwargs: for `AutoModelForCausalLM.from_pretrained`; the dtype is bfloat16 unless given, and
                `use_safetensors` True: pickled weights, which can run code, are read with False or None only. Training
                runs the `attn_implementation` that the student was loaded with.

        Raises:
            TypeError, ValueError: as the class.
            ValueError: weights are missing, of another shape or not finite, they are pickled, or the configuration
                names code that would be fetched, without `trust_remote_code`.
            OSError: there are no weights.
        """
        _check_types(n_layers, with_ntp)
        name = str(pretrained_model_name_or_path)
        if "gguf_file" not in kwargs:
            check_model_place(Path(name, kwargs.get("subfolder", "")) if Path(name).is_dir() else name, ARGUMENT)
            kwargs.setdefault("use_safetensors", True)
        dtype = kwargs.pop("torch_dtype", torch.bfloat16)
        dtype = kwargs.pop("dtype", dtype)
        own = ("get_base_model", "get_layers", "set_layers")
        overridden = any(getattr(cls, name) is not getattr(PreTrainedModelForAIM, name) for name in own)
        if "config" not in kwargs:
            hub = {name: kwargs[name] for name in (*HUB, "gguf_file", "trust_remote_code") if name in kwargs}
            config, kwargs = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
            whole = with_ntp or overridden
            kwargs |= hub | {"config": config if whole else layer_config(config, n_layers)}
        if not kwargs.get("trust_remote_code"):
            check_implementations(kwargs["config"], name, ARGUMENT)
        with only_errors(), no_pickles() if kwargs.get("use_safetensors") else nullcontext():
            model, loading = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **kwargs)
        check_loaded(loading, name, ARGUMENT, () if with_ntp else _head_names(model))
        check_finite(model.named_parameters(), f"{ARGUMENT}: wanted weights that are finite in {name!r}")
        return cls(model, n_layers=n_layers, frozen_embeddings_mask=frozen_embeddings_mask, with_ntp=with_ntp)

    def get_base_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The decoder without its head."""
        return model.get_decoder()

    def get_layers(self) -> Sequence[nn.Module]:
        """The decoder's layers."""
        return decoder_layers(self.model)

    def set_layers(self, layers: Sequence[nn.Module]) -> None:
        """Leave the decoder these layers only: the first ones that it has."""
        del decoder_layers(self.model)[len(layers) :]

    def create_partly_frozen_embeddings(self, frozen_mask: torch.Tensor) -> nn.Module:
        """The embedding with its rows split into frozen and trainable ones: a `PartlyFrozenEmbeddings`."""
        embeddings = self.get_input_embeddings()
        scale = getattr(embeddings, "embed_scale", None)
        if scale is not None:
            return Gemma3TextScaledPartlyFrozenWordEmbedding(embeddings, frozen_mask, embed_scale=scale)
        if type(embeddings).forward is not nn.Embedding.forward:
            raise ValueError(
                f"model: {type(embeddings).__name__} does more than look rows up; override "
                "create_partly_frozen_embeddings with a PartlyFrozenEmbeddings that does the same"
            )
        return PartlyFrozenEmbeddings(embeddings, frozen_mask)

    @property
    def trunk(self) -> PreTrainedModel:
        """What training runs: the whole model with `with_ntp`, else its lower layers."""
        return self.causal_model if self.with_ntp else self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.model.set_input_embeddings(embeddings)

    def get_output_embeddings(self) -> nn.Linear:
        """The output head. Raises ValueError without `with_ntp`."""
        self._check_head()
        return self.causal_model.get_output_embeddings()

    def set_output_embeddings(self, embeddings: nn.Linear) -> None:
        """Replace the output head. Raises ValueError without `with_ntp`."""
        self._check_head()
        self.causal_model.set_output_embeddings(embeddings)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        ntp_labels: torch.Tensor | None = None,
    ) -> AIMOutput:
        """Attention weights and values of layer `n_layers`, n × n numbers per head: to look at, not to train with.

        Args:
            input_ids: [B, n] int64.
            attention_mask, position_ids: [B, n], as the model takes them.
            ntp_labels: [B, n] int64, -100 where there is none; without `with_ntp` they have no use.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        labels = {"labels": ntp_labels} if self.with_ntp and ntp_labels is not None else {}
        layer = self.n_layers - 1
        states = capture(self.trunk, attention=[layer], **inputs).attention[layer]
        with switched(self.trunk, "eager"):
            output = self.trunk(**inputs, **labels, output_attentions=True, use_cache=False)
        loss = output.loss if labels else None
        return AIMOutput(ntp_loss=loss, attentions=output.attentions[layer], value_states=states.value)

    def _check_head(self) -> None:
        if not self.with_ntp:
            raise ValueError("with_ntp: the output head is there with with_ntp=True only, got False")


def _head_names(model: PreTrainedModel) -> set[str]:
    """The names of the output head's own parameters, without one that is tied to the input embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    own = set() if head is None else {id(x) for x in head.parameters()} - {id(x) for x in embeddings.parameters()}
    return {name for name, x in model.named_parameters() if id(x) in own}


def _check_types(n_layers: int, with_ntp: bool) -> None:
    check_type("n_layers", n_layers, int)
    check_type("with_ntp", with_ntp, bool)
