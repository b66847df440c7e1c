"""What a transfer is to do: its arguments, checked, and what of them may change when it goes on."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from matt_fast.initializers import Method, needs_whole_model
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.arguments import check_arguments
from matt_fast.training.objectives import trains_input, trains_output
from matt_fast.training.options import TrainingOptions

# Of what decides the result these may be others when a run goes on; steps and epochs only more of them.
MAY_CHANGE = ("steps", "epochs", "validate_every", "patience")
# Where things lie, and what does not decide the result: files and folders are compared by their contents.
NOT_COMPARED = ("model", "tokenizer", "data", "eval_data", "parallel", "donor", "data_cache", "device", "track")
NOT_COMPARED += ("checkpoint_every", "training", "init")


@dataclass(frozen=True)
class Job:
    """The arguments of `transfer`, see there."""

    model: str | Path
    tokenizer: str | Path | PreTrainedTokenizerBase
    data: str | Path
    init: str | Path | Method
    init_head: str
    donor: str | Path | None
    parallel: str | Path | None
    freeze_shared: bool
    n_layers: int | None
    max_length: int
    batch_size: int
    training: TrainingOptions
    epochs: float | None
    precision: str
    split: str
    text_field: str
    data_cache: str | Path | None
    eval_data: str | Path | None
    eval_pieces: int
    checkpoint_every: str | int
    validate_every: str | int | None
    patience: int | None
    track: str | None
    seed: int
    device: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def __post_init__(self):
        check_arguments({x.name: getattr(self, x.name) for x in fields(self)})

    @property
    def hub_options(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}

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
        """Raise a ValueError if objective, start of rows or eval_data want a model of another kind."""
        with_head = trains_output(self.training.objectives())
        if with_head and teacher.masked:
            raise ValueError(
                "objective: ntp and boundary-head want a causal language model, but "
                f"{str(self.model)!r} is a masked one; got {self.training.objective!r}"
            )
        wishes = {
            f"objective {self.training.objective!r}": with_head,
            f"init {self.init_name!r} with init_head {self.init_head!r}": needs_whole_model(self.init, self.init_head),
            "eval_data": self.eval_data is not None,
        }
        for what in (what for what, wished in wishes.items() if wished):
            teacher.check_language_model(what)

    def untrained_tables(self) -> list[str]:
        """Lines on the table that the objective leaves as it is initialised, in a model whose head is not tied."""
        names, found = self.training.objectives(), []
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
        found["prepared"] = self.data_cache is not None or self.epochs is not None
        return found | asdict(self.training)

    def arguments(self, output: Path) -> dict:
        """The arguments of `transfer` by name."""
        return {"output": output} | {x.name: getattr(self, x.name) for x in fields(self)}


def changes(before: dict, now: dict, diverged: bool) -> list[str]:
    """What of the settings is not as it was and may not change, a line each.

    Args:
        before, now: `Job.settings` of the run, and of the call that is to go on with it.
        diverged: whether the run stopped because its loss went up; another learning rate is what it needs then.
    """
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        fewer = name in ("steps", "epochs") and None not in (old, new) and new < old
        if old != new and (fewer or name not in MAY_CHANGE) and not (diverged and name == "lr"):
            found.append(f"{name}: was {old!r}, now {new!r}")
    return found
