"""Arguments checked by their values: types, choices, paths. Imports nothing slow."""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from matt_fast.support.files import check_writable, is_empty

MANY = 1_000_000_000  # steps, pieces, bytes: more than anyone will wait for
LENGTH, ROWS = 1 << 24, 1 << 16  # tokens of a chunk, and chunks of a batch, at most
SEEDS = (1 << 32) - 1  # NumPy's largest
TOKENIZER_KINDS = ("byte-bpe", "sentencepiece-bpe", "unigram")  # that can be trained
_WIDER = {int: Integral, float: Real}  # numbers of NumPy too, and whole ones where a fraction may be


SHOWN = 80  # characters of a wrong value
Given = ParamSpec("Given")
Returned = TypeVar("Returned")
Made = TypeVar("Made")


def check_type(name: str, value: Any, wanted: Any) -> Any:
    """Raise a TypeError that names the argument unless `value` is what an annotation says, `int | None` for example.

    Of what is in a sequence or a mapping that is looked at too; a string is no sequence of strings.

    Returns:
        The value; a number of NumPy as Python's, which can be written as JSON.
    """
    kinds = _alternatives(wanted)
    if not any(_fits(value, kind) for kind in kinds):
        raise TypeError(
            f"{name}: wanted {' or '.join(map(_named, kinds))}, got {_shown(value)} ({type(value).__name__})"
        )
    if isinstance(value, Real) and not isinstance(value, int | float):
        return int(value) if isinstance(value, Integral) else float(value)
    return float(value) if type(value) is not float and isinstance(value, float) else value


def _alternatives(wanted: Any) -> tuple:
    return get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)


def _fits(value: Any, kind: Any) -> bool:
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    if origin is Literal:  # another value of its kind is a ValueError, of whoever knows the values
        return type(value) in map(type, inside)
    if origin is Callable:
        return callable(value)
    if origin is None:
        return isinstance(value, _WIDER.get(kind, kind))
    if isinstance(value, str | bytes) or not isinstance(value, origin):
        return False
    parts = value.values() if issubclass(origin, Mapping) else value if issubclass(origin, Sequence) else ()
    wanted = next(x for x in reversed(inside) if x is not ...)  # of tuple[int, ...] the first
    return all(any(_fits(part, x) for x in _alternatives(wanted)) for part in parts)


def _named(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Callable:
        return "a function"
    return (
        kind.__name__ if get_origin(kind) is None else str(kind).replace("collections.abc.", "").replace("pathlib.", "")
    )


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def check_content(name: str, found: Any, wanted: Any) -> None:
    """`check_type` of what a file has.

    Args:
        name: what errors call it.
        found: what JSON or YAML gave.
        wanted: a type, or of an object such a thing for each of its keys, where `...` is any other key. A key whose
            value may be None may be missing.

    Raises:
        TypeError: something else is there; the message names the place in it.
    """
    if not isinstance(wanted, Mapping):
        check_type(name, found, wanted)
        return
    check_type(name, found, dict)
    for key, kind in wanted.items():
        for each in found if key is ... else [key]:
            check_content(f"{name}.{each}", found.get(each), kind)


def made_of(kind: type[Made], found: Any) -> Made:
    """A dataclass of what JSON gave, its fields by name.

    Raises:
        TypeError: other fields, or values of other types than they want.
    """
    check_type(kind.__name__, found, dict)
    made = kind(**found)
    check_field_types(made)
    return made


def check_field_types(settings: Any) -> None:
    """`check_type` for each field of a dataclass; numbers of NumPy become Python's there."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if (plain := check_type(field.name, value, field.type)) is not value:
            object.__setattr__(settings, field.name, plain)  # frozen


def checked(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A function whose arguments are checked by its annotations, see `check_type`."""

    @functools.wraps(function)
    def check_and_call(*given: Given.args, **named: Given.kwargs) -> Returned:
        signature = inspect.signature(function)
        bound = signature.bind(*given, **named)
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.annotation is not parameter.empty:
                bound.arguments[name] = check_type(name, value, parameter.annotation)
        return function(*bound.args, **bound.kwargs)

    return check_and_call


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
    if place.exists() and not is_empty(place):
        raise FileExistsError(f"{name}: wanted a new or empty folder, but {str(path)!r} has something in it")
    check_writable(name, place)
