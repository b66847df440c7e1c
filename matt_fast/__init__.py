"""matt-fast: give a pretrained language model a new tokenizer and keep what the model knows.

The names below are imported when they are first used: `aim_loss` alone needs torch and NumPy only.
"""

from importlib.metadata import version

from matt_fast.support.lazy import lazy_names

_WHERE = {
    "AIMLoss": "matt_fast.loss",
    "AttentionInputs": "matt_fast.model.capture",
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
        return version("matt-fast")
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
