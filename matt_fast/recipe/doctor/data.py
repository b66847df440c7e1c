"""The text: whether it can be read, how it is cut, and whether what is held out is in it."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from matt_fast.data.documents import read_documents
from matt_fast.data.own import OTHERS
from matt_fast.data.reading import find_files
from matt_fast.data.rehearsal import ANSWER, QUESTION, lacking_tokens, read_as_text, template_of
from matt_fast.data.snippets import NEW
from matt_fast.data.summary import DataSummary, check_held_out
from matt_fast.evaluation.bits_per_byte import MASKED_PIECE_BYTES, PIECE_BYTES, cut_pieces
from matt_fast.recipe.checks import look_at_data
from matt_fast.recipe.doctor.finding import Enough, ForSeconds, Said, fail, look, ok, share
from matt_fast.recipe.doctor.sample import sample_of
from matt_fast.recipe.subject import Subject
from matt_fast.runs.record import HELD_OUT

SECONDS = 5.0  # spent on reading, in each check
WINDOW, STRIDE = 60, 20  # characters of a stretch that is looked for, and between two of them in the training text
COPIED = 0.5  # of a piece's characters: then it counts as copied
MUCH_LONGER = 2  # times as many tokens as the student's
MOST_PADDING, MOST_PASSES, MOST_LONGER = 0.3, 20, 0.01


def readable(subject: Subject) -> Iterator[Said]:
    """All of it, if that takes no longer than some seconds; else its beginning."""
    tell = subject.tell
    subject.tell = read = ForSeconds(SECONDS, tell)
    try:
        lines = list(look_at_data(subject))
    except Enough:
        yield ok(
            f"{read.done:,} of {read.total:,} bytes were read in {SECONDS:.0f} s without a fault; a transfer reads all"
        )
        return
    finally:
        subject.tell = tell
    yield from (look(line.removeprefix("Warning: ")) for line in lines)
    data = subject.data
    yield ok(f"{data.documents:,} documents, {data.bytes:,} bytes of text")


def segments(subject: Subject) -> Iterator[Said]:
    """How the two tokenizers cut the same text."""
    sample = sample_of(subject)
    found = sample.segments
    if not len(found.sizes):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items()) or "no documents"
        yield look(f"nothing can be trained on in {sample.name} ({reasons})", "is a document longer than --max-length?")
        return
    single = int((found.sizes == 1).all(1).sum())
    longest = found.sizes.max(0)
    teacher, student = found.sizes.sum(0)
    line = (
        f"{share(single, len(found.sizes))} segments are one token on both sides, the longest have {longest[0]:,} and "
        f"{longest[1]:,}; the text has {teacher:,} tokens now, {student:,} with the new tokenizer "
        f"({student / teacher - 1:+.0%})"
    )
    left = found.skipped["segments longer than a chunk"] + found.skipped["documents without a common boundary"]
    if left * 100 > len(found.lengths):
        yield look(f"{line}; {left:,} stretches are left out, as no boundary is common within --max-length")
    else:
        yield ok(line)
    longer = int((found.sizes[:, 1] > found.sizes[:, 0]).sum())
    if longer > MOST_LONGER * len(found.sizes) and subject.job.healing is None:
        yield look(
            f"{share(longer, len(found.sizes))} segments have more tokens than before: words that are no token now",
            "new rows do not help there; --heal does, or a tokenizer that keeps the old ones (tokenizer extend)",
        )
    if student > teacher:
        yield look(
            f"{sample.name} become longer, by {student / teacher - 1:.0%}",
            "is the tokenizer made for this kind of text?",
        )


def rows(subject: Subject) -> Iterator[Said]:
    """Padding, and how often the data is passed over."""
    job, sample = subject.job, sample_of(subject)
    lengths = sample.segments.lengths
    if not len(lengths):
        return
    size = job.batch_size
    longest = [lengths[i : i + size].max(0) for i in range(0, len(lengths), size)]
    padding = 1 - lengths.sum() / (size * np.sum(longest)) if len(lengths) >= size else 0.0
    teacher, student = lengths.mean(0)
    line = f"chunks have {student:,.0f} of {job.max_length:,} tokens on average"
    if teacher > MUCH_LONGER * student and 2 * teacher > job.max_length:
        line += f", since the model's tokenizer has {teacher:,.0f} there (a larger --max-length makes them longer)"
    if padding > MOST_PADDING and not job.training.packing:
        yield look(
            f"{line}, and {padding:.0%} of the rows is padding", "--packing fills rows, where the layers allow it"
        )
    else:
        yield ok(line)
    if job.epochs is None and sample.share:
        steps = job.training.steps + (0 if job.healing is None else job.healing.steps)
        passes = steps * job.training.accumulation * size * sample.share / len(lengths)
        passes *= OTHERS if job.rehearse else 1
        times = f"{passes:,.0f}" if passes >= 10 else f"{passes:.2g}"
        shown = f"{steps:,} steps are {'about ' * (not sample.whole)}{times} passes over the data"
        if passes > MOST_PASSES:
            yield look(shown, "fewer steps or more text")
        else:
            yield ok(shown)


def snippets(subject: Subject) -> Iterator[Said]:
    """What the teacher has to write, as far as the sample tells."""
    job, vocabulary = subject.job, subject.vocabulary
    if job.snippets is None:
        return
    ids, where = np.zeros(0, np.int64), "no text"
    if job.data is not None:
        sample = sample_of(subject)
        ids, where = sample.segments.ids, sample.name
    counts = np.bincount(ids, minlength=vocabulary.rows)[vocabulary.new]
    missing = np.maximum(job.snippets - counts, 0)
    yield ok(
        f"{share(int((missing > 0).sum()), len(counts))} new tokens come fewer than {job.snippets} times in {where}: "
        f"the teacher writes {missing.sum():,} snippets for them, of up to {NEW} tokens, {NEW * missing.sum():,} in all"
    )


def rehearsal(subject: Subject) -> Iterator[Said]:
    """What the teacher has to write of its own, and whether it can."""
    count = subject.job.rehearse
    if not count:
        return
    try:
        what = "texts" if template_of(subject.sides[0].tokenizer) is None else "conversations"
    except ValueError as error:
        yield fail(str(error))
        return
    longest = QUESTION + ANSWER
    yield ok(f"the teacher writes {count:,} {what} of its own, of up to {longest} tokens, {longest * count:,} in all")
    if lacking := lacking_tokens(*(side.tokenizer for side in subject.sides)):
        yield look(read_as_text(lacking), "`matt-fast tokenizer extend` keeps them")


def held_out(subject: Subject) -> Iterator[Said]:
    """Whether held-out text is in the training text: as a file, or in long stretches."""
    job = subject.job
    if not job.held_out:
        yield look("there is no held-out text", "--eval-data FILE tells what training is worth")
    for name, place in job.held_out.items():
        yield from _held_out(subject, "" if name == HELD_OUT else f"{name}: ", place)


def _held_out(subject: Subject, name: str, place: str | Path) -> Iterator[Said]:
    job = subject.job
    if job.data is None:
        return
    files = [DataSummary(0, 0, 0, str(x), _paths(x)) for x in (place, job.data)]
    check_held_out(*files, place, job.data)
    size = MASKED_PIECE_BYTES if subject.teacher.masked else PIECE_BYTES
    documents = read_documents(place, split=job.split, text_field=job.text_field)
    pieces = [_joined(x) for x in itertools.islice(cut_pieces(documents, size), job.eval_pieces)]
    copied, part = find_copies(pieces, read_documents(job.data, split=job.split, text_field=job.text_field))
    line = f"{name}{share(len(copied), len(pieces))} held-out pieces are in the training text"
    line += "" if part is None else f", of which {part:,} characters were looked at in {SECONDS:.0f} s"
    if copied:
        shown = pieces[copied[0]][:WINDOW]
        yield look(f"{line}: {shown!r}", "figures on them flatter the training; hold out other documents")
    else:
        yield ok(line)


def find_copies(pieces: list[str], documents: Iterator[str]) -> tuple[list[int], int | None]:
    """Which pieces of text are, for the most part, stretches of documents.

    A stretch has WINDOW + STRIDE characters at least; a shorter piece must be a document's line or a whole document.

    Returns:
        Their numbers, and the characters of the documents that were looked at; None if these are all.
    """
    wanted = {hash(piece[i : i + WINDOW]) for piece in pieces for i in range(max(1, len(piece) - WINDOW + 1))}
    found, characters, end = set(), 0, time.monotonic() + SECONDS
    for document in documents:
        text = _joined(document)
        characters += len(text)
        hashes = {hash(text[i : i + WINDOW]) for i in range(0, max(1, len(text) - WINDOW + 1), STRIDE)}
        hashes |= {hash(_joined(line)) for line in document.split("\n") if len(line) < WINDOW}
        found |= hashes & wanted
        if time.monotonic() > end:
            break
    else:
        characters = None
    return [number for number, piece in enumerate(pieces) if _covered(piece, found) >= COPIED], characters


def _covered(piece: str, found: set[int]) -> float:
    """The share of a piece's characters that are in stretches which were found."""
    covered = np.zeros(len(piece), bool)
    for i in range(max(1, len(piece) - WINDOW + 1)):
        if hash(piece[i : i + WINDOW]) in found:
            covered[i : i + WINDOW] = True
    return float(covered.mean()) if len(piece) else 0.0


def _joined(text: str | None) -> str:
    """White space counts as one space: lines may be broken otherwise."""
    return " ".join((text or "").split())


def _paths(source: str | Path) -> dict[str, str]:
    """Files by their resolved paths, as in a summary, with contents that equal no other's."""
    return {str(x.resolve()): f"{source}:{x}" for x in find_files(source) or ()}
