"""The AIM loss (paper §3.3-3.4): one function, engines behind it. See api.py."""

from matt_fast.loss.api import AIMLoss, aim_loss, tile_planner

__all__ = ["AIMLoss", "aim_loss", "tile_planner"]
