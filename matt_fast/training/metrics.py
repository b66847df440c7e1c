"""What one sees of a training run while it works: metrics.jsonl, and the trackers that are told the same."""

import contextlib
import errno
import io
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from matt_fast.support.checks import check_content
from matt_fast.support.memory import peak_memory
from matt_fast.training.state import Progress
from matt_fast.training.trackers import finish_trackers, log_to_trackers, start_trackers

WHOLE_LINE = re.compile(rb'\{"step": (\d+), .*\}\n')
VALIDATION = b'"bits_per_byte": '


class Metrics:
    """Writes a line of metrics.jsonl after each step, and tells the accelerator's trackers the same.

    A line is a JSON object that begins with its "step". A line of a training step has, in this order:

    - loss, and the loss of each objective by its name, before it is scaled to the first;
    - lr, and gradient_norm before it is clipped;
    - tokens: of the student without padding, so far; tokens_per_second: since the line before;
    - padding, waiting: shares so far, as in `Progress`;
    - peak_memory: bytes, see `peak_memory`;
    - flops: work so far, see `FlopCounter`;
    - epoch, seconds: as in `Progress`; and what else `log` is given.

    A line of a validation has bits_per_byte, and bits_per_byte/NAME for further texts. What is not finite is null, and
    trackers do not get it. Counts are those of the main process; the other processes write nothing.

    A file that cannot be written does not end training: a warning says so once, and every further line is tried again,
    so that lines are whole though some may be missing. A tracker that fails is named, too, and told no more.

    Args:
        path: of metrics.jsonl. Lines of later steps than `step`, and one that is torn, are cut off its end: a run that
            goes on has the file of one that was never stopped.
        accelerator: made with `accelerator_options` where there are to be trackers.
        name, config: of the run, for trackers; see `start_trackers`.
        step: the last step that is done; 0 in a new run.

    Raises what `start_trackers` does.
    """

    def __init__(
        self, path: Path, accelerator: Accelerator, *, name: str = "run", config: dict | None = None, step: int = 0
    ):
        self._path, self._accelerator = path, accelerator
        self._file: io.FileIO | None = None
        self._tracked = 0  # the last step that trackers were told
        self._last: dict[str, Any] = {}  # the last line of a training step
        self._validated = -1  # the last step with a validation
        self._reported = False
        if accelerator.is_main_process:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._cut(step)
            except OSError as error:
                self._report(error)
            start_trackers(accelerator, path.parent, name, config or {}, step)

    def log(self, progress: Progress, **more: float) -> None:
        """Write down a training step; `more` goes into its line."""
        if not self._accelerator.is_main_process:
            return
        tokens = progress.tokens - self._last.get("tokens", 0)
        seconds = progress.seconds - self._last.get("seconds", 0.0)
        self._last = {
            "step": progress.step,
            "loss": progress.loss,
            **progress.parts,
            "lr": progress.lr,
            "gradient_norm": progress.gradient_norm,
            "tokens": progress.tokens,
            "tokens_per_second": tokens / seconds if seconds > 0 else math.nan,
            "padding": progress.padding,
            "waiting": progress.waiting,
            "peak_memory": peak_memory(self._accelerator.device),
            "flops": progress.flops,
            "epoch": progress.epoch,
            "seconds": progress.seconds,
            **more,
        }
        self._write(self._last)

    def log_validation(self, step: int, bits_per_byte: float, others: Mapping[str, float] | None = None) -> None:
        """Write down a validation after a step, once: a run that goes on may make its last one again.

        `others` has the figures of further texts, by name.
        """
        if self._accelerator.is_main_process and step != self._validated:
            self._validated = step
            named = {f"bits_per_byte/{name}": value for name, value in (others or {}).items()}
            self._write({"step": step, "bits_per_byte": bits_per_byte, **named})

    def close(self) -> None:
        """End the trackers, but not the process group."""
        finish_trackers(self._accelerator)
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _write(self, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        try:
            self._append(json.dumps(dict.fromkeys(values) | finite).encode() + b"\n")
        except OSError as error:
            self._report(error)
        log_to_trackers(self._accelerator, finite, finite.pop("step"), self._tracked)

    def _append(self, line: bytes) -> None:
        """Hand a line to the system, where it outlives this process; or none of it."""
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        try:
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                self._file.truncate(end)
                raise
        except OSError:
            file, self._file = self._file, None  # a network file system may never take this one back
            with contextlib.suppress(OSError):
                file.close()
            raise

    def _cut(self, step: int) -> None:
        """Leave whole lines up to a step in the file, and learn what they say."""
        if not self._path.exists():
            return
        size, last = 0, b""
        with open(self._path, "rb") as file:
            for line in file:
                whole = WHOLE_LINE.fullmatch(line)
                if whole is None:
                    break
                self._tracked = int(whole[1])
                if self._tracked > step:
                    continue
                size += len(line)
                if VALIDATION in line:
                    self._validated = self._tracked
                else:
                    last = line
        if last:
            try:
                self._last = json.loads(last)
                check_content("line", self._last, {"tokens": int, "seconds": float})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self._path}: wanted lines of metrics, got {last[:40]!r}: {error}") from error
        os.truncate(self._path, size)

    def _report(self, error: OSError) -> None:
        if not self._reported:
            warnings.warn(f"{self._path} is not written, training goes on without it: {error}", stacklevel=4)
        self._reported = True
