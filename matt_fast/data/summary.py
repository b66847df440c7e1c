"""Data read to the end before anything slow begins: what is wrong with it, how much it is, and what it was."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matt_fast.data.chunks import WITHOUT_TEXT
from matt_fast.data.compressed import ending_of
from matt_fast.data.documents import read_documents
from matt_fast.data.reading import find_files, format_of, passed_over, read_texts

FIRST_ROWS = 100  # of a hub dataset, which is not read to the end
REPORT_EVERY = 16 << 20  # bytes
_EMPTY = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class DataSummary:
    """What a source holds; of a hub dataset what its first rows hold.

    Attributes:
        documents: rows, or files of plain text.
        characters, bytes: of their texts; bytes in UTF-8.
        digest: changes with any byte of the files, their names and their order; of a hub dataset with the first rows.
        files: SHA-256 of each file's bytes, by its resolved path; empty for a hub dataset.
        revision: commit of a hub dataset; None for local data, or where the hub does not answer.
        skipped: what is passed over, by reason: documents without text, files of another format, hidden files.
        without_text: the first document without text, in words; None where there is none.
    """

    documents: int
    characters: int
    bytes: int
    digest: str
    files: Mapping[str, str]
    revision: str | None = None
    skipped: Counter = field(default_factory=Counter)
    without_text: str | None = None


def check_readable(
    source: str | Path,
    *,
    split: str = "train",
    text_field: str = "text",
    argument: str = "data",
    on_progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> DataSummary:
    """Read local data to its end, or the first rows of a hub dataset; memory does not grow with the data.

    Args:
        source, split, text_field: as `read_documents`.
        argument: what errors call the source.
        on_progress: called with "bytes", how many of the files have been read, and how many they have.

    Raises:
        ValueError: what `read_documents` raises, and what its iterator does: file and line are named.
        OSError: a file cannot be read.
    """
    files = find_files(source, argument)
    if files is None:
        return _check_hub(str(source), split, text_field)
    total, done, reported = sum(file.stat().st_size for file in files), 0, 0
    documents = characters = size = 0
    first = None
    skipped = passed_over(source)
    digests: dict[Path, str] = {}
    for file in files:
        digest = hashlib.sha256()

        def watch(block: memoryview, digest: "hashlib._Hash" = digest) -> None:
            nonlocal done, reported
            digest.update(block)
            done += len(block)
            if done - reported >= REPORT_EVERY:
                reported = done
                on_progress("bytes", done, total)

        in_file, with_text, empty = 0, 0, None
        for in_file, text in enumerate(read_texts(file, text_field, argument, watch=watch), 1):
            has_text = bool(text) and not text.isspace()
            with_text += has_text
            empty = in_file if empty is None and not has_text else empty
            characters += len(text or "")
            size += len((text or "").encode())
        if format_of(file) == "text":  # one document, however many pieces it came in
            in_file, with_text, empty = 1, min(1, with_text), None
        if first is None and with_text < in_file:
            first = repr(str(file)) if empty is None else f"document {empty:,} of {str(file)!r}"
        documents += in_file
        skipped[WITHOUT_TEXT] += in_file - with_text
        digests[file] = digest.hexdigest()
    on_progress("bytes", done, total)
    by_path = {str(file.resolve()): digest for file, digest in digests.items()}
    return DataSummary(
        documents, characters, size, _digest_of(source, digests), by_path, skipped=+skipped, without_text=first
    )


def digest_files(source: str | Path) -> str | None:
    """The digest that `check_readable` gives for local data, without reading its texts; None for a hub dataset."""
    files = find_files(source)
    if files is None:
        return None
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digest_of(source, digests)


class LocalFiles:
    """The files of a source as they are now, by size and time; those of the hub, and of no source, are none."""

    def __init__(self, source: str | Path | None):
        self.source, self.states = source, _states(source)

    def changes(self) -> list[str]:
        """What is different by now: "'a.txt' is gone", "'b.txt' has changed", "'c.txt' is new"."""
        now = _states(self.source)
        words = {
            "is gone": self.states.keys() - now.keys(),
            "has changed": {x for x in self.states.keys() & now.keys() if self.states[x] != now[x]},
            "is new": now.keys() - self.states.keys(),
        }
        return [f"{str(file)!r} {word}" for word, files in words.items() for file in sorted(files)]


def _states(source: str | Path | None) -> dict[Path, tuple[int, int]]:
    states = {}
    try:
        for file in (None if source is None else find_files(source)) or ():
            found = file.stat()
            states[file] = found.st_size, found.st_mtime_ns
    except (ValueError, OSError):  # nothing is there any longer, or not for now: what was not seen is gone
        pass
    return states


def check_held_out(held_out: DataSummary, training: DataSummary, eval_data: str | Path, data: str | Path) -> str | None:
    """Compare held-out data with what is trained on.

    Returns:
        A warning where a file has the same content as another one that is trained on; else None.

    Raises:
        ValueError: both are the same file or dataset, or one is a folder that has the other's file.
    """
    same = sorted(held_out.files.keys() & training.files.keys())
    if same:
        raise ValueError(
            f"eval_data: wanted text that is not trained on, got {str(eval_data)!r}, but {same[0]!r} is also part of "
            f"data {str(data)!r}"
        )
    if not held_out.files and held_out.digest == training.digest:
        raise ValueError(
            f"eval_data: wanted text that is not trained on, got the same dataset and split as data: {str(data)!r}"
        )
    twins = {digest: path for path, digest in training.files.items()}
    copies = [(path, twins[x]) for path, x in held_out.files.items() if x in twins and x != _EMPTY]
    if not copies:
        return None
    return (
        f"eval_data: {copies[0][0]!r} has the content of {copies[0][1]!r}: bits per byte are of text that is trained on"
    )


def _digest_of(source: str | Path, digests: Mapping[Path, str]) -> str:
    """Names count inside a folder; of a single file only its format, so that it may be moved."""
    source = Path(source)
    names = [x.relative_to(source).as_posix() if source.is_dir() else ending_of(x) for x in digests]
    return hashlib.sha256(json.dumps([names, list(digests.values())]).encode()).hexdigest()


def _check_hub(name: str, split: str, text_field: str) -> DataSummary:
    texts = list(itertools.islice(read_documents(name, split=split, text_field=text_field), FIRST_ROWS))
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise ValueError(f"text_field: wanted texts, got {kind} in row {number} of {text_field!r} of {name!r}")
    whole = "".join(text or "" for text in texts)
    digest = hashlib.sha256(json.dumps([name, split, text_field, texts]).encode()).hexdigest()
    return DataSummary(len(texts), len(whole), len(whole.encode()), digest, {}, hub_revision(name))


def hub_revision(name: str) -> str | None:
    """The commit of a hub dataset; None where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # of many kinds; the dataset itself may be there all the same, in datasets' cache
        return None
