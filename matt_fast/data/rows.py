"""Rows of JSON and CSV as a stream, and text in blocks: what cannot be read is named by file and line."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from matt_fast.data.compressed import BUFFER

BLOCK = 1 << 20  # bytes decoded at a time
LONGEST_ROW = 1 << 30  # bytes, or characters: more is no document, but what a few compressed bytes can make
SHOWN = 60  # characters of a bad line in an error
TAIL = 16  # characters: a literal or an escape that the end of a block may have cut

SPACE = re.compile(r"[ \t\n\r]*")


def decoded(stream: io.BufferedReader, file: Path, argument: str) -> Iterator[str]:
    """Text in blocks, with \\n for every end of a line."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    while True:
        block = stream.read(BLOCK)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _not_utf8(error, line, file, argument) from error
        line += block.count(b"\n")
        if not block:
            return


def _not_utf8(error: UnicodeDecodeError, line: int, file: Path, argument: str) -> ValueError:
    byte = f"0x{error.object[error.start]:02x}"
    return ValueError(
        f"{argument}: wanted UTF-8 in line {line} of {str(file)!r}, got the byte {byte} ({error.reason}); "
        "iconv converts other encodings"
    )


def json_rows(stream: io.BufferedReader, file: Path, argument: str) -> Iterator[tuple[int, object]]:
    """(line, row): one a line if the first line is a row, else those of a list, or rows that span lines."""
    start = stream.peek(BUFFER)
    first = start.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0]
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    try:
        one_a_line = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        one_a_line = False
    if not one_a_line:
        yield from _JsonValues(decoded(stream, file, argument), file, argument)
        return
    for number, line in _lines(stream, file, argument):
        if not line.isspace():
            text = _text(line, number, file, argument)
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:  # of a number with thousands of digits, too
                place = f"line {number} of {str(file)!r}"
                raise ValueError(
                    f"{argument}: wanted JSON in {place}, got {text[:SHOWN].rstrip()!r} ({error})"
                ) from error


def csv_rows(stream: io.BufferedReader, file: Path, argument: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of comma-separated values, with the names of the columns in the first row.

    A value in quotes may have line ends, which are \\n then, and a quote is written twice in it.
    """
    at = 0

    def lines() -> Iterator[str]:
        for number, line in _lines(stream, file, argument):
            text = _text(line, number, file, argument)
            yield (text.removeprefix("\ufeff") if number == 1 else text).replace("\r\n", "\n")

    csv.field_size_limit(LONGEST_ROW)  # of this process: 131,072 characters otherwise
    rows = csv.reader(lines(), strict=True)
    names = None
    while True:
        at, shown = rows.line_num + 1, f"of {str(file)!r}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{argument}: wanted CSV in line {at} {shown}, got what is none ({error})") from error
        if row is None:
            return
        if names is None:
            names = row
        elif row:  # none of an empty line
            if len(row) != len(names):
                wanted = f"wanted {len(names)} values in line {at} {shown}"
                raise ValueError(f"{argument}: {wanted}, one for each column of its first row, got {len(row)}")
            yield at, dict(zip(names, row, strict=True))


def _lines(stream: io.BufferedReader, file: Path, argument: str) -> Iterator[tuple[int, bytes]]:
    number = 1
    while line := stream.readline(LONGEST_ROW):
        if len(line) == LONGEST_ROW:
            raise _too_long(number, file, argument)
        yield number, line
        number += 1


def _too_long(line: int, file: Path, argument: str) -> ValueError:
    return ValueError(
        f"{argument}: wanted rows of less than {LONGEST_ROW:,} bytes, got a longer one in line {line} of {str(file)!r}"
    )


def _text(line: bytes, number: int, file: Path, argument: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, number, file, argument) from error


class _JsonValues:
    """The elements of a list, or values one after the other, with their lines; memory is that of one, and a block."""

    def __init__(self, blocks: Iterable[str], file: Path, argument: str):
        self.blocks, self.file, self.argument = iter(blocks), file, argument
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[int, object]]:
        if self._sign() != "[":
            while self._sign():
                yield self.line, self._value()
            return
        self.at += 1
        sign = self._sign()
        self.at += sign == "]"
        while sign != "]":
            self._sign()
            line, row = self.line, self._value()
            yield line, {"text": row} if isinstance(row, str) else row
            sign = self._sign()
            if sign not in (",", "]"):
                raise self._wrong("wanted ',' or ']' between the rows of a list")
            self.at += 1
        if self._sign():
            raise self._wrong("wanted nothing after the list of rows")

    def _value(self) -> object:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                cut = "Unterminated" in str(error) or getattr(error, "pos", 0) > len(self.text) - TAIL
                if self.ended or not cut:
                    raise self._wrong("wanted JSON", error) from error
                self._more()
            else:
                self._pass(end)
                return value

    def _sign(self) -> str:
        """The next character that is not white space, which stays where it is; none at the end."""
        while True:
            self._pass(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def _pass(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _more(self) -> None:
        """As much again as is waiting, so that a long value is not read over and over."""
        waiting, size = [self.text[self.at :]], 0
        while not self.ended and size <= len(waiting[0]):
            block = next(self.blocks, None)
            self.ended = block is None
            waiting.append(block or "")
            size += len(waiting[-1])
            if len(waiting[0]) + size > LONGEST_ROW:
                raise _too_long(self.line, self.file, self.argument)
        self.text, self.at = "".join(waiting), 0

    def _wrong(self, wanted: str, error: Exception | None = None) -> ValueError:
        end = max(self.at, getattr(error, "pos", self.at))
        line = self.line + self.text.count("\n", self.at, end)
        got = self.text[end : end + SHOWN] or "the end of the file"
        why = f" ({error})" if error is not None and not isinstance(error, json.JSONDecodeError) else ""
        return ValueError(f"{self.argument}: {wanted} in line {line} of {str(self.file)!r}, got {got!r}{why}")
