"""GPT-NeoX in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM


class GPTNeoXForAIM(PreTrainedModelForAIM):
    """GPT-NeoX, see `PreTrainedModelForAIM`."""
