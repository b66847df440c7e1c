"""The settings of `MATT`, under the names of the reference library."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from matt_fast.support.checks import check_field_types, check_positive
from matt_fast.training.options import TrainingOptions

PRECISIONS = {  # dtype of the frozen weights; None as they were loaded
    "bf16-mixed": None,
    "bf16-true": torch.bfloat16,
    "bf16": torch.bfloat16,
    "32": torch.float32,
    "32-true": torch.float32,
}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


@dataclass
class MATTConfig:
    """Settings of `MATT`, with the names and defaults of the reference library; `accelerator` alone is "auto" here.

    Attributes:
        seed: of the order of the data.
        accelerator: "auto" (a GPU if there is one), "gpu" or "cuda", "cpu".
        devices: processes; -1 or "auto" for those that `accelerate launch` or `torchrun` started, else their number.
        checkpoint_output_dir: folder of the checkpoints.
        dataset_output_dir: folder of the prepared data.
        batch_size: chunks per batch and process.
        num_workers: processes that load data.
        max_epochs, max_steps: passes over the data and updates; what comes first ends training, -1 is no limit.
        gradient_clip_val: norm to clip the gradients of a step's rows to, those of each table on their own; None or 0
            for no clipping.
        gradient_clip_algorithm: "norm".
        accumulate_grad_batches: batches per update.
        pad_to_multiple_of: pad batches to a multiple of this length.
        strategy: "auto" or "ddp": gradients are averaged over the processes. Lightning's variants of "ddp" that differ
            in how it looks for unused parameters are the same here.
        precision: of the frozen weights: "bf16-mixed" (as loaded: bfloat16 unless asked otherwise), "bf16-true" or
            "bf16", "32-true" or "32". Trained rows and their optimiser are always float32.
        log_every_n_steps: steps between two lines in the log.
        save_every_n_steps: steps between two checkpoints.
        save_top_k: checkpoints to keep, those with the lowest loss; -1 for all, 0 for none but the last.
        loss: "mse" or "cosine".
        aim_impl: "aim" or "aim_star".
        lr: learning rate of AdamW, without weight decay.
        num_warmup_steps, num_decay_steps: of the warm-up-stable-decay schedule.
        with_ntp: add the next-token loss, scaled to the AIM loss at each step.
        use_wandb, wandb_project, wandb_output_dir: log to Weights & Biases.

    Raises:
        TypeError: a value of another type.
        ValueError: a value that cannot be honoured; the message says why.
    """

    seed: int = 0
    accelerator: str = "auto"
    devices: int | str = -1
    checkpoint_output_dir: str | Path = "output/checkpoints"
    dataset_output_dir: str | Path = "output/datasets"

    batch_size: int = 4
    num_workers: int = 4

    max_epochs: int = 1
    max_steps: int = -1
    gradient_clip_val: float | None = 1.0
    gradient_clip_algorithm: str = "norm"
    accumulate_grad_batches: int = 1
    pad_to_multiple_of: int = 8
    strategy: str = "auto"
    precision: str = "bf16-mixed"
    log_every_n_steps: int = 50
    save_every_n_steps: int = 50_000
    save_top_k: int = -1
    loss: str = "mse"
    aim_impl: str = "aim"
    lr: float = 1e-4
    num_warmup_steps: int = 0
    num_decay_steps: int = 0
    with_ntp: bool = False

    use_wandb: bool = False
    wandb_project: str = "matt"
    wandb_output_dir: str | Path = "output/wandb"

    def __post_init__(self):
        if self.precision in (16, 32, 64):
            self.precision = str(self.precision)
        if isinstance(self.devices, list | tuple):
            raise TypeError(
                f"devices: wanted a number of processes, -1 or 'auto', got {self.devices}; which GPUs they use is for "
                "CUDA_VISIBLE_DEVICES to say"
            )
        check_field_types(self)
        if str(self.devices).removeprefix("-").isdecimal():
            self.devices = int(self.devices)
        one_of = {
            "accelerator": (("auto", "gpu", "cuda", "cpu"), "the loss runs on CUDA devices and the CPU"),
            "gradient_clip_algorithm": (("norm",), "clipping single values would change the direction of a row"),
            "strategy": (STRATEGIES, "only gradients of rows are shared; there is nothing to shard"),
            "precision": (
                tuple(PRECISIONS),
                "gradients of the AIM loss are too small for fp16 and below, and float64 is not offered",
            ),
            "loss": (("mse", "cosine"), "the AIM loss has these two metrics"),
            "aim_impl": (("aim", "aim_star"), "the AIM loss has these two variants"),
        }
        for name, (known, reason) in one_of.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: wanted one of {', '.join(known)} ({reason}); got {getattr(self, name)!r}")
        least = {
            "seed": 0,
            "batch_size": 1,
            "num_workers": 0,
            "max_epochs": -1,
            "max_steps": -1,
            "gradient_clip_val": 0,
            "accumulate_grad_batches": 1,
            "pad_to_multiple_of": 1,
            "log_every_n_steps": 1,
            "save_every_n_steps": 1,
            "save_top_k": -1,
            "num_warmup_steps": 0,
            "num_decay_steps": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:  # nor NaN
                raise ValueError(f"{name}: wanted at least {bound}, got {value}")
        for name in ("max_epochs", "max_steps"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: wanted -1 or at least 1, got 0")
        if self.max_epochs == self.max_steps == -1:
            raise ValueError("max_steps: wanted at least 1 where max_epochs is -1 (training would not end), got -1")
        if self.devices not in (-1, "auto") and (isinstance(self.devices, str) or self.devices < 1):
            raise ValueError(f"devices: wanted a number of processes, -1 or 'auto', got {self.devices!r}")
        check_positive("lr", self.lr)


def training_options(config: MATTConfig, chunks: int, processes: int) -> TrainingOptions:
    """The configuration for our training; a last step that a pass does not fill is filled from the next pass."""
    batches = math.ceil(math.ceil(chunks / processes) / config.batch_size)
    by_epochs = math.ceil(batches * config.max_epochs / config.accumulate_grad_batches)
    steps = min(n for n, limit in ((by_epochs, config.max_epochs), (config.max_steps, config.max_steps)) if limit != -1)
    if config.num_warmup_steps + config.num_decay_steps > steps:
        raise ValueError(
            f"num_warmup_steps and num_decay_steps: wanted at most the {steps} steps of this training together "
            f"(max_steps={config.max_steps}, max_epochs={config.max_epochs} over {chunks} chunks), got "
            f"{config.num_warmup_steps} and {config.num_decay_steps}"
        )
    return TrainingOptions(
        objective=config.aim_impl + ("+ntp" if config.with_ntp else ""),
        steps=steps,
        lr=config.lr,
        warmup_steps=config.num_warmup_steps,
        decay_steps=config.num_decay_steps,
        accumulation=config.accumulate_grad_batches,
        max_grad_norm=None if config.gradient_clip_val in (0, math.inf) else config.gradient_clip_val,
        metric=config.loss,
    )
