"""Which matt-fast this is."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def own_version() -> str:
    """The installed version; "not installed" where the package runs from a folder on the path."""
    try:
        return version("matt-fast")
    except PackageNotFoundError:
        return "not installed"
