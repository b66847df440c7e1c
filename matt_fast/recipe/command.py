"""The command line that makes a run again, from its options. Imports nothing slow."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matt_fast.recipe.config import INPUTS, OUTPUTS
from matt_fast.support.printable import printable

# What says where the work goes on or how it is watched, and does not decide what comes out.
NOT_THE_RESULT = ("checkpoint_every", "data_workers", "track")
NAMES = {"map_tokens": "map"}  # options that are not called after their argument
NO_LIMIT = {"heal_max_worse": 1e9}  # how the command line says None
WIDTH = 100


def command_line(options: Mapping[str, Any], processes: int = 1) -> str:
    """A command for a shell, over several lines; folders and files of this machine are named by their last part.

    Args:
        options: of `resolved_config`.
        processes: that trained together.
    """
    words = [f"torchrun --nproc_per_node {processes} -m matt_fast transfer"] if processes > 1 else []
    words = words or ["matt-fast transfer"]
    healing = options.get("heal") is not None
    for name, value in options.items():
        if name in NOT_THE_RESULT or (name == "steps" and options.get("epochs") is not None):
            continue
        if name.startswith(("heal_", "keep_adapter")) and not healing:
            continue
        words += _words(name, NO_LIMIT.get(name) if value is None else value)
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return " \\\n    ".join(lines)


def last_parts(name: str, value: Any) -> Any:
    """An option's value with folders and files of this machine by their last part."""
    if isinstance(value, list):
        return [last_parts(name, x) for x in value]
    if name not in (*INPUTS, *OUTPUTS) or not isinstance(value, str):
        return value
    label, sign, place = value.partition("=") if name == "eval_data" else ("", "", value)
    if sign and Path(place).is_absolute():
        return f"{label}={Path(place).name}"
    return Path(value).name if Path(value).is_absolute() else value


def _words(name: str, value: Any) -> list[str]:
    option = f"--{NAMES.get(name, name).replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else ["--no-freeze-shared"] if name == "freeze_shared" else []
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"{option} {_quoted(last_parts(name, x))}" for x in values]


def _quoted(value: Any) -> str:
    text = f"{value!r}" if isinstance(value, float) else str(value)
    return shlex.quote(re.sub(r"[\n\t]", lambda x: {"\n": "\\n", "\t": "\\t"}[x[0]], printable(text)))
