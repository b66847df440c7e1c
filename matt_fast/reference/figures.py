"""What `MATT` logs, under the names of the reference library."""

import logging

import torch

from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training.loop import Progress

logger = logging.getLogger(__name__)

GIB = 1 << 30


def losses_logged(parts: dict[str, float]) -> dict[str, float]:
    """The losses of a step by our names and the reference library's, and the factor that the NTP loss is scaled by.

    Args:
        parts: of `Progress`: the AIM loss first, then the NTP loss if there is one.
    """
    aim, *ntp = parts.values()
    logged = {**parts, "aim_loss": aim}
    for loss in ntp:
        factor = aim / loss if loss else 0.0
        logged |= {"ntp_loss": loss, "ntp_scaling_factor": factor, "scaled_ntp_loss": factor * loss}
    return logged


def begin_figures(device: torch.device) -> None:
    """Let the peak memory of `figures_at_end` begin here; before training."""
    if device.type == "cuda":
        reset_peak_memory(device)


def figures_at_end(progress: Progress, device: torch.device) -> dict[str, float]:
    """Seconds of training, and on a CUDA device GiB that were in use at most."""
    figures = {"total_training_time_seconds": progress.seconds}
    if device.type == "cuda":
        figures["peak_vram_gb"] = peak_memory(device) / GIB
    logger.info("at the end of training: %s", figures)
    return figures
