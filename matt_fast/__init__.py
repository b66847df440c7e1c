"""matt-fast: give a pretrained language model a new tokenizer and keep what the model knows.

The names below are imported when they are first used: `aim_loss` alone needs torch and NumPy only.
"""

from typing import TYPE_CHECKING

from matt_fast.support.lazy import lazy_names
from matt_fast.support.version import own_version

if TYPE_CHECKING:
    from matt_fast.alignment.segments import (
        align_segments as align_segments,
    )
    from matt_fast.alignment.segments import (
        align_segments_batch as align_segments_batch,
    )
    from matt_fast.alignment.vocabulary import match_tokens as match_tokens
    from matt_fast.evaluation.bits_per_byte import evaluate as evaluate
    from matt_fast.initializers import initialize as initialize
    from matt_fast.loss import AIMLoss as AIMLoss
    from matt_fast.loss import aim_loss as aim_loss
    from matt_fast.model.attention import AttentionInputs as AttentionInputs
    from matt_fast.model.capture import capture_attention as capture_attention
    from matt_fast.model.layers import layer_config as layer_config
    from matt_fast.modeling import (
        Gemma3ForAIM as Gemma3ForAIM,
    )
    from matt_fast.modeling import (
        GPTNeoXForAIM as GPTNeoXForAIM,
    )
    from matt_fast.modeling import (
        LlamaForAIM as LlamaForAIM,
    )
    from matt_fast.modeling import (
        MistralForAIM as MistralForAIM,
    )
    from matt_fast.modeling import (
        PartlyFrozenEmbeddings as PartlyFrozenEmbeddings,
    )
    from matt_fast.modeling import (
        PreTrainedModelForAIM as PreTrainedModelForAIM,
    )
    from matt_fast.modeling import (
        Qwen3ForAIM as Qwen3ForAIM,
    )
    from matt_fast.planning.plan import plan as plan
    from matt_fast.recipe.apply import apply as apply
    from matt_fast.recipe.comparison import compare_initializers as compare_initializers
    from matt_fast.recipe.doctor import doctor as doctor
    from matt_fast.recipe.result import TransferResult as TransferResult
    from matt_fast.recipe.sweep import sweep_layers as sweep_layers
    from matt_fast.recipe.transfer import transfer as transfer
    from matt_fast.reference.config import MATTConfig as MATTConfig
    from matt_fast.reference.matt import MATT as MATT
    from matt_fast.reference.output import MATTOutput as MATTOutput
    from matt_fast.training.aim_impl import aim_impl as aim_impl
    from matt_fast.training.aim_impl import aim_star_impl as aim_star_impl
    from matt_fast.training.options import HealingOptions as HealingOptions
    from matt_fast.training.options import TrainingOptions as TrainingOptions

_WHERE = {
    "AIMLoss": "matt_fast.loss",
    "AttentionInputs": "matt_fast.model.attention",
    "GPTNeoXForAIM": "matt_fast.modeling",
    "Gemma3ForAIM": "matt_fast.modeling",
    "HealingOptions": "matt_fast.training.options",
    "LlamaForAIM": "matt_fast.modeling",
    "MATT": "matt_fast.reference.matt",
    "MATTConfig": "matt_fast.reference.config",
    "MATTOutput": "matt_fast.reference.output",
    "MistralForAIM": "matt_fast.modeling",
    "PartlyFrozenEmbeddings": "matt_fast.modeling",
    "PreTrainedModelForAIM": "matt_fast.modeling",
    "Qwen3ForAIM": "matt_fast.modeling",
    "TrainingOptions": "matt_fast.training.options",
    "TransferResult": "matt_fast.recipe.result",
    "apply": "matt_fast.recipe.apply",
    "aim_impl": "matt_fast.training.aim_impl",
    "aim_loss": "matt_fast.loss",
    "aim_star_impl": "matt_fast.training.aim_impl",
    "align_segments": "matt_fast.alignment.segments",
    "align_segments_batch": "matt_fast.alignment.segments",
    "capture_attention": "matt_fast.model.capture",
    "compare_initializers": "matt_fast.recipe.comparison",
    "doctor": "matt_fast.recipe.doctor",
    "evaluate": "matt_fast.evaluation.bits_per_byte",
    "initialize": "matt_fast.initializers",
    "layer_config": "matt_fast.model.layers",
    "match_tokens": "matt_fast.alignment.vocabulary",
    "plan": "matt_fast.planning.plan",
    "sweep_layers": "matt_fast.recipe.sweep",
    "transfer": "matt_fast.recipe.transfer",
}

__all__ = list(_WHERE)

_lazy = lazy_names(__name__, _WHERE)


def __getattr__(name: str):
    if name == "__version__":
        return own_version()
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
