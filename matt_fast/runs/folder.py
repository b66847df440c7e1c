"""A run on disk: the folder `run` in the output, which one process at a time works in, and what lies there.

    run.yaml       the resolved configuration; `--config run.yaml` makes the run again
    run.json       version, settings, fingerprints and libraries, by which a call that goes on is compared
    state.json     status, seconds of each stage
    sample.txt     a part of a text, for pictures
    evaluations.json, completions.json, metrics.jsonl, result.json
    rows/          where rows start
    snippets/      what the teacher wrote around new tokens
    rehearsal/     what it wrote of its own
    drawn.jsonl    what is there of these while it writes
    checkpoints/   of the training
    best/          the rows that validation found best so far
    trained/       the rows behind training
    healing/       checkpoints and best weights of the training of rows and layers, with healing.jsonl
    healed/        rows and layers behind it
    result/        the folder that becomes the output

Each is whole or not there. What a finished run does not need any more is removed.
"""

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from matt_fast.runs.contents import CONTENTS
from matt_fast.support.checks import check_content, check_type
from matt_fast.support.files import check_writable, remove_parts, write_text
from matt_fast.support.locks import locked
from matt_fast.support.version import own_version

Resume = bool | Literal["auto"]  # "auto": go on where there is a run, begin where there is none

TRAININGS = {"steps": ("trained", "."), "heal_steps": ("healed", "healing")}  # option: what it ends with, checkpoints
WRITTEN_OFTEN = ("checkpoints", "best", "healing", "healing/checkpoints", "healing/best")  # while it trains
DRAWN = "drawn.jsonl"
HEAVY = ("rows", "data", "checkpoints", "best", "trained", "healing", "healed", "result")


CLEAR = re.compile(r"[\w ]+: wanted ")  # an error that says already what is wrong


@contextmanager
def damaged_files(place: str | Path, argument: str, by: str = "a transfer") -> Iterator[None]:
    """Code that reads a file of a run, or the files in its folder: where it cannot, the error names the place.

    Args:
        place: of the file or folder.
        argument: what errors call it.
        by: who wrote it.

    Raises:
        ValueError: what lies at `place` is torn, or was changed by hand.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, SafetensorError, TypeError, ValueError, yaml.YAMLError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ValueError) and CLEAR.match(str(error)):
            raise
        raise ValueError(
            f"{argument}: wanted what {by} wrote in {str(place)!r}, got something else ({line})"
        ) from error


class Run:
    """The run in a folder.

    Args:
        output: the folder that gets the result; the run is in its folder `run`.
        argument: what errors call it.
    """

    def __init__(self, output: str | Path, argument: str = "output"):
        self.output, self.argument = Path(output), argument
        self.folder = self.output / "run"

    def path(self, name: str) -> Path:
        return self.folder / name

    def text(self, name: str) -> str:
        """A file of text in the folder.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is not UTF-8.
        """
        path = self.path(name)
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.argument}: wanted a run with {name}, but {str(path)!r} is not there"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.argument}: wanted UTF-8 in {str(path)!r}, got other bytes") from error

    def read(self, name: str) -> dict[str, Any]:
        """A file of JSON in the folder, checked by `CONTENTS`; {} if it is not there.

        Raises:
            ValueError: it has something else in it.
        """
        path = self.path(name)
        if not path.exists():
            return {}
        try:
            found = json.loads(self.text(name))
            check_type(name, found, dict)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.argument}: wanted a JSON object in {str(path)!r}, got something else") from error
        with damaged_files(path, self.argument):
            check_content(path.stem, found, CONTENTS.get(name, {}))
        return found

    def write(self, name: str, value: dict) -> None:
        write_text(self.path(name), json.dumps(value, indent=1) + "\n")

    def update(self, name: str, **values) -> None:
        self.write(name, self.read(name) | values)

    @property
    def begun(self) -> bool:
        return self.path("run.json").exists()

    @property
    def status(self) -> str:
        """ "new", "running" (or stopped), "diverged" or "finished"."""
        return self.read("state.json").get("status", "running" if self.begun else "new")

    @property
    def published(self) -> bool:
        """Whether the output has the model, whole."""
        return (self.output / "config.json").exists() and not self.path("result").exists()

    @property
    def has_something(self) -> bool:
        """Whether something was made that would be lost with the folder."""
        return any(self.path(name).exists() for name in (*HEAVY, "evaluations.json"))

    @property
    def owner(self) -> str | None:
        """Who holds the run, as the file `lock` says; None where it is not there.

        Not for the process that holds it: the system takes off a process's locks when it closes a file that has some.
        """
        try:
            return self.path("lock").read_text(encoding="utf-8").strip()
        except OSError:
            return None

    @property
    def how_to_go_on(self) -> str:
        if self.status == "diverged":
            command = f"matt-fast transfer --resume {shlex.quote(str(self.output))}"
            healing = self.path("trained").exists()
            rate, steps = ("--heal-lr", "--heal-steps") if healing else ("--lr", "--steps")
            done = self.steps_behind(*TRAININGS["heal_steps" if healing else "steps"])
            enough = f", or, to take what was trained so far, {command} {steps} {done}" if done else ""
            return f"To go on from there: {command} {rate} LOWER{enough}"
        if self.has_something:
            return f"To go on from there: matt-fast transfer --resume {shlex.quote(str(self.output))}"
        return "Nothing was made yet: give the same command again."

    def begin(self, settings: dict, fingerprints: dict, configuration: str, libraries: dict) -> None:
        """Write what the run is, before its first stage."""
        write_text(self.path("run.yaml"), configuration)
        about = {"version": own_version(), "settings": settings, "fingerprints": fingerprints, "libraries": libraries}
        self.write("run.json", about)

    def steps_behind(self, over: str, place: str) -> float:
        """The last step of a training that has a checkpoint in `place`; infinity where the folder `over` is there."""
        numbers = [int(x.name.removeprefix("step-")) for x in self.path(place).glob("checkpoints/step-*")]
        return math.inf if self.path(over).exists() else max(numbers, default=0)

    def finish(self) -> None:
        """Remove what only going on would need."""
        self.update("state.json", status="finished")
        for name in HEAVY:
            shutil.rmtree(self.path(name), ignore_errors=True)

    def check_free(self, resume: Resume) -> None:
        """Raise unless the folder is new or empty, or, with `resume`, has a run in it; with "auto" either will do."""
        place = str(self.output)
        if not self.begun and self.has_something:
            raise FileExistsError(
                f"output: wanted a new or empty folder, or a run, but {place!r} has parts of a run without its "
                "run/run.json, which says what they are of: bring that back, or delete the folder"
            )
        if self.status == "new":
            others = [x.name for x in self.output.iterdir() if x != self.folder] if self.output.is_dir() else []
            if resume is True:
                raise ValueError(f"resume: wanted a folder with a run in it, got {place!r}, which has no run/run.json")
            if self.output.exists() and (not self.output.is_dir() or others):
                raise FileExistsError(f"output: wanted a new or empty folder, but {place!r} has something in it")
        elif not resume and self.status == "finished":
            raise FileExistsError(f"output: wanted a new or empty folder, but {place!r} holds a finished run")
        elif not resume:
            raise FileExistsError(
                f"output: wanted a new or empty folder, but {place!r} holds a run that is not finished; go on with it: "
                f"matt-fast transfer --resume {shlex.quote(place)} (in Python resume=True), or delete the folder"
            )


@contextmanager
def reserved(output: str | Path, resume: Resume) -> Iterator[Run]:
    """The run in `output`, for this process alone; what killed processes left half-written is removed.

    A folder in which nothing was made by the end is taken away again.

    Raises:
        FileExistsError: the folder has something in it, or another process works there.
        ValueError: `resume` is True, and there is no run.
        OSError: the folder cannot be made or written.
    """
    run = Run(output)
    run.check_free(resume)
    was_there = run.output.exists()
    check_writable("output", run.output)
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.path("lock")):
        run.check_free(resume)
        for folder in (run.output, run.folder, *map(run.path, WRITTEN_OFTEN)):
            remove_parts(folder)
        try:
            yield run
        finally:
            if not run.begun or (run.status != "finished" and not run.has_something):
                shutil.rmtree(run.folder, ignore_errors=True)
                if not was_there and not any(run.output.iterdir()):
                    run.output.rmdir()
