"""Qwen3 in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM


class Qwen3ForAIM(PreTrainedModelForAIM):
    """A Qwen3 model, see `PreTrainedModelForAIM`."""

    model_types = ("qwen3",)
