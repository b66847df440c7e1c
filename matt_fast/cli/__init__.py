"""The command line."""

from matt_fast.support.lazy import lazy_names

_WHERE = {
    "app": "matt_fast.cli.app",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
