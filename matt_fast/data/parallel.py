"""Parallel text: sentences or paragraphs and their translations, for the initialisers that learn from them."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from matt_fast.data.compressed import format_ending, unpacked


def check_pairs_file(source: str | Path) -> Path:
    """Return `source` as a path; raise a ValueError if it is no file of a format that `read_pairs` reads."""
    path = Path(source)
    if format_ending(path) not in (".tsv", ".jsonl") or not path.is_file():
        raise ValueError(f"parallel: wanted a .tsv or .jsonl file of pairs of texts, got {str(source)!r}")
    return path


def read_pairs(source: str | Path) -> list[tuple[str, str]]:
    """Read pairs of texts of the same meaning.

    Args:
        source: a .tsv file with two columns, the text in a language that the teacher knows and its translation into
            that of the new tokens, without a heading and without quoting; or a .jsonl file with fields "source" and
            "target". Either may be compressed (.gz, .bz2, .xz, .zst).

    Returns:
        (source text, target text), in order. Pairs of which a side has no text are left out.

    Raises:
        ValueError: no such file, another format, a line that is no pair or no UTF-8, or no pair with text on both
            sides.
    """
    path = check_pairs_file(source)
    is_tsv = format_ending(path) == ".tsv"
    wanted = "two columns" if is_tsv else 'texts "source" and "target"'
    pairs = []
    for number, line in _lines(path):
        pair = tuple(line.split("\t")) if is_tsv else _json_pair(line)
        if len(pair) != 2:
            raise ValueError(f"parallel: wanted {wanted} in line {number} of {str(source)!r}, got {line[:200]!r}")
        if any("\ud800" <= sign <= "\udfff" for text in pair for sign in text):  # JSON can write half a character
            raise ValueError(f"parallel: wanted whole characters in line {number} of {str(source)!r}, got half of one")
        if all(text.strip() for text in pair):
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"parallel: wanted a pair with text on both sides, got none in {str(source)!r}")
    return pairs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, without their ends, and their numbers; a byte order mark is left out."""
    with path.open("rb") as raw:
        for number, line in enumerate(unpacked(raw, path, "parallel"), 1):
            try:
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = f"0x{error.object[error.start]:02x}"
                place = f"line {number} of {str(path)!r}"
                raise ValueError(f"parallel: wanted UTF-8 in {place}, got the byte {byte} ({error.reason})") from error
            if text:
                yield number, text


def _json_pair(line: str) -> tuple[str, ...]:
    """Both texts, "" for null; () if it is no such pair."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(row, dict) or not {"source", "target"} <= row.keys():
        return ()
    texts = tuple("" if row[name] is None else row[name] for name in ("source", "target"))
    return texts if all(isinstance(text, str) for text in texts) else ()
