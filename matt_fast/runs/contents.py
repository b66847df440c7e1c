"""What must be in the files of a run for others to read them, by `check_content`. Imports nothing slow.

Who reads more of a file than this makes dataclasses of it, by `made_of`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FIGURES = {"bits_per_byte": float, "bytes_per_token": float, "n_bytes": int, "masked": bool | None}
EVALUATIONS = {...: {...: FIGURES}}  # stage, text
PROGRESS = {
    "step": int,
    "losses": list[float],
    "tokens": int,
    "seconds": float,
    "skipped": dict[str, int],
    "steps_without_new_tokens": int,
}
TRAINED = {"progress": PROGRESS, "validation": list[list[float]], "best_step": int | None}
NUMBERS = TRAINED | {"n_layers": int, "training_memory": int, "peak_memory": int}
SETTINGS = {
    "init": str,
    "init_head": str,
    "precision": str,
    "steps": int,
    "heal": str | None,
    "heal_steps": int | None,
    "epochs": float | None,
    "processes": int | None,
    "batch_size": int,
    "accumulation": int,
}

IN_RESULT = {"healing": TRAINED, "rehearsal": {"texts": int}}  # where the run did it

CONTENTS: Mapping[str, Any] = MappingProxyType(
    {
        "run.json": {
            "version": str,
            "settings": SETTINGS,
            "fingerprints": {...: dict[str, str | None], "model": dict[str, str | None]},
            "libraries": dict[str, str] | None,
        },
        "run.yaml": {
            "model": str,
            "tokenizer": str,
            "data": str | None,
            "eval_data": str | list[str] | None,
            "init": str,
            "init_head": str,
            "freeze_shared": bool,
            "objective": str,
            "steps": int,
            "epochs": float | None,
            "lr": float,
            "heal": str | None,
            "heal_objective": str | None,
            "heal_steps": int | None,
            "heal_lr": float | None,
            "heal_rows_lr": float | None,
        },
        "state.json": {
            "status": str | None,
            "seconds": dict[str, float] | None,
            "messages": list[str] | None,
            "lost": list[str] | None,
            "step": int | None,
            "steps": int | None,
        },
        "evaluations.json": EVALUATIONS,
        "completions.json": {
            "prompts": list[list[str]] | None,
            "bytes": int | None,
            "original": list[str] | None,
            "adapted": list[str] | None,
        },
        "trained/numbers.json": NUMBERS | {"trained_numbers": int | None},
        "healed/numbers.json": NUMBERS | {"trained_numbers": int},
        "result.json": NUMBERS
        | {
            "shared": int,
            "new": int,
            "unspelled": int,
            "trainable": int,
            "seen": int,
            "report": {"outliers": list[dict[str, Any]], "own": int | None},
            "evaluations": EVALUATIONS,
            "seconds": dict[str, float],
            "text": str,
            "completions": list[dict[str, str]],
            "healing": dict | None,
            "snippets": dict | None,
            "rehearsal": dict | None,
        },
    }
)
