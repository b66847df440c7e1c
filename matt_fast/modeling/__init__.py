"""Models in the shape that the reference library's scripts expect, for `matt_fast.MATT` and nothing else here."""

from matt_fast.modeling.base import AIMOutput, PreTrainedModelForAIM
from matt_fast.modeling.embeddings import PartlyFrozenEmbeddings
from matt_fast.modeling.gemma3 import Gemma3ForAIM
from matt_fast.modeling.gpt_neox import GPTNeoXForAIM
from matt_fast.modeling.llama import LlamaForAIM
from matt_fast.modeling.mistral import MistralForAIM
from matt_fast.modeling.qwen3 import Qwen3ForAIM

__all__ = [
    "AIMOutput",
    "GPTNeoXForAIM",
    "Gemma3ForAIM",
    "LlamaForAIM",
    "MistralForAIM",
    "PartlyFrozenEmbeddings",
    "PreTrainedModelForAIM",
    "Qwen3ForAIM",
]
