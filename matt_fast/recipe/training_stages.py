"""The stages that train: rows alone, then rows and layers together (healing)."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.background import default_workers
from matt_fast.data.chunks import Side
from matt_fast.data.stream import AlignedBatches
from matt_fast.initializers import Rows
from matt_fast.model.checkpoint_files import stored_dtype
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.recipe.job import Job
from matt_fast.recipe.watching import KEPT, LAYERS, RunWatcher
from matt_fast.recipe.work import Work
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.loop import DivergedError, freeze, train
from matt_fast.training.objectives import plan_ahead
from matt_fast.training.options import TrainingOptions, options_of_healing
from matt_fast.training.sides import Target
from matt_fast.training.state import Progress, TrainingState, joined
from matt_fast.training.student import frozen_rows, make_student, make_target

ROWS, NUMBERS = "rows.safetensors", "numbers.json"
SEED = 1  # healing sees the data in an order of its own


@dataclass(frozen=True)
class TrainingData:
    """What there is to train on.

    Attributes:
        sides: the teacher's and the student's.
        prepared: folders of chunks that are made before training; None where they are made on the way.
        leading: numbers of those that come first; None without.
        own: folder of chunks that the teacher wrote of its own; None without.
    """

    sides: tuple[Side, Side]
    prepared: tuple[Path | str, ...] | None = None
    leading: NDArray[np.int64] | None = None
    own: Path | None = None


def train_rows(
    work: Work,
    vocabulary: VocabularyPair,
    start: Rows,
    data: TrainingData,
    options: TrainingOptions,
) -> None:
    """Train the rows: `trained/`; on the way `checkpoints/`, `best/` and `metrics.jsonl`.

    No step where nothing is trained.
    """
    if work.has("trained"):
        return
    if nothing_to_train(work, vocabulary) or options.steps == 0:
        seen, memory = torch.zeros(vocabulary.rows, dtype=torch.int64), peak_memory(work.device)
        none = Progress(loss=0.0, lr=0.0, gradient_norm=0.0)
        numbers = {"progress": asdict(none), "validation": [], "best_step": None, "training_memory": memory}
        numbers |= {"peak_memory": memory, "n_layers": work.n_layers, "options": asdict(options)}
        work.once("trained", lambda part: _save_trained(part, {}, seen, numbers))
        work.release()
        return
    with work.stage("training"):
        memory_before = peak_memory(work.device)
        reset_peak_memory(work.device)
        trunk = work.ready(work.trunk() if work.with_head else work.teacher.trunk(work.trunk()))
        teacher, target = _teacher(work, vocabulary, trunk, options)
        student = make_student(trunk, vocabulary, start, work.job.freeze_shared, options.objectives(), target)
        state = TrainingState.begin(student, options)
        watcher = RunWatcher(work, vocabulary, start, options, work.run.folder, "metrics.jsonl")
        _train(work, (teacher, trunk), state, data, options, watcher, "trained", memory_before)
    work.release()


def heal(work: Work, vocabulary: VocabularyPair, start: Rows, data: TrainingData) -> None:
    """Train rows and layers together: `healed/`; on the way `healing/` and `healing.jsonl`."""
    healing = work.job.healing
    if healing is None or work.has("healed"):
        return
    from matt_fast.training.layers import TrainedLayers  # and peft

    with work.stage("healing"):
        memory_before = peak_memory(work.device)
        reset_peak_memory(work.device)
        options = options_of_healing(work.job.training, healing)
        model = work.frozen(None)
        if work.job.training.shard:
            freeze(model)
            layers = TrainedLayers(model, healing, spread=work.spread)
        else:
            layers = TrainedLayers(work.ready(model), healing)
        tables = trained_rows(work, "trained", vocabulary, start, model)
        teacher, target = _teacher(work, vocabulary, model, options)
        student = make_student(model, vocabulary, tables, work.job.freeze_shared, options.objectives(), target)
        state = TrainingState.begin(student, options, layers)
        watcher = RunWatcher(work, vocabulary, tables, options, work.run.path("healing"), "healing.jsonl")
        both = teacher, layers.student
        _train(work, both, state, data, options, watcher, "healed", memory_before, seed=SEED)


def teacher_vocabulary(work: Work, vocabulary: VocabularyPair) -> VocabularyPair:
    """The vocabularies of the model to learn from and of the student."""
    if work.other is None:
        return vocabulary
    rows = len(work.other.outline(work.dtype).get_input_embeddings().weight)
    return VocabularyPair(work.other.load_tokenizer(), vocabulary.student, rows)


def _teacher(
    work: Work, vocabulary: VocabularyPair, model: PreTrainedModel, options: TrainingOptions
) -> tuple[PreTrainedModel, Target | None]:
    """The model to learn from, frozen on the device, and its output side; None where `model` is that itself."""
    if work.other is None:
        return model, None
    spread = work.job.training.shard
    other = work.other.outline(work.dtype) if spread and not work.is_main else work.other.load(work.dtype)
    freeze(other)
    other = work.spread(other) if spread else other.to(work.device)
    return other, make_target(other, teacher_vocabulary(work, vocabulary), options.objectives())


def trained_rows(work: Work, folder: str, vocabulary: VocabularyPair, start: Rows, model: PreTrainedModel) -> Rows:
    """The whole tables behind a stage, on the CPU: what it trained over what it began with.

    Args:
        work, vocabulary: of the transfer.
        folder: of the run, "trained" or "healed".
        start: where the rows of the transfer started.
        model: the original, of which shared rows are read.
    """
    trained = load_file(work.run.path(folder) / ROWS)
    frozen_from = frozen_rows(vocabulary, work.job.freeze_shared)

    def whole(module: torch.nn.Module, initial: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        if rows is None:
            return initial
        table = EmbeddingTable(module.weight.cpu(), frozen_from, initial)
        table.trainable = rows
        return table.weight()

    output = None
    if start.output is not None:
        output = whole(model.get_output_embeddings(), start.output, trained.get("output"))
    rows = whole(model.get_input_embeddings(), start.input, trained.get("input"))
    return replace(start, input=rows, output=output)


def trained_in(job: Job) -> tuple[str, ...]:
    """The folders of a run that hold trained rows, in their order."""
    return ("trained",) if job.healing is None else ("trained", "healed")


def moved_in(work: Work) -> bool:
    """Whether any training ended with other weights than it began with, as validation may find the start the best."""
    found = [json.loads((work.run.path(x) / NUMBERS).read_text(encoding="utf-8")) for x in trained_in(work.job)]
    return any(x["progress"]["step"] and x["best_step"] != 0 for x in found)


def seen_in(work: Work) -> torch.Tensor:
    """[student rows] int64: how often each id occurred in all training."""
    return sum(load_file(work.run.path(folder) / ROWS)["seen"] for folder in trained_in(work.job))


def nothing_to_train(work: Work, vocabulary: VocabularyPair) -> bool:
    """Whether each row of the new vocabulary is one of the teacher's and stays as it is."""
    return work.job.freeze_shared and not vocabulary.new


def _train(
    work: Work,
    models: tuple[PreTrainedModel, PreTrainedModel],
    state: TrainingState,
    data: TrainingData,
    options: TrainingOptions,
    watcher: RunWatcher,
    into: str,
    memory_before: int,
    seed: int = 0,
) -> None:
    job, accelerator = work.job, work.accelerator
    target = state.student.target
    checkpoints = Checkpoints(watcher.place / "checkpoints")
    more = checkpoints.read(state, accelerator, KEPT)
    stream = AlignedBatches(
        job.data,
        *data.sides,
        batch_size=job.batch_size,
        seed=job.seed + seed,
        split=job.split,
        text_field=job.text_field,
        prepared=data.prepared,
        leading=data.leading,
        own=data.own,
        packing=options.packing,
        finish=plan_ahead(models[1], work.n_layers, options, target and target.continuations),
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        start=state.position,
    )
    workers = default_workers(work.device) if job.data_workers is None else job.data_workers
    batches = stream.in_background(workers, pin_memory=work.device.type == "cuda")
    with watcher:
        if watcher.began(state, checkpoints, more, job.data if data.prepared is None else None):
            given = {"causal": not work.teacher.masked, "watcher": watcher}
            train(*models, state, batches, work.n_layers, options, accelerator, watcher.on_step, **given)
        if watcher.best_step is None:
            _check_last_step(state, stored_dtype(work.teacher))
    batches.close()
    seen = accelerator.reduce(state.seen.to(work.device), reduction="sum").cpu()
    numbers = {
        "progress": asdict(state.progress) | joined(gather_object([state.progress.counts])),
        "validation": watcher.curve,
        "best_step": watcher.best_step,
        "training_memory": peak_memory(work.device),
        "peak_memory": memory_before,
        "n_layers": work.n_layers,
        "options": asdict(options),
        "trained_numbers": 0 if state.layers is None else state.layers.count,
    }
    best = watcher.best_weights()
    tensors = rows_of(state) if best is None else {name: best[name] for name in ("input", "output") if name in best}
    if best is not None and state.layers is not None:
        state.layers.load({name.removeprefix(LAYERS): x for name, x in best.items() if name.startswith(LAYERS)})

    def make(part: Path) -> None:
        _save_trained(part, tensors, seen, numbers)
        if state.layers is not None:
            state.layers.save(part)

    work.once(into, make)


def _check_last_step(state: TrainingState, dtype: torch.dtype) -> None:
    """Raise a DivergedError where the last update, which no loss tells of, made what the model cannot store."""
    trained = [x.trainable for x in state.student.tables]
    trained += [] if state.layers is None else list(state.layers.masters.values())
    if not all(bool(x.to(dtype).isfinite().all()) for x in trained):
        raise DivergedError(
            f"the last step, {state.progress.step}, made numbers that are not finite in "
            f"{str(dtype).removeprefix('torch.')}, which the model is stored in; a lower lr may help"
        )


def _save_trained(folder: Path, tensors: dict[str, torch.Tensor], seen: torch.Tensor, numbers: dict) -> None:
    save_file(tensors | {"seen": seen}, folder / ROWS)
    (folder / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")


def rows_of(state: TrainingState) -> dict[str, torch.Tensor]:
    """The trained rows, float32 on the CPU: "input" and, where they are rows of their own, "output"."""
    names = ("input", "output")
    return {name: x.trainable.detach().cpu().clone() for name, x in zip(names, state.student.tables, strict=False)}
