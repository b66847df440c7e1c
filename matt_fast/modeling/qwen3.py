"""Qwen 3 in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM


class Qwen3ForAIM(PreTrainedModelForAIM):
    """Qwen 3, see `PreTrainedModelForAIM`."""
