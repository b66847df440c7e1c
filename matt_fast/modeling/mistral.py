"""Mistral in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM


class MistralForAIM(PreTrainedModelForAIM):
    """Mistral, see `PreTrainedModelForAIM`."""
