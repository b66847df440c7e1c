"""What a person sees while a command works: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import psutil
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from matt_fast.cli.output import say
from matt_fast.support.printable import printable
from matt_fast.support.units import GIB

if TYPE_CHECKING:
    from matt_fast.training.state import Progress as TrainingProgress

SECONDS_WITHOUT_BAR = 2.0
SECONDS_TO_FIRST_LINE = 15.0
SECONDS_TO_NEXT_LINE = 30.0
WINDOW = 600.0  # seconds over which the speed is averaged


class ProgressDisplay:
    """A context manager whose methods are the callbacks of `transfer`.

    On a terminal the stage has a bar once it takes longer than two seconds; one of unknown length has a moving bar.
    Elsewhere a line is printed 15 seconds after the last stage's name, and then every 30. What training came to stays
    to be read when it ends.

    Args:
        console: where to print; nothing is, and no thread runs, if it is quiet.
        steps: training steps to come, as far as they are known; `on_progress("steps", done, total)` tells it too.
        announce: print the name of each stage on a line of its own.
    """

    def __init__(self, console: Console, steps: int | None = None, *, announce: bool = True):
        self.console, self.steps, self.announce = console, steps, announce
        self.stage, self.since = "training", time.monotonic()
        self.bar = _Bars(self)
        self.tasks: dict[str, TaskID] = {}
        self.current: TaskID | None = None
        self.figures = ""
        # steps and their times: behind which this process began, and the last one
        self._first = self._last = (0, 0.0)
        self.live = console.is_interactive or console.is_jupyter
        self._due = 0.0  # when the next line is
        self._ended = threading.Event()
        self._lines: threading.Thread | None = None
        self._streams = None

    def __enter__(self) -> "ProgressDisplay":
        self.since = time.monotonic()
        self._due = self.since + SECONDS_TO_FIRST_LINE
        if self.live and not self.console.quiet:
            self._streams = sys.stdout, sys.stderr  # the bar puts its own in their place
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._leave_child_alone)
            self.bar.start()
        elif not self.console.quiet:
            self._lines = threading.Thread(target=self._print_lines, name="progress lines", daemon=True)
            self._lines.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._forget_tasks()
        if self._streams is not None:
            self.bar.stop()
            self._streams = None
        if self._lines is not None:
            self._lines.join()

    def on_stage(self, stage: str) -> None:
        """A stage begins."""
        self._forget_tasks()
        self.stage, self.since = stage, time.monotonic()
        if self.announce:
            say(self.console, stage, "bold")
            self._due = self.since + SECONDS_TO_FIRST_LINE
        self._task("", None)

    def on_progress(self, what: str, done: int, total: int | None) -> None:
        """So many of something ("rows", "pieces", "bytes") are done in this stage; None if their number is unknown."""
        if what == "steps":
            self.steps = total or self.steps
        begins = what == "steps" and what not in self.tasks
        task = self._task(what, total)
        if what == "steps":
            self._last = (done, self.bar.get_time())
            self._first = self._last if begins else self._first
        if done < self._state(task).completed:  # begun anew
            self.bar.remove_task(self.tasks.pop(what))
            task = self._task(what, total)
        self.bar.update(task, completed=done, total=total)
        self.current = task

    def on_step(self, progress: "TrainingProgress") -> None:
        """A training step is done."""
        parts = progress.parts if len(progress.parts) > 1 else {}
        losses = f"loss {progress.loss:.4g}"
        losses += f" ({', '.join(f'{name} {value:.3g}' for name, value in parts.items())})" if parts else ""
        rate = progress.tokens / progress.seconds if progress.seconds else 0.0
        self.figures = f"{losses}, {rate:,.0f} tokens/s, {_memory_in_use() / GIB:.2f} GiB in use"
        self.on_progress("steps", progress.step, self.steps)

    def on_message(self, text: str) -> None:
        """Something to tell."""
        say(self.console, text)

    def line(self) -> str:
        """Where the work is, in one line."""
        current, steps = self._state(self.current), self._state(self.tasks.get("steps"))
        task = steps or current  # in the middle of the steps the model may be measured
        parts = [] if task is None else [amount(task)]
        if steps is not None:
            parts.append(self.figures)
        if current not in (None, task) and not current.finished:
            parts.append(amount(current))
        parts.append(f"{duration(time.monotonic() - self.since)} so far")
        left = None if task is None else self.left(task)
        if left is not None and not task.finished:
            parts.append(f"{duration(left)} left")
        return f"{self.stage}: {', '.join(part for part in parts if part)}"

    def left(self, task: Task) -> float | None:
        """Seconds that a task still takes; None where that is not known.

        Of steps by all that this process did: validations and checkpoints come between them, now and then.
        """
        if task.description != "steps":
            return task.time_remaining
        (first, began), (last, now) = self._first, self._last
        return (task.total - last) / (last - first) * (now - began) if last > first and task.total else None

    def _task(self, what: str, total: int | None) -> TaskID:
        if what not in self.tasks:
            if what and "" in self.tasks:  # its length is known now
                self.bar.remove_task(self.tasks.pop(""))
            self.tasks[what] = self.bar.add_task(what, total=total)
            self.current = self.tasks[what]
        return self.tasks[what]

    def _state(self, task: TaskID | None) -> Task | None:
        return next((state for state in self.bar.tasks if state.id == task), None)

    def _forget_tasks(self) -> None:
        if self.figures:  # what training came to stays to be read
            say(self.console, self.line())
        for task in self.tasks.values():
            self.bar.remove_task(task)
        self.tasks, self.current, self.figures = {}, None, ""

    def _print_lines(self) -> None:
        while not self._ended.wait(SECONDS_TO_FIRST_LINE / 30):
            if time.monotonic() >= self._due:
                say(self.console, self.line())
                self._due = time.monotonic() + SECONDS_TO_NEXT_LINE

    def _leave_child_alone(self) -> None:
        """In a forked process: its prints must not wait for locks of a thread that it does not have."""
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams


class _Bars(Progress):
    """The stage's name and one bar for each thing that is counted, with the figures of training below."""

    def __init__(self, display: ProgressDisplay):
        self.display = display
        columns = (_Column(lambda task: display.stage), BarColumn(24), _Column(amount), _Column(self._clock))
        super().__init__(*columns, console=display.console, speed_estimate_period=WINDOW, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        display = self.display
        if time.monotonic() - display.since < SECONDS_WITHOUT_BAR:
            return
        tasks = [task for task in self.tasks if not task.finished or task.id == display.current]
        yield self.make_tasks_table(tasks)
        if display.figures:
            yield Text(display.figures, "dim")

    def _clock(self, task: Task) -> str:
        so_far, left = f"{duration(task.elapsed or 0)} so far", self.display.left(task)
        return so_far if left is None else f"{so_far}, {duration(left)} left"


class _Column(ProgressColumn):
    """A column of plain text."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(printable(self.text(task)), no_wrap=True)


def amount(task: Task) -> str:
    """How much is done of what."""
    if not task.description:
        return ""
    done, total = int(task.completed), task.total
    if task.description == "bytes":
        return decimal(done) + ("" if total is None else f" of {decimal(int(total))}")
    of_all = "" if total is None else f" of {int(total):,}"
    return f"step {done:,}{of_all}" if task.description == "steps" else f"{done:,}{of_all} {task.description}"


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory_in_use() -> int:
    """Bytes: of the accelerator's tensors if torch runs on one, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss
