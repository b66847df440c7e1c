"""Looks at what a run that goes on will read of itself: its files may be torn, or changed by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open

from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.recipe.result import SnippetCounts
from matt_fast.runs.folder import Run, damaged_files
from matt_fast.support.checks import check_content, made_of
from matt_fast.training.state import Progress


def _figures(found: dict) -> None:
    for texts in {"original": found["original"], **found}.values():  # which is measured first
        for figures in texts.values():
            made_of(Evaluation, figures)


def _numbers(found: dict) -> None:
    made_of(Progress, found["progress"])
    steps = [int(step) for step, _ in found["validation"]]
    if found["best_step"] not in (None, 0, *steps):
        raise ValueError(f"no validation behind best_step {found['best_step']}")


def _prompts(found: dict) -> None:
    prompts = [prompt for _, prompt in found["prompts"]]
    for name in ("original", "adapted"):
        list(zip(prompts, found.get(name, prompts), strict=True))


READ: Mapping[str, Callable[[dict], Any]] = MappingProxyType(
    {
        "run.json": dict,
        "state.json": dict,
        "evaluations.json": _figures,
        "completions.json": _prompts,
        "rows/report.json": InitReport.of_json,
        "trained/numbers.json": _numbers,
        "healed/numbers.json": _numbers,
        "snippets/counts.json": lambda found: made_of(SnippetCounts, found),
    }
)
TENSORS = ("rows/rows", "trained/rows", "healed/rows", "healed/layers")


def check_run_files(run: Run) -> None:
    """Raise a ValueError that names a file of the run which has something else in it than the run wrote."""
    for name, use in READ.items():
        if run.path(name).exists():
            found = run.read(name)
            with damaged_files(run.path(name), run.argument):
                use(found)
    written = run.path("rehearsal/texts.jsonl")
    if written.exists():
        with damaged_files(written, run.argument), written.open(encoding="utf-8") as lines:
            for line in lines:
                check_content("line", json.loads(line), {"text": str})
    for path in (run.path(f"{name}.safetensors") for name in TENSORS):
        if path.exists():
            _check_tensors(path, run.argument)


def _check_tensors(path: Path, argument: str) -> None:
    """Read a file's header, which says how long the file is."""
    with damaged_files(path, argument), safe_open(path, "pt") as file:
        file.keys()
