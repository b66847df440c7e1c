"""What goes on beside the steps of a run: metrics, validation, checkpoints, and its end when a signal asks for it."""

import math
import signal
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.summary import LocalFiles
from matt_fast.initializers import Rows
from matt_fast.recipe import export
from matt_fast.recipe.work import Work
from matt_fast.support.every import Every
from matt_fast.support.files import FULL, seconds_to_write, whole_file
from matt_fast.support.stopping import BrokenOffError
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.course import TOGETHER, rising
from matt_fast.training.loop import DivergedError, Watcher
from matt_fast.training.metrics import Metrics
from matt_fast.training.options import TrainingOptions
from matt_fast.training.state import Progress, TrainingState

USUAL = 600.0  # seconds between two checkpoints
LAYERS = "layers."
KEPT = {"curve": list[list[float]], "best_step": int | None, "pending": bool}  # in a checkpoint, beside training's own
SHOWN = 3  # files that changed
UNWRITTEN = 3  # checkpoints in a row for which the disk has no room, until the run ends: little is lost then
SHARE = 0.01  # of the time, that checkpoints may take where nobody said how often they are written


class RunWatcher(Watcher):
    """The watcher of a transfer's training.

    Args:
        work, vocabulary, start: of the transfer.
        options: of the training.
        place: folder of its checkpoints and best weights.
        metrics: file of its metrics.

    Attributes:
        curve: [step, bits per byte] of each validation.
        best_step: the step of the best of them, 0 where the start was better; None without.
    """

    def __init__(
        self,
        work: Work,
        vocabulary: VocabularyPair,
        start: Rows,
        options: TrainingOptions,
        place: Path,
        metrics: str,
    ):
        self.work, self.vocabulary, self.start = work, vocabulary, start
        self.options, self.place, self.lines = options, place, work.run.path(metrics)
        job = work.job
        self.cheap = job.checkpoint_every == "auto"
        self.save_every = Every(seconds=USUAL) if self.cheap else Every.parse("checkpoint_every", job.checkpoint_every)
        self.validate_every = Every.parse("validate_every", job.validate_every)
        self.validates = job.validate_every is not None
        self.curve: list[list[float]] = []
        self.best_step: int | None = None
        self.limits: dict[str, float] = {}
        self.start_bits = math.inf  # of the weights of step 0, where they are kept, on the text that decides
        self.unwritten = 0
        self.pending = False  # the validation behind the present step, which a signal left no time for
        self.warned = self.told_of_memory = False
        self.forgot: list[str] = []
        self.metrics: Metrics | None = None
        self.files, self.epoch = LocalFiles(None), 0

    def __enter__(self) -> "RunWatcher":
        self.work.stop.patient = True
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.work.stop.patient = False
        if error is None:
            self._look_at_files()
        if self.metrics is not None:
            self.metrics.close()
        if isinstance(error, DivergedError) and self.work.is_main:
            progress = self.state.progress  # the rows behind the last step that was in order gave the first bad loss
            self.checkpoints.remove_from(progress.step - progress.steps_far_off)
            self.work.run.update("state.json", status="diverged")

    def began(
        self, state: TrainingState, checkpoints: Checkpoints, more: dict | None, source: str | Path | None
    ) -> bool:
        """Training begins, or goes on, from this state; whether there is more to do.

        Args:
            state: see `TrainingState`.
            checkpoints: where they go.
            more: what `Checkpoints.read` gave; None in training that begins.
            source: texts that are read while it trains, if any.
        """
        self.files, self.epoch = LocalFiles(source if self.work.is_main else None), state.progress.epoch
        self.state, self.checkpoints = state, checkpoints
        more = more or {}
        self.curve, self.best_step = more.get("curve", []), more.get("best_step")
        run, step = self.work.run, state.progress.step
        config = run.read("run.json").get("settings")
        options = {"name": run.output.resolve().name, "config": config, "step": step}
        self.metrics = Metrics(self.lines, self.work.accelerator, **options)
        self.trainable = max(1, len(state.occurred))
        if self.validates and self.work.is_main:
            self.limits = self._limits()
            if step == 0:
                self._try_to_keep(state)
            self.start_bits = self._start_bits() if self.best_step == 0 else math.inf
        self.best_step = self.work.processes.of_main(self.best_step)
        if self.cheap and self.work.is_main:
            size = sum(3 * table.trainable.nbytes for table in state.student.tables)
            size += 0 if state.pending is None else state.pending.nbytes
            size += 0 if state.layers is None else 12 * state.layers.count
            self.save_every.seconds = max(USUAL, seconds_to_write(run.folder, size) / SHARE)
        self.work.tell("steps", step, self.options.steps)
        if state.progress.step:
            self.work.say(f"Goes on behind step {state.progress.step}.")
        if self.work.is_main:
            self.work.run.update("state.json", status="running", steps=self.options.steps, step=state.progress.step)
        go_on = True
        unmeasured = step == self.options.steps and step not in dict(self.curve)  # fewer steps are enough now
        if self.validates and (more.get("pending") or unmeasured):
            go_on = self._validate(state)
            if self.pending:
                self.work.stop.leave()
        return go_on

    def on_step(self, progress: Progress) -> None:
        self.metrics.log(progress, new_tokens_seen_share=progress.new_tokens_seen / self.trainable)
        self.work.listeners.on_step(progress)
        if progress.step % TOGETHER == 0 and not self.warned and (line := rising(progress.losses)) is not None:
            self.warned = True
            self.work.say(f"Warning: {line}; a lower lr may help")
        if progress.epoch != self.epoch:
            self.epoch = progress.epoch
            self._look_at_files()

    def out_of_memory(self, step: int) -> None:
        if not self.told_of_memory:
            self.work.say(
                f"Warning: the device had no memory left in step {step}: what was cached is given back, and the step "
                "made once more; so will others be. Where a step fails twice, the run ends"
            )
        self.told_of_memory = True

    def _look_at_files(self) -> None:
        """Say it where the data is no longer what the run began with: each pass reads what is there then."""
        if changes := self.files.changes():
            more = f" and {len(changes) - SHOWN:,} more" if len(changes) > SHOWN else ""
            self.work.say(
                f"Warning: the data changed while it was read: {', '.join(changes[:SHOWN])}{more}. The result is not "
                "that of the data as it was, and a run that is stopped cannot go on until the files are as they were"
            )
            self.files = LocalFiles(None)

    def wishes(self, progress: Progress) -> tuple[bool, ...]:
        step, main = progress.step + 1, self.work.is_main
        save = main and self.save_every.due(step)
        validate = main and self.validates and (self.validate_every.due(step) or step == self.options.steps)
        return self.work.stop.requested is not None, save, validate

    def after_step(self, state: TrainingState, granted: tuple[bool, ...]) -> bool:
        stop, save, validate = granted
        go_on = True
        if validate and stop:
            self.pending = True  # first of all the checkpoint: whoever stops a run waits for seconds
        elif validate:
            go_on = self._validate(state)
            stop = self.pending
        if (stop or save) and not state.progress.steps_far_off:
            self._save(state, stop)
        if stop:
            if self.work.stop.requested is None:  # another process got the signal
                self.work.stop.requested = signal.SIGTERM
            self.work.stop.leave()
        return go_on

    def _save(self, state: TrainingState, stop: bool) -> None:
        begin = time.perf_counter()
        self._write(state, stop)
        if self.work.is_main:
            self._remove_old_best()
        self.work.processes.wait()  # longer than a collective may take, where the disk is slow
        if self.cheap:
            self.save_every.seconds = max(USUAL, (time.perf_counter() - begin) / SHARE)
        self.save_every.restart()

    def _write(self, state: TrainingState, stop: bool) -> None:
        """Write a checkpoint. Where the disk is full and nobody stops the run, it is told, at first."""
        step = state.progress.step
        try:
            more = {"curve": self.curve, "best_step": self.best_step, "pending": self.pending}
            self.checkpoints.write(state, self.work.accelerator, more)
            if self.work.is_main:
                self.work.run.update("state.json", step=step)
        except OSError as error:
            self.unwritten += 1
            if stop or error.errno not in FULL or self.unwritten == UNWRITTEN:
                raise
            self.work.listeners.on_message(
                f"Warning: {error}: there is no checkpoint behind step {step}. Training goes on, and the next one is "
                f"written when it is due; it ends where {UNWRITTEN} in a row cannot be"
            )
        else:
            self.unwritten = 0

    def _remove_old_best(self) -> None:
        """Leave what is the best now, and what was when a checkpoint was written that may be gone on from."""
        steps = {self.best_step, *(more.get("best_step") for more in self.checkpoints.notes())} - {None}
        for old in (self.place / "best").glob("step-*"):
            if old not in map(self._best, steps):
                old.unlink()

    def _validate(self, state: TrainingState) -> bool:
        """Measure the rows as they stand, unless a signal comes meanwhile; whether training goes on."""
        step, patience = state.progress.step, self.work.job.patience
        if self.work.is_main:
            self.work.stop.breaks_off = True
            try:
                bits = self._bits(state)
            except BrokenOffError:
                self.pending = True
            else:
                self._judge(state, *bits)
            finally:
                self.work.stop.breaks_off = False
        told = self.work.processes.of_main([self.curve, self.best_step, self.forgot, self.pending])
        self.curve, self.best_step, self.forgot, self.pending = told
        self.validate_every.restart()
        if self.pending:
            return True
        if self.forgot:
            kept = "the start of this stage" if self.best_step == 0 else f"step {self.best_step}"
            self.work.say(
                f"Stops at step {step}: on {', '.join(map(repr, self.forgot))} the model became worse than max_worse "
                f"allows; {kept} is the result."
            )
            return False
        since = [at for at, _ in self.curve if self.best_step is not None and at > self.best_step]
        ends = patience is not None and len(since) >= patience
        if self.best_step == 0 and (ends or step == self.options.steps):
            self.work.say(
                f"Warning: behind step {step} none of {len(self.curve)} validations was better than the start of this "
                "training: that is the result."
            )
        elif ends:
            self.work.say(f"Stops at step {step}: the best of {len(self.curve)} validations was at {self.best_step}.")
        return not ends

    def _judge(self, state: TrainingState, bits: float, *others: float) -> None:
        """Write down what was measured, and keep the weights where they are the best so far; in the main process."""
        step, best = state.progress.step, dict(self.curve).get(self.best_step, self.start_bits)
        self.curve.append([step, bits])
        self.metrics.log_validation(step, bits, dict(zip(self.limits, others, strict=True)))
        self.forgot = [name for name, x in zip(self.limits, others, strict=True) if x > self.limits[name]]
        if bits < best and not self.forgot:
            self._try_to_keep(state)
        self.work.listeners.on_progress("steps", step, self.options.steps)

    def _try_to_keep(self, state: TrainingState) -> None:
        """Keep what is trained as it stands, the best so far; where the disk is full it is told."""
        try:
            self._keep(state, state.progress.step)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.best_step = self.best_step or None  # what is there at the end may well be better than the start
            before = "none are" if self.best_step is None else f"those of step {self.best_step} are"
            self.work.listeners.on_message(  # `say` would write it down
                f"Warning: {error}: the weights of step {state.progress.step}, the best so far, are not kept; until "
                f"better ones are measured, {before}"
            )

    def _keep(self, state: TrainingState, step: int) -> None:
        """Keep what is trained as it stands: the best so far."""
        tables = zip(("input", "output"), state.student.tables, strict=False)
        tensors = {name: table.trainable.cpu().contiguous() for name, table in tables}
        if state.layers is not None:
            tensors |= {f"{LAYERS}{name}": x for name, x in state.layers.weights().items()}
        self._best(step).parent.mkdir(exist_ok=True, parents=True)
        with whole_file(self._best(step)) as part:
            save_file(tensors, part)
        self.best_step = step
        self._remove_old_best()

    def _limits(self) -> dict[str, float]:
        """The bits per byte that each further text may have at most: a share above the original or the start."""
        healing, known = self.work.job.healing, self.work.run.read("evaluations.json")
        share = math.inf if self.state.layers is None or healing.max_worse is None else 1 + healing.max_worse
        starts = {
            text: max(known[stage][text]["bits_per_byte"] for stage in ("original", "initialised"))
            for text in list(self.work.job.held_out)[1:]
        }
        return {text: share * bits for text, bits in starts.items()}

    def _start_bits(self) -> float:
        """The bits per byte of what this training begins with on the text that decides; infinite if not measured."""
        rows = self.work.run.read("trained/numbers.json")  # not there while rows alone are trained
        best = rows["best_step"] if rows and rows["progress"]["step"] else 0
        if best:
            return dict(rows["validation"])[best]
        first = next(iter(self.work.job.held_out))
        start = self.work.run.read("evaluations.json")["initialised"][first]["bits_per_byte"]
        return math.inf if best is None else start

    def _bits(self, state: TrainingState) -> list[float]:
        """Bits per byte of the whole model as it stands, on each held-out text."""
        tables = [table.weight().cpu() for table in state.student.tables]
        output = tables[1] if len(tables) > 1 else self.start.output
        load = partial(self.work.teacher.load, self.work.dtype)
        full = load() if state.layers is None else state.layers.measured(load)
        export.replace_vocabulary(full, Rows(tables[0], output, self.start.output_bias))
        texts = self.work.job.held_out
        return [self.work.measure(full, self.vocabulary.student, text).bits_per_byte for text in texts]

    def _best(self, step: int) -> Path:
        return self.place / "best" / f"step-{step:09}.safetensors"

    def best_weights(self) -> dict[str, torch.Tensor] | None:
        """What validation found best: rows ("input", "output") and layers ("layers.…"); None without validation."""
        return None if self.best_step is None else load_file(self._best(self.best_step))
