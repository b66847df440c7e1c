"""The student's rows at the start of training, over the teacher's."""

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.continuations import Continuations
from matt_fast.alignment.next_token import next_token_classes
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import Rows
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.head import Head, logit_rule
from matt_fast.training.objectives import needs_target, trains_output
from matt_fast.training.sides import Student, Target


def frozen_rows(vocabulary: VocabularyPair, freeze_shared: bool) -> torch.Tensor:
    """[student rows] int64: the teacher's row of each token whose row stays as it is, -1 for one that is trained."""
    frozen_from = torch.full((vocabulary.rows,), -1)
    if freeze_shared:
        for student_id, match in vocabulary.matches.items():
            frozen_from[student_id] = match.teacher_id
    return frozen_from


def make_student(
    trunk: PreTrainedModel,
    vocabulary: VocabularyPair,
    start: Rows,
    freeze_shared: bool,
    objectives: tuple[str, ...],
    target: Target | None = None,
) -> Student:
    """The student's vocabulary over the teacher's; shared tokens are frozen or start from the teacher's rows.

    Args:
        trunk: the frozen model, on its device; a causal language model if an objective trains the output side.
        vocabulary, start: from `VocabularyPair` and `initial_rows`.
        freeze_shared: whether rows of shared tokens stay as they are, in both tables.
        objectives: names of the objectives; they decide what of the output side is there.
        target: the output side of the model to learn from, from `make_target`; that of `trunk` if None.
    """
    frozen_from = frozen_rows(vocabulary, freeze_shared)
    table = EmbeddingTable(trunk.get_input_embeddings().weight, frozen_from, start.input)
    if not trains_output(objectives):
        return Student(table)
    output = None
    if start.output is not None:
        output = EmbeddingTable(trunk.get_output_embeddings().weight, frozen_from, start.output)
    weight = (table if output is None else output).weight()
    bias = None if start.output_bias is None else start.output_bias.to(weight)
    target = target or make_target(trunk, vocabulary, objectives)
    return Student(table, output, Head(weight, bias, **logit_rule(trunk)), target)


def make_target(teacher: PreTrainedModel, vocabulary: VocabularyPair, objectives: tuple[str, ...]) -> Target | None:
    """The teacher's output side, as far as the objectives need it."""
    needed = needs_target(objectives)
    if not needed:
        return None
    output = teacher.get_output_embeddings()
    head = Head(output.weight.detach(), getattr(output, "bias", None), **logit_rule(teacher))
    if not needed & {"classes", "continuations"}:
        return Target(head)
    *sides, n_classes = next_token_classes(vocabulary)
    sides = (torch.tensor(side, device=output.weight.device) for side in sides)
    return Target(head, *sides, n_classes, Continuations.of(vocabulary) if "continuations" in needed else None)
