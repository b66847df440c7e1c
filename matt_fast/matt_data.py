"""The data of `MATT`: prepared once on disk, then batches of it, pass after pass."""

import itertools
import json
import logging
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets import Dataset, Features, Sequence, Value
from pyarrow.compute import list_flatten
from pyarrow.compute import max as max_of
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from matt_fast.batches import Batch, Chunk, collate
from matt_fast.data import Side, make_chunks
from matt_fast.matt_config import MATTConfig
from matt_fast.vocabulary import special_affixes

logger = logging.getLogger(__name__)

DATA_VERSION = 1  # count up when prepared data changes: part of the cache's key
HIGHEST_IDS = "highest_ids.json"  # beside the data
COLUMNS = ("teacher_ids", "student_ids", "teacher_segments", "student_segments")


def identity(tokenizer: PreTrainedTokenizerBase) -> list:
    """All of a tokenizer that prepared data depends on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # left there by the last call
    return [backend, special_affixes(tokenizer)]


def prepare(dataset: Dataset, folder: Path, **options) -> None:
    """Make the chunks under a temporary name, then rename: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
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
            raise ValueError(f"dataset: wanted text to train on, got none in {len(dataset)} rows")
        logger.info("%d documents, %d chunks", len(dataset), len(chunks))
        chunks.save_to_disk(temporary / "data")
        ids = chunks.data
        highest = {side: max_of(list_flatten(ids.column(f"{side}_ids"))).as_py() for side in ("teacher", "student")}
        (temporary / "data" / HIGHEST_IDS).write_text(json.dumps(highest))
        (temporary / "data").chmod(0o755)
        if folder.exists():
            folder.rename(temporary / "old")
        (temporary / "data").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunk_columns(rows: dict[str, list], sides: tuple[Side, Side], column: str) -> dict[str, list]:
    chunks = list(make_chunks(rows[column], *sides, Counter()))
    return {name: [getattr(chunk, name).astype(np.int32) for chunk in chunks] for name in COLUMNS}


def batches(data: Dataset, config: MATTConfig, accelerator: Accelerator) -> Iterator[Batch]:
    """Batches of this process, without end; each pass over the data has an order of its own."""

    def make(rows: list[dict]) -> Batch:
        chunks = [[Chunk(*(row[name].astype(np.int64) for name in COLUMNS))] for row in rows]
        return collate(chunks, Counter(), config.pad_to_multiple_of)

    processes = accelerator.num_processes
    for epoch in itertools.count():
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data))
        order = np.resize(order, math.ceil(len(order) / processes) * processes)  # as many for each process
        mine = order[accelerator.process_index :: processes].tolist()
        with warnings.catch_warnings():  # the default num_workers is the reference library's, more than some have cores
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(data, config.batch_size, sampler=mine, collate_fn=make, num_workers=config.num_workers)
            passing = iter(loader)
        yield from passing
