"""Triton kernels for the Attention Influence Modeling loss and the rows it trains. Imports torch and triton only."""

from triton import knobs

from matt_kernels.loss import aim_loss, aim_plan, tile_widths
from matt_kernels.optimizer import adamw_rows
from matt_kernels.plan import AimPlan
from matt_kernels.tune import autotune

if knobs.runtime.interpret:
    from matt_kernels.interpreter import patch_once, repair_bfloat16

    repair_bfloat16()
    patch_once()

__all__ = ["AimPlan", "adamw_rows", "aim_loss", "aim_plan", "autotune", "tile_widths"]
