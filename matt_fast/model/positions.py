"""How many tokens a model can take at once."""

from torch import nn
from transformers import PreTrainedModel

LEARNED = ("wpe", "position_embeddings", "embed_positions")  # what models call the table of learned positions


def position_limit(trunk: PreTrainedModel) -> int | None:
    """Tokens that a model has positions for, special ones included; None where more are meant to work.

    Learned positions end with their table. Rotary ones end at the length that the model was trained with
    (`max_position_embeddings`), unless they are scaled (`rope_scaling`). Others (ALiBi, relative ones) have no end, but
    in MPT, whose table of them is made for `max_seq_len`.

    Args:
        trunk: a model without its head, see `Teacher.trunk`; an outline will do.
    """
    config = trunk.config.get_text_config(decoder=True)
    trained = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    tables = [
        module
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in LEARNED
    ]
    for table in tables:
        first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa and its kin count from there
        rows = table.num_embeddings - first
        trained = rows if trained is None else min(trained, rows)
    endless = getattr(config, "alibi", False) or _scaled(config)
    return None if endless and not tables else trained


def _scaled(config: object) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # one for each type of layer
    kinds = [part.get("rope_type", part.get("type", "default")) for part in nested or [rope]]
    return any(kind not in ("default", None) for kind in kinds)
