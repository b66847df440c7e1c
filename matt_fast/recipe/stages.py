"""The stages of a transfer. What each makes lies in the run's folder; one that is there whole is not made again."""

import json
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side
from matt_fast.data.documents import read_documents
from matt_fast.data.epochs import count_batches
from matt_fast.data.parallel import read_pairs
from matt_fast.data.prepared import prepare_once
from matt_fast.data.stream import AlignedBatches
from matt_fast.initializers import InitReport, Outlier, Rows, initial_rows, needs_whole_model
from matt_fast.model.checkpoint_files import stored_dtype
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.teacher import only_errors
from matt_fast.model.weight_values import check_same_weights
from matt_fast.recipe import export
from matt_fast.recipe.checks import begin_or_go_on, check_teacher
from matt_fast.recipe.processor_files import copy_processor
from matt_fast.recipe.special_ids import update_special_ids
from matt_fast.recipe.subject import load_vocabulary
from matt_fast.recipe.watching import RunWatcher
from matt_fast.recipe.work import Work
from matt_fast.support.files import move_into, whole_folder
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training.checkpoints import Checkpoints
from matt_fast.training.loop import Progress, TrainingState, freeze, train
from matt_fast.training.objectives import plan_ahead
from matt_fast.training.options import TrainingOptions
from matt_fast.training.student import frozen_rows, make_student

ROWS, REPORT, NUMBERS = "rows.safetensors", "report.json", "numbers.json"


def read_vocabulary(work: Work) -> VocabularyPair:
    """The two vocabularies; a function of tokenizers that do not change, made anew in each process."""
    with work.stage("vocabulary"):
        return load_vocabulary(work.job, work.teacher, work.teacher.outline(work.dtype))


def check(work: Work, vocabulary: VocabularyPair) -> None:
    """Compare with the run that goes on, or look at all that could go wrong later and begin a new one: `run.json`."""
    if work.is_main:
        with work.stage("checks"):
            begin_or_go_on(work, vocabulary)
    work.accelerator.wait_for_everyone()


def nothing_to_train(work: Work, vocabulary: VocabularyPair) -> bool:
    """Whether each row of the new vocabulary is one of the teacher's and stays as it is."""
    return work.job.freeze_shared and not vocabulary.new


def held_out_text(work: Work):
    """The held-out documents; None where nothing is to be measured."""
    job = work.job
    return None if job.eval_data is None else read_documents(job.eval_data, split=job.split, text_field=job.text_field)


def initialise(work: Work, vocabulary: VocabularyPair) -> Rows:
    """Where rows start: `rows/`."""
    job = work.job

    init, init_head = (job.init, job.init_head) if vocabulary.new else ("mean", "same")  # a method would make no row

    def make(part: Path) -> None:
        model = work.trunk()
        if needs_whole_model(init, init_head):
            model = model if work.with_head else work.frozen(None)
            model = model if work.placed else model.to(work.device)
        given = {
            "texts": read_documents(job.data, split=job.split, text_field=job.text_field),
            "donor": job.donor,
            "parallel": None if job.parallel is None else read_pairs(job.parallel),
            "init_head": init_head,
            "on_progress": lambda done, total: work.tell("rows", done, total),
        }
        rows = initial_rows(model, vocabulary, init, job.seed, **given, **job.hub_options)
        export.check_rows(rows, stored_dtype(work.teacher), vocabulary)
        save_rows(part, rows)

    if work.run.path("rows").exists():
        start = load_rows(work.once("rows", make))
    else:
        with work.stage("initialisation"):
            start = load_rows(work.once("rows", make))
    if not nothing_to_train(work, vocabulary):
        _warn_of_untrained_rows(start, work)
    return start


def measure_start(work: Work, vocabulary: VocabularyPair, start: Rows) -> None:
    """Bits per byte of the original model, and with the rows that training starts from: `evaluations.json`."""
    if work.job.eval_data is None or not work.is_main:
        return
    held_out, done = held_out_text(work), work.run.read("evaluations.json")
    if "initialised" in done:
        return
    full = work.teacher.load(work.dtype)
    if "original" not in done:
        _measure(work, "original", full, vocabulary.teacher, held_out)
    export.replace_vocabulary(full, start)
    _measure(work, "initialised", full, vocabulary.student, held_out)


def prepare(work: Work, vocabulary: VocabularyPair) -> tuple[tuple[Side, Side], Path | None, TrainingOptions]:
    """Both sides of the data, its chunks on disk where they are made before training, and the steps to take."""
    job, options = work.job, work.job.training
    sides = (
        Side("teacher", vocabulary.teacher, vocabulary.teacher_rows, job.max_length),
        Side("student", vocabulary.student, vocabulary.rows, job.max_length),
    )
    if nothing_to_train(work, vocabulary) or (job.data_cache is None and job.epochs is None):
        return sides, None, options
    cache = work.run.path("data") if job.data_cache is None else Path(job.data_cache)
    with work.stage("data"), work.accelerator.local_main_process_first():  # the others find it made
        given = {"split": job.split, "text_field": job.text_field, "on_message": work.say}
        given["digest"] = work.run.read("run.json")["fingerprints"]["data"]["content"]
        prepared = prepare_once(cache, job.data, *sides, **given)
    if job.epochs is not None:
        limits = [side.max_length for side in sides] if options.packing else None
        batches = count_batches(prepared, job.batch_size, work.accelerator.num_processes, limits)
        options = replace(options, steps=max(1, round(job.epochs * batches / options.accumulation)))
    return sides, prepared, options


def train_rows(
    work: Work,
    vocabulary: VocabularyPair,
    start: Rows,
    sides: tuple[Side, Side],
    prepared: Path | None,
    options: TrainingOptions,
) -> None:
    """Train: `trained/`; on the way `checkpoints/`, `best/` and `metrics.jsonl`. No step where nothing is trained."""
    job, accelerator = work.job, work.accelerator
    there = work.run.path("trained").exists()
    accelerator.wait_for_everyone()  # before anyone could write it
    if there:
        return
    if nothing_to_train(work, vocabulary):
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
        trunk = work.trunk() if work.with_head else work.teacher.trunk(work.trunk())
        trunk = trunk if work.placed else trunk.to(work.device)
        freeze(trunk)
        student = make_student(trunk, vocabulary, start, job.freeze_shared, work.with_head)
        state = TrainingState.begin(student, options)
        checkpoints = Checkpoints(work.run.path("checkpoints"))
        more = checkpoints.read(state, accelerator)
        stream = AlignedBatches(
            job.data,
            *sides,
            batch_size=job.batch_size,
            seed=job.seed,
            split=job.split,
            text_field=job.text_field,
            prepared=prepared,
            packing=options.packing,
            finish=plan_ahead(trunk, work.n_layers, options),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            start=state.position,
        )
        batches = stream.in_background()
        with RunWatcher(work, vocabulary, start, checkpoints, options, more) as watcher:
            watcher.began(state)
            given = {"causal": not work.teacher.masked, "watcher": watcher}
            train(trunk, trunk, state, batches, work.n_layers, options, accelerator, watcher.on_step, **given)
        batches.close()
        seen = accelerator.reduce(state.seen.to(work.device), reduction="sum").cpu()
        numbers = {
            "progress": asdict(state.progress),
            "validation": watcher.curve,
            "best_step": watcher.best_step,
            "training_memory": peak_memory(work.device),
            "peak_memory": memory_before,
            "n_layers": work.n_layers,
            "options": asdict(options),
        }
        tensors = watcher.best_rows() or rows_of(state)
        work.once("trained", lambda part: _save_trained(part, tensors, seen, numbers))
    work.release()


def _save_trained(folder: Path, tensors: dict[str, torch.Tensor], seen: torch.Tensor, numbers: dict) -> None:
    save_file(tensors | {"seen": seen}, folder / ROWS)
    (folder / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")


def write_model(work: Work, vocabulary: VocabularyPair, start: Rows) -> None:
    """The model with its new vocabulary: `result/`, which then becomes the output."""
    run = work.run
    if work.is_main and not run.published:
        with work.stage("writing"):
            if not run.path("result").exists():
                check_teacher(work)
                with whole_folder(run.path("result")) as part:
                    _fill(part, work, vocabulary, start)
            move_into(run.path("result"), run.output, last=("config.json",))
    work.accelerator.wait_for_everyone()


def measure_result(work: Work, vocabulary: VocabularyPair) -> None:
    """Bits per byte of the model as it was written."""
    if work.job.eval_data is None or not work.is_main or "trained" in work.run.read("evaluations.json"):
        return
    written = work.teacher.load_result(work.run.output, work.dtype)
    _measure(work, "trained", written, vocabulary.student, held_out_text(work))


def _measure(work: Work, name: str, model, tokenizer, held_out) -> None:
    with work.stage(f"evaluation ({name})"):
        found = work.measure(model, tokenizer, held_out)
        work.run.update("evaluations.json", **{name: asdict(found)})


def _fill(folder: Path, work: Work, vocabulary: VocabularyPair, start: Rows) -> None:
    """Write the model's folder."""
    job = work.job
    trained = load_file(work.run.path("trained") / ROWS)
    full = work.teacher.load("auto")
    frozen_from = frozen_rows(vocabulary, job.freeze_shared)

    def whole(weight: torch.Tensor, initial: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        if rows is None:
            return initial
        table = EmbeddingTable(weight, frozen_from, initial)
        table.trainable = rows
        return table.weight()

    output = None
    if start.output is not None:
        output = whole(full.get_output_embeddings().weight, start.output, trained.get("output"))
    rows = Rows(whole(full.get_input_embeddings().weight, start.input, trained.get("input")), output, start.output_bias)
    export.check_rows(rows, full.get_input_embeddings().weight.dtype, vocabulary)
    export.replace_vocabulary(full, rows)
    update_special_ids(full, vocabulary)
    export.keep_chat_template(vocabulary.student, vocabulary.teacher)
    export.repair_generation_config(full)
    with only_errors():
        full.save_pretrained(folder)
    check_same_weights(work.teacher, folder, full)
    vocabulary.student.save_pretrained(folder)
    copy_processor(work.job.model, folder, vocabulary)
    is_trainable, seen = (frozen_from < 0).tolist(), trained["seen"].tolist()
    path = folder / "token_provenance.jsonl"
    export.write_provenance(path, vocabulary, job.init_name, start.report, is_trainable, seen)


def rows_of(state: TrainingState) -> dict[str, torch.Tensor]:
    """The trained rows, float32 on the CPU: "input" and, where they are rows of their own, "output"."""
    names = ("input", "output")
    return {name: x.trainable.detach().cpu().clone() for name, x in zip(names, state.student.tables, strict=False)}


def save_rows(folder: Path, rows: Rows) -> None:
    """Write rows and the report on them."""
    tensors = {name: getattr(rows, name) for name in ("input", "output", "output_bias")}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None}
    save_file(tensors, folder / ROWS)
    report = asdict(rows.report) | {"made": sorted(rows.report.made)}
    (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")


def load_rows(folder: Path) -> Rows:
    """What `save_rows` wrote."""
    tensors = load_file(folder / ROWS)
    return Rows(**{name: tensors.get(name) for name in ("input", "output", "output_bias")}, report=load_report(folder))


def load_report(folder: Path) -> InitReport:
    """The report that `save_rows` wrote."""
    values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    values["outliers"] = tuple(Outlier(**x) for x in values["outliers"])
    values["made"] = frozenset(values["made"])
    return InitReport(**{x.name: values[x.name] for x in fields(InitReport)})


def _warn_of_untrained_rows(start: Rows, work: Work) -> None:
    for line in work.job.untrained_tables() if start.output is not None and work.is_main else ():
        warnings.warn(line, stacklevel=4)
