"""What the folder of a run tells, finished or not. Imports nothing slow."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from matt_fast.runs.contents import CONTENTS, IN_RESULT
from matt_fast.runs.folder import Run, damaged_files
from matt_fast.support.checks import check_content
from matt_fast.support.locks import at_work

HELD_OUT = "held-out text"  # the name of one that was given none
ENOUGH = 1 << 16  # bytes of the end of a file of metrics that have a line of a step
STEP = re.compile(rb'\{"step": \d+, "loss": .*\}\n')
PROVENANCE = "token_provenance.jsonl"
FIELDS = {"id": int, "start": str, "teacher_ids": list, "trained": bool, "seen": int}
STATES = {
    "finished": "finished",
    "diverged": "stopped, as its loss went far up",
    "running": "not finished",
}


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        name: "rows" or "healing".
        title: what it is, for people.
        objective: its objective.
        steps: updates that were planned.
        metrics: its file of metrics; it may not be there.
        progress: what the run's summary says of it; {} before the end.
        validation: (step, bits per byte) of each validation; before the end they are in `metrics` alone.
        best_step: the one of them whose weights became the result.
    """

    name: str
    title: str
    objective: str
    steps: int
    metrics: Path
    progress: Mapping[str, Any] = field(default_factory=dict)
    validation: Sequence[Sequence[float]] = ()
    best_step: int | None = None


@dataclass(frozen=True)
class Record:
    """What lies in the output of a transfer.

    Attributes:
        folder: the output.
        status: "finished", "running" (or stopped) or "diverged".
        at_work: who works on it now; None where nobody does.
        version: of matt-fast.
        options: of the run, by the names of the command line.
        starts: how new rows started, by the names of methods, for people.
        configuration: the same as the text of run.yaml.
        processes: that trained together.
        step, steps: of the present training, the last one that is on disk, and all; None where the run does not say.
        seconds: of each stage.
        messages: what the run told.
        evaluations: text -> stage -> figures, as far as they were measured.
        result: the summary of a finished run, else {}.
        sample: a part of a text of the run; None where it kept none.
        phases: of the training, in their order.
    """

    folder: Path
    status: str
    at_work: str | None
    version: str
    options: Mapping[str, Any]
    starts: str
    configuration: str
    processes: int
    step: int | None
    steps: int | None
    seconds: Mapping[str, float]
    messages: Sequence[str]
    evaluations: Mapping[str, Mapping[str, Mapping[str, Any]]]
    result: Mapping[str, Any]
    sample: str | None
    phases: Sequence[Phase]

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def trained_on(self) -> bool:
        """Whether a finished run trained a model on that had its tokenizer already."""
        return bool(self.result.get("report", {}).get("own"))

    @property
    def last_line(self) -> Mapping[str, Any]:
        """The last line of a step that the present training wrote; {} where there is none."""
        for phase in reversed(self.phases):
            if phase.metrics.is_file():
                with phase.metrics.open("rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - ENOUGH))
                    lines = [x for x in file.read().splitlines(keepends=True) if STEP.match(x)]
                if not lines:
                    return {}
                with damaged_files(phase.metrics, "runs"):
                    line = json.loads(lines[-1])
                    check_content("line", line, {"step": int, "loss": float | None, "seconds": float})
                return line
        return {}

    @property
    def has_model(self) -> bool:
        """Whether the adapted model lies in the folder."""
        return (self.folder / "config.json").is_file()

    @property
    def completions(self) -> list[Mapping[str, str]]:
        """Beginnings of texts and what both models made of them; [] where the run made none."""
        return list(self.result.get("completions") or ())


def read_record(folder: Path, argument: str = "runs", *, ends: bool = False) -> Record:
    """What a transfer left in its output folder.

    Args:
        folder: the output.
        argument: what errors call it.
        ends: the run's own process asks, at its end: all that will be there is.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file of the run is damaged; the message names it.
    """
    run = Run(folder, argument)
    if not run.begun:
        raise FileNotFoundError(
            f"{argument}: wanted the output folder of a transfer, got {str(folder)!r}, which has no run/run.json"
        )
    about, state, result = (run.read(f"{name}.json") for name in ("run", "state", "result"))
    configuration = run.text("run.yaml")
    with damaged_files(run.path("run.yaml"), argument):
        options = yaml.safe_load(configuration)
        check_content("run", options, CONTENTS["run.yaml"])
    with damaged_files(run.path("result.json"), argument):
        for name, wanted in IN_RESULT.items():
            if result.get(name):
                check_content(f"result.{name}", result[name], wanted)
    with damaged_files(run.folder, argument):
        settings = about["settings"]
        figures = result["evaluations"] if "evaluations" in result else run.read("evaluations.json")
        evaluations = {text: {} for texts in figures.values() for text in texts}
        for stage, texts in figures.items():
            for text, values in texts.items():
                evaluations[text][stage] = values
        status, head = "finished" if ends else run.status, settings["init_head"]
        return Record(
            folder=folder,
            status=status if status in STATES else "running",
            at_work=None if status == "finished" else at_work(run.path("lock")),
            version=str(about["version"]),
            options=dict(options),
            starts=settings["init"] + ("" if head == "same" else f", {head} head"),
            configuration=configuration,
            processes=int(settings.get("processes", 1)),
            step=state.get("step"),
            steps=state.get("steps"),
            seconds=dict(result.get("seconds") or state.get("seconds", {})),
            messages=list(state.get("messages", ())),
            evaluations=evaluations,
            result=result,
            sample=run.text("sample.txt") if run.path("sample.txt").is_file() else None,
            phases=_phases(run, options, result),
        )


def held_out_names(options: Mapping[str, Any]) -> list[str]:
    """The names of a run's held-out texts, the first of which decides."""
    given = options.get("eval_data")
    if isinstance(given, list):
        return [x.partition("=")[0] for x in given]
    return [] if given is None else [HELD_OUT]


def _phases(run: Run, options: Mapping[str, Any], result: Mapping[str, Any]) -> list[Phase]:
    found = []
    if options["steps"] or options.get("epochs"):
        given = {name: result[name] for name in ("progress", "validation", "best_step") if name in result}
        metrics, steps = run.path("metrics.jsonl"), int(options["steps"])
        found.append(Phase("rows", "Rows alone", options["objective"], steps, metrics, **given))
    if options.get("heal"):
        healing = result.get("healing") or {}
        given = {name: healing[name] for name in ("progress", "validation", "best_step") if name in healing}
        objective, steps, metrics = options["heal_objective"], int(options["heal_steps"]), run.path("healing.jsonl")
        found.append(Phase("healing", "Rows and layers together", objective, steps, metrics, **given))
    return found


def read_provenance(folder: Path, argument: str = "folder", *, copied: bool = False) -> list[dict]:
    """The lines of a result's token_provenance.jsonl that tell of new tokens.

    Args:
        folder: of the result.
        argument: what errors call it.
        copied: those that tell of tokens with an old one's row, in their place.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: a line is no JSON object with the fields that `transfer` writes.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: wanted the output of a finished transfer, but {str(path)!r} is not there")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                good = all(isinstance(record[name], kind) for name, kind in FIELDS.items())
            except (KeyError, TypeError, ValueError):
                good = False
            if not good:
                got = line[:60].decode(errors="backslashreplace")
                where = f"line {number} of {str(path)!r}"
                raise ValueError(f"{argument}: wanted an object with {', '.join(FIELDS)} in {where}, got {got!r}")
            if record["start"].startswith("copied") is copied and not record["start"].startswith("no token"):
                records.append(record)
    return records
