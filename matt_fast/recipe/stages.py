"""The stages of a transfer. What each makes lies in the run's folder; one that is there whole is not made again."""

import json
import shutil
import warnings
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side, sides_of
from matt_fast.data.coverage import cover
from matt_fast.data.epochs import count_rows
from matt_fast.data.own import OTHERS
from matt_fast.data.parallel import read_pairs
from matt_fast.data.places import is_url
from matt_fast.data.prepared import prepare_once
from matt_fast.data.shards import MadeOf, Shards
from matt_fast.initializers import InitReport, Rows, initial_rows, needs_whole_model
from matt_fast.model.checkpoint_files import stored_dtype
from matt_fast.recipe import export
from matt_fast.recipe.checks import begin_or_go_on, check_teacher, check_unchanged
from matt_fast.recipe.completing import write_completions
from matt_fast.recipe.job import rows_of_update
from matt_fast.recipe.rehearsal import own_chunks
from matt_fast.recipe.saving import save_result
from matt_fast.recipe.snippets import snippet_chunks
from matt_fast.recipe.subject import load_vocabulary
from matt_fast.recipe.training_stages import (
    ROWS,
    TrainingData,
    moved_in,
    nothing_to_train,
    seen_in,
    teacher_vocabulary,
    trained_in,
    trained_rows,
)
from matt_fast.recipe.work import Work
from matt_fast.runs.record import HELD_OUT, PROVENANCE
from matt_fast.support.files import move_into, whole_folder
from matt_fast.support.printable import printable
from matt_fast.training.options import TrainingOptions
from matt_fast.training.student import frozen_rows

REPORT = "report.json"
UNMOVED = 0.5  # of the new tokens that training saw


def read_vocabulary(work: Work) -> VocabularyPair:
    """The two vocabularies; a function of tokenizers that do not change, made anew in each process."""
    with work.stage("vocabulary"):
        return load_vocabulary(work.job, work.teacher, work.teacher.outline(work.dtype), work.other)


def check(work: Work, vocabulary: VocabularyPair) -> None:
    """Compare with the run that goes on, or look at all that could go wrong later and begin a new one: `run.json`."""
    if work.is_main:
        with work.stage("checks"):
            begin_or_go_on(work, vocabulary)
    work.processes.wait()


def initialise(work: Work, vocabulary: VocabularyPair) -> Rows:
    """Where rows start: `rows/`."""
    job = work.job

    init, init_head = (job.init, job.init_head) if vocabulary.new else ("mean", "same")  # a method would make no row

    def make(part: Path) -> None:
        model = work.whole() if needs_whole_model(init, init_head) else work.trunk()
        given = {
            "texts": work.texts(),
            "donor": job.donor,
            "parallel": None if job.parallel is None else read_pairs(job.parallel),
            "init_head": init_head,
            "omp_k": job.omp_k,
            "on_progress": lambda done, total: work.tell("rows", done, total),
        }
        rows = initial_rows(model, vocabulary, init, job.seed, **given, **job.hub_options)
        export.check_rows(rows, stored_dtype(work.teacher), vocabulary)
        save_rows(part, rows)

    if work.has("rows"):
        start = load_rows(work.once("rows", make))
    else:
        with work.stage("initialisation"):
            start = load_rows(work.once("rows", make))
    if not nothing_to_train(work, vocabulary):
        _warn_of_untrained_rows(start, work)
    return start


def measure_start(work: Work, vocabulary: VocabularyPair, start: Rows) -> None:
    """Bits per byte of the original model, and with the rows that training starts from: `evaluations.json`."""
    if not _unmeasured(work, "initialised"):
        return
    full = work.teacher.load(work.dtype)
    _measure(work, "original", full, vocabulary.teacher)
    write_completions(work, "original", full, vocabulary.teacher)
    export.replace_vocabulary(full, start)
    _measure(work, "initialised", full, vocabulary.student)


def prepare(work: Work, vocabulary: VocabularyPair) -> tuple[TrainingData, TrainingOptions]:
    """The data, its chunks on disk where they are made before training, and the steps to take."""
    job, options = work.job, work.job.training
    rows = rows_of_update(job.settings() | {"processes": work.accelerator.num_processes})
    pair = teacher_vocabulary(work, vocabulary)
    sides = sides_of(pair, job.max_length)
    if nothing_to_train(work, vocabulary):
        return TrainingData(sides), options
    folders = _prepared(work, pair, vocabulary.new, sides) if job.prepares_data else None
    data = TrainingData(sides, folders, own=own_chunks(work, pair, sides) if job.rehearse else None)
    if job.per_token is not None:
        found = cover(folders, vocabulary.new, job.per_token, job.seed)
        work.say(found.message(job.per_token, rows * (1 if data.own is None else OTHERS)))
        data = replace(data, leading=found.chunks)
    if job.epochs is not None:
        limits = [side.max_length for side in sides] if options.packing else None
        options = replace(options, steps=max(1, round(job.epochs * count_rows(folders, limits, data.own) / rows)))
    return data, options


def _prepared(
    work: Work, pair: VocabularyPair, new: Collection[int], sides: tuple[Side, Side]
) -> tuple[Path | str, ...]:
    """The folders of the chunks that are made before training."""
    job = work.job
    cache = work.run.path("data") if job.data_cache is None else Path(job.data_cache)
    folders: tuple[Path | str, ...] = ()
    if job.prepared is not None:
        folders = (check_here(work, sides),)
    elif job.data is not None:
        here = job.data_cache is not None  # each machine may have one of its own; the run's is for all
        with work.stage("data"), work.processes.first(here):  # the others find it made
            given = {"split": job.split, "text_field": job.text_field, "on_message": work.say}
            given["digest"] = work.run.read("run.json")["fingerprints"]["data"]["content"]
            folders = (prepare_once(cache, job.data, *sides, **given),)
    return folders if job.snippets is None else folders + snippet_chunks(work, pair, new, folders, sides)


def check_here(work: Work, sides: tuple[Side, Side]) -> str:
    """Look at the prepared chunks as this process sees them; returns where they are.

    Raises:
        ValueError: they are not what the main process saw, or a stream of them has fewer shards than there are
            processes.
    """
    shards, accelerator = Shards(work.job.prepared), work.accelerator
    if accelerator.is_local_main_process and not work.is_main:
        shards.check(MadeOf.of(*sides))
    check_unchanged(work.run.read("run.json")["fingerprints"], {"prepared": {"content": shards.manifest.digest}})
    if is_url(shards.place) and len(shards) < accelerator.num_processes:
        raise ValueError(
            f"prepared: wanted a shard for each of the {accelerator.num_processes} processes in {shards.place!r}, got "
            f"{len(shards)}: prepare it with more --shards, or read it from a local folder, which any number can"
        )
    return shards.place


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
    work.processes.wait()


def measure_result(work: Work, vocabulary: VocabularyPair) -> None:
    """Bits per byte of the model as it was written, and what it writes."""
    if _unmeasured(work, "trained"):
        full = work.teacher.load_result(work.run.output, work.dtype)
        write_completions(work, "adapted", full, vocabulary.student)
        _measure(work, "trained", full, vocabulary.student)


def _unmeasured(work: Work, name: str) -> list[str]:
    """The held-out texts that this process has still to measure a model on, by name."""
    done = work.run.read("evaluations.json").get(name, {})
    return [text for text in work.job.held_out if text not in done] if work.is_main else []


def _measure(work: Work, name: str, model, tokenizer) -> None:
    for text in _unmeasured(work, name):
        with work.stage(f"evaluation ({name}{'' if text == HELD_OUT else f', {printable(text)}'})"):
            found = asdict(work.measure(model, tokenizer, text))
            done = work.run.read("evaluations.json")
            work.run.write("evaluations.json", done | {name: done.get(name, {}) | {text: found}})


def _fill(folder: Path, work: Work, vocabulary: VocabularyPair, start: Rows) -> None:
    """Write the model's folder."""
    from matt_fast.training.layers import ADAPTER, put_layers  # and peft

    job = work.job
    full = work.teacher.load("auto")
    frozen_from = frozen_rows(vocabulary, job.freeze_shared)
    rows = start
    for stage in trained_in(job):  # one may have trained a table that the next left alone
        rows = trained_rows(work, stage, vocabulary, rows, full)
    if full.dtype != work.dtype:  # in which rows started
        for tables in (rows, start):
            export.keep_digits(tables, start, full, vocabulary)
    changed: set[str] = set()
    if job.healing is not None:
        full, changed = put_layers(full, work.run.path("healed"))
    work.run.update("state.json", lost=save_result(folder, work.teacher, full, rows, vocabulary, changed))
    is_trainable = (frozen_from < 0).tolist()
    if job.healing is not None and job.healing.keep_adapter:
        shutil.copytree(work.run.path("healed") / ADAPTER, folder / ADAPTER)
    path, seen = folder / PROVENANCE, seen_in(work)
    dtype = stored_dtype(work.teacher)
    same, of = export.unmoved(vocabulary, start, rows, seen, dtype)
    if same > of * UNMOVED and moved_in(work):
        told = f"less than {str(dtype).removeprefix('torch.')} can tell, which the model is stored in"
        work.say(
            f"Warning: training moved the rows of {same:,} of the {of:,} new tokens that it saw by {told}; a higher "
            "lr or more steps would"
        )
    seen = seen.tolist()
    lengths = export.row_lengths(vocabulary, start.input, rows.input)
    export.write_provenance(path, vocabulary, job.init_name, start.report, is_trainable, seen, lengths)


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
    report = InitReport.of_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    return Rows(**{name: tensors.get(name) for name in ("input", "output", "output_bias")}, report=report)


def _warn_of_untrained_rows(start: Rows, work: Work) -> None:
    for line in work.job.untrained_tables() if start.output is not None and work.is_main else ():
        warnings.warn(line, stacklevel=4)
        work.note(line)
