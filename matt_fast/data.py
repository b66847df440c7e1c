"""Texts into aligned training batches: read documents, tokenise with both tokenizers, cut at segment boundaries."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets, load_dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from matt_fast.batches import Batch, Chunk, collate, pack
from matt_fast.segments import SPECIAL, align_segments_batch
from matt_fast.vocabulary import special_affixes

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
MAX_CHARACTERS = 1 << 20  # longer documents are cut at line ends before they are tokenised, to bound memory
TOKENISE_TOGETHER = 16
SHUFFLE_BUFFER = 256  # documents


def read_documents(source: str | Path, *, split: str = "train", text_field: str = "text", seed: int | None = None):
    """Stream the documents of a local file or folder, or of a Hugging Face dataset.

    Args:
        source: a .txt or .md file (one document), a .jsonl, .json or .parquet file (one document a row), a folder of
            such files, or the name of a dataset on the hub.
        split: of a hub dataset.
        text_field: the column that holds the text, in all but .txt and .md files.
        seed: shuffle with this seed; in the order of the source if None.

    Returns:
        An iterable of str, which can be iterated again.

    Raises:
        ValueError: no readable file in the folder, an unknown format, or no such column.
    """
    path = Path(source)
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        by_format: dict[str, list[str]] = {}
        for file in files:
            if file.suffix in FORMATS:
                by_format.setdefault(FORMATS[file.suffix], []).append(str(file))
        if not by_format:
            raise ValueError(f"data: wanted a file or folder with {', '.join(FORMATS)} files, got {str(source)!r}")
        parts = []
        for name, paths in by_format.items():
            options, field = ({"sample_by": "document"}, "text") if name == "text" else ({}, text_field)
            parts.append((load_dataset(name, data_files=paths, split="train", streaming=True, **options), field))
    else:
        try:
            parts = [(load_dataset(str(source), split=split, streaming=True), text_field)]
        except Exception as error:  # datasets raises many kinds, and few name the argument
            raise ValueError(
                f"data: {str(source)!r} is no file or folder here, and no dataset could be loaded by that name: {error}"
            ) from error
    texts = []
    for part, field in parts:
        columns = part.column_names or list(next(iter(part), {field: ""}))
        if field not in columns:
            raise ValueError(f"text_field: wanted one of the columns {columns} of {str(source)!r}, got {field!r}")
        texts.append(part.select_columns([field]).rename_columns({} if field == "text" else {field: "text"}))
    dataset = concatenate_datasets(texts) if len(texts) > 1 else texts[0]
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return _Texts(dataset)


@dataclass(frozen=True)
class _Texts:
    dataset: object

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in self.dataset)


@dataclass(frozen=True)
class Side:
    """One tokenizer's part of the data: how it tokenises, and how many tokens of it a chunk may hold."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    rows: int  # of the embedding: no id may reach it
    max_length: int  # tokens of a chunk, special ones included


class AlignedBatches(IterableDataset):
    """An endless stream of training batches; each pass over the documents is shuffled anew.

    Long documents are cut where both tokenizers have a token boundary, never truncated. What cannot be used is counted
    in `Batch.skipped`: documents with no text, without a common boundary on both sides, and single segments that alone
    are longer than a chunk.

    Args:
        source, split, text_field: as `read_documents`.
        teacher, student: the two sides.
        batch_size: rows per batch.
        seed: of the order of the documents.
        packing: fill each row with as many chunks as it holds; otherwise a row is one chunk.
        finish: what else is done to each batch ahead of the step, if anything.
        process, processes: this process takes every `processes`-th document.

    Raises (while iterating):
        ValueError: a pass over the data gave not one chunk, or a token's id has no embedding row.
    """

    def __init__(
        self,
        source: str | Path,
        teacher: Side,
        student: Side,
        *,
        batch_size: int,
        seed: int,
        split: str = "train",
        text_field: str = "text",
        packing: bool = False,
        finish: Callable[[Batch], Batch] | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        self.source, self.split, self.text_field = source, split, text_field
        self.teacher, self.student = teacher, student
        self.batch_size, self.seed, self.packing, self.finish = batch_size, seed, packing, finish
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Batch]:
        skipped: Counter = Counter()
        chunks = self._chunks(skipped)
        limits = self.teacher.max_length, self.student.max_length
        rows = pack(chunks, limits) if self.packing else ([chunk] for chunk in chunks)
        while True:
            batch = collate(list(itertools.islice(rows, self.batch_size)), Counter(skipped))
            yield batch if self.finish is None else self.finish(batch)
            skipped.clear()

    def in_background(self) -> Iterator[Batch]:
        """The batches, made ahead in a worker process; its errors are raised here as they are."""
        for item in DataLoader(_ErrorsAsItems(self), batch_size=None, num_workers=1):
            if isinstance(item, Exception):
                raise item
            yield item

    def _chunks(self, skipped: Counter) -> Iterator[Chunk]:
        for epoch in itertools.count():
            documents = read_documents(
                self.source, split=self.split, text_field=self.text_field, seed=self.seed + epoch
            )
            mine = itertools.islice(documents, self.process, None, self.processes)
            found = False
            for chunk in make_chunks(mine, self.teacher, self.student, skipped):
                found = True
                yield chunk
            if not found:
                reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no documents"
                raise ValueError(f"data: wanted text to train on in {str(self.source)!r}, got none ({reasons})")


class _ErrorsAsItems(IterableDataset):
    """A worker's exception would arrive with its traceback for a message; as an item it arrives as it is."""

    def __init__(self, batches: AlignedBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            yield from self.batches
        except Exception as error:
            yield error


def make_chunks(documents: Iterable[str], teacher: Side, student: Side, skipped: Counter) -> Iterator[Chunk]:
    """Cut documents into chunks that both sides can hold, at segment boundaries (paper, Appendix B).

    Each chunk gets the special tokens that its tokenizer puts around a text, as tokens outside all segments.

    Args:
        documents: texts.
        teacher, student: the two sides.
        skipped: counts what is left out, by reason; updated in place.

    Raises:
        ValueError: an id without an embedding row, or a `max_length` that the special tokens fill.
    """
    sides = (teacher, student)
    affixes = [special_affixes(side.tokenizer) for side in sides]
    limits = []
    for side, (prefix, suffix) in zip(sides, affixes, strict=True):
        limits.append(side.max_length - len(prefix) - len(suffix))
        if limits[-1] < 1:
            raise ValueError(f"max_length: wanted room for text beside {len(prefix + suffix)} special tokens, got none")
    pieces = (piece for document in documents for piece in _bounded_pieces(document, skipped))
    while together := list(itertools.islice(pieces, TOKENISE_TOGETHER)):
        encoded = [side.tokenizer(together, add_special_tokens=False, return_offsets_mapping=True) for side in sides]
        offsets = [[np.array(o, np.int64).reshape(-1, 2) for o in part["offset_mapping"]] for part in encoded]
        segments = align_segments_batch(*offsets)
        for row in range(len(together)):
            ids = [np.array(part["input_ids"][row], np.int64) for part in encoded]
            for side, side_ids in zip(sides, ids, strict=True):
                _check_ids(side, side_ids)
            yield from _cut(ids, [part[row] for part in segments], limits, affixes, skipped)


def _bounded_pieces(document: str, skipped: Counter) -> Iterator[str]:
    """The document itself, or, where it is very long, pieces of it that end with a line."""
    if not document or document.isspace():
        skipped["documents without text"] += 1
        return
    start = 0
    while start < len(document):
        end = min(start + MAX_CHARACTERS, len(document))
        if end < len(document):
            end = document.rfind("\n", start, end) + 1 or end
        yield document[start:end]
        start = end


def _check_ids(side: Side, ids: NDArray[np.int64]) -> None:
    if len(ids) and ids.max() >= side.rows:
        token = side.tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise ValueError(
            f"{side.name} tokenizer: wanted ids below the {side.rows} embedding rows, got {ids.max()} ({token!r})"
        )


def _cut(ids, segments, limits, affixes, skipped: Counter) -> Iterator[Chunk]:
    """Greedy: each chunk takes as many whole segments as fit on both sides."""
    n_segments = max(int(part.max(initial=-1)) for part in segments) + 1
    if n_segments == 0:
        skipped["documents without a common boundary"] += 1
        return
    # ends[side][k]: tokens of that side in the first k segments
    ends = [np.searchsorted(part, np.arange(n_segments + 1)) for part in segments]
    first = 0
    while first < n_segments:
        last = min(
            int(np.searchsorted(end, end[first] + limit, side="right")) - 1
            for end, limit in zip(ends, limits, strict=True)
        )
        if last <= first:
            skipped["segments longer than a chunk"] += 1
            first += 1
            continue
        cut_ids, cut_segments = [], []
        for side in range(2):
            inside = slice(ends[side][first], ends[side][last])
            prefix, suffix = affixes[side]
            cut_ids.append(np.concatenate([prefix, ids[side][inside], suffix]).astype(np.int64))
            cut_segments.append(
                np.pad(segments[side][inside] - first, (len(prefix), len(suffix)), constant_values=SPECIAL)
            )
        yield Chunk(*cut_ids, *cut_segments)
        first = last
