"""The AIM loss (paper §3.3-3.4): one function, engines behind it. See api.py."""

from typing import TYPE_CHECKING

from matt_fast.support.lazy import lazy_names

if TYPE_CHECKING:
    from matt_fast.loss.api import AIMLoss as AIMLoss
    from matt_fast.loss.api import aim_loss as aim_loss
    from matt_fast.loss.api import tile_planner as tile_planner

_WHERE = {
    "AIMLoss": "matt_fast.loss.api",
    "aim_loss": "matt_fast.loss.api",
    "tile_planner": "matt_fast.loss.api",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
