"""A pretrained model cut to its lower layers, with a trainable embedding: what `MATT.train` takes for each side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from matt_fast.capture import capture, decoder_layers, layer_config
from matt_fast.modeling.embeddings import PartlyFrozenEmbeddings
from matt_fast.teacher import only_errors


@dataclass
class AIMOutput(ModelOutput):
    """What `PreTrainedModelForAIM.forward` gives.

    Attributes:
        aim_loss: always None; `MATT.train` and `aim_loss` compute it without attention weights.
        ntp_loss: scalar, if labels were given to a model with `with_ntp`.
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
        model: a causal language model. Without `with_ntp` its layers above `n_layers` are cut off.
        n_layers: the target layer, counted from 1.
        frozen_embeddings_mask: [tokens] bool, True for rows that stay as they are; a table may have more rows than that
            (padding), which are never used. None trains all rows.
        with_ntp: keep the whole model, and train its output rows too.

    Raises:
        ValueError: `n_layers` is beyond the model, or the mask beyond its embedding.
        TypeError: `model` is of another architecture than the class is for.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        n_layers: int = 1,
        frozen_embeddings_mask: torch.Tensor | None = None,
        with_ntp: bool = False,
    ):
        super().__init__()
        self.config = model.config.get_text_config(decoder=True)
        if self.model_types and self.config.model_type not in self.model_types:
            raise TypeError(
                f"model: {type(self).__name__} wants a model of type {' or '.join(self.model_types)}, "
                f"got {self.config.model_type}"
            )
        if not 1 <= n_layers <= self.config.num_hidden_layers:
            raise ValueError(f"n_layers: wanted 1 to {self.config.num_hidden_layers} for this model, got {n_layers}")
        self.n_layers, self.with_ntp, self.frozen_embeddings_mask = n_layers, with_ntp, frozen_embeddings_mask
        head = model.get_output_embeddings()
        self.tied = head is None or head.weight is model.get_input_embeddings().weight
        if with_ntp:
            self.model = model
        else:
            self.model = self.get_base_model(model)
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
        """Load from a folder or the hub; layers above `n_layers` are not read from disk unless `with_ntp`.

        Args:
            **kwargs: for `AutoModelForCausalLM.from_pretrained`; the dtype is bfloat16 unless given.

        Raises:
            ValueError: as the class.
        """
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = torch.bfloat16
        if not with_ntp and "config" not in kwargs:
            hub = {name: kwargs[name] for name in ("trust_remote_code", "revision", "token") if name in kwargs}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            kwargs["config"] = layer_config(config, n_layers)
        with only_errors():
            model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
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
        """The embedding with its rows split into frozen and trainable ones."""
        return PartlyFrozenEmbeddings(self.get_input_embeddings(), frozen_mask)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.model.set_input_embeddings(embeddings)

    def get_output_embeddings(self) -> nn.Linear:
        """The output head. Raises ValueError without `with_ntp`."""
        self._check_head()
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, embeddings: nn.Linear) -> None:
        """Replace the output head. Raises ValueError without `with_ntp`."""
        self._check_head()
        self.model.set_output_embeddings(embeddings)

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
            ntp_labels: [B, n] int64, -100 where there is none; for models with `with_ntp`.

        Raises:
            ValueError: labels without `with_ntp`.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        labels = {}
        if ntp_labels is not None:
            self._check_head()
            labels["labels"] = ntp_labels
        layer = self.n_layers - 1
        states = capture(self.model, attention=[layer], **inputs).attention[layer]
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            output = self.model(**inputs, **labels, output_attentions=True, use_cache=False)
        finally:
            self.model.set_attn_implementation(previous)
        loss = output.loss if labels else None
        return AIMOutput(ntp_loss=loss, attentions=output.attentions[layer], value_states=states.value)

    def _check_head(self) -> None:
        if not self.with_ntp:
            raise ValueError("with_ntp: the output head is there with with_ntp=True only, got False")
