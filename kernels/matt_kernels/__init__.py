"""Triton kernels for the Attention Influence Modeling loss. Imports torch and triton only.

In progress, and not reached from `matt_fast.aim_loss`: forward and backward with the mean squared error run in the
interpreter. No kernel has run on a GPU. float32 gradients have up to 2.3 times the plain formula's own error (the bar
is 2), aim_basis spills, tile shapes are guesses, and the cosine metric and aim_star are missing.
"""

from triton import knobs

from matt_kernels.loss import aim_loss, aim_plan

if knobs.runtime.interpret:
    from matt_kernels.interpreter import repair_bfloat16

    repair_bfloat16()

__all__ = ["aim_loss", "aim_plan"]
