"""What a model is worth on held-out text, in figures that do not depend on its tokenizer."""

from typing import TYPE_CHECKING

from matt_fast.support.lazy import lazy_names

if TYPE_CHECKING:
    from matt_fast.evaluation.bits_per_byte import Evaluation as Evaluation
    from matt_fast.evaluation.bits_per_byte import evaluate as evaluate

_WHERE = {
    "Evaluation": "matt_fast.evaluation.bits_per_byte",
    "evaluate": "matt_fast.evaluation.bits_per_byte",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
