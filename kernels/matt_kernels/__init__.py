"""Triton kernels for the Attention Influence Modeling loss. Imports torch and triton only."""

from matt_kernels.loss import aim_loss, aim_plan

__all__ = ["aim_loss", "aim_plan"]
