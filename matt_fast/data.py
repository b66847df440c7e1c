"""Texts into aligned chunks: read documents, tokenise with both tokenizers, cut at segment boundaries."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from matt_fast.batches import Chunk
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
        ValueError: no readable file in the folder, an unknown format, no such column, or one that holds no texts.
    """
    dataset = load_documents(source, split=split, text_field=text_field, streaming=True)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return _Texts(dataset)


def load_documents(source: str | Path, *, split: str, text_field: str, streaming: bool) -> Dataset | IterableDataset:
    """What `read_documents` reads, as a dataset with the column "text"; without streaming `datasets` keeps a copy."""
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
            parts.append((load_dataset(name, data_files=paths, split="train", streaming=streaming, **options), field))
    else:
        try:
            parts = [(load_dataset(str(source), split=split, streaming=streaming), text_field)]
        except Exception as error:  # datasets raises many kinds, and few name the argument
            raise ValueError(
                f"data: {str(source)!r} is no file or folder here, and no dataset could be loaded by that name: {error}"
            ) from error
    texts = []
    for part, field in parts:
        columns = part.column_names or list(next(iter(part), {field: ""}))
        if field not in columns:
            raise ValueError(f"text_field: wanted one of the columns {columns} of {str(source)!r}, got {field!r}")
        check_text_column(part, field, "text_field")
        texts.append(part.select_columns([field]).rename_columns({} if field == "text" else {field: "text"}))
    return concatenate_datasets(texts) if len(texts) > 1 else texts[0]


def check_text_column(dataset: Dataset | IterableDataset, column: str, argument: str) -> None:
    """Raise a ValueError that names the argument if the column holds something else than texts.

    A stream that does not know its columns' types is judged by its first row.
    """
    if dataset.features is None:
        kind = type(next(iter(dataset), {}).get(column)).__name__
    else:
        kind = getattr(dataset.features[column], "dtype", type(dataset.features[column]).__name__)
    if kind not in ("str", "string", "large_string", "string_view", "NoneType", "null"):
        raise ValueError(f"{argument}: wanted a column of texts, got {column!r}, which holds {kind}")


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
