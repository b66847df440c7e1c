"""Where the rows of new tokens start."""

from matt_fast.initializers.heuristics import METHODS, Method, initialize
from matt_fast.initializers.report import InitReport, Outlier
from matt_fast.initializers.rows import INIT_HEADS, INITS, Rows, initial_rows, needs_whole_model

__all__ = [
    "INITS",
    "INIT_HEADS",
    "METHODS",
    "InitReport",
    "Method",
    "Outlier",
    "Rows",
    "initial_rows",
    "initialize",
    "needs_whole_model",
]
