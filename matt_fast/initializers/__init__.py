"""Where the rows of new tokens start."""

from matt_fast.initializers.heuristics import METHODS, Method, initialize
from matt_fast.initializers.rows import INITS, Rows, initial_rows

__all__ = ["INITS", "METHODS", "Method", "Rows", "initial_rows", "initialize"]
