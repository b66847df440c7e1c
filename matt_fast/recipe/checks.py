"""What is looked at before a run begins or goes on: the files it depends on, and all that could go wrong at its end."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import identity
from matt_fast.data.compressed import ending_of
from matt_fast.data.documents import read_documents
from matt_fast.data.reading import find_files
from matt_fast.data.rehearsal import lacking_tokens, read_as_text
from matt_fast.data.shards import MadeOf, Shards
from matt_fast.data.stream import TEXT_ORDER
from matt_fast.data.summary import WITHOUT_TEXT, DataSummary, check_held_out
from matt_fast.model.checkpoint_files import BUFFER, check_savable, check_weights, configured_dtype, some_of
from matt_fast.model.positions import position_limit
from matt_fast.model.tables import check_tables
from matt_fast.model.weight_values import check_values
from matt_fast.recipe.config import dump_config, resolved_config
from matt_fast.recipe.export import lost_chat_template
from matt_fast.recipe.job import DIVISION, HOW, STEPS, Job, changes
from matt_fast.recipe.preflight import (
    check_max_length,
    check_pieces,
    check_room,
    check_tokenizers_differ,
    estimate_bytes,
    missing_new_tokens,
    no_new_tokens,
    rehearse_ids,
    rehearse_saving,
)
from matt_fast.recipe.same import libraries
from matt_fast.recipe.special_ids import check_special_ids
from matt_fast.recipe.subject import Subject
from matt_fast.recipe.work import Work
from matt_fast.runs.folder import TRAININGS
from matt_fast.runs.record import HELD_OUT
from matt_fast.support.files import check_writable, write_text
from matt_fast.support.fingerprints import compare, fingerprint_file, fingerprint_model
from matt_fast.support.units import size_in_words
from matt_fast.support.version import own_version
from matt_fast.training.loop import UPDATES
from matt_fast.training.objectives import trains_output

SHORT = 100  # characters of a held-out text
SAMPLE, LOOKED_AT = 500, 20_000  # characters of a text that pictures are made of, and those that it is found among

Prints = dict[str, dict[str, str | None]]


def begin_or_go_on(work: Work, vocabulary: VocabularyPair) -> None:
    """Compare with the run that goes on, or look at what it will need and begin a new one; in the main process.

    Raises:
        ValueError: an argument, a file or the version is not what the run began with; data that cannot be read; a
            model that cannot be loaded or saved whole.
        OSError: there is no room for the result.
    """
    job, run = work.job, work.run
    settings = work.settings | {"text_order": TEXT_ORDER, "updates": UPDATES}
    settings["processes"] = work.accelerator.num_processes
    known = run.read("run.json")
    if known:
        if known["version"] != own_version():
            was = known["version"]
            raise ValueError(
                f"resume: the run began with matt-fast {was}, this is {own_version()}; go on with that one"
            )
        done = {name: run.steps_behind(*places) for name, places in TRAININGS.items()}
        found = changes(known["settings"], json.loads(json.dumps(settings)), run.status == "diverged", done)
        if found:
            raise ValueError(f"resume: wanted what the run in {str(run.output)!r} began with, got " + "; ".join(found))
    subject = Subject(job, run.output, work.tell, teacher=work.teacher, vocabulary=vocabulary)
    for check in () if known else CHECKS:
        for message in check.look(subject):
            work.say(message)
    if not known and job.precision == "auto" and work.dtype == torch.bfloat16:
        work.say("precision: frozen weights are bfloat16 here; --precision no makes them float32")
    if not known and (lost := lost_chat_template(vocabulary.student, vocabulary.teacher)) is not None:
        work.say(f"tokenizer: {lost}")
    if job.rehearse:
        lacking = lacking_tokens(*(side.tokenizer for side in subject.sides))
        if lacking and not known:
            work.say(read_as_text(lacking))
    if known:
        _check_prepared(subject)
        for line in _told_of_changes(known, settings, done):
            work.say(line)
    for message in look_at_data(subject, begins=not known):
        work.say(message)
    prints = _fingerprints(work, vocabulary, subject.data, subject.held_out)
    if known:
        check_unchanged(known["fingerprints"], prints)
    else:
        check_values(work.teacher, subject.unused, work.tell)
    run.begin(settings, prints, dump_config(resolved_config(job.arguments(run.output))), libraries())
    if not known:
        write_text(run.path("sample.txt"), _sample(job))


def _told_of_changes(known: dict, settings: dict, done: Mapping[str, float]) -> Iterator[str]:
    """What a person should know of that is no longer as it was, and may be so.

    Args:
        known: run.json.
        settings: of the call that goes on.
        done: steps that are behind.
    """
    before = known["settings"]
    if settings["processes"] != before["processes"]:
        was, now = before["processes"], settings["processes"]
        yield f"processes: {was} before, {now} from here on, with batch_size rows each."
    divisions = [" x ".join(str(x[name]) for name in DIVISION) for x in (before, settings)]
    if divisions[0] != divisions[1]:
        yield (
            f"{' x '.join(DIVISION)}: {divisions[0]} before, {divisions[1]} from here on: updates have the same rows, "
            "and their loss is the mean of other batches' means."
        )
    for name in HOW:
        if settings[name] != before[name]:
            yield f"{name}: {before[name]!r} before, {settings[name]!r} from here on: the same but for rounding."
    for name in STEPS:
        old, new, behind = before.get(name), settings.get(name), done[name]
        if old != new and behind:
            plan = "the learning rate rises and falls by the new number"
            yield f"{name}: {old:,} before, {new:,} from here on, of which {behind:,} are done; {plan}."
    now = libraries()
    was = known.get("libraries", now)
    if others := [f"{x} {was.get(x)}, now {now[x]}" for x in now if now[x] != was.get(x)]:
        yield f"Warning: the run began with {'; '.join(others)}: the result may have other bits than without a stop"


class Check(NamedTuple):
    """Something that is looked at before weights are read.

    Attributes:
        area, name: what it is about.
        look: raises an error where a transfer would fail, and gives lines that a person should read.
        ok: what can be said where there are none, or gives it.
    """

    area: str
    name: str
    look: Callable[[Subject], Iterable[str]]
    ok: str | Callable[[Subject], str]


def _look_at_output(subject: Subject) -> Iterable[str]:
    check_writable("output", subject.output)
    return ()


def _look_at_difference(subject: Subject) -> Iterable[str]:
    vocabulary = subject.vocabulary
    others = [] if subject.other is None else [subject.other.load_tokenizer()]
    check_tokenizers_differ(vocabulary.student, vocabulary.teacher, *others)
    line = no_new_tokens(vocabulary) if subject.job.freeze_shared else None
    return () if line is None else (line,)


def _look_at_weights(subject: Subject) -> Iterable[str]:
    check_savable(subject.teacher)
    configured_dtype(subject.teacher)
    weights = sorted(name for name in subject.unused if not BUFFER.search(name))
    return [f"model: left out, as no part of {subject.teacher.kind.name}: {some_of(weights)}"] if weights else ()


def _look_at_tables(subject: Subject) -> Iterable[str]:
    check_tables(subject.teacher)
    return [_price_of_untying(subject)] if subject.job.untie else ()


def _price_of_untying(subject: Subject) -> str:
    stored = subject.teacher.stored
    outline = stored.outline(torch.float32)
    head, embedding = outline.get_output_embeddings(), outline.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return "untie: the model's output head has a table of its own already"
    numbers = subject.vocabulary.rows * embedding.weight.shape[1]
    size = size_in_words(numbers * (configured_dtype(stored) or torch.float32).itemsize)
    return f"untie: the output head becomes a table of its own, {numbers:,} numbers more ({size} in the result's files)"


def _look_at_saving(subject: Subject) -> Iterable[str]:
    return rehearse_saving(subject.teacher, subject.vocabulary.student)


def _look_at_ids(subject: Subject) -> Iterable[str]:
    check_special_ids(subject.teacher.config)
    return rehearse_ids(subject.teacher, subject.vocabulary)


def _look_at_lengths(subject: Subject) -> Iterable[str]:
    job, vocabulary, limit = subject.job, subject.vocabulary, subject.limit
    check_max_length(job.max_length, limit)
    _check_prepared(subject)
    if subject.other is not None:
        check_weights(subject.other)
        check_max_length(job.max_length, position_limit(subject.other.trunk(subject.other.outline(torch.float32))))
    masked, tokenizers = subject.teacher.masked, (vocabulary.teacher, vocabulary.student)
    for name, place in job.held_out.items():
        documents = read_documents(place, split=job.split, text_field=job.text_field)
        argument = "eval_data" if name == HELD_OUT else f"eval_data {name!r}"
        check_pieces(documents, tokenizers, limit, masked=masked, max_pieces=job.eval_pieces, argument=argument)
    return ()


def _check_prepared(subject: Subject) -> None:
    if subject.job.prepared is not None:
        Shards(subject.job.prepared).check(MadeOf.of(*subject.sides))


def _look_at_disk(subject: Subject) -> Iterable[str]:
    check_room(subject.output, _needed(subject))
    return ()


def _needed(subject: Subject) -> int:
    job = subject.job
    predicts = trains_output(job.training.objectives())
    options = {"healing": job.healing, "predicts": predicts, "validates": job.validate_every is not None}
    return estimate_bytes(subject.teacher, subject.vocabulary.rows, subject.trainable, **options)


CHECKS = (
    Check("run", "output", _look_at_output, "the folder can be written"),
    Check("tokenizers", "difference", _look_at_difference, "the new one has tokens that the model has not"),
    Check("model", "weights", _look_at_weights, "all are there, by name and shape, and can be saved again"),
    Check("model", "tables", _look_at_tables, "no more than input embedding and output head have a row for each token"),
    Check("model", "saving", _look_at_saving, "configuration and tokenizer stay what they are when saved and loaded"),
    Check("model", "token ids", _look_at_ids, "all ids in its configurations have one in the new vocabulary"),
    Check("data", "positions", _look_at_lengths, "the model has positions for all tokens of a chunk"),
    Check("run", "disk", _look_at_disk, lambda x: f"there is room for the {size_in_words(_needed(x))} to be written"),
)


def look_at_data(subject: Subject, begins: bool = True) -> Iterator[str]:
    """Read the data, if there is any, to its end; gives lines that a person should read, if the run begins.

    Raises:
        ValueError: it cannot be read, it has no text, or the held-out text is a part of it.
        OSError: a file cannot be read.
    """
    job, data, held_out = subject.job, subject.data, subject.held_out
    if data is None:
        return
    if data.characters == 0 or data.skipped[WITHOUT_TEXT] == data.documents:
        raise ValueError(
            f"data: wanted text to train on in {str(job.data)!r}, got none ({data.documents} documents without text)"
        )
    for name, place in job.held_out.items():
        if warning := check_held_out(held_out[name], data, place, job.data):
            yield f"Warning: {warning}"
    for name, found in held_out.items() if begins else ():
        if found.characters < SHORT:
            where = f"eval_data{'' if name == HELD_OUT else ' ' + name}: {found.characters:,} characters"
            yield f"Warning: {where} are too few to measure on: chance decides on its bits per byte"
    read = (("data", job.data, data), *(("eval_data", job.held_out[name], x) for name, x in held_out.items()))
    for argument, place, found in read if begins else ():
        formats = Counter(ending_of(file) for file in find_files(place) or ())
        if len(formats) > 1:  # a dataset's README.md is a text like any other
            parts = (f"{count:,} {suffix}" for suffix, count in formats.items())
            yield f"{argument}: files of several formats are read: {', '.join(parts)}"
        if found.skipped:
            parts = (f"{count:,} {reason}" for reason, count in found.skipped.items())
            where = "" if found.without_text is None else f"; the first without text is {found.without_text}"
            yield f"{argument}: passed over {', '.join(parts)}{where}"
    if begins and job.freeze_shared and no_new_tokens(subject.vocabulary) is None:
        documents = read_documents(job.data, split=job.split, text_field=job.text_field)
        if (message := missing_new_tokens(documents, subject.vocabulary)) is not None:
            yield message


def check_teacher(work: Work) -> None:
    """Raise a ValueError where the teacher's files are not those that the run began with."""
    known = {"model": work.run.read("run.json")["fingerprints"]["model"]}
    check_unchanged(known, {"model": fingerprint_model(work.job.model)})


def check_unchanged(before: Prints, now: Prints) -> None:
    """Raise a ValueError that names the files which are not what they were."""
    found = [f"{name}: {line}" for name in now for line in compare(before.get(name, {}), now[name])]
    if found:
        raise ValueError("these are not the files that the run began with: " + "; ".join(found))


def _sample(job: Job) -> str:
    """A part of the text that decides, for pictures: of the first held-out text, else of the data.

    It comes from the middle of what is looked at: texts begin with titles and licences.
    """
    source = next(iter(job.held_out.values()), job.data)
    if source is None:
        return ""
    text = ""
    for document in read_documents(source, split=job.split, text_field=job.text_field):
        text += f"{document}\n" if document and not document.isspace() else ""
        if len(text) > LOOKED_AT:
            break
    text = text[min(len(text), LOOKED_AT) // 2 :]
    start = text.find("\n", 0, SAMPLE) + 1 or text.find(" ", 0, SAMPLE) + 1
    return text[start : start + SAMPLE].rpartition(" ")[0].strip() or text[:SAMPLE].strip()


def _fingerprints(work: Work, vocabulary: VocabularyPair, data: DataSummary | None, held_out: dict) -> Prints:
    """Of everything that the result depends on: argument -> file -> digest."""
    job = work.job
    tokenizer = json.dumps(identity(vocabulary.student)).encode()
    prints = {
        "model": fingerprint_model(job.model),
        "tokenizer": {"content": hashlib.sha256(tokenizer).hexdigest()},
    }
    if data is not None:
        prints["data"] = {"content": data.digest, "revision": data.revision}
    if job.prepared is not None:
        prints["prepared"] = {"content": Shards(job.prepared).manifest.digest}
    for name, found in held_out.items():
        prints["eval_data" if name == HELD_OUT else f"eval_data {name}"] = {
            "content": found.digest,
            "revision": found.revision,
        }
    for name in ("init", "donor", "parallel", "teacher"):
        value = getattr(job, name)
        if isinstance(value, str | Path) and Path(value).exists():
            of = fingerprint_model(value) if Path(value).is_dir() else {Path(value).name: fingerprint_file(value)}
            prints[name] = of
    return prints
