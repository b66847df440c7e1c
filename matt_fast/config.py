"""Where the reference library has `MATTConfig`."""

from matt_fast.matt_config import MATTConfig

__all__ = ["MATTConfig"]
