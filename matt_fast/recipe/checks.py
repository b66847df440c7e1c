"""What is looked at before a run begins or goes on: the files it depends on, and all that could go wrong at its end."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.documents import read_documents
from matt_fast.data.prepared import identity
from matt_fast.data.summary import WITHOUT_TEXT, DataSummary, check_held_out, check_readable
from matt_fast.model.checkpoint_files import BUFFER, check_savable, check_weights, configured_dtype, some_of
from matt_fast.model.positions import position_limit
from matt_fast.model.tables import check_tables
from matt_fast.model.weight_values import check_values
from matt_fast.recipe.config import dump_config, resolved_config
from matt_fast.recipe.job import changes
from matt_fast.recipe.preflight import (
    check_max_length,
    check_output,
    check_pieces,
    check_room,
    check_tokenizers_differ,
    estimate_bytes,
    missing_new_tokens,
    no_new_tokens,
    rehearse_ids,
    rehearse_saving,
)
from matt_fast.recipe.special_ids import check_special_ids
from matt_fast.recipe.work import Work
from matt_fast.support.fingerprints import compare, fingerprint_file, fingerprint_model

Prints = dict[str, dict[str, str | None]]


def begin_or_go_on(work: Work, vocabulary: VocabularyPair) -> None:
    """Compare with the run that goes on, or look at what it will need and begin a new one; in the main process.

    Raises:
        ValueError: an argument, a file or the version is not what the run began with; data that cannot be read; a
            model that cannot be loaded or saved whole.
        OSError: there is no room for the result.
    """
    job, run = work.job, work.run
    settings = job.settings() | {"processes": work.accelerator.num_processes}
    known = run.read("run.json")
    if known:
        if known["version"] != version("matt-fast"):
            raise ValueError(f"resume: the run began with matt-fast {known['version']}, this is {version('matt-fast')}")
        found = changes(known["settings"], json.loads(json.dumps(settings)), run.status == "diverged")
        if found:
            raise ValueError(f"resume: wanted what the run in {str(run.output)!r} began with, got " + "; ".join(found))
    unused = set() if known else _check_model(work, vocabulary)
    data = _readable(work, "data")
    held_out = None if job.eval_data is None else _readable(work, "eval_data")
    if data.characters == 0 or data.skipped[WITHOUT_TEXT] == data.documents:
        raise ValueError(
            f"data: wanted text to train on in {str(job.data)!r}, got none ({data.documents} documents without text)"
        )
    if held_out is not None and (warning := check_held_out(held_out, data, job.eval_data, job.data)):
        work.say(f"Warning: {warning}")
    for argument, found in (("data", data), ("eval_data", held_out)):
        if found is not None and found.skipped and not known:
            parts = (f"{count:,} {reason}" for reason, count in found.skipped.items())
            work.say(f"{argument}: passed over {', '.join(parts)}")
    if not known and job.freeze_shared and no_new_tokens(vocabulary) is None:
        documents = read_documents(job.data, split=job.split, text_field=job.text_field)
        if (message := missing_new_tokens(documents, vocabulary)) is not None:
            work.say(message)
    prints = _fingerprints(work, vocabulary, data, held_out)
    if known:
        check_unchanged(known["fingerprints"], prints)
    else:
        check_values(work.teacher, unused, work.tell)
    run.begin(settings, prints, dump_config(resolved_config(job.arguments(run.output))))


def _check_model(work: Work, vocabulary: VocabularyPair) -> set[str]:
    """What would keep the result from being made, written or loaded, before weights are read.

    Returns the names of tensors that the model's class leaves out.
    """
    job, teacher = work.job, work.teacher
    check_output(work.run.output)
    check_tokenizers_differ(vocabulary.student, vocabulary.teacher)
    if job.freeze_shared and (line := no_new_tokens(vocabulary)) is not None:
        work.say(line)
    check_savable(teacher)
    configured_dtype(teacher)
    unused = check_weights(teacher)
    check_tables(teacher)
    check_special_ids(teacher.config)
    if weights := sorted(name for name in unused if not BUFFER.search(name)):
        work.say(f"model: left out, as no part of {teacher.kind.name}: {some_of(weights)}")
    for message in rehearse_saving(teacher, vocabulary.student) + rehearse_ids(teacher, vocabulary):
        work.say(message)
    limit = position_limit(teacher.trunk(teacher.outline(work.dtype)))
    check_max_length(job.max_length, limit)
    if job.eval_data is not None:
        documents = read_documents(job.eval_data, split=job.split, text_field=job.text_field)
        tokenizers = vocabulary.teacher, vocabulary.student
        check_pieces(documents, tokenizers, limit, masked=teacher.masked, max_pieces=job.eval_pieces)
    trainable = vocabulary.rows - len(vocabulary.matches) * job.freeze_shared
    check_room(work.run.output, estimate_bytes(teacher, vocabulary.rows, trainable))
    return unused


def check_teacher(work: Work) -> None:
    """Raise a ValueError where the teacher's files are not those that the run began with."""
    known = {"model": work.run.read("run.json")["fingerprints"]["model"]}
    check_unchanged(known, {"model": fingerprint_model(work.job.model)})


def check_unchanged(before: Prints, now: Prints) -> None:
    """Raise a ValueError that names the files which are not what they were."""
    found = [f"{name}: {line}" for name in now for line in compare(before.get(name, {}), now[name])]
    if found:
        raise ValueError("these are not the files that the run began with: " + "; ".join(found))


def _readable(work: Work, argument: str) -> DataSummary:
    job = work.job
    options = {"split": job.split, "text_field": job.text_field, "on_progress": work.tell}
    return check_readable(getattr(job, argument), argument=argument, **options)


def _fingerprints(work: Work, vocabulary: VocabularyPair, data: DataSummary, held_out: DataSummary | None) -> Prints:
    """Of everything that the result depends on: argument -> file -> digest."""
    job = work.job
    tokenizer = json.dumps(identity(vocabulary.student)).encode()
    prints = {
        "model": fingerprint_model(job.model),
        "tokenizer": {"content": hashlib.sha256(tokenizer).hexdigest()},
        "data": {"content": data.digest, "revision": data.revision},
    }
    if held_out is not None:
        prints["eval_data"] = {"content": held_out.digest, "revision": held_out.revision}
    for name in ("init", "donor", "parallel"):
        value = getattr(job, name)
        if isinstance(value, str | Path) and Path(value).exists():
            of = fingerprint_model(value) if Path(value).is_dir() else {Path(value).name: fingerprint_file(value)}
            prints[name] = of
    return prints
