"""What there is to know of a model before its weights are used."""

from collections.abc import Iterator

import torch

from matt_fast.model.checkpoint_files import configured_dtype, source_files
from matt_fast.model.weight_values import check_values
from matt_fast.recipe.doctor.finding import Enough, ForSeconds, Said, look, ok
from matt_fast.recipe.job import Job
from matt_fast.recipe.subject import Subject
from matt_fast.support.units import size_in_words

SECONDS = 6.0  # spent on reading weights


def kind(subject: Subject) -> Iterator[Said]:
    """Its class, size and positions."""
    teacher, outline, limit = subject.teacher, subject.outline, subject.limit
    count = sum(x.numel() for x in outline.parameters())
    name = type(outline).__name__ if teacher.kind.name is None else teacher.kind.name
    what = "" if teacher.kind.is_language_model else ", no language model: its held-out text cannot be scored"
    dtype = str(configured_dtype(teacher) or torch.float32).removeprefix("torch.")
    places = "no limit of positions" if limit is None else f"{limit:,} positions"
    yield ok(f"{name}, {teacher.depth} layers, {count:,} parameters, {dtype}, {places}{what}")


def target_layer(subject: Subject) -> Iterator[Said]:
    """What is trained, by which objective; the target layer counts while rows are trained alone."""
    job = subject.job
    n_layers = job.layers_of(subject.teacher)
    job.check_kind(subject.teacher)
    if job.trains_rows_alone:
        yield ok(f"layer {n_layers} of {subject.teacher.depth}, objective {job.training.objective}")
    if job.healing is not None:
        yield ok(f"rows and layers together ({job.healing.method}), objective {job.healing.objective}")
    elif not job.trains_rows_alone:
        yield ok("nothing is trained: rows are as they start")


def head(subject: Subject) -> Iterator[Said]:
    """Tied or not, and what that means for the objective."""
    outline = subject.outline
    embedding, output = outline.get_input_embeddings().weight, outline.get_output_embeddings()
    if output is None:
        yield ok("the model has no output head")
    elif output.weight is embedding:
        yield ok("the output head is tied to the input embedding: one table")
    else:
        untrained = subject.job.untrained_tables()
        yield from map(look, untrained)
        if not untrained:
            yield ok(f"the output head has rows of its own{_trained_by(subject.job)}")


def _trained_by(job: Job) -> str:
    if job.healing is not None:
        return f"; {job.healing.objective} trains both tables"
    return f"; {job.training.objective} trains both tables" if job.trains_rows_alone else ""


def padding(subject: Subject) -> Iterator[Said]:
    """Rows without a token, and tokens without a row."""
    vocabulary = subject.vocabulary
    known = {i for i in vocabulary.teacher_tokens if i < vocabulary.teacher_rows}
    beyond = len(vocabulary.teacher_tokens) - len(known)
    rows = vocabulary.teacher_rows - len(known)
    line = f"{vocabulary.teacher_rows:,} rows, {rows:,} of them without a token, which are not used"
    if beyond:
        yield look(
            f"{line}; {beyond:,} tokens of the model's tokenizer have no row", "text with them cannot be trained on"
        )
    else:
        yield ok(line)


def values(subject: Subject) -> Iterator[Said]:
    """Whether they are finite, as far as they can be read in some seconds."""
    size = sum(x.stat().st_size for x in source_files(subject.teacher))
    read = ForSeconds(SECONDS, subject.tell)
    try:
        check_values(subject.teacher, subject.unused, read)
    except Enough:
        yield ok(
            f"{read.done:,} of {read.total:,} tensors were read in {SECONDS:.0f} s, all finite; a transfer reads all "
            f"{size_in_words(size)}"
        )
    else:
        yield ok(f"all {read.total:,} tensors are finite ({size_in_words(size)} read)")
