"""Gemma3 in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM


class Gemma3ForAIM(PreTrainedModelForAIM):
    """A Gemma3 model, see `PreTrainedModelForAIM`."""

    model_types = (
        "gemma3",
        "gemma3_text",
    )
