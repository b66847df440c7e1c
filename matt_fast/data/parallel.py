"""Parallel text: sentences or paragraphs and their translations, for the initialisers that learn from them."""

import csv
import json
from pathlib import Path


def check_pairs_file(source: str | Path) -> Path:
    """Return `source` as a path; raise a ValueError if it is no file of a format that `read_pairs` reads."""
    path = Path(source)
    if path.suffix not in (".tsv", ".jsonl") or not path.is_file():
        raise ValueError(f"parallel: wanted a .tsv or .jsonl file of pairs of texts, got {str(source)!r}")
    return path


def read_pairs(source: str | Path) -> list[tuple[str, str]]:
    """Read pairs of texts of the same meaning.

    Args:
        source: a .tsv file with two columns, the text in a language that the teacher knows and its translation into
            that of the new tokens, without a heading and without quoting; or a .jsonl file with fields "source" and
            "target".

    Returns:
        (source text, target text), in order. Pairs of which a side has no text are left out.

    Raises:
        ValueError: no such file, another format, a line that is no pair, or no pair with text on both sides.
    """
    path = check_pairs_file(source)
    pairs = []
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix == ".tsv" else lines
        for number, row in enumerate(rows, 1):
            if not row or row == "\n":
                continue
            pair = tuple(row) if path.suffix == ".tsv" else _json_pair(row)
            if len(pair) != 2:
                wanted = "two columns" if path.suffix == ".tsv" else 'texts "source" and "target"'
                raise ValueError(f"parallel: wanted {wanted} in line {number} of {str(source)!r}, got {str(row)[:200]}")
            if all(text.strip() for text in pair):
                pairs.append(pair)
    if not pairs:
        raise ValueError(f"parallel: wanted a pair with text on both sides, got none in {str(source)!r}")
    return pairs


def _json_pair(line: str) -> tuple[str, ...]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return ()
    texts = (row.get("source"), row.get("target")) if isinstance(row, dict) else ()
    return texts if all(isinstance(text, str) for text in texts) else ()
