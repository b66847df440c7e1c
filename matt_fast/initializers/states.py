"""Rows from the teacher's own states in a text: "composed" or "contextual" for the embedding, "boundary" for the head.

A tied table serves as both. What is asked of it as an embedding and as a head is weighed in the metric of each. A row
that predicts well can lead the context behind it astray: of several tables, the start among them, the one is taken with
which stretches of the text cost least.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.initializers.boundary import boundary_rows, boundary_states, output_scale, tied_rows
from matt_fast.initializers.composed import TiedTo, composed_rows
from matt_fast.initializers.contextual import CONTEXTS, WIDTH, contextual_rows, mean_square_jacobian
from matt_fast.initializers.spelled import Occurrences, SpelledText, spell_texts
from matt_fast.model.capture import capture
from matt_fast.model.embeddings import rows_of_any_number
from matt_fast.model.head import head_logits
from matt_fast.model.layers import decoder_layers
from matt_fast.model.positions import position_limit

METRIC_LAYERS = 1 / 8  # of the depth: where single tokens' states are compared
COMPOSED_LAYERS = 1 / 3  # the same where whole stretches are read
OUTPUT_WEIGHT = 10.0  # of a tied row's wish as an output row, beside that as an input row
OUTPUT_WEIGHT_SOLVED = 30.0  # the same while input rows are solved for, which moves them further
SCORED, STRETCH = 5, 256  # stretches, and their student tokens, that tell whether rows are better than their start
SHARES = (1.0, 0.5)  # of what the map adds to a tied table, to choose from
NONE = torch.zeros(0, dtype=torch.int64)


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
    output_rows: torch.Tensor | None,
    output_bias: torch.Tensor | None,
    *,
    solved: str | None,
    boundary: bool,
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
        output_rows: likewise for the head: with `boundary` the means of sub-tokens' rows.
        output_bias: [student rows]; None without.
        solved: "contextual" or "composed", how input rows are solved for; if None, `input_rows` are kept.
        boundary: whether output rows are moved to where the teacher expects them; always if tied.
        tied: whether one table must serve as both.
        seed: of the choice of places in the text.
        on_progress: called with the input rows solved for, and their number.

    Raises:
        ValueError: no text with new tokens; a masked language model, or one whose logits `logit_rule` does not know.
    """
    if type(model).__name__.endswith("ForMaskedLM"):
        raise ValueError(
            "init: 'composed', 'contextual' and init_head 'boundary' need a causal language model, which predicts the "
            f"next token; got {type(model).__name__}"
        )
    text = spell_texts(texts, vocabulary, position_limit(model))
    head, counts = model.get_output_embeddings().weight, text.counts(vocabulary.rows)
    start = input_rows.to(head.device)
    inputs = _InputRows(model, vocabulary, text, solved, seed, on_progress)
    if not boundary:
        rows, ids = inputs.untied(start)
        return StateRows(rows, output_rows, ids, counts)
    found, as_output = boundary_states(model, text, seed), output_rows.to(head.device)
    known, wanted = boundary_rows(head, as_output, output_bias, vocabulary, counts, found)
    if not tied:
        rows, ids = inputs.untied(start)
        return StateRows(rows, as_output.index_copy(0, known.to(head.device), wanted), ids, counts)
    tables = [*inputs.tied(start, known, wanted, found.second_moment()), (start, NONE)]
    before = torch.tensor(start_of_text(vocabulary.student), dtype=torch.int64)
    stretches = [torch.cat([before, part]) for part in text.student_stretches(STRETCH, SCORED, seed)]
    losses = [text_loss(model, table, table, output_bias, found.rule, stretches) for table, _ in tables]
    rows, ids = tables[losses.index(min(losses))]
    return StateRows(rows, rows, ids, counts)


class _InputRows:
    """Input rows by a method, for a table of their own or for one that is the head's too.

    Each way takes a start, [student rows, hidden], and gives such tables and the ids whose rows were solved for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: VocabularyPair,
        text: SpelledText,
        solved: str | None,
        seed: int,
        on_progress: Callable[[int, int], None] | None,
    ):
        self.model, self.vocabulary, self.text, self.solved = model, vocabulary, text, solved
        self.seed, self.on_progress = seed, on_progress

    def untied(self, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.solved is None:
            return start, NONE
        if self.solved == "composed":
            return self._composed(start)
        start = self._last_pieces(start)
        return self._contextual(start, *self._metric(start))

    def tied(
        self, start: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor, moment: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tables to choose from; the head wants `wanted` [n, hidden] for `ids` [n], in the metric `moment`."""
        contextual = self.solved == "contextual"
        start = self._last_pieces(start) if contextual else start
        matrix, found = self._metric(start)
        weight = OUTPUT_WEIGHT_SOLVED if contextual else OUTPUT_WEIGHT
        rows = start.index_copy(0, ids.to(start.device), tied_rows(start[ids], wanted, matrix, moment, weight))
        if contextual:
            return [self._contextual(rows, matrix, found, output_scale(matrix, moment, weight) * moment)]
        if self.solved is None:
            return [(rows, NONE)]
        damping = torch.linalg.solve(matrix + output_scale(matrix, moment, weight) * moment, matrix)
        composed, ids = self._composed(rows, TiedTo(moment, damping))
        return [(rows + share * (composed - rows), ids) for share in SHARES] + [(rows, NONE)]

    def _metric(self, start: torch.Tensor) -> tuple[torch.Tensor, Occurrences]:
        """In what metric the lower layers see input rows, and where in the text that was looked at."""
        found = self.text.occurrences(torch.tensor(sorted(self.vocabulary.subtokens)), CONTEXTS, WIDTH, self.seed)
        return mean_square_jacobian(
            self.model, self.vocabulary, start, found, self._layer(METRIC_LAYERS), self.seed
        ), found

    def _contextual(self, start, matrix, found, stiffness=None) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.model, self.vocabulary, start, matrix, found, self._layer(METRIC_LAYERS)
        ids, rows = contextual_rows(*given, stiffness, self.on_progress)
        return start.index_copy(0, ids.to(start.device), rows), ids

    def _composed(self, start, tied=None) -> tuple[torch.Tensor, torch.Tensor]:
        prefix, layer = start_of_text(self.vocabulary.student), self._layer(COMPOSED_LAYERS)
        given = self.model, self.vocabulary, start, self.text, prefix, layer, self.seed
        ids, rows = composed_rows(*given, tied, self.on_progress)
        return start.index_copy(0, ids.to(start.device), rows), ids

    def _layer(self, share: float) -> int:
        return max(1, round(share * len(decoder_layers(self.model)))) - 1

    def _last_pieces(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` with that of its last piece for each new token: nearer to the goal than the mean, of a usual norm."""
        weight, spelled = self.model.get_input_embeddings().weight, self.vocabulary.subtokens
        rows, ids = rows.clone(), list(spelled)
        rows[ids] = weight.detach()[[spelled[i][-1] for i in ids]].to(rows.dtype)
        return rows


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
        with rows_of_any_number(embedding):
            embedded = torch.func.functional_call(embedding, weight, (ids[None],))
        states = capture(model, head=True, inputs_embeds=embedded).head_input[0, :-1].float()
        logits = head_logits(states, output_rows, output_bias, **rule)
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return total
