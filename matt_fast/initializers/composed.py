"""Input rows composed of the pieces' rows by one linear map, which all new tokens share.

Where a new token stands, its row should lead the lower layers to the state that they reach behind the last of its
pieces (the goal of token distillation: K. Dobler, D. Elliott and G. de Melo, "Token Distillation", 2025,
https://arxiv.org/abs/2505.20133), in the contexts that the student itself makes. Few tokens occur often enough for a
row of their own to be fitted: what is fitted is how the rows of the first piece, the last one and all together make the
row of the whole, by Adam, on some thousands of tokens of text. (ZeTT, https://arxiv.org/abs/2405.07883, trains a
network that makes rows of pieces.)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.spelled import Pair, SpelledText
from matt_fast.model.capture import capture
from matt_fast.model.embeddings import rows_of_any_number

LENGTH, TOGETHER = 256, 4  # student tokens of a stretch, and stretches of a step
STRETCHES = 64
PASSES = 3
RATE = 0.576  # of Adam, over the width: the map's numbers are shares
BETAS = (0.9, 0.98)
PRIOR = 0.25  # in a tied table: the price of a squared nat in a new token's logit, in shares of a state's variance
ROWS_AT_ONCE = 4096


class TiedTo(NamedTuple):
    """The head of a tied table.

    Attributes:
        metric: [hidden, hidden], the mean of h hᵀ, h the head's input: what a row's change does to its logit.
        damping: [hidden, hidden], what of an input's wish is left where the output's is weighed beside it. Without it
            the few directions that all states share, and that move logits by far the most, make the fit unstable.
    """

    metric: torch.Tensor
    damping: torch.Tensor


def composed_rows(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    start: torch.Tensor,
    text: SpelledText,
    prefix: list[int],
    layer: int,
    seed: int,
    tied: TiedTo | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input rows for all new tokens that the teacher can spell.

    Args:
        model: the teacher, a causal language model.
        vocabulary: the two vocabularies.
        start: [student rows, hidden] float32, on the model's device: shared rows, and what the map adds to.
        text: in which both sides are run; 16,384 tokens of it at most.
        prefix: what the student puts before a text.
        layer: whose output (the residual stream behind it) is compared, counted from 0.
        seed: of the choice and order of stretches.
        tied: for a table that is the head's too: what is added to a row is held back, and costs what it changes of the
            token's logit.
        on_progress: called with the share of the steps done, in rows, and the rows.

    Returns:
        ids [r] int64, ascending, and rows [r, hidden] float32.
    """
    pairs = text.pairs(LENGTH, STRETCHES, prefix, seed)
    batches = [_Batch(pairs[i : i + TOGETHER]) for i in range(0, len(pairs), TOGETHER)]
    with torch.no_grad():
        goals = [_states(model, layer, batch.ends, input_ids=batch.teacher_ids.to(start.device)) for batch in batches]
    middle = torch.cat(goals).median(0).values
    # The first tokens of a text often have states a hundred times as long as others: each counts by its own length.
    lengths = [(goal - middle).square().sum(1) for goal in goals]
    usual = torch.cat(lengths).median()
    pieces = _Pieces(model.get_input_embeddings().weight.detach(), vocabulary)
    weight = torch.zeros(3 * start.shape[1], start.shape[1], device=start.device, requires_grad=True)
    steps = PASSES * len(batches)
    optimizer = torch.optim.Adam([weight], lr=RATE / start.shape[1], betas=BETAS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    order = np.random.default_rng(seed)
    order = np.concatenate([order.permutation(len(batches)) for _ in range(PASSES)])
    embedding = model.get_input_embeddings()
    with rows_of_any_number(embedding):
        for step, at in enumerate(order, 1):
            used, numbers = batches[at].student_ids.to(start.device).unique(return_inverse=True)
            change = _change(pieces(used), weight, tied)
            rows = {"weight": (start[used] + change).to(embedding.weight.dtype)}
            embedded = torch.func.functional_call(embedding, rows, (numbers,))
            states = _states(model, layer, batches[at].positions, inputs_embeds=embedded)
            loss = ((states - goals[at]).square().sum(1) / (lengths[at] + usual)).mean()
            if tied is not None:
                logits = (change @ tied.metric * change).sum(1)
                loss = loss + PRIOR * logits[_take(numbers, batches[at].positions)].mean()
            (gradient,) = torch.autograd.grad(loss, weight)  # the model's own weights get none
            # A step among some hundreds has one a hundred times as long, which Adam would go on along until its end.
            weight.grad = nn.functional.normalize(gradient, dim=(0, 1))
            optimizer.step()
            schedule.step()
            if on_progress is not None:
                on_progress(step * pieces.count // steps, pieces.count)
    ids = torch.tensor(sorted(vocabulary.subtokens), dtype=torch.int64)
    with torch.no_grad():
        parts = ids.to(start.device).split(ROWS_AT_ONCE)
        rows = [start[some] + _change(pieces(some), weight, tied) for some in parts]
    return ids, torch.cat(rows)


def _change(features: torch.Tensor, weight: torch.Tensor, tied: TiedTo | None) -> torch.Tensor:
    # [n, 3 hidden] @ [3 hidden, hidden] -> [n, hidden]
    change = features @ weight
    return change if tied is None else change @ tied.damping.T


class _Batch:
    """Stretches side by side, filled up behind their ends, where nothing is compared."""

    def __init__(self, pairs: list[Pair]):
        self.student_ids, self.teacher_ids = (
            nn.utils.rnn.pad_sequence([getattr(pair, name) for pair in pairs], batch_first=True)
            for name in ("student_ids", "teacher_ids")
        )
        self.positions, self.ends = (
            tuple(
                torch.cat(parts)
                for parts in zip(*((torch.full_like(x, i), x) for i, x in enumerate(places)), strict=True)
            )
            for places in ([pair.positions for pair in pairs], [pair.ends for pair in pairs])
        )


def _take(values: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return values[tuple(x.to(values.device) for x in places)]


def _states(model: PreTrainedModel, layer: int, places: tuple[torch.Tensor, torch.Tensor], **inputs) -> torch.Tensor:
    """[m, hidden] float32: the states behind a layer, at rows and positions."""
    return _take(capture(model, hidden=layer, use_cache=False, **inputs).hidden, places).float()


class _Pieces:
    """What the map reads of a token: the rows of its first and last piece and the mean of all; zeros for other tokens.

    Attributes:
        count: of the tokens that have pieces.
    """

    def __init__(self, weight: torch.Tensor, vocabulary: VocabularyPair):
        spelled = vocabulary.subtokens
        self.weight, self.count = weight, len(spelled)
        self.flat = torch.tensor([piece for pieces in spelled.values() for piece in pieces], dtype=torch.int64)
        sizes = torch.tensor([len(pieces) for pieces in spelled.values()], dtype=torch.int64)
        self.starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        self.number = torch.full((vocabulary.rows,), -1)
        self.number[list(spelled)] = torch.arange(len(spelled))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, 3 hidden] float32 for ids [n]."""
        number = self.number[ids.cpu()]
        known = number >= 0
        first, end = self.starts[number[known]], self.starts[number[known] + 1]
        sizes = end - first
        within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        flat = self.flat[first.repeat_interleave(sizes) + within]
        device = self.weight.device
        rows = self.weight[flat.to(device)].float()
        owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
        sums = rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, owner, rows)
        last = (sizes.cumsum(0) - 1).to(device)
        first = last - sizes.to(device) + 1
        found = rows.new_zeros(len(ids), 3 * rows.shape[1])
        found[known.to(device)] = torch.cat([rows[first], rows[last], sums / sizes.to(device)[:, None]], 1)
        return found
