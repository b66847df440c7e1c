"""Looks at what a run that goes on will read of itself: its files may be torn, or changed by hand."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.runs.folder import Run, damaged_files
from matt_fast.training.loop import Progress


def _about(found: dict) -> None:
    str(found["version"]).strip()
    sum(found["settings"].get(name) or 0 for name in ("heal_steps", "processes")) + found["settings"]["steps"]
    prints = found["fingerprints"]
    [part.items() for part in (found["settings"], found.get("libraries", {}), *prints.values(), prints["model"])]


def _state(found: dict) -> None:
    sum(found.get("seconds", {}).values())
    "".join(found.get("messages", []))


def _figures(found: dict) -> None:
    for texts in {"original": found["original"], **found}.values():  # which is measured first
        sum(Evaluation(**figures).bits_per_byte for figures in texts.values())


def _numbers(found: dict) -> None:
    sum(Progress(**found["progress"]).losses)
    sum(bits for _, bits in found["validation"])
    sum(found[name] or 0 for name in ("best_step", "training_memory", "peak_memory", "n_layers"))


READ: Mapping[str, Callable[[dict], Any]] = MappingProxyType(
    {
        "run.json": _about,
        "state.json": _state,
        "evaluations.json": _figures,
        "rows/report.json": InitReport.of_json,
        "trained/numbers.json": _numbers,
        "healed/numbers.json": _numbers,
    }
)


def check_run_files(run: Run) -> None:
    """Raise a ValueError that names a file of the run which has something else in it than the run wrote."""
    for name, use in READ.items():
        if run.path(name).exists():
            found = run.read(name)
            with damaged_files(run.path(name), run.argument):
                use(found)
