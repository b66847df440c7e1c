"""How to train: objective, steps, learning rate, and how the losses are computed."""

import math
from dataclasses import asdict, dataclass, replace

from matt_fast.loss.choices import check_choices
from matt_fast.support.checks import MANY, ROWS, check_choice, check_field_types, check_positive, check_range

OBJECTIVES = (
    "aim",
    "aim_star",
    "aim-all-layers",
    "token-distillation",
    "boundary-head",
    "ntp",
    "alm",
    "boundary-kl",
    "segment-kl",
)


def split_objectives(argument: str, objective: str) -> tuple[str, ...]:
    """The names in an objective.

    Raises:
        ValueError: an unknown name, or one that is given twice.
    """
    names = tuple(objective.split("+"))
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(
                f"{argument}: wanted one or more of {', '.join(OBJECTIVES)}, joined by '+'; got {objective!r}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{argument}: wanted each name once, got {objective!r}")
    return names


HEALING = ("lora", "outer", "full")


@dataclass(frozen=True)
class HealingOptions:
    """How layers are trained together with the rows. The rates did best (docs/healing-tried.md), the objective keeps
    most of what the model would say (docs/healing.md).

    Attributes:
        method: "lora" (adapters of low rank beside all linear layers, by peft), "outer" (the first and last layers),
            "full" (all layers).
        steps: number of updates.
        lr: learning rate of the layers; rows keep `rows_lr`. Both rise and fall as `TrainingOptions.lr_at` says.
        rows_lr: learning rate of the rows.
        objective: as in `TrainingOptions`; one or more of those that reach the model's output.
        rank: of LoRA; its products are scaled by 2.
        outer_layers: how many at either end, for "outer".
        max_worse: stop where bits per byte on a further held-out text are more than this share above those of the
            original model, or of the start where that is worse; looked at by each validation. None for no limit.
        keep_adapter: write the LoRA adapter into the result too, beside the weights that it is merged into.
    """

    method: str = "lora"
    steps: int = 200
    lr: float = 1e-3
    rows_lr: float = 3e-3
    objective: str = "segment-kl"
    rank: int = 16
    outer_layers: int = 2
    max_worse: float | None = 0.02
    keep_adapter: bool = False

    def __post_init__(self):
        check_field_types(self)
        check_choice("heal", self.method, HEALING)
        for name, most in (("steps", MANY), ("rank", ROWS), ("outer_layers", ROWS)):
            check_range(f"heal_{name}", getattr(self, name), 1, most)
        for name in ("lr", "rows_lr"):
            check_positive(f"heal_{name}", getattr(self, name))
        if self.max_worse is not None and not 0 <= self.max_worse < math.inf:
            raise ValueError(f"heal_max_worse: wanted a share of 0 or more, got {self.max_worse}")
        split_objectives("heal_objective", self.objective)
        if self.keep_adapter and self.method != "lora":
            raise ValueError(f"keep_adapter: wanted heal='lora' with it, got {self.method!r}")


def healing_settings(healing: HealingOptions | None) -> dict[str, object]:
    """Healing's options by the names that the command line has; only `heal`, and that None, where there is none."""
    if healing is None:
        return {"heal": None}
    values = asdict(healing)
    return {"heal": values.pop("method")} | {HEAL_NAMES.get(x, f"heal_{x}"): value for x, value in values.items()}


HEAL_NAMES = {"keep_adapter": "keep_adapter"}  # an option that is not called after its field


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Objective and learning rate are those that did best in benchmarks/bench_objectives.py.

    Attributes:
        objective: one or more of OBJECTIVES, joined by "+"; all but the first are scaled to the first's value at
            each step.
        steps: number of updates; 0 leaves the rows as they start.
        lr: learning rate of AdamW; there is no weight decay.
        warmup_steps: the rate rises linearly from 0 over so many steps at the start.
        decay_steps: it falls linearly to 0 over so many steps at the end (with a warm-up: warm-up-stable-decay); half
            of the steps that the warm-up leaves if None, 0 for a constant rate.
        moments: of AdamW, for rows that a step's batches do not have: "lazy" leaves them and their moments alone,
            "dense" moves them on as their moments fade, which takes time with the size of the vocabulary.
        accumulation: batches per update.
        packing: fill each row of a batch with as many chunks as it holds, each a document that no other sees.
        max_grad_norm: clip the gradient of a step's rows to this norm; None for no clipping. Input and output rows that
            are not tied are clipped each on their own.
        metric, reduction: of the AIM losses, as in `aim_loss`; the other objectives have no choice.
        alm_temperature: of alm: a segment's probability counts as its power of 1/temperature.
        alm_divergence: of alm: "kl", "reverse-kl" or "tvd" (total variation).
        backend: as in `aim_loss`; it also runs lazy row updates, see `RowAdamW`.
        attn_implementation: what the layers run; what the model is loaded with, SDPA where it has it, if None.
        checkpointing: keep only what goes into each layer of the student, and run the layer once more in backward: less
            memory, more time.
        compile: run the layers of both sides through torch.compile, but for those whose attention is captured; not with
            packing.
        quantization: of the frozen layers while they are trained through: "8bit" or "4bit" (NF4), by bitsandbytes.
            Embeddings stay as they are, and the result has the original weights.
        offload: where the frozen layers wait until each runs: "cpu" (memory, for a model that runs on a GPU) or "disk".
            Wants checkpointing: without it autograd keeps the weights of every layer that a pass went through.
        shard: spread the frozen layers over the processes: each keeps a part of every weight, and a layer is gathered
            while it runs, once in each pass. The result is that of whole copies but for rounding.
    """

    objective: str = "token-distillation"
    steps: int = 1000
    lr: float = 3e-3
    warmup_steps: int = 0
    decay_steps: int | None = None
    moments: str = "lazy"
    accumulation: int = 1
    packing: bool = False
    max_grad_norm: float | None = 1.0
    metric: str = "mse"
    reduction: str = "pairs"
    alm_temperature: float = 100.0
    alm_divergence: str = "kl"
    backend: str = "auto"
    attn_implementation: str | None = None
    checkpointing: bool = False
    compile: bool = False
    quantization: str | None = None
    offload: str | None = None
    shard: bool = False

    def __post_init__(self):
        check_field_types(self)
        if "aim-all-layers" in self.objectives() and self.checkpointing:
            raise ValueError("checkpointing: wanted an objective other than aim-all-layers, which keeps every layer")
        if self.packing and self.compile:
            raise ValueError(
                "packing and compile: wanted one of them, got both: attention runs on one document at a time, and "
                "layers would be compiled anew for the documents of each batch"
            )
        check_range("steps", self.steps, 0, MANY)
        check_range("accumulation", self.accumulation, 1, ROWS)
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name}: wanted 0 or more, got {getattr(self, name)}")
        if self.warmup_steps + self.falling_steps > self.steps:
            raise ValueError(
                f"warmup_steps and decay_steps: wanted at most the {self.steps} steps together, "
                f"got {self.warmup_steps} and {self.falling_steps}"
            )
        for name, most in (("lr", math.inf), ("max_grad_norm", math.inf), ("alm_temperature", MANY)):
            check_positive(name, getattr(self, name), most)
        for name, usual in (("metric", "mse"), ("reduction", "pairs")):
            value = getattr(self, name)
            if value != usual and not any(objective.startswith("aim") for objective in self.objectives()):
                raise ValueError(
                    f"{name}: wanted {usual!r} with an objective that has no AIM loss ({self.objective}), got {value!r}"
                )
        check_choice("alm_divergence", self.alm_divergence, ("kl", "reverse-kl", "tvd"))
        check_choice("moments", self.moments, ("lazy", "dense"))
        for name, choices in (("quantization", ("8bit", "4bit")), ("offload", ("cpu", "disk"))):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
                if self.compile:
                    raise ValueError(f"{name} and compile: wanted one of them, got both")
        if self.quantization is not None and self.offload is not None:
            raise ValueError("quantization and offload: wanted one of them, got both")
        if self.shard:
            self._check_shard()
        if self.offload is not None and not self.checkpointing:
            raise ValueError(
                "offload: wanted checkpointing with it, got none: the weights of every layer would stay until backward"
            )
        check_choices({name: getattr(self, name) for name in ("metric", "reduction", "backend")})

    def _check_shard(self) -> None:
        """Raise a ValueError where layers that are spread over processes do not go with the other options."""
        reasons = {
            "quantization": "bitsandbytes keeps scales beside the weights, and FSDP spreads the weights only",
            "offload": "layers wait in the memory of all processes",
            "compile": "compiled layers were not tried on weights that are gathered",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"shard and {name}: wanted one of them, got both: {reason}")

    @property
    def falling_steps(self) -> int:
        """`decay_steps`, or what stands for it."""
        return max(0, self.steps - self.warmup_steps) // 2 if self.decay_steps is None else self.decay_steps

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1; the last step of a warm-up has the full rate."""
        rising = step / self.warmup_steps if self.warmup_steps else 1.0
        falling = (self.steps - step + 1) / self.falling_steps if self.falling_steps else 1.0
        return self.lr * min(1.0, rising, falling)

    def objectives(self) -> tuple[str, ...]:
        """The names in `objective`.

        Raises:
            ValueError: an unknown name, or one that is given twice.
        """
        return split_objectives("objective", self.objective)


WARMING = 20  # healing warms up over one of so many steps


def options_of_healing(training: TrainingOptions, healing: HealingOptions) -> TrainingOptions:
    """How healing trains the rows; the layers follow. All but the objective, its steps and rates is as in `training`.

    Raises:
        ValueError: what is set in `training` does not go with healing's objective or method.
    """
    if training.shard and healing.method != "lora":
        raise ValueError(
            "heal: wanted 'lora' with layers that are spread over processes, whose weights stay as they are, got "
            f"{healing.method!r}"
        )
    return replace(
        training,
        objective=healing.objective,
        steps=healing.steps,
        lr=healing.rows_lr,
        warmup_steps=healing.steps // WARMING,
        decay_steps=None,
        metric="mse",
        reduction="pairs",
    )
