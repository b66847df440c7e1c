"""Rows from the teacher's own states in a text: "contextual" for the embedding, "boundary" for the head.

A tied table serves as both. What is asked of it as an embedding and as a head is weighed in the metric of each. A row
that predicts well can lead the context behind it astray: where stretches of the text cost more with the new rows than
with those that were there before, the latter stay.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.initializers.boundary import boundary_rows, boundary_states, output_scale, tied_rows
from matt_fast.initializers.contextual import CONTEXTS, WIDTH, contextual_rows, mean_square_jacobian
from matt_fast.initializers.spelled import spell_texts
from matt_fast.model.capture import capture
from matt_fast.model.head import head_logits
from matt_fast.model.layers import decoder_layers

LAYERS = 1 / 8  # of the depth: where states of the two sides are compared
OUTPUT_WEIGHT = 10.0  # of a tied row's wish as an output row, beside that as an input row
OUTPUT_WEIGHT_SOLVED = 30.0  # the same while input rows are solved for, which moves them further
SCORED, STRETCH = 5, 256  # stretches, and their student tokens, that tell whether rows are better than their start


class StateRows(NamedTuple):
    """Two tables, the same one if tied; shared rows are as they came.

    Attributes:
        input, output: [student rows, hidden] float32.
        solved: [r] int64, the tokens whose input row was solved for.
        counts: [student rows] float32, how often each token occurs in the text.
    """

    input: torch.Tensor
    output: torch.Tensor
    solved: torch.Tensor
    counts: torch.Tensor


def rows_from_states(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    texts: Iterable[str],
    input_rows: torch.Tensor,
    output_means: torch.Tensor,
    output_bias: torch.Tensor | None,
    *,
    contextual: bool,
    tied: bool,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> StateRows:
    """Input and output rows for a new vocabulary.

    Args:
        model: the whole teacher, a causal language model, on the device to work on.
        vocabulary: the two vocabularies.
        texts: documents in the language or domain of the new tokens.
        input_rows: [student rows, hidden] float32: the shared rows, and a start for the others.
        output_means: likewise for the head: the means of sub-tokens' rows.
        output_bias: [student rows]; None without.
        contextual: solve for input rows; else `input_rows` are kept.
        tied: whether one table must serve as both.
        seed: of the choice of places in the text.
        on_progress: called with the input rows solved for, and their number.

    Raises:
        ValueError: no text with new tokens; a masked language model, or one whose logits `logit_rule` does not know.
    """
    if type(model).__name__.endswith("ForMaskedLM"):
        raise ValueError(
            "init: 'contextual' and init_head 'boundary' need a causal language model, which predicts the next token; "
            f"got {type(model).__name__}"
        )
    text = spell_texts(texts, vocabulary)
    layer = max(1, round(LAYERS * len(decoder_layers(model)))) - 1
    weight = model.get_output_embeddings().weight
    as_input, as_output = input_rows.to(weight.device), output_means.to(weight.device)
    start = as_input
    if contextual:
        as_input = _last_pieces(model.get_input_embeddings().weight, vocabulary, as_input)
    boundary = boundary_states(model, text, seed)
    counts, solved = text.counts(vocabulary.rows), torch.zeros(0, dtype=torch.int64)
    ids, rows = boundary_rows(weight, as_output, output_bias, vocabulary, counts, boundary)
    as_output = as_output.index_copy(0, ids.to(weight.device), rows)
    if not tied and not contextual:
        return StateRows(as_input, as_output, solved, counts)
    found = text.occurrences(torch.tensor(sorted(vocabulary.subtokens)), CONTEXTS, WIDTH, seed)
    matrix, stiffness = mean_square_jacobian(model, vocabulary, as_input, found, layer, seed), None
    if tied:
        output_weight = OUTPUT_WEIGHT_SOLVED if contextual else OUTPUT_WEIGHT
        moment = boundary.second_moment()
        stiffness = output_scale(matrix, moment, output_weight) * moment
        both = tied_rows(as_input[ids], as_output[ids], matrix, moment, output_weight)
        as_input = as_input.index_copy(0, ids.to(weight.device), both)
    if contextual:
        solved, rows = contextual_rows(model, vocabulary, as_input, matrix, found, layer, stiffness, on_progress)
        as_input = as_input.index_copy(0, solved.to(weight.device), rows)
    if tied:
        as_output = as_input
        before = torch.tensor(start_of_text(vocabulary.student), dtype=torch.int64)
        stretches = [torch.cat([before, part]) for part in text.student_stretches(STRETCH, SCORED, seed)]
        losses = [text_loss(model, table, table, output_bias, boundary.rule, stretches) for table in (as_input, start)]
        if losses[1] < losses[0]:
            return StateRows(start, start, torch.zeros(0, dtype=torch.int64), counts)
    return StateRows(as_input, as_output, solved, counts)


@torch.no_grad()
def text_loss(
    model: PreTrainedModel,
    input_rows: torch.Tensor,
    output_rows: torch.Tensor,
    output_bias: torch.Tensor | None,
    rule: dict[str, float | None],
    stretches: list[torch.Tensor],
) -> float:
    """Nats that a text costs with new tables, everything else being the teacher's.

    Args:
        model: the teacher.
        input_rows, output_rows: [student rows, hidden] float32.
        output_bias: [student rows]; None without.
        rule: how logits are made, see `logit_rule`.
        stretches: of the text, student ids [n] each, n >= 2. The first token of each is given.
    """
    embedding, total = model.get_input_embeddings(), 0.0
    weight = {"weight": input_rows.to(embedding.weight.dtype)}
    for ids in stretches:
        ids = ids.to(input_rows.device)
        embedded = torch.func.functional_call(embedding, weight, (ids[None],))
        states = capture(model, head=True, inputs_embeds=embedded).head_input[0, :-1].float()
        logits = head_logits(states, output_rows, output_bias, **rule)
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return total


def _last_pieces(weight: torch.Tensor, vocabulary: VocabularyPair, rows: torch.Tensor) -> torch.Tensor:
    """`rows` with that of its last piece for each new token: nearer to the goal than the mean, and of a usual norm."""
    ids = list(vocabulary.subtokens)
    rows = rows.clone()
    rows[ids] = weight.detach()[[vocabulary.subtokens[i][-1] for i in ids]].to(rows.dtype)
    return rows
