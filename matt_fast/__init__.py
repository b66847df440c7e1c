"""matt-fast: give a pretrained language model a new tokenizer and keep what the model knows.

The names below are imported when they are first used: `aim_loss` alone needs torch and NumPy only.
"""

from importlib import import_module
from importlib.metadata import version

_WHERE = {
    "AIMLoss": "matt_fast.loss",
    "AttentionInputs": "matt_fast.capture",
    "GPTNeoXForAIM": "matt_fast.modeling",
    "Gemma3ForAIM": "matt_fast.modeling",
    "LlamaForAIM": "matt_fast.modeling",
    "MATT": "matt_fast.matt",
    "MATTConfig": "matt_fast.matt_config",
    "MATTOutput": "matt_fast.matt",
    "MistralForAIM": "matt_fast.modeling",
    "PartlyFrozenEmbeddings": "matt_fast.modeling",
    "PreTrainedModelForAIM": "matt_fast.modeling",
    "Qwen3ForAIM": "matt_fast.modeling",
    "TrainingOptions": "matt_fast.options",
    "TransferResult": "matt_fast.result",
    "aim_impl": "matt_fast.modeling.aim",
    "aim_loss": "matt_fast.loss",
    "aim_star_impl": "matt_fast.modeling.aim",
    "align_segments": "matt_fast.segments",
    "align_segments_batch": "matt_fast.segments",
    "capture_attention": "matt_fast.capture",
    "compare_initializers": "matt_fast.comparison",
    "evaluate": "matt_fast.evaluation",
    "initialize": "matt_fast.initializers",
    "layer_config": "matt_fast.capture",
    "match_tokens": "matt_fast.vocabulary",
    "plan": "matt_fast.planning",
    "sweep_layers": "matt_fast.sweep",
    "transfer": "matt_fast.recipe",
}

__all__ = list(_WHERE)


def __getattr__(name: str):
    if name == "__version__":
        return version("matt-fast")
    if name not in _WHERE:
        raise AttributeError(f"module 'matt_fast' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
