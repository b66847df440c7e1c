"""Whether a loss has gone the wrong way, told while there is time to do something about it."""

from collections.abc import Sequence

import numpy as np

TOGETHER = 100  # steps that are averaged: more than the difference between batches
GROWN = 2  # times the lowest of these averages


def rising(losses: Sequence[float]) -> str | None:
    """A line that says so where the last TOGETHER losses are GROWN times as high as any so many before, on average.

    Args:
        losses: of all steps so far; 0 where a batch had nothing to predict, which is left out.
    """
    values = np.asarray(losses[len(losses) % TOGETHER :], dtype=float).reshape(-1, TOGETHER)
    counts = (values > 0).sum(1)
    means = np.where(counts > 0, values.sum(1) / np.maximum(1, counts), np.inf)
    lowest = int(np.argmin(means)) if len(means) else 0
    if len(means) < 2 or not GROWN * means[lowest] < means[-1] < np.inf:
        return None
    step = len(losses) - TOGETHER * (len(means) - 1 - lowest)
    return (
        f"the loss of the last {TOGETHER} steps up to {len(losses):,} is {means[-1]:.3g} on average, and was "
        f"{means[lowest]:.3g} up to step {step:,}"
    )
