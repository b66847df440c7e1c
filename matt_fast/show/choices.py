"""What the pictures' arguments may be, and what the run of an adapted model says of it.

Imports nothing slow, so that they can be checked before torch is imported.
"""

from pathlib import Path

from matt_fast.data.reading import check_text_file, format_of, read_texts
from matt_fast.runs.folder import Run
from matt_fast.runs.record import Record, read_record
from matt_fast.support.checks import check_parent
from matt_fast.support.plots import PICTURES, figure_class

ORDERS = ("moved", "seen", "norm", "outlier", "id")
TABLES = ("input", "output")
PAGES = (".html",)


def check_output(output: Path | None, endings: tuple[str, ...]) -> None:
    """Check where a picture or page is to be written, and that matplotlib is there for a picture.

    Raises:
        ValueError: another ending.
        FileNotFoundError: no such folder.
        ImportError: matplotlib is missing.
    """
    if output is None:
        return
    if output.suffix.lower() not in endings or output.is_dir():
        raise ValueError(f"output: wanted a file that ends in {', '.join(endings)}, got {str(output)!r}")
    check_parent("output", output)
    if output.suffix.lower() in PICTURES:
        figure_class()


def check_adapted(argument: str, folder: Path) -> None:
    """Raise a FileNotFoundError that names the argument unless a transfer has written its model into a folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{argument}: wanted the output of a finished transfer, got {str(folder)!r}")


def made_of(argument: str, folder: Path, model: str | None) -> tuple[str, Record | None]:
    """The original of an adapted model, which its run names, and the record of that run; None if that is not there.

    Args:
        argument, folder: where the adapted model is.
        model: the original where it was given.

    Raises:
        ValueError: no original was given, and there is no run; or a file of the run is damaged.
    """
    record = read_record(folder, argument) if Run(folder).begun else None
    if model is None and record is None:
        raise ValueError(f"model: wanted the original model, which {str(folder)!r} does not name; got none")
    return model or record.options["model"], record


def read_text(text: str | None, file: Path | None, most: int, text_field: str = "text") -> tuple[str, str]:
    """(text, a note): the text given, or that of a file, at most so many characters; the note says what was left out.

    Args:
        text, file: one of them is None.
        most: characters.
        text_field: column of a .jsonl or .parquet file; the texts of such a file are joined by line ends.

    Raises:
        ValueError: both or neither, no text in it, half a character, or what `read_texts` raises.
        OSError: the file cannot be read.
    """
    if (text is None) == (file is None):
        raise ValueError(f"text and file: wanted one of them, got {'neither' if text is None else 'both'}")
    if file is None:
        found, more = text[:most], len(text) > most
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
            raise ValueError("text: wanted UTF-8, got other bytes") from error
    else:
        check_text_file(file, "file")
        parts, size = [], 0
        for part in read_texts(file, text_field, "file"):
            parts.append(part or "")
            size += len(parts[-1]) + 1
            if size > most:
                break
        separator = "" if format_of(file) == "text" else "\n"
        found = separator.join(parts)
        more, found = len(found) > most, found[:most]
    if not found.strip():
        raise ValueError(f"{'text' if file is None else 'file'}: wanted text, got white space or nothing")
    return found, f"The first {most:,} characters of a longer text." if more else ""
