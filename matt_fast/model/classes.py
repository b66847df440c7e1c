"""Which class a model's configuration names: what it is loaded as, written as, and can be used for."""

import re
from typing import Any, NamedTuple

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

WITH_IMAGES = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
POSSIBLE = (
    "causal language models (…ForCausalLM, …LMHeadModel; …ForConditionalGeneration with images), masked ones "
    "(…ForMaskedLM), and the bodies and heads for other tasks of the same architectures (…Model, "
    "…ForSequenceClassification, …ForTokenClassification …)"
)
# A name that transformers does not have is one of a language model, unless it says what else it is.
OTHER_TASK = re.compile(r"For(?!CausalLM|Causal|AIM|ConditionalGeneration)[A-Z]\w*$|(?<!LMHead)Model$")


class ModelClass(NamedTuple):
    """What a model's configuration names.

    Attributes:
        loader: has `from_pretrained`, and `from_config` or `_from_config`.
        name: of the class, as the configuration has it; None where it names none.
        is_language_model: whether it has a head that `evaluate` can score.
        sees_all: whether its tokens see those behind them, as in an encoder.
    """

    loader: Any
    name: str | None
    is_language_model: bool
    sees_all: bool

    @property
    def pipeline_tag(self) -> str | None:
        """The hub's name of what such a model is for; None where the class does not say."""
        if not self.is_language_model:
            return None
        if self.sees_all:
            return "fill-mask"
        return None if (self.name or "").endswith("ForConditionalGeneration") else "text-generation"


def model_class(config: PreTrainedConfig) -> ModelClass:
    """The class that a configuration names in `architectures`.

    Raises:
        ValueError: an encoder-decoder, or a class of a kind that has no language model of one stack of layers.
    """
    names = config.architectures or ()
    if not isinstance(names, list | tuple) or not all(isinstance(x, str) for x in names):
        raise ValueError(f"model: wanted a list of names as architectures in its configuration, got {names!r}")
    name = names[0] if names else None
    wanted = f"model: wanted one of {POSSIBLE}, got {name or type(config).__name__}"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{wanted}, an encoder with a decoder")
    if any(x.endswith("ForMaskedLM") for x in names):
        return ModelClass(AutoModelForMaskedLM, name, is_language_model=True, sees_all=True)
    text = ModelClass(AutoModelForCausalLM, name, is_language_model=True, sees_all=False)
    known = _known_class(name)
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return text
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if known is None:
        if not causal or (name is not None and OTHER_TASK.search(name)):
            raise ValueError(f"{wanted}, which transformers does not have")
        return text
    if causal and (known is causal or name.endswith(("ForCausalLM", "LMHeadModel"))):
        return text
    if any(type(config) in mapping and known is mapping[type(config)] for mapping in WITH_IMAGES):
        return ModelClass(known, name, is_language_model=True, sees_all=False)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if not (causal or masked) or name.endswith("ForConditionalGeneration"):
        raise ValueError(wanted)
    return ModelClass(known, name, is_language_model=False, sees_all=_sees_all(config, masked))


def _known_class(name: str | None) -> type[PreTrainedModel] | None:
    found = None if name is None else getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _sees_all(config: PreTrainedConfig, masked: bool) -> bool:
    text = config.get_text_config(decoder=True)
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return True
    return masked and not getattr(text, "is_decoder", False)
