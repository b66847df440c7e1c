"""Texts of local files, read as a stream: what cannot be read is named by file and line. Imports nothing slow."""

import codecs
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from matt_fast.data.compressed import BUFFER, COMPRESSIONS, SIGNS, compression_of, ending_of, format_ending, unpacked
from matt_fast.data.rows import SHOWN, csv_rows, decoded, json_rows
from matt_fast.support.checks import check_location
from matt_fast.support.files import LFS_POINTER
from matt_fast.support.texts import rejoin

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COLUMNAR = ("parquet", "arrow")  # are not read from the first byte to the last, and compress their columns themselves
DESCRIPTIONS = {"dataset_info.json", "state.json"}  # what `datasets` writes beside .arrow files
SPLITS = "dataset_dict.json"  # of several datasets
PIECE = 1 << 16  # characters of plain text given at a time: some 15,000 tokens
ROWS_TOGETHER = 256  # of a parquet file
ARROW_FILE = b"ARROW1"  # of a file with an index; `datasets` writes streams, without one

OTHER_FORMAT, ENDINGS = "files of another format", 5  # of which so many endings are named
CHATS = ("messages", "conversations", "conversation")  # columns that have them by custom
CHATS_PAGE = "docs/howto/instruct.md"

Watch = Callable[[memoryview], None]


def format_of(file: Path) -> str | None:
    """ "text", "json", "csv", "parquet" or "arrow" by the ending of its name, in capitals or not; None for another one.

    Text, JSON and CSV may be compressed, see `COMPRESSIONS`.
    """
    kind = FORMATS.get(format_ending(file))
    return None if kind in COLUMNAR and compression_of(file) else kind


def find_files(source: str | Path, argument: str = "data") -> list[Path] | None:
    """The files of a local source, in the order in which they are read; None if nothing of that name is here.

    Raises:
        ValueError: a folder without readable files, one with several splits of a dataset, a file of another format, or
            a pipe.
        OSError: a link to nothing, or a folder inside that cannot be read.
    """
    path = Path(source)
    if not path.exists():
        return None
    if not (path.is_file() or path.is_dir()):
        raise ValueError(
            f"{argument}: wanted a file or folder, got {str(source)!r}, a pipe or device: text is read several times, "
            "so write it to a file first"
        )
    if (path / SPLITS).is_file():
        found = ", ".join(repr(str(x.parent)) for x in sorted(path.glob("*/state.json")))
        raise ValueError(f"{argument}: wanted one split, got {str(source)!r}, which has several; give one of {found}")
    files = [file for file, why in _listed(path, argument) if why is None]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{argument}: wanted a file, got the link {str(file)!r} to {os.readlink(file)!r}")
    if not files:
        others = ", ".join(f"{count:,} {why}" for why, count in passed_over(path).items()) or "no file"
        raise ValueError(
            f"{argument}: wanted a file or folder with {', '.join(FORMATS)} files, or text that is compressed (.txt"
            f"{', .txt'.join(COMPRESSIONS)}), got {str(source)!r}" + (f", which has {others}" if path.is_dir() else "")
        )
    return files


def passed_over(source: str | Path) -> Counter:
    """How many files of a folder are not read, by reason."""
    reasons: Counter = Counter()
    endings: Counter = Counter()
    for file, why in _listed(Path(source)):
        if why == OTHER_FORMAT:
            endings[file.suffix.lower() or "none"] += 1
        elif why is not None:
            reasons[why] += 1
    if endings:
        shown = ", ".join(sorted(ending for ending, _ in endings.most_common(ENDINGS)))
        reasons[f"{OTHER_FORMAT} ({shown}{' …' if len(endings) > ENDINGS else ''})"] = endings.total()
    return reasons


def _listed(path: Path, argument: str = "data") -> Iterator[tuple[Path, str | None]]:
    """A path, or the files in a folder in order; and why one is not read, None for one that is."""
    for file in sorted(_inside(path, argument)) if path.is_dir() else [path]:
        inside = file.relative_to(path).parts
        if file.is_dir() and file.is_symlink() and file != path:
            yield file, "links to folders"  # one could lead back here
        elif any(part.startswith(".") for part in inside):
            yield file, "hidden files"
        elif file.exists() and not file.is_file():
            yield file, "pipes and devices"
        elif file.name in DESCRIPTIONS and inside and any(file.parent.glob("*.arrow")):
            yield file, "descriptions of a dataset"
        else:
            yield file, None if format_of(file) else OTHER_FORMAT


def _inside(folder: Path, argument: str) -> Iterator[Path]:
    """All that is in a folder and the folders in it, but for these folders themselves."""

    def refuse(error: OSError) -> None:
        if not any(part.startswith(".") for part in Path(error.filename).relative_to(folder).parts):
            raise _unreadable(error, argument, "folder", error.filename) from error

    for top, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(top, name) for name in files)
        yield from (path for path in (Path(top, name) for name in folders) if path.is_symlink())


def _unreadable(error: OSError, argument: str, kind: str, path: str | Path) -> OSError:
    return type(error)(f"{argument}: wanted a {kind} that can be read, got {str(path)!r}: {error.strerror}")


def read_texts(
    file: Path, text_field: str, argument: str = "data", *, watch: Watch | None = None
) -> Iterator[str | None]:
    """The texts of a file in their order: one a row, None where it is null; of plain text pieces of PIECE characters.

    Pieces end with a line where they can. So memory does not grow with the file, but with its longest row.

    Args:
        file: a file of `find_files`.
        text_field: column that holds the text, in all but .txt and .md files.
        argument: what errors call the source.
        watch: called with the bytes of each block that is read, all bytes of the file in order.

    Raises (while iterating):
        ValueError: bytes that are not UTF-8 (a byte order mark is left out), a row that is not JSON, has no such
            column, or something else than a text in it; file and line (row of a parquet or Arrow file) are named. A
            compressed file that is cut off or damaged.
        OSError: the file cannot be read.
    """
    kind = format_of(file)
    try:
        opened = file.open("rb", buffering=BUFFER)
    except OSError as error:
        raise _unreadable(error, argument, "file", file) from error
    with opened as raw:
        stream = raw if watch is None else io.BufferedReader(_Watched(raw, watch), BUFFER)
        if kind in COLUMNAR:
            if watch is not None:  # it is not read in order
                while stream.read(BUFFER):
                    pass
                raw.seek(0)
            yield from _column_texts(raw, file, text_field, argument)
            return
        start = stream.peek(len(LFS_POINTER))
        if start.startswith(LFS_POINTER):
            raise ValueError(
                f"{argument}: wanted the content of {str(file)!r}, got a pointer of git-lfs, see git lfs pull"
            )
        stream = unpacked(stream, file, argument)
        start = stream.peek(4)[:4]
        if packed := next((name for sign, name in SIGNS.items() if start.startswith(sign)), None):
            raise ValueError(
                f"{argument}: wanted text in {str(file)!r}, got what {packed} compressed; what has a name that ends in "
                f"{', '.join(COMPRESSIONS)} is unpacked"
            )
        if b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            got = "what looks like UTF-16 or 32, which iconv converts"
            raise ValueError(f"{argument}: wanted UTF-8 in line 1 of {str(file)!r}, got {got}")
        if kind == "text":
            pieces = rejoin(decoded(stream, file, argument), PIECE)
            yield next(pieces, "")
            yield from pieces
        else:
            rows = csv_rows if kind == "csv" else json_rows
            for line, row in rows(stream, file, argument):
                yield _text_of(row, text_field, f"line {line} of {str(file)!r}", argument)


class _Watched(io.RawIOBase):
    """A file that shows what is read from it."""

    def __init__(self, raw: io.BufferedReader, watch: Watch):
        self.raw, self.watch = raw, watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.raw.readinto(buffer)
        self.watch(memoryview(buffer)[:count])
        return count


def _text_of(row: object, text_field: str, place: str, argument: str) -> str | None:
    if not isinstance(row, dict):
        got = repr(str(row)[:SHOWN]) if isinstance(row, str | int | float | None) else type(row).__name__
        raise ValueError(f"{argument}: wanted a row with columns in {place}, got {got}")
    if text_field not in row:
        raise ValueError(
            f"text_field: wanted one of the columns {list(row)} of {place}, got {text_field!r}{_of_chats(row)}"
        )
    text = row[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(
            f"text_field: wanted a column of texts, got {text_field!r}, which holds {kind} in {place}{_of_chats(row)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half a character
        got = text[error.start].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{argument}: wanted whole characters in {place}, got {got}, half of one") from error
    return text


def _of_chats(columns: Iterable[str]) -> str:
    """What an error adds where a row is a chat."""
    found = next((name for name in columns if name in CHATS), None)
    return "" if found is None else f"; chats become texts by the tokenizer's apply_chat_template ({CHATS_PAGE})"


def _column_texts(raw: io.BufferedReader, file: Path, text_field: str, argument: str) -> Iterator[str | None]:
    """Of a file that has whole columns: Parquet, or Arrow as `datasets` writes it."""
    import pyarrow as pa

    kind_of_file = "parquet" if format_of(file) == "parquet" else "Arrow"
    row = 0
    try:
        schema, batches = _columns(raw, file, text_field)
        if text_field not in schema.names:
            raise ValueError(
                f"text_field: wanted one of the columns {schema.names} of {str(file)!r}, got {text_field!r}"
                + _of_chats(schema.names)
            )
        kind = schema.field(text_field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            place = f"in {str(file)!r}{_of_chats(schema.names)}"
            raise ValueError(f"text_field: wanted a column of texts, got {text_field!r}, which holds {kind} {place}")
        for batch in batches:
            for value in batch.column(text_field):
                row += 1
                yield value.as_py()
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise ValueError(f"{argument}: wanted UTF-8 in row {row} of {str(file)!r}, got the byte {byte}") from error
    except (pa.ArrowException, OSError) as error:
        place = f"after row {row} of {str(file)!r}"
        raise ValueError(f"{argument}: wanted a whole {kind_of_file} file, got {error} {place}") from error


def _columns(raw: io.BufferedReader, file: Path, text_field: str) -> "tuple[pa.Schema, Iterable[pa.RecordBatch]]":
    """Columns and groups of rows of a file; a parquet file is read as far as its column of texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if format_of(file) == "parquet":
        parquet = pq.ParquetFile(raw)
        return parquet.schema_arrow, parquet.iter_batches(ROWS_TOGETHER, columns=[text_field])
    if raw.peek(len(ARROW_FILE)).startswith(ARROW_FILE):
        arrow = pa.ipc.open_file(raw)
        return arrow.schema, map(arrow.get_batch, range(arrow.num_record_batches))
    stream = pa.ipc.open_stream(raw)
    return stream.schema, stream


def check_text_file(file: Path, argument: str) -> None:
    """Raise a FileNotFoundError or ValueError that names the argument unless there is such a file of texts."""
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: wanted a file that is there, got {str(file)!r}")
    if format_of(file) is None:
        raise ValueError(f"{argument}: wanted {', '.join(FORMATS)}, got {str(file)!r}")


def check_plain_text(file: str | Path, argument: str) -> None:
    """Raise a FileNotFoundError or ValueError that names the argument unless there is such a file of plain text."""
    if not Path(file).exists():
        raise FileNotFoundError(f"{argument}: wanted a file that is there, got {str(file)!r}")
    if not Path(file).is_file() or format_of(Path(file)) != "text":
        raise ValueError(f"{argument}: wanted a .txt or .md file, got {str(file)!r}")


def check_first_rows(files: list[Path], text_field: str, argument: str = "data") -> None:
    """Read the first row of the first file of each ending, so that a wrong `text_field` is an error at once."""
    first_of = {ending_of(file): file for file in reversed(files)}
    for file in first_of.values():
        next(read_texts(file, text_field, argument), None)


def check_texts(argument: str, source: str | Path, text_field: str = "text") -> None:
    """Look at a source of texts as far as the first rows of local files, so that a wrong one is an error at once.

    Args:
        argument: what errors call the source.
        source, text_field: as `read_documents`; a URL or the name of a hub dataset is left alone.

    Raises:
        ValueError, OSError: what `find_files` raises, what `read_texts` raises of the first row, or a path where
            nothing is.
    """
    check_location(argument, source, (*FORMATS, *COMPRESSIONS))
    files = None if "://" in str(source) else find_files(source, argument)
    if files is not None:
        check_first_rows(files, text_field, argument)
