"""Documents of local files, folders and hub datasets, as a stream of texts."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, config, load_dataset
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from matt_fast.data.reading import check_first_rows, find_files, format_of, read_texts
from matt_fast.support.installing import packages_line
from matt_fast.support.texts import MAX_CHARACTERS, bounded_pieces

SHUFFLED_CHARACTERS = 1 << 26  # in the buffer, at most
SHUFFLED_PIECES = 8192
UNEVEN = 2  # times the size of the smallest file
CUT_TOGETHER = 16  # rows of a hub dataset
COPY_TOGETHER = 64  # documents
FEATURES = Features({"text": Value("large_string")})


def read_documents(
    source: str | Path,
    *,
    split: str = "train",
    text_field: str = "text",
    seed: int | None = None,
    most: int = MAX_CHARACTERS,
) -> "Texts":
    """Stream the documents of a local file or folder, or of a Hugging Face dataset.

    Args:
        source: a .txt or .md file (one document), a .jsonl, .json, .csv, .parquet or .arrow file (one document a row),
            a folder of such files, the name of a dataset on the hub, or the URL of .jsonl, .json, .csv or .parquet
            files that fsspec knows (s3://…/*.jsonl). Text, JSON and CSV may be compressed (.gz, .bz2, .xz, .zst).
            Hidden files in a folder, and those of another format, are passed over.
        split: of a hub dataset.
        text_field: the column that holds the text, in all but .txt and .md files.
        seed: shuffle with this seed, in a buffer of 8,192 texts or 67 million characters; in the order of the source
            if None.
        most: characters of a text that is shuffled. Longer documents come in pieces that end with a line where they
            can, which are shuffled like documents; so a long one does not fill the batches of many steps.

    Returns:
        An iterable of str, which can be iterated again. A null gives "". A long file of plain text comes in pieces that
        end with a line where they can, each as if it were a document.

    Raises:
        ValueError: no readable file in the folder, an unknown format, no such column, or one that holds no texts. While
            iterating: what `read_texts` raises.
        OSError: `datasets` cannot write its cache.
    """
    files = find_files(source)
    if files is None:
        dataset = load_hub_documents(str(source), split, text_field, streaming=True)
        if seed is not None:
            options = {"batched": True, "batch_size": CUT_TOGETHER, "fn_kwargs": {"most": most}}
            dataset = dataset.map(_cut_rows, **options, features=dataset.features)
    else:
        check_first_rows(files, text_field)
        given = {"files": [str(file) for file in files], "text_field": text_field}  # a list: files are shuffled too
        given |= {"most": None if seed is None else most}
        try:
            dataset = IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs=given)
        except OSError as error:  # it makes a folder that it does not need
            wanted = "a folder that can be written for the cache of datasets (set HF_HOME to one)"
            raise type(error)(
                f"data: wanted {wanted}, got {str(config.HF_DATASETS_CACHE)!r}: {error.strerror}"
            ) from error
    buffer = min(SHUFFLED_PIECES, max(1, SHUFFLED_CHARACTERS // most))
    return Texts(dataset, str(source), None if files is None else tuple(files), seed, buffer)


def copy_documents(source: str | Path, text_field: str, copy: Path) -> Dataset:
    """What `read_documents` reads of a local source, as a dataset with the column "text" that lies in the file `copy`.

    A copy of our own: that of `datasets` is found again by names, sizes and times of the files, whatever is in them.
    """
    files = find_files(source)
    check_first_rows(files, text_field)
    schema, rows = FEATURES.arrow_schema, _rows([str(file) for file in files], text_field)
    with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while together := list(itertools.islice(rows, COPY_TOGETHER)):
            writer.write_batch(pa.RecordBatch.from_pylist(together, schema))
    return Dataset.from_file(str(copy))


def _rows(files: list[str], text_field: str, most: int | None = None) -> Iterator[dict[str, str | None]]:
    for file in files:
        texts = read_texts(Path(file), text_field)
        for text in texts if most is None else bounded_pieces(texts, most):
            yield {"text": text}


def _cut_rows(rows: dict[str, list[str | None]], most: int) -> dict[str, list[str]]:
    return {"text": list(bounded_pieces(rows["text"], most))}


def load_hub_documents(name: str, split: str, text_field: str, *, streaming: bool) -> Dataset | IterableDataset:
    """What `read_documents` reads of the hub, as a dataset with the column "text"; whole, `datasets` keeps a copy."""
    WebDataset.DECODERS.pop("pth", None)  # which torch would unpickle: it stays bytes
    given = _of_url(name) if "://" in name else {"path": name, "split": split}
    try:
        dataset = load_dataset(**given, streaming=streaming)
    except Exception as error:  # datasets raises many kinds, and few name the argument
        packages = f"; {packages_line('zstandard')}" if "zstd" in str(error) else ""
        raise ValueError(
            f"data: {name!r} is no file or folder here, and no dataset could be loaded by that name: {error}{packages}"
        ) from error
    columns = dataset.column_names or list(next(iter(dataset), {text_field: ""}))
    if text_field not in columns:
        raise ValueError(f"text_field: wanted one of the columns {columns} of {name!r}, got {text_field!r}")
    check_text_column(dataset, text_field, "text_field")
    return dataset.select_columns([text_field]).rename_columns({} if text_field == "text" else {text_field: "text"})


def _of_url(url: str) -> dict[str, str]:
    """What `load_dataset` is given for files at a URL that fsspec knows, or for a pattern of them."""
    kind = format_of(PurePosixPath(url))
    if kind not in ("json", "csv", "parquet"):
        raise ValueError(f"data: wanted .jsonl, .json, .csv or .parquet files at a URL, got {url!r}")
    return {"path": kind, "data_files": url, "split": "train"}


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
class Texts:
    """Texts that can be iterated again, see `read_documents`."""

    dataset: Dataset | IterableDataset
    name: str
    files: tuple[Path, ...] | None  # None of the hub
    seed: int | None
    buffer: int

    @property
    def num_shards(self) -> int:
        """Files, or what `datasets` takes for shards of a hub dataset."""
        return self.dataset.num_shards

    def are_for(self, processes: int) -> bool:
        """Whether shards should go round so many processes: they can be dealt out evenly.

        Of local files, which one process reads as well in one go, none may be more than twice another.
        """
        if self.files is None:
            return self.num_shards % processes == 0
        if processes == 1 or self.num_shards % processes:
            return False
        sizes = [file.stat().st_size for file in self.files]
        return max(sizes) <= UNEVEN * min(sizes)

    def shard(self, number: int) -> "Texts":
        """One of `num_shards`, shuffled by itself."""
        seed = None if self.seed is None else self.seed + number
        return replace(self, dataset=self.dataset.shard(num_shards=self.num_shards, index=number), seed=seed)

    def __iter__(self) -> Iterator[str]:
        dataset = self.dataset
        if self.seed is not None:
            dataset = dataset.shuffle(seed=self.seed, buffer_size=self.buffer)
        for row in dataset:
            text = row["text"]
            if not isinstance(text, str | None):  # a stream of the hub that does not know its types
                raise ValueError(f"text_field: wanted texts, got {type(text).__name__} in a row of {self.name!r}")
            yield text or ""
