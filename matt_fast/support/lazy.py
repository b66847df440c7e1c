"""Names of a package that are imported when they are first used, so that a command starts at once."""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, where: Mapping[str, str]) -> Callable[[str], object]:
    """A module's `__getattr__` for names that live in other modules.

    Args:
        package: the module's `__name__`.
        where: name -> the module that has it.
    """

    def getattr_(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(where[name]), name)

    return getattr_
