"""Where training stands: what happened so far, and all that the next step depends on."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from matt_fast.data.positions import Position
from matt_fast.model.embeddings import RowAdamW
from matt_fast.training.options import TrainingOptions
from matt_fast.training.sides import Student

if TYPE_CHECKING:
    from matt_fast.training.layers import TrainedLayers  # imports peft


@dataclass
class Progress:
    """What happened so far in this process, handed to the progress callback after each step.

    `parts` has the values of the objectives of the last step by name, before they are scaled to the first; `lr` and
    `gradient_norm` (of the tables' norms the largest, before clipping) are the last step's; `new_tokens_seen` counts
    the trainable rows that occurred in any process; `epoch` is the pass over the data, from 0; `seconds` are counted
    from the first batch on; `padding` is the share of both sides' tokens that is padding, `waiting` the share of the
    time in which the loop waited for data; `flops` is the work so far, see `FlopCounter`.
    """

    step: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    lr: float = math.nan
    gradient_norm: float = math.nan
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    new_tokens_seen: int = 0
    steps_without_new_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # no Counter: `asdict` would count its items
    padding_tokens: int = 0
    all_tokens: int = 0
    seconds_waiting: float = 0.0
    flops: int = 0
    counted_flops: int = 0
    counted_tokens: int = 0
    first_loss: float | None = None  # of the first step in which new tokens occurred
    steps_far_off: int = 0  # in a row, up to this one, with a loss DIVERGED times the first

    @property
    def padding(self) -> float:
        return self.padding_tokens / max(1, self.all_tokens)

    @property
    def waiting(self) -> float:
        return self.seconds_waiting / self.seconds if self.seconds else 0.0

    @property
    def counts(self) -> dict[str, Any]:
        """What each process counts in its own share of the data."""
        return {"tokens": self.tokens, "skipped": self.skipped}


def joined(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`Progress.counts` of several processes, as one."""
    shares = list(counts)
    skipped = sum((Counter(x["skipped"]) for x in shares), Counter())
    return {"tokens": sum(x["tokens"] for x in shares), "skipped": dict(skipped)}


@dataclass
class TrainingState:
    """All that the next step depends on beside its batches, and what happened so far.

    Attributes:
        student: its rows, trained in place.
        optimizers: one for each of its tables.
        progress: see `Progress`.
        seen: [student rows] int64 on the CPU, how often each id occurred in this process's batches.
        occurred: [trainable rows] bool, the input rows that occurred in any process.
        pending: [trainable rows, hidden] float32, what the output rows' gradients add up to since each row was updated
            last; None where no objective trains them.
        position: where this process's stream of batches stands.
        layers: layers that are trained beside the rows; None for rows alone.
    """

    student: Student
    optimizers: list[RowAdamW]
    progress: Progress
    seen: torch.Tensor
    occurred: torch.Tensor
    pending: torch.Tensor | None
    position: Position
    layers: "TrainedLayers | None" = None

    @classmethod
    def begin(
        cls, student: Student, options: TrainingOptions, layers: "TrainedLayers | None" = None
    ) -> "TrainingState":
        """The state before the first step."""
        chosen = {"moments": options.moments, "backend": options.backend}
        table = student.input
        return cls(
            student=student,
            optimizers=[RowAdamW(table.trainable, options.lr, **chosen) for table in student.tables],
            progress=Progress(),
            seen=torch.zeros(len(table.slot), dtype=torch.int64),
            occurred=torch.zeros(len(table.trainable), dtype=torch.bool, device=table.trainable.device),
            pending=None if student.head is None else torch.zeros_like(student.tables[-1].trainable),
            position=Position(),
            layers=layers,
        )
