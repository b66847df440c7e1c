"""Where the rows of new tokens start."""

from matt_fast.support.lazy import lazy_names

_WHERE = {
    "INITS": "matt_fast.initializers.choices",
    "INIT_HEADS": "matt_fast.initializers.choices",
    "METHODS": "matt_fast.initializers.choices",
    "InitReport": "matt_fast.initializers.report",
    "Method": "matt_fast.initializers.heuristics",
    "Outlier": "matt_fast.initializers.report",
    "Rows": "matt_fast.initializers.rows",
    "initial_rows": "matt_fast.initializers.rows",
    "initialize": "matt_fast.initializers.heuristics",
    "needs_whole_model": "matt_fast.initializers.rows",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
