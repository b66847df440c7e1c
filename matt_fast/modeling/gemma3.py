"""Gemma 3 in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM
from matt_fast.modeling.embeddings import Gemma3TextScaledPartlyFrozenWordEmbedding

__all__ = ["Gemma3ForAIM", "Gemma3TextScaledPartlyFrozenWordEmbedding"]


class Gemma3ForAIM(PreTrainedModelForAIM):
    """Gemma 3, and Gemma 2, which the reference library's README loads with it; see `PreTrainedModelForAIM`."""
