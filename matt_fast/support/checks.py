"""Types of settings, checked against what the settings are annotated with."""

from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args

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
