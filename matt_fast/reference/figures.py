"""What `MATT` logs, under the names of the reference library."""

import logging
import math

import torch
from accelerate import Accelerator

from matt_fast.reference.config import MATTConfig
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.support.units import GIB
from matt_fast.training.state import Progress

logger = logging.getLogger(__name__)


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


def flops_of_a_chunk(progress: Progress, config: MATTConfig, chunks: int, accelerator: Accelerator) -> int:
    """Work of the first step, forward and backward, by the chunks that this process had in it.

    Args:
        progress: after the first step.
        chunks: in the data.
    """
    mine = math.ceil(chunks / accelerator.num_processes)  # of a pass
    passes, batches = divmod(config.accumulate_grad_batches, math.ceil(mine / config.batch_size))
    return progress.flops // (passes * mine + min(batches * config.batch_size, mine))


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
