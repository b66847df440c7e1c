"""Where a command's words go: results to stdout, errors to stderr, and nothing from any process but the first."""

import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from matt_fast.cli.lasting import lasting_output
from matt_fast.support.printable import printable
from matt_fast.support.version import PACKAGE

LONG = ("losses", "made", "pieces")  # a value for each step, token or piece; they are in files of the output
SILENT = {  # what libraries read when they are imported
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def clear_errors(debug: bool = False, options: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Print any error as one message and end with status 1, or with 130 after Ctrl-C.

    Args:
        debug: print the traceback too.
        options: argument -> option, of those that have another name at the command line than in Python.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        of_all = getattr(error, "said_by_all", False)
        if of_all and os.environ.get("LOCAL_RANK", "0") != "0":  # the first process of this machine prints it
            raise typer.Exit(1) from error
        parts = [_by_option(str(error).strip(), options), *getattr(error, "__notes__", ())]
        if not (_tells_what_was_wanted(error) or of_all):
            parts[0] = f"{type(error).__name__}: {parts[0]}".removesuffix(": ")
            parts += [] if debug else ["--debug shows where it happened."]
        message = escape(printable("\n".join(parts)))
        plain_text = {"highlight": False, "emoji": False, "soft_wrap": True}
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {message}", **plain_text)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        if str(error):
            print(printable(str(error)), file=sys.stderr, flush=True)
        raise typer.Exit(130) from error


def _by_option(message: str, options: Mapping[str, str]) -> str:
    """A message that begins with the name of an argument, with that of its option where they differ."""
    name, colon, rest = message.partition(": ")
    return f"{options[name]}: {rest}" if colon and name in options else message


def _tells_what_was_wanted(error: Exception) -> bool:
    """Whether an error is of a kind by which this package and its libraries say what is wrong with an input."""
    if isinstance(error, UnicodeError | json.JSONDecodeError):  # they name neither argument nor file
        return False
    if isinstance(error, TypeError):  # Python's own come from anywhere
        frames = traceback.extract_tb(error.__traceback__)
        return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE) and ": wanted " in str(error)
    return isinstance(error, ValueError | OSError | ImportError | FloatingPointError)


class Output:
    """Where a command prints.

    Attributes:
        console: for people: stages, progress, tables.
    """

    def __init__(self, as_json: bool, quiet: bool):
        self.main = os.environ.get("RANK", "0") == "0"  # of several processes one prints
        self.as_json = as_json
        self.stdout = sys.stdout
        self.console = Console(stderr=as_json, quiet=quiet or not self.main)

    def result(self, value: Any) -> None:
        """Print the machine-readable result, if it was asked for."""
        if self.as_json and self.main:
            print(json.dumps(plain(value), allow_nan=False), file=self.stdout, flush=True)


@contextmanager
def command_output(
    as_json: bool,
    quiet: bool,
    debug: bool = False,
    options: Mapping[str, str] = MappingProxyType({}),
    *,
    lasting: bool = False,
) -> Iterator[Output]:
    """A command's output, and clear errors while it works.

    Args:
        as_json: the result is one line of JSON on stdout, and everything else goes to stderr.
        quiet: nothing but errors and that line.
        debug: tracebacks of errors, too.
        options: as `clear_errors`.
        lasting: the work is worth more than its output, see `lasting_output`.
    """
    with ExitStack() as stack:
        if lasting:
            stack.enter_context(lasting_output())
        output = Output(as_json, quiet)
        stack.enter_context(clear_errors(debug, options))
        stack.enter_context(printable_messages())
        if as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        if quiet:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_environment(SILENT))
        yield output


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


@contextmanager
def printable_messages() -> Iterator[None]:
    """Warnings and log messages, those of libraries too, can have names of files and tokens: print them `printable`.

    This package's own warnings are for whoever gave the command, and come without the place in its code.
    """
    records, warning = logging.getLogRecordFactory(), warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, *more: Any, **others: Any) -> str:
        ours = category is UserWarning and Path(filename).is_relative_to(PACKAGE)
        return printable(f"Warning: {message}\n" if ours else warning(message, category, filename, *more, **others))

    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(records)
        warnings.formatwarning = warning


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses and mappings as objects; paths as texts; None for what is not finite.

    Of dataclasses the fields in LONG are left out.
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name not in LONG}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is: no markup, no emoji codes, no line breaks of ours; control characters as escapes."""
    console.print(Text(printable(text), style), soft_wrap=True)
