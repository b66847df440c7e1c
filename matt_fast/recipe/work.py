"""What the stages of a transfer share: the job, the run on disk, the teacher, the processes, and who is told."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import InitProcessGroupKwargs, set_seed
from transformers import PreTrainedModel

from matt_fast.data.documents import read_documents
from matt_fast.evaluation.bits_per_byte import Evaluation, evaluate
from matt_fast.model.precision import DTYPES, NAMES, choose_dtype
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.job import Job
from matt_fast.recipe.processes import Processes, started, timeout
from matt_fast.runs.folder import Run
from matt_fast.support.files import FULL, wait_to_see, whole_folder
from matt_fast.support.stopping import Stopping
from matt_fast.training.frozen import check_frozen, load_frozen
from matt_fast.training.loop import freeze
from matt_fast.training.objectives import trains_output
from matt_fast.training.sharding import shard_layers

MESSAGES = 100  # that are kept
DEVICE = "ACCELERATE_TORCH_DEVICE"  # where accelerate reads it, once


@dataclass(frozen=True)
class Listeners:
    """The callbacks of `transfer`."""

    on_step: Callable
    on_stage: Callable[[str], None]
    on_progress: Callable[[str, int, int | None], None]
    on_message: Callable[[str], None]


class Work:
    """A job under way in this process.

    Args:
        job: what to do.
        run: where it lies.
        accelerator: device and processes.
        processes: how they wait for each other.
        stop: what signals ask for.
        listeners: whom to tell.

    Raises:
        ValueError, ImportError: options that do not fit the model or the device.
    """

    def __init__(
        self,
        job: Job,
        run: Run,
        accelerator: Accelerator,
        processes: Processes,
        stop: Stopping,
        listeners: Listeners,
    ):
        self.job, self.run, self.accelerator, self.processes = job, run, accelerator, processes
        self.stop, self.listeners = stop, listeners
        begun = DTYPES.get(run.read("run.json").get("settings", {}).get("precision"))  # it goes on so on any device
        dtype = begun if begun and job.precision == "auto" else choose_dtype(accelerator, job.precision)
        self.dtype = DTYPES[processes.of_main(NAMES[dtype])]  # hosts may have CPUs of several kinds
        self.teacher = Teacher(job.model, untie=job.untie, **job.hub_options)
        check_frozen(self.teacher, job.training, self.device, accelerator.num_processes)
        self.n_layers = job.layers_of(self.teacher)
        job.check_kind(self.teacher)
        self.other = job.other_teacher()
        self.with_head = trains_output(job.training.objectives())
        self._loaded: PreTrainedModel | None = None

    @property
    def settings(self) -> dict:
        """`Job.settings`, with the precision that was chosen."""
        return self.job.settings() | {"precision": NAMES[self.dtype]}

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage to the listeners, and note how long it took. Random draws in it depend on the seed alone."""
        self.stop.check()
        self.listeners.on_stage(name)
        set_seed(self.job.seed)
        begin = time.perf_counter()
        yield
        if self.is_main and self.run.begun:
            seconds = self.run.read("state.json").get("seconds", {})
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
            self.run.update("state.json", seconds=seconds)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """The run's folder of that name: made by `make` in the main process if it is not there; the others wait."""
        path = self.run.path(name)
        if self.is_main and not path.exists():
            with whole_folder(path) as part:
                make(part)
        self.processes.wait()
        wait_to_see(path)
        return path

    def has(self, name: str) -> bool:
        """Whether the run has a file or folder of that name, as the main process sees it."""
        return self.processes.of_main(self.run.path(name).exists())

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Tell the listeners how far a stage is."""
        self.stop.check()
        self.listeners.on_progress(what, done, total)

    def say(self, message: str) -> None:
        """Tell a person, and keep it for the report."""
        if self.is_main:
            self.listeners.on_message(message)
            self.note(message)

    def note(self, message: str) -> None:
        """Keep a line for the report, once; where the disk is full it is not kept."""
        known = self.run.read("state.json").get("messages", [])
        if self.is_main and message not in known and len(known) < MESSAGES:
            try:
                self.run.update("state.json", messages=[*known, message])
            except OSError as error:
                if error.errno not in FULL:
                    raise

    def frozen(self, depth: int | None) -> PreTrainedModel:
        """The frozen model, so deep, with its head, on the device where it is quantised or offloaded.

        Where layers are to be spread over processes, all but the main one have its outline.
        """
        if self.job.training.shard and not self.is_main:
            return self.teacher.outline(self.dtype, depth)
        return load_frozen(self.teacher, self.dtype, depth, self.job.training, self.device)

    @property
    def placed(self) -> bool:
        """Whether frozen weights are where they run as soon as they are loaded."""
        return self.job.training.quantization is not None or self.job.training.offload is not None

    def ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model of `frozen`, or a part of it, frozen where it runs; all processes call it."""
        freeze(model)
        if self.job.training.shard:
            return self.spread(model)
        return model if self.placed else model.to(self.device)

    def spread(self, model: PreTrainedModel) -> PreTrainedModel:
        """`shard_layers`, once the main process has read the weights, which may take longer than a collective may."""
        self.processes.wait()
        return shard_layers(model, self.accelerator)

    def trunk(self) -> PreTrainedModel:
        """The frozen model as training needs it, head included; loaded once until `release`."""
        if self._loaded is None:
            self._loaded = self.frozen(None if self.with_head else self.n_layers)
        return self._loaded

    def whole(self) -> PreTrainedModel:
        """The frozen model at its full depth with its head, where it runs."""
        model = self.trunk() if self.with_head else self.frozen(None)
        return model if self.placed else model.to(self.device)

    def texts(self) -> Iterable[str] | None:
        """The documents of the data; None where there is no text."""
        job = self.job
        return None if job.data is None else read_documents(job.data, split=job.split, text_field=job.text_field)

    def release(self) -> None:
        self._loaded = None

    def measure(self, model: PreTrainedModel, tokenizer, text: str) -> Evaluation:
        """Bits per byte of a held-out text, given by its name."""
        model.to(self.device).eval()
        job = self.job
        held_out = read_documents(job.held_out[text], split=job.split, text_field=job.text_field)
        pieces = self.job.eval_pieces
        told = lambda done: self.tell("pieces", done, pieces)  # noqa: E731
        options = {"max_pieces": pieces, "masked": self.teacher.masked, "on_piece": told}
        return evaluate(model, tokenizer, held_out, **options)


def make_accelerator(device: str | None, precision: str, **options) -> Accelerator:
    """Device and processes of a job; options are the accelerator's.

    Raises:
        ValueError: another device is in use in this process already; a launcher started several processes, and
            accelerate takes each for one alone.
    """
    kind = None if device is None else torch.device(device).type
    if not is_initialized():
        options |= {"cpu": kind == "cpu", "mixed_precision": None if precision == "auto" else precision}
    before = os.environ.get(DEVICE)
    try:
        if kind not in (None, "cpu"):
            os.environ[DEVICE] = str(device)
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout())], **options)
    finally:
        if before is None:
            os.environ.pop(DEVICE, None)
        else:
            os.environ[DEVICE] = before
    if kind is not None and accelerator.device.type != kind:
        raise ValueError(f"device: wanted {device!r}, but this process uses {accelerator.device} already")
    if accelerator.num_processes == 1 < (count := started()):
        raise ValueError(
            f"device: {count} processes were started, and accelerate takes each for one alone, as it does without "
            f"GPUs where nobody asks for the CPU; wanted device 'cpu' (--device cpu), got {device!r}"
        )
    return accelerator
