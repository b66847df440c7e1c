"""What a transfer is to do: its arguments, checked, and what of them may change when it goes on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from matt_fast.initializers import Method
from matt_fast.recipe.arguments import check_arguments
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
    map_tokens: Sequence[str]
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
