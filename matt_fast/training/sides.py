"""The student's vocabulary, its rows in a step, and the teacher's output side."""

from dataclasses import dataclass

import torch

from matt_fast.alignment.continuations import Continuations
from matt_fast.model.embeddings import BatchRows, EmbeddingTable, OutputRows
from matt_fast.model.head import Head


@dataclass(frozen=True)
class Target:
    """The teacher's output side, where an objective compares what both sides predict.

    Attributes:
        head: the teacher's output head.
        teacher_classes, student_classes: [teacher rows], [student rows] int64 and
        n_classes: see `next_token_classes`; None where no objective needs them.
        continuations: each side's tokens by the other's; None where no objective needs them.
    """

    head: Head
    teacher_classes: torch.Tensor | None = None
    student_classes: torch.Tensor | None = None
    n_classes: int = 0
    continuations: Continuations | None = None


@dataclass(frozen=True)
class Student:
    """The student's vocabulary: its embedding, and its output side where an objective needs it.

    Attributes:
        input: the input embedding.
        output: rows of the output head, where it is not tied to the embedding and an objective trains it.
        head: the whole output head; None where no objective needs it.
        target: the teacher's output side; None where no objective needs it.
    """

    input: EmbeddingTable
    output: EmbeddingTable | None = None
    head: Head | None = None
    target: Target | None = None

    @property
    def tables(self) -> list[EmbeddingTable]:
        return [self.input] if self.output is None else [self.input, self.output]

    def rows(self, ids: torch.Tensor) -> "StepRows":
        """The rows of one step, given the ids ([any shape] int64) that occur in it."""
        if self.head is None:
            return StepRows(self.input.rows(ids))
        output = self.tables[-1].output_rows()
        return StepRows(self.input.rows(ids, output if self.output is None else None), output)


@dataclass(frozen=True)
class StepRows:
    """The rows of one step as input embeddings, and as output embeddings where an objective trains these."""

    input: BatchRows
    output: OutputRows | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What receives the gradients, a tensor for each table; of tied ones it is that of the output rows."""
        if self.output is None or self.output.trainable is self.input.trainable:
            return [self.input.trainable]
        return [self.input.trainable, self.output.trainable]
