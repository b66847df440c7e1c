"""What can be told of a plan's arguments by their values. Imports nothing slow."""

from collections.abc import Mapping
from typing import Any

from matt_fast.model.folders import check_model_place, check_tokenizer_place
from matt_fast.support.checks import LENGTH, MANY, ROWS, check_choice, check_positive, check_range

LIMITS = {"length": LENGTH, "batch_size": ROWS, "n_layers": MANY, "processes": MANY}


def check_plan(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of `plan`, by name.

    Raises:
        ValueError: a value that it does not take; the message names it.
        OSError: a path where nothing is.
    """
    for name, most in LIMITS.items():
        check_range(name, arguments[name], 1, most)
    check_positive("bandwidth", arguments["bandwidth"], MANY)
    check_positive("vram", arguments["vram"])
    training = arguments["training"]
    if training is not None and training.steps == 0 and arguments["healing"] is None:
        raise ValueError("steps: wanted 1 or more without healing, got 0, which trains nothing")
    if training is not None and training.shard and arguments["processes"] == 1:
        raise ValueError("shard: wanted processes of 2 or more with it, got 1")
    check_choice("precision", arguments["precision"], ("no", "bf16"))
    check_choice("device", arguments["device"], ("cuda", "cpu"))
    check_model_place(arguments["model"], "model")
    check_tokenizer_place(arguments["tokenizer"], "tokenizer")
