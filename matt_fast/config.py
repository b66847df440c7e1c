"""Where the reference library has `MATTConfig`."""

from matt_fast.reference.config import MATTConfig

__all__ = ["MATTConfig"]
