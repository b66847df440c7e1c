"""The settings of `MATT`, under the names of the reference library."""

from dataclasses import dataclass

import torch

PRECISIONS = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "bf16": torch.bfloat16,
    "32": torch.float32,
    "32-true": torch.float32,
}


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
        max_epochs, max_steps: what ends training, whichever comes first; -1 for no limit of steps.
        gradient_clip_val: norm to clip a step's gradients to; 0 for no clipping.
        gradient_clip_algorithm: "norm".
        accumulate_grad_batches: batches per update.
        pad_to_multiple_of: pad batches to a multiple of this length.
        strategy: "auto" or "ddp": gradients are averaged over the processes.
        precision: of the frozen weights: "bf16-mixed", "bf16-true", "bf16", "32-true", "32"; trained rows are float32.
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
        ValueError: a value that cannot be honoured; the message says why.
    """

    seed: int = 0
    accelerator: str = "auto"
    devices: int | str = -1
    checkpoint_output_dir: str = "output/checkpoints"
    dataset_output_dir: str = "output/datasets"

    batch_size: int = 4
    num_workers: int = 4

    max_epochs: int = 1
    max_steps: int = -1
    gradient_clip_val: float = 1.0
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
    wandb_output_dir: str = "output/wandb"

    def __post_init__(self):
        self.precision = str(self.precision)
        one_of = {
            "accelerator": (("auto", "gpu", "cuda", "cpu"), "the loss runs on CUDA devices and the CPU"),
            "gradient_clip_algorithm": (("norm",), "clipping single values would change the direction of a row"),
            "strategy": (("auto", "ddp"), "only gradients of rows are shared; there is nothing to shard"),
            "precision": (tuple(PRECISIONS), "gradients of the AIM loss are too small for fp16 and below"),
            "loss": (("mse", "cosine"), "the AIM loss has these two metrics"),
            "aim_impl": (("aim", "aim_star"), "the AIM loss has these two variants"),
        }
        for name, (known, reason) in one_of.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: wanted one of {', '.join(known)} ({reason}); got {getattr(self, name)!r}")
        least = {
            "batch_size": 1,
            "num_workers": 0,
            "max_epochs": 1,
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
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: wanted at least {bound}, got {getattr(self, name)}")
        if self.max_steps == 0:
            raise ValueError("max_steps: wanted -1 or at least 1, got 0")
        if self.devices != "auto" and (not isinstance(self.devices, int) or (self.devices < 1 and self.devices != -1)):
            raise ValueError(f"devices: wanted a number of processes, -1 or 'auto', got {self.devices!r}")
        if not self.lr > 0:
            raise ValueError(f"lr: wanted a number above 0, got {self.lr}")
