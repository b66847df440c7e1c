"""Chunks on disk: made once for a corpus, two tokenizers and a length, then read from memory-mapped files."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Sequence, Value, load_from_disk
from pyarrow.compute import list_flatten
from pyarrow.compute import max as max_of
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import special_affixes
from matt_fast.data.batches import Chunk
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.documents import load_documents

logger = logging.getLogger(__name__)

DATA_VERSION = 1  # count up when prepared data changes: part of the cache's key
HIGHEST_IDS, SKIPPED = "highest_ids.json", "skipped.json"  # beside the data
READ_TOGETHER = 64  # chunks
COLUMNS = ("teacher_ids", "student_ids", "teacher_segments", "student_segments")


def identity(tokenizer: PreTrainedTokenizerBase) -> list:
    """All of a tokenizer that prepared data depends on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # left there by the last call
    return [backend, special_affixes(tokenizer)]


def data_key(dataset: Dataset, column: str, tokenizers: tuple, *numbers: int) -> str:
    """A name for the chunks of a dataset that changes with everything that changes them."""
    key = [DATA_VERSION, dataset._fingerprint, column, *numbers, *map(identity, tokenizers)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def prepare_once(
    cache: str | Path, source: str | Path, teacher: Side, student: Side, *, split: str, text_field: str
) -> Path:
    """The folder in `cache` with the chunks of a source, made if it is not there; on all cores.

    Args:
        cache: folder of such folders.
        source, split, text_field: as `read_documents`.
        teacher, student: the two sides.

    Raises:
        ValueError: what `read_documents` and `make_chunks` raise, or no text.
    """
    dataset = load_documents(source, split=split, text_field=text_field, streaming=False)
    sides = teacher, student
    numbers = [number for side in sides for number in (side.rows, side.max_length)]
    digest = data_key(dataset, "text", tuple(side.tokenizer for side in sides), *numbers)
    folder = Path(cache) / digest
    if not folder.exists():
        processes = min(os.cpu_count() or 1, len(dataset)) or None
        options = {"num_proc": processes, "fn_kwargs": {"sides": sides, "column": "text"}, "new_fingerprint": digest}
        prepare(dataset, folder, argument="data", **options)
    return folder


def read_prepared(
    folder: Path, seed: list[int], process: int, processes: int, skipped: Counter, first: int = 0
) -> Iterator[Chunk]:
    """Every `processes`-th chunk, in an order drawn from `seed`; the first process counts what was left out.

    Each is a piece of its own; `first` of them are passed over.
    """
    data = load_from_disk(folder).with_format("numpy")
    if process == 0 and first == 0:
        skipped.update(json.loads((folder / SKIPPED).read_text()))
    order = np.random.default_rng(seed).permutation(len(data))[process::processes]
    for start in range(first, len(order), READ_TOGETHER):
        columns = data[order[start : start + READ_TOGETHER]]
        for piece, row in enumerate(zip(*(columns[name] for name in COLUMNS), strict=True), start):
            yield Chunk(*(x.astype(np.int64) for x in row), piece=piece)


def prepare(dataset: Dataset, folder: Path, *, argument: str = "dataset", **options) -> None:
    """Make the chunks under a temporary name, then rename: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    counts = temporary / "skipped.jsonl"
    counts.touch()
    options["fn_kwargs"] |= {"counts": str(counts)}
    try:
        chunks = dataset.map(
            _chunk_columns,
            batched=True,
            remove_columns=dataset.column_names,
            features=Features({name: Sequence(Value("int32")) for name in COLUMNS}),
            load_from_cache_file=False,
            cache_file_name=str(temporary / "map.arrow"),
            desc="Aligning",
            **options,
        )
        if len(chunks) == 0:
            raise ValueError(f"{argument}: wanted text to train on, got none in {len(dataset)} rows")
        logger.info("%d documents, %d chunks", len(dataset), len(chunks))
        chunks.save_to_disk(temporary / "data")
        ids = chunks.data
        highest = {side: max_of(list_flatten(ids.column(f"{side}_ids"))).as_py() for side in ("teacher", "student")}
        (temporary / "data" / HIGHEST_IDS).write_text(json.dumps(highest))
        skipped = sum(map(Counter, map(json.loads, counts.read_text().splitlines())), Counter())
        (temporary / "data" / SKIPPED).write_text(json.dumps(skipped))
        (temporary / "data").chmod(0o755)
        if folder.exists():
            folder.rename(temporary / "old")
        (temporary / "data").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunk_columns(rows: dict[str, list], sides: tuple[Side, Side], column: str, counts: str) -> dict[str, list]:
    skipped: Counter = Counter()
    chunks = list(make_chunks(rows[column], *sides, skipped))
    with open(counts, "a") as file:  # several processes append a short line each
        file.write(json.dumps(skipped) + "\n")
    return {name: [getattr(chunk, name).astype(np.int32) for chunk in chunks] for name in COLUMNS}
