"""What a transfer is to do: its arguments, checked, and what of them may change when it goes on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PreTrainedTokenizerBase

from matt_fast.initializers import Method, check_init_head, needs_whole_model
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.arguments import check_arguments
from matt_fast.runs.record import HELD_OUT
from matt_fast.support.checks import check_field_types
from matt_fast.training.objectives import compares_predictions, trains_input, trains_output
from matt_fast.training.options import (
    HealingOptions,
    TrainingOptions,
    healing_settings,
    options_of_healing,
    split_objectives,
)

# Of what decides the result these may be others when a run goes on; steps not fewer than are done, epochs only more.
STEPS = ("steps", "heal_steps")
HOW = ("checkpointing", "offload", "compile")  # how it is computed: the result is the same but for rounding
DIVISION = ("batch_size", "accumulation")  # of the rows of an update: others where it has as many, in the same order
MAY_CHANGE = (*STEPS, *HOW, "epochs", "validate_every", "patience", "processes", "shard")
RATES = ("lr", "heal_lr", "heal_rows_lr")  # these may where the loss went up: another one is what the run needs then
# Where things lie, and what does not decide the result: files and folders are compared by their contents.
NOT_COMPARED = (
    "model",
    "teacher",
    "tokenizer",
    "data",
    "eval_data",
    "parallel",
    "donor",
    "data_cache",
    "prepared",
    "device",
    "track",
)
NOT_COMPARED += ("language", "data_workers", "checkpoint_every", "completions", "training", "healing", "init")


@dataclass(frozen=True)
class Job:
    """The arguments of `transfer`, see there."""

    model: str | Path
    tokenizer: str | Path | PreTrainedTokenizerBase
    data: str | Path | None
    teacher: str | Path | None
    init: str | Path | Method
    init_head: str
    donor: str | Path | None
    omp_k: int
    parallel: str | Path | None
    map_tokens: Sequence[str]
    freeze_shared: bool
    untie: bool
    n_layers: int | None
    max_length: int
    batch_size: int
    training: TrainingOptions
    healing: HealingOptions | None
    epochs: float | None
    precision: str
    split: str
    text_field: str
    per_token: int | None
    snippets: int | None
    rehearse: int
    data_cache: str | Path | None
    prepared: str | Path | None
    data_workers: int | None
    eval_data: str | Path | Mapping[str, str | Path] | None
    eval_pieces: int
    completions: int
    checkpoint_every: str | int
    validate_every: str | int | None
    patience: int | None
    track: str | None
    language: Sequence[str]
    seed: int
    device: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def __post_init__(self):
        check_field_types(self)
        check_arguments({x.name: getattr(self, x.name) for x in fields(self)})
        if self.healing is not None:
            options_of_healing(self.training, self.healing)  # an error now, not behind the training of the rows
        for name, usual in (("alm_temperature", 100.0), ("alm_divergence", "kl")):
            value = getattr(self.training, name)
            if value != usual and "alm" not in (*self.training.objectives(), *self._healing_names):
                raise ValueError(f"{name}: wanted {usual!r} with objectives without alm, got {value!r}")

    @property
    def hub_options(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}

    @property
    def prepares_data(self) -> bool:
        """Whether chunks are made before training."""
        reasons = (self.data_cache, self.prepared, self.epochs, self.per_token, self.snippets)
        return any(x is not None for x in reasons)

    @property
    def trains_rows_alone(self) -> bool:
        return bool(self.training.steps or self.epochs is not None)

    @property
    def held_out(self) -> dict[str, str | Path]:
        """Name -> place of each held-out text; the first one decides."""
        if self.eval_data is None:
            return {}
        return dict(self.eval_data) if isinstance(self.eval_data, Mapping) else {HELD_OUT: self.eval_data}

    @property
    def init_name(self) -> str:
        return getattr(self.init, "__name__", "function") if callable(self.init) else str(self.init)

    def layers_of(self, teacher: Teacher) -> int:
        """The target layer, counted from 1. Raises ValueError if the model does not have it."""
        chosen = max(1, round(teacher.depth / 3)) if self.n_layers is None else self.n_layers
        if not 1 <= chosen <= teacher.depth:
            raise ValueError(f"n_layers: wanted 1 to {teacher.depth} for this model, got {chosen}")
        return chosen

    def check_kind(self, teacher: Teacher) -> None:
        """Raise a ValueError if objective, starts of rows or eval_data want a model of another kind."""
        if self.init_head not in ("same", "boundary"):
            check_init_head(self.init_head, teacher.outline(torch.float32))
        with_head = trains_output(self.training.objectives())
        for argument, names in (("objective", self.training.objectives()), ("heal_objective", self._healing_names)):
            if trains_output(names) and teacher.masked:
                raise ValueError(
                    f"{argument}: ntp, alm, boundary-kl, segment-kl and boundary-head want a causal language model, "
                    f"but {str(self.model)!r} is a masked one; got {'+'.join(names)!r}"
                )
        for name in ("snippets", "rehearse"):
            if getattr(self, name) and teacher.masked:
                raise ValueError(
                    f"{name}: wanted a causal language model to write texts, got the masked one {str(self.model)!r}"
                )
        if self.healing is not None:
            self._check_healing(teacher.depth)
        wishes = {
            f"objective {self.training.objective!r}": with_head,
            "heal": self.healing is not None,
            f"init {self.init_name!r} with init_head {self.init_head!r}": needs_whole_model(self.init, self.init_head),
            "eval_data": self.eval_data is not None,
            "snippets": self.snippets is not None,
            "rehearse": self.rehearse > 0,
        }
        for what in (what for what, wished in wishes.items() if wished):
            teacher.check_language_model(what)
        if needs_whole_model(self.init, self.init_head) and teacher.masked:
            raise ValueError(
                "init: 'composed', 'contextual' and init_head 'boundary' want a causal language model, but "
                f"{str(self.model)!r} is a masked one; got init {self.init_name!r} with init_head {self.init_head!r}"
            )

    @property
    def _healing_names(self) -> tuple[str, ...]:
        return () if self.healing is None else split_objectives("heal_objective", self.healing.objective)

    def _check_healing(self, depth: int) -> None:
        options, healing = self.training, self.healing
        if healing.method == "outer" and healing.outer_layers > depth // 2:
            raise ValueError(
                f"outer_layers: wanted 1 to {depth // 2} at either end of this model's {depth} layers, "
                f"got {healing.outer_layers}"
            )
        if not trains_input(self._healing_names):
            raise ValueError(
                f"heal_objective: wanted one that runs the student's layers, got {healing.objective!r}, which does not"
            )
        if options.offload is not None:
            raise ValueError(f"heal and offload: wanted one of them, got {healing.method!r} and {options.offload!r}")
        if options.quantization is not None and healing.method != "lora":
            raise ValueError(
                f"heal: wanted 'lora' with quantised layers, which cannot be trained, got {healing.method!r}"
            )

    def other_teacher(self) -> Teacher | None:
        """The model to learn from, where it is another one.

        Raises:
            ValueError: it is no causal language model, or an objective compares what lies inside the two models.
        """
        if self.teacher is None:
            return None
        of_rows = self.training.objectives() if self.trains_rows_alone else ()
        if unfit := [name for name in (*of_rows, *self._healing_names) if not compares_predictions(name)]:
            raise ValueError(
                f"teacher: wanted objectives that compare what two models predict (alm, boundary-kl, segment-kl, ntp) "
                f"with one that is not the model itself, got {', '.join(unfit)}"
            )
        other = Teacher(self.teacher, argument="teacher", **self.hub_options)
        other.check_language_model("teacher")
        if other.masked:
            raise ValueError(f"teacher: wanted a causal language model, got the masked one {str(self.teacher)!r}")
        return other

    def untrained_tables(self) -> list[str]:
        """Lines on the table that the objective leaves as it is initialised, in a model whose head is not tied."""
        names, found = self.training.objectives(), []
        if self.healing is not None or not self.trains_rows_alone:
            return found
        if not trains_output(names):
            found.append(
                "the model's output head is not tied to its input embedding: its new rows are initialised but not "
                f"trained, since the objective {self.training.objective!r} reaches input embeddings only (paper, "
                "appendix A); add boundary-head or ntp to it"
            )
        if not trains_input(names):
            found.append(
                "the model's output head is not tied to its input embedding: new input rows are initialised but not "
                f"trained, since the objective {self.training.objective!r} reaches output rows only; add "
                "token-distillation or aim to it"
            )
        return found

    def settings(self) -> dict:
        """All that decides the result, as JSON has it, without what is compared by contents."""
        found = {x.name: getattr(self, x.name) for x in fields(self) if x.name not in NOT_COMPARED}
        init = self.init_name
        found["init"] = Path(init).name if Path(init).exists() else init
        found["prepared"] = self.prepares_data
        return found | asdict(self.training) | healing_settings(self.healing)

    def arguments(self, output: Path) -> dict:
        """The arguments of `transfer` by name."""
        return {"output": output} | {x.name: getattr(self, x.name) for x in fields(self)}


def rows_of_update(settings: Mapping) -> int:
    """How many rows all processes together take for an update, by `Job.settings` and "processes"."""
    return math.prod(settings.get(name, 1) for name in ("processes", *DIVISION))


def changes(before: dict, now: dict, diverged: bool, done: Mapping[str, float] = MappingProxyType({})) -> list[str]:
    """What of the settings is not as it was and may not change, a line each.

    Args:
        before, now: `Job.settings` of the run, and of the call that is to go on with it.
        diverged: whether the run stopped because its loss went up; another learning rate is what it needs then.
        done: steps of each of STEPS that are behind; infinitely many where that training is over.
    """
    found = []
    rows, was = (rows_of_update(x) for x in (now, before))
    if rows != was and now.get("epochs") is not None:
        found.append(f"rows of an update: was {was}, now {rows}, which makes other epochs of the steps")
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if name in DIVISION:
            if old != new and rows != was:
                found.append(f"{name}: was {old!r}, now {new!r}, which makes updates of {rows} rows that had {was}")
            continue
        behind = done.get("steps" if name == "epochs" else name, 0)
        if old != new and behind == math.inf:
            found.append(f"{name}: was {old!r}, now {new!r}, but that training is over")
            continue
        if name in STEPS and old != new and None not in (old, new) and new < behind:
            found.append(f"{name}: was {old!r}, now {new!r}, but {behind} are done")
        fewer = name == "epochs" and None not in (old, new) and new < old
        if old != new and (fewer or name not in MAY_CHANGE) and not (diverged and name in RATES):
            found.append(f"{name}: was {old!r}, now {new!r}")
    return found
