"""Output rows from the teacher's own states, without a pass of the student.

Where the teacher is about to read a new token, its final hidden state must give that token's probability: that of the
token's first piece, which the teacher tells, times the share of the token in what begins with that piece, which the
text tells by counting. So a new row starts between the first piece's row and the mean of all pieces, at the level of
the logarithm of that share. From there levels move until the teacher's states expect each token as often as it occurs
in the text, in so far as the few states that were read can tell: of a token that is seldom expected and seldom occurs
they tell nothing, and it stays. A level is a shift along the one direction that all states share: in a tied model it
hardly moves the row as an input embedding.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.spelled import SpelledText
from matt_fast.model.capture import capture
from matt_fast.model.head import head_logits, logit_rule

N_STATES = 4096
STRETCH = 256  # student tokens read at a time
FIRST_PIECE = 0.75  # its share of a row's start, the mean of all pieces has the rest
ROUNDS = 4
SMOOTHING = 0.1  # occurrences in the text added to each token's count
PRIOR = 0.1  # occurrences among the states added to what is expected and to what is wanted
MAX_STEP = 6.0  # of a level in a round, in nats
STATES_AT_ONCE = 512


@dataclass(frozen=True)
class BoundaryStates:
    """Final hidden states of the teacher before tokens of the student, and what makes logits of them.

    Attributes:
        states: [N, hidden] float32, the head's input.
        rule: how the model turns the head's output into logits, see `logit_rule`.
    """

    states: torch.Tensor
    rule: dict[str, float | None]

    def second_moment(self) -> torch.Tensor:
        """[hidden, hidden]: the mean of h hᵀ, in which a change of a row is measured by what it does to its logit."""
        return self.states.T @ self.states / len(self.states)

    def level(self) -> torch.Tensor:
        """[hidden]: the shift of a row that raises its logit by nearly one in every state (ridge least squares)."""
        moment = self.second_moment()
        damping = 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        return torch.linalg.solve(moment + damping, self.states.mean(0)) / self.rule["scale"]


@torch.no_grad()
def boundary_states(model: PreTrainedModel, text: SpelledText, seed: int) -> BoundaryStates:
    """Run the whole teacher over random stretches of the text, up to 4,096 states.

    Raises:
        ValueError: a masked language model, or one whose logits are made in a way that `logit_rule` does not know.
    """
    rule = logit_rule(model)
    found, missing = [], N_STATES
    for ids, positions in text.stretches(STRETCH, seed):
        given = capture(model, head=True, input_ids=ids[None].to(model.device)).head_input[0]
        found.append(given[positions[:missing].to(given.device)].float())
        missing -= len(found[-1])
        if missing <= 0:
            break
    return BoundaryStates(torch.cat(found), rule)


@torch.no_grad()
def boundary_rows(
    weight: torch.Tensor,
    means: torch.Tensor,
    bias: torch.Tensor | None,
    vocabulary: VocabularyPair,
    counts: torch.Tensor,
    boundary: BoundaryStates,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output rows for the new tokens that the teacher can spell.

    Args:
        weight: [teacher rows, hidden], the teacher's head.
        means: [student rows, hidden] float32: shared rows, and the mean of the pieces' rows for new ones.
        bias: [student rows], the head's bias for them; None without.
        vocabulary: the two vocabularies.
        counts: [student rows], how often each token occurs in a text.
        boundary: the teacher's states in that text.

    Returns:
        ids [r] int64, and rows [r, hidden] float32.
    """
    ids = torch.tensor(sorted(vocabulary.subtokens), dtype=torch.int64)
    first = weight[torch.tensor([vocabulary.subtokens[int(i)][0] for i in ids], device=weight.device)]
    level, rows = boundary.level(), means.to(weight.device).clone()
    rows[ids] = FIRST_PIECE * first.float() + (1 - FIRST_PIECE) * rows[ids]
    rows[ids] += log_shares(vocabulary, counts)[ids, None].to(weight.device) * level
    wanted = (counts + SMOOTHING).to(weight.device)
    wanted = len(boundary.states) * wanted / wanted.sum()
    for _ in range(ROUNDS):
        expected = torch.zeros(len(rows), device=weight.device)
        for states in boundary.states.split(STATES_AT_ONCE):
            expected += head_logits(states, rows, bias, **boundary.rule).softmax(-1).sum(0)
        step = ((wanted + PRIOR) / (expected + PRIOR)).log().clamp(-MAX_STEP, MAX_STEP)
        rows[ids] += step[ids, None] * level
    return ids, rows[ids]


def log_shares(vocabulary: VocabularyPair, counts: torch.Tensor) -> torch.Tensor:
    """How much of what begins with a token's first piece is that token.

    Args:
        vocabulary: the two vocabularies.
        counts: [student rows], how often each token occurs in a text.

    Returns:
        [student rows]: the logarithm of a token's share of all student tokens that the teacher spells with the same
        first piece, the shared token of that piece among them; 0 for tokens that it cannot spell.
    """
    first = {i: match.teacher_id for i, match in vocabulary.matches.items()}
    first |= {i: pieces[0] for i, pieces in vocabulary.subtokens.items()}
    ids, owner = torch.tensor(sorted(first.items()), dtype=torch.int64).view(-1, 2).T
    smoothed = (counts[ids] + SMOOTHING).double()
    totals = smoothed.new_zeros(vocabulary.teacher_rows).index_add_(0, owner, smoothed)
    shares = torch.zeros(vocabulary.rows, dtype=counts.dtype)
    shares[ids] = (smoothed / totals[owner]).log().to(counts.dtype)
    return shares


def tied_rows(
    as_input: torch.Tensor,
    as_output: torch.Tensor,
    input_metric: torch.Tensor,
    output_metric: torch.Tensor,
    output_weight: float,
) -> torch.Tensor:
    """The rows of a tied table that are nearest to both of two wishes, each in its own metric.

    Args:
        as_input, as_output: [r, hidden] float32: the rows wanted for the embedding, and for the head.
        input_metric, output_metric: [hidden, hidden], positive.
        output_weight: of the output's metric beside the input's, both divided by their traces.

    Returns:
        [r, hidden]: the least of ‖row - as_input‖² and output_weight · ‖row - as_output‖² in these metrics.
    """
    scaled = output_scale(input_metric, output_metric, output_weight) * output_metric
    return as_input + torch.linalg.solve(input_metric + scaled, scaled @ (as_output - as_input).T).T


def output_scale(input_metric: torch.Tensor, output_metric: torch.Tensor, output_weight: float) -> torch.Tensor:
    """The factor that gives the output's metric `output_weight` times the trace of the input's."""
    return output_weight * input_metric.trace() / output_metric.trace()
