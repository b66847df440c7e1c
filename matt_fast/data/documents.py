"""Documents of local files, folders and hub datasets, as a stream of texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
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
