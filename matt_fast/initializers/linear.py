"""A linear map from one space to another, fitted to tokens that are in both."""

from collections.abc import Callable

import torch

# Shares of the mean eigenvalue that are added to all of them; the one that leaves out each token best is taken.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


@torch.no_grad()
def linear_map(source: torch.Tensor, target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ridge regression of `target` by `source`, both seen from their means; the ridge is chosen by leaving out.

    Each token's error, had it not been fitted to, is told in closed form: its residual over 1 - its leverage.

    Args:
        source: [s, a] floating point; target: [s, d], on the same device. Computed in float64.

    Returns:
        a function of [n, a] that gives [n, d] float32.
    """
    source, target = source.detach().double(), target.detach().double()
    middle, aim = source.mean(0), target.mean(0)
    left, right = source - middle, target - aim
    # [a, s] @ [s, a] -> [a, a]
    values, vectors = torch.linalg.eigh(left.T @ left)
    values = values.clamp_min(0)
    turned, products = left @ vectors, vectors.T @ (left.T @ right)
    best, chosen = torch.inf, None
    for share in RIDGES:
        scale = 1 / (values + share * values.mean().clamp_min(torch.finfo(torch.float64).tiny))
        leverage = (turned.square() * scale).sum(1) + 1 / len(source)
        residual = right - turned @ (scale[:, None] * products)
        error = float((residual / (1 - leverage).clamp_min(1e-9)[:, None]).square().mean())
        if error < best:
            best, chosen = error, vectors @ (scale[:, None] * products)
    return lambda some: (aim + (some.double() - middle) @ chosen).float()
