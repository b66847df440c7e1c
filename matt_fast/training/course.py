"""Whether a loss has gone the wrong way, told while there is time to do something about it."""

from collections.abc import Sequence

import numpy as np

TOGETHER = 100  # steps that are averaged: more than the difference between batches
GROWN = 2  # times the lowest of these averages
GROWN_AT_ONCE = 3  # times the first loss, of one batch alone


def rising(losses: Sequence[float]) -> str | None:
    """A line that says so where the last TOGETHER losses are GROWN times as high as any so many before, on average.

    Or GROWN_AT_ONCE times as high as the first one.

    Args:
        losses: of all steps so far; 0 where a batch had nothing to predict, which is left out.
    """
    values = np.asarray(losses[len(losses) % TOGETHER :], dtype=float).reshape(-1, TOGETHER)
    counts = (values > 0).sum(1)
    means = np.where(counts > 0, values.sum(1) / np.maximum(1, counts), np.inf)
    if not len(means) or means[-1] == np.inf:
        return None
    now = f"the loss of the last {TOGETHER} steps up to {len(losses):,} is {means[-1]:.3g} on average, and was"
    lowest, first = int(np.argmin(means)), next(x for x in losses if x > 0)
    if means[-1] > GROWN * means[lowest]:
        return f"{now} {means[lowest]:.3g} up to step {len(losses) - TOGETHER * (len(means) - 1 - lowest):,}"
    return f"{now} {first:.3g} at the start" if means[-1] > GROWN_AT_ONCE * first else None
