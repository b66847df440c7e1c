"""Input rows from what the teacher makes of a new token's pieces, in real contexts.

Where a new token occurs, its row should lead the lower layers to the hidden state that they reach behind the last of
its pieces (the goal of token distillation: K. Dobler, D. Elliott and G. de Melo, "Token Distillation", 2025,
https://arxiv.org/abs/2505.20133). The context before the token is the same on both sides, so its keys and values are
computed once, where a model has nothing else to remember, and the student's pass is that of one single token. Rows do
not depend on each other: each is solved for by itself, by damped Gauss-Newton steps whose matrix, the mean of JᵀJ over
many tokens, all share.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers.spelled import Occurrences
from matt_fast.model.capture import capture
from matt_fast.model.embeddings import rows_of_any_number

CONTEXTS = 1  # of a token, at most
WIDTH = 24  # teacher tokens before a token
ROUNDS = 4
PROBES = 512  # occurrences that the shared matrix is estimated from
LONGEST = 3.0  # times the median: what one of them may weigh, by the length of its Jᵀv; under 1% are longer
ROWS_AT_ONCE = 128
PRIOR = 0.03  # weight of the distance from the start, in units of the shared matrix's mean eigenvalue
LOOSER, TIGHTER = 1 / 3, 4.0  # how the damping of a row changes when its step helped, and when it did not


def contextual_rows(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    start: torch.Tensor,
    matrix: torch.Tensor,
    found: Occurrences,
    layer: int,
    stiffness: torch.Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input rows for the new tokens that occur in a text.

    Args:
        model: the teacher, a causal language model.
        vocabulary: the two vocabularies.
        start: [student rows, hidden] float32, where the search starts, on the model's device.
        matrix: [hidden, hidden], from `mean_square_jacobian`.
        found: where the tokens occur, from `occurrences`.
        layer: whose output (the residual stream behind it) is compared, counted from 0.
        stiffness: [hidden, hidden] K, what leaving the start costs beside the states: (row - start)ᵀ K (row - start).
        on_progress: called with the rows done and r.

    Returns:
        ids [r] int64, and their rows [r, hidden] float32.
    """
    prior = PRIOR * matrix.diagonal().mean() * torch.eye(len(matrix), device=matrix.device)
    stiffness = prior if stiffness is None else stiffness + prior
    tokens = found.ids.unique()
    with rows_of_any_number(model.get_input_embeddings()):
        rows = []
        for some in tokens.split(ROWS_AT_ONCE):
            here = found[torch.isin(found.ids, some)]
            places = _Places(model, vocabulary, layer, here)
            owner = torch.searchsorted(some, here.ids)
            rows.append(_solve(places, owner, start[some.to(start.device)], matrix, stiffness))
            if on_progress is not None:
                on_progress(sum(map(len, rows)), len(tokens))
    return tokens, torch.cat(rows)


def mean_square_jacobian(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    start: torch.Tensor,
    found: Occurrences,
    layer: int,
    seed: int,
) -> torch.Tensor:
    """In what metric a change of an input row matters: the mean of JᵀJ, J the derivative of the states by the row.

    It is estimated from one random direction v at each of 512 places, as the mean of Jᵀv vᵀJ. Where a state is about to
    become one of the few enormous ones of a model, J is hundreds of times as large as elsewhere, and such a place would
    be all that the mean tells: its Jᵀv is shortened. Arguments as in `contextual_rows`.

    Returns:
        [hidden, hidden] float32, symmetric and not negative.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(found.ids), generator=generator)[:PROBES]
    products = []
    with rows_of_any_number(model.get_input_embeddings()):
        for some in chosen.split(ROWS_AT_ONCE):
            rows = start[found.ids[some].to(start.device)].clone().requires_grad_()
            states = _Places(model, vocabulary, layer, found[some]).states(rows)
            direction = torch.randn(states.shape, generator=generator).to(states)
            products += torch.autograd.grad(states, rows, direction)
    each = torch.cat(products)
    lengths = each.norm(dim=1, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny)
    each *= (LONGEST * lengths.median() / lengths).clamp(max=1)
    return each.T @ each / len(each)


class _Places:
    """Occurrences of new tokens: the teacher's states there, and the student's as a function of its rows.

    Attributes:
        goal: [N, hidden] float32: the teacher's states behind the layer, at the tokens' last pieces.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, vocabulary: VocabularyPair, layer: int, found: Occurrences):
        self.model, self.layer = model, layer
        device = model.device
        before, embedding = found.before.to(device), model.get_input_embeddings()
        self.cache, self.before = _keys_and_values(model, layer, before), embedding(before)
        pieces = [torch.tensor(vocabulary.subtokens[i]) for i in found.ids.tolist()]
        padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(device)
        states = self._behind(embedding(padded))
        last = torch.tensor([len(part) - 1 for part in pieces], device=device)
        self.goal = states[torch.arange(len(pieces), device=device), last].float()

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, hidden] float32: the same with `rows` [N, hidden] in place of the pieces."""
        embedding = self.model.get_input_embeddings()
        numbers = torch.arange(len(rows), device=rows.device)[:, None]
        weight = {"weight": rows.to(embedding.weight.dtype)}
        return self._behind(torch.func.functional_call(embedding, weight, (numbers,)))[:, 0].float()

    def _behind(self, embedded: torch.Tensor) -> torch.Tensor:
        """[N, n, hidden]: the states of embedded tokens ([N, n, hidden]) behind those that are before."""
        if self.cache is not None:
            given = {"past_key_values": copy.deepcopy(self.cache), "use_cache": True, "inputs_embeds": embedded}
            return capture(self.model, hidden=self.layer, **given).hidden
        whole = capture(self.model, hidden=self.layer, inputs_embeds=torch.cat([self.before, embedded], 1))
        return whole.hidden[:, self.before.shape[1] :]


def _keys_and_values(model: PreTrainedModel, layer: int, ids: torch.Tensor) -> DynamicCache | None:
    """What the layers up to this one keep of [N, n] token ids; None where that is no keys and values alone.

    Recurrent layers write into their state in place, which has no gradient, and some models keep it elsewhere.
    """
    cache = DynamicCache(config=model.config)
    if any(type(part) not in (DynamicLayer, DynamicSlidingWindowLayer) for part in cache.layers):
        return None
    capture(model, hidden=layer, past_key_values=cache, use_cache=True, input_ids=ids)
    return cache if cache.get_seq_length() == ids.shape[1] else None


def _solve(
    places: _Places, owner: torch.Tensor, start: torch.Tensor, matrix: torch.Tensor, stiffness: torch.Tensor
) -> torch.Tensor:
    """Levenberg-Marquardt for each row: the least mean square distance of its states from their goals.

    Args:
        places: N occurrences.
        owner: [N] int64, the row of each.
        start: [r, hidden] float32.
        matrix, stiffness: [hidden, hidden], shared by all rows.
    """
    eigenvalues, vectors = torch.linalg.eigh(matrix + stiffness)
    unit = matrix.diagonal().mean()
    owner = owner.to(start.device)
    share = 1 / torch.bincount(owner, minlength=len(start))

    def cost(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = rows.detach().requires_grad_()
        distances = 0.5 * (places.states(rows[owner]) - places.goal).square().sum(1)
        costs = torch.zeros_like(share).index_add(0, owner, distances) * share
        costs = costs + 0.5 * ((rows - start) @ stiffness * (rows - start)).sum(1)
        (gradient,) = torch.autograd.grad(costs.sum(), rows)
        return costs.detach(), gradient

    rows, damping = start, torch.ones_like(share)
    best, gradient = cost(rows)
    for _ in range(ROUNDS):
        curvature = eigenvalues.clamp_min(0) + damping[:, None] * unit
        tried = rows - (gradient @ vectors / curvature) @ vectors.T
        costs, new_gradient = cost(tried)
        helped = costs < best
        rows, gradient = (torch.where(helped[:, None], a, b) for a, b in ((tried, rows), (new_gradient, gradient)))
        best = torch.where(helped, costs, best)
        damping = damping * torch.where(helped, LOOSER, TIGHTER)
    return rows
