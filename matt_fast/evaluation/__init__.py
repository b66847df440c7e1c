"""What a model is worth on held-out text, in figures that do not depend on its tokenizer."""

from matt_fast.support.lazy import lazy_names

_WHERE = {
    "Evaluation": "matt_fast.evaluation.bits_per_byte",
    "evaluate": "matt_fast.evaluation.bits_per_byte",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
