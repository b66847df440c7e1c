"""Chunks on disk: made once for a corpus, two tokenizers and a length, then read from memory-mapped files."""

import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    Features,
    Value,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from datasets import Sequence as SequenceFeature
from numpy.typing import NDArray
from pyarrow.compute import list_flatten
from pyarrow.compute import max as max_of

from matt_fast.data.chunks import Side, identity, make_chunks
from matt_fast.data.documents import copy_documents, load_hub_documents
from matt_fast.data.packing import Chunk
from matt_fast.data.reading import find_files
from matt_fast.data.shards import COLUMNS, Shards, as_chunks, is_shards
from matt_fast.data.summary import digest_files
from matt_fast.support.checks import check_content
from matt_fast.support.files import flush, flush_tree
from matt_fast.support.fingerprints import compare, fingerprint_folder
from matt_fast.support.temporary import work_folder
from matt_fast.support.workers import die_with_parent, forks_die_with_us

logger = logging.getLogger(__name__)

DATA_VERSION = 3  # count up when prepared data changes: part of the cache's key
HIGHEST_IDS, SKIPPED, FILES = "highest_ids.json", "skipped.json", "files.json"  # beside the data
READ_TOGETHER = 64  # chunks
ROWS_TOGETHER = 64  # documents that a process takes at a time


def data_key(content: Dataset | str, column: str, tokenizers: tuple, *numbers: int) -> str:
    """A name for the chunks of a dataset, or of files with this digest, that changes with all that changes them."""
    content = content if isinstance(content, str) else content._fingerprint
    key = [DATA_VERSION, content, column, *numbers, *map(identity, tokenizers)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def prepare_once(
    cache: str | Path,
    source: str | Path,
    teacher: Side,
    student: Side,
    *,
    split: str,
    text_field: str,
    digest: str | None = None,
    on_message: Callable[[str], None] = logger.warning,
) -> Path:
    """The folder in `cache` with the chunks of a source, made if it is not there or damaged; on all cores.

    Args:
        cache: folder of such folders.
        source, split, text_field: as `read_documents`.
        teacher, student: the two sides.
        digest: `DataSummary.digest` of the source; a local one is read for it if None.
        on_message: called with a line when something that was there is made again.

    Raises:
        ValueError: what `read_documents` and `make_chunks` raise, or no text.
        ChildProcessError: a process that prepared data was killed.
    """
    sides = teacher, student
    tokenizers = tuple(side.tokenizer for side in sides)
    numbers = [number for side in sides for number in (side.rows, side.max_length)]
    local = find_files(source) is not None
    if local:
        content = digest or digest_files(source)
    else:  # its revision is what `datasets` knows it by
        content = load_hub_documents(str(source), split, text_field, streaming=False)
    key = data_key(content, text_field, tokenizers, *numbers)
    folder = Path(cache) / key
    if folder.exists():
        if not (damage := find_damage(folder)):
            return folder
        on_message(f"data_cache: {str(folder)!r} is damaged ({'; '.join(damage)}); it is made again")
    with work_folder(Path(cache)) as temporary:
        dataset = copy_documents(source, text_field, temporary / "documents.arrow") if local else content
        processes = min(os.cpu_count() or 1, len(dataset)) or None
        options = {"num_proc": processes, "fn_kwargs": {"sides": sides, "column": "text"}, "new_fingerprint": key}
        options["batch_size"] = ROWS_TOGETHER
        prepare(dataset, folder, argument="data", **options)
    return folder


def find_damage(folder: Path) -> list[str]:
    """What of prepared data is not as it was written, a line for each file; nothing if all is."""
    try:
        written = json.loads((folder / FILES).read_text())
        check_content(FILES, written, dict[str, str])
    except (OSError, TypeError, ValueError):
        return [f"{FILES} is gone or damaged"]
    found = fingerprint_folder(folder)
    del found[FILES]
    return compare(written, found)


def open_chunks(folders: Sequence[Path]) -> Dataset:
    """The chunks of one or several folders of `prepare_once` or of shards, one after another, memory-mapped."""
    return concatenate_datasets([part for folder in folders for part in _parts(folder)])


def _parts(folder: Path) -> list[Dataset]:
    if not is_shards(folder):
        return [load_from_disk(folder)]
    return [Dataset.from_file(str(Path(folder) / shard.name)) for shard in Shards(folder).manifest.shards]


def left_out_of(folders: Sequence[Path | str]) -> Counter:
    """What was left out of prepared chunks, by reason."""
    found: Counter = Counter()
    for folder in folders:
        known = Shards(folder).manifest.skipped if is_shards(folder) else json.loads((folder / SKIPPED).read_text())
        found.update(known)
    return found


class ShuffledChunks:
    """The chunks of `open_chunks` in an order drawn from `seed`: four bytes of memory for each.

    `leading` has numbers of chunks that come before all others, in their own order.
    """

    def __init__(self, folders: Sequence[Path], seed: list[int], leading: NDArray[np.int64] | None = None):
        self.data = open_chunks(folders).with_format("numpy")
        self.order = np.arange(len(self.data), dtype=np.uint32)
        np.random.default_rng(seed).shuffle(self.order)
        if leading is not None:
            others = self.order[~np.isin(self.order, leading)]
            self.order = np.concatenate([leading.astype(np.uint32), others])

    def __len__(self) -> int:
        return len(self.order)

    def read(self, places: NDArray[np.int64]) -> Iterator[Chunk]:
        """The chunks at some places of the order."""
        for start in range(0, len(places), READ_TOGETHER):
            columns = self.data[self.order[places[start : start + READ_TOGETHER]]]
            yield from as_chunks(columns)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Progress bars of `datasets` where a terminal shows them; in a file each state is a line."""
    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


def prepare(dataset: Dataset, folder: Path, *, argument: str = "dataset", **options) -> None:
    """Make the chunks under a temporary name, then rename: a folder that is there is whole.

    The processes that work on it end with this one.
    """
    with work_folder(folder.parent) as temporary, forks_die_with_us(), _bars_on_terminals():
        counts = temporary / "skipped.jsonl"
        counts.touch()
        options["fn_kwargs"] |= {"counts": str(counts), "parent": os.getpid()}
        try:
            chunks = dataset.map(
                _chunk_columns,
                batched=True,
                remove_columns=dataset.column_names,
                features=Features({name: SequenceFeature(Value("int32")) for name in COLUMNS}),
                load_from_cache_file=False,
                cache_file_name=str(temporary / "map.arrow"),
                desc="Aligning",
                **options,
            )
        except Exception as error:
            if isinstance(error.__context__, SystemExit | KeyboardInterrupt):  # datasets waits for its workers, in vain
                raise error.__context__ from None
            if "abruptly died" not in str(error):
                raise
            raise ChildProcessError(
                f"{argument}: a process that prepared it was killed, by a lack of memory perhaps; nothing is lost, "
                "the same command begins to prepare it again"
            ) from error
        if len(chunks) == 0:
            raise ValueError(f"{argument}: wanted text to train on, got none in {len(dataset)} rows")
        logger.info("%d documents, %d chunks", len(dataset), len(chunks))
        data = temporary / "data"
        chunks.save_to_disk(data)
        ids = chunks.data
        highest = {side: max_of(list_flatten(ids.column(f"{side}_ids"))).as_py() for side in ("teacher", "student")}
        (data / HIGHEST_IDS).write_text(json.dumps(highest))
        skipped = sum(map(Counter, map(json.loads, counts.read_text().splitlines())), Counter())
        (data / SKIPPED).write_text(json.dumps(skipped))
        (data / FILES).write_text(json.dumps(fingerprint_folder(data)))
        flush_tree(data)
        if folder.exists():
            folder.rename(temporary / "old")
        try:
            data.rename(folder)
        except OSError:  # another process was faster
            if find_damage(folder):
                raise
        flush(folder.parent)


def _chunk_columns(
    rows: dict[str, list], sides: tuple[Side, Side], column: str, counts: str, parent: int
) -> dict[str, list]:
    die_with_parent(parent)  # where workers are not forked
    skipped: Counter = Counter()
    chunks = list(make_chunks(rows[column], *sides, skipped))
    with open(counts, "a") as file:  # several processes append a short line each
        file.write(json.dumps(skipped) + "\n")
    return {name: [getattr(chunk, name).astype(np.int32) for chunk in chunks] for name in COLUMNS}
