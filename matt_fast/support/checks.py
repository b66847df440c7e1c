"""Arguments checked by their values: types, choices, paths. Imports nothing slow."""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from matt_fast.support.files import check_writable

MANY = 1_000_000_000  # steps, pieces, bytes: more than anyone will wait for
LENGTH, ROWS = 1 << 24, 1 << 16  # tokens of a chunk, and chunks of a batch, at most
SEEDS = (1 << 32) - 1  # NumPy's largest
TOKENIZER_KINDS = ("byte-bpe", "sentencepiece-bpe", "unigram")  # that can be trained
_WIDER = {int: Integral, float: Real}  # numbers of NumPy too, and whole ones where a fraction may be


def check_type(name: str, value: Any, wanted: type | UnionType) -> None:
    """Raise a TypeError that names the argument unless `value` is of a type, or of one of several (`int | None`)."""
    kinds = get_args(wanted) or (wanted,)
    fits = bool in kinds if isinstance(value, bool) else isinstance(value, tuple(_WIDER.get(x, x) for x in kinds))
    if not fits:
        names = " or ".join("None" if x is type(None) else x.__name__ for x in kinds)
        raise TypeError(f"{name}: wanted {names}, got {value!r} ({type(value).__name__})")


def check_field_types(settings: Any) -> None:
    """`check_type` for each field of a dataclass."""
    for field in fields(settings):
        check_type(field.name, getattr(settings, field.name), field.type)


def check_argument_types(function: Callable, given: Mapping[str, Any]) -> None:
    """`check_type` for each argument of a function by its annotation, as far as that names classes.

    Args:
        function: of which the annotations are.
        given: its arguments by name, as `locals()` has them at its beginning.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = tuple(get_origin(x) or x for x in kinds)
        if name in given and all(isinstance(x, type) for x in kinds) and parameter.kind is not parameter.VAR_KEYWORD:
            check_type(name, given[name], functools.reduce(operator.or_, kinds))


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the argument unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}")


def check_range(name: str, value: float | None, least: int, most: float) -> None:
    """Raise a ValueError that names the argument if `value` is not from `least` to `most`; None may be."""
    if value is not None and not value >= least:  # NaN is not either
        raise ValueError(f"{name}: wanted at least {least}, got {value}")
    if value is not None and value > most:
        raise ValueError(f"{name}: wanted at most {most:,}, got {value}")


def check_positive(name: str, value: float | None, most: float = math.inf) -> None:
    """Raise a ValueError that names the argument unless `value` is above 0, at most `most` and finite; None may be."""
    if value is not None and not 0 < value < math.inf:  # NaN is not either
        raise ValueError(f"{name}: wanted a number above 0, got {value}")
    check_range(name, value, 0, most)


def check_location(name: str, value: str | Path | None, suffixes: Collection[str] = ()) -> None:
    """Raise a FileNotFoundError that names the argument if `value` can only be a path, and nothing is there.

    A name of the hub has one slash at most, and none at its ends. None is left alone, as is a URL.

    Args:
        name, value: of the argument.
        suffixes: what only files end in, ".jsonl" for example.
    """
    text = str(value)
    if value is None or "://" in text or (text and Path(text).exists()):
        return
    if (
        text.count("/") > 1
        or text[:1] in ("", "/", ".", "~", "<", "-")
        or text[-1:] == "/"
        or Path(text).suffix.lower() in suffixes
    ):
        raise FileNotFoundError(f"{name}: wanted a file or folder that is there, or a name of the hub; got {text!r}")


def check_outside(name: str, path: str | Path, source_name: str, source: str | Path | None) -> None:
    """Raise a ValueError if a folder that is to be written would lie in a folder of texts, and be read as one.

    Args:
        name, path: of what is to be written.
        source_name, source: of the texts; anything but a local folder is left alone.
    """
    folder, place = Path(source or ""), Path(path).resolve()
    if source is not None and folder.is_dir() and place.is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: wanted a folder outside of {source_name}, {str(source)!r}, got {str(path)!r}")


def check_parent(name: str, file: Path | None) -> None:
    """Raise a FileNotFoundError that names the argument unless the folder of a file that is to be written is there."""
    if file is not None and not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: wanted a file in a folder that is there, got {str(file)!r}")


def check_new_folder(name: str, path: str | Path) -> None:
    """Raise an OSError that names the argument unless `path` is an empty folder, or none yet, that can be written.

    Something else there is a FileExistsError.
    """
    place = Path(path)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise FileExistsError(f"{name}: wanted a new or empty folder, but {str(path)!r} has something in it")
    check_writable(name, place)
