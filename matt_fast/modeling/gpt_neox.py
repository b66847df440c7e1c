"""GPTNeoX in the shape that the reference library's scripts expect."""

from matt_fast.modeling.base import PreTrainedModelForAIM


class GPTNeoXForAIM(PreTrainedModelForAIM):
    """A GPTNeoX model, see `PreTrainedModelForAIM`."""

    model_types = ("gpt_neox",)
