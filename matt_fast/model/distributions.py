"""What two models with different vocabularies say of the next token, compared without whole logits of a text."""

import torch

from matt_fast.alignment.next_token import LEFT_OUT
from matt_fast.model.embeddings import OutputRows
from matt_fast.model.head import Gradients, Head, chunks, head_logits, scaled_gradients, slope


def token_log_probs(head: Head, hidden: torch.Tensor, targets: torch.Tensor, rows: OutputRows) -> torch.Tensor:
    """The log-probability of each of `targets` ([N] int64) given the head's input `hidden` ([N, hidden]).

    Backward makes the logits of a chunk of tokens once more. Gradients flow as in `Head.loss`.

    Returns:
        [N], nats, float32 or wider.
    """
    return _TokenLogProbs.apply(hidden, rows.trainable, rows.ids, head, targets)


def chosen_logits(
    head: Head,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    token: torch.Tensor,
    place: torch.Tensor,
    rows: OutputRows | None = None,
) -> torch.Tensor:
    """Logits of some tokens at some places.

    Args:
        head, hidden, rows: as in `Head.loss`; [N, hidden]. Without `rows` no row gets a gradient.
        tokens: [U] int64, the distinct tokens.
        token, place: [P] int64, which of `tokens`, and which of the N; each pair once.

    Returns:
        [P], float32 or wider.
    """
    weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
    if rows is not None and len(rows.ids):
        at = torch.searchsorted(rows.ids, tokens).clamp_max(len(rows.ids) - 1)
        weight = torch.where((rows.ids[at] == tokens)[:, None], rows.trainable[at].to(weight.dtype), weight)
    logits = _Products.apply(hidden, weight, place, token)
    if bias is not None:
        logits = logits + bias[token]
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


@torch.no_grad()
def log_normalizers(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """[N]: the logarithm of the sum of all tokens' exponentiated logits, given the head's input ([N, hidden])."""
    found = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
    found += [_logits(head, hidden[part]).logsumexp(-1) for part in chunks(len(hidden), len(head.weight))]
    return torch.cat(found)


def log_sums(values: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """[count]: the logarithm of the sum of the exponentiated `values` ([P]) of each group; each has one at least."""
    top = values.detach().new_full((count,), -torch.inf).scatter_reduce_(0, group, values.detach(), "amax")
    return values.new_zeros(count).index_add(0, group, (values - top[group]).exp()).log() + top


def class_divergence(
    head: Head,
    hidden: torch.Tensor,
    classes: torch.Tensor,
    rows: OutputRows,
    target: Head,
    target_hidden: torch.Tensor,
    target_classes: torch.Tensor,
    n_classes: int,
) -> torch.Tensor:
    """Mean KL divergence, in nats, of two models' next-token distributions after their tokens are put into classes.

    Args:
        head, hidden, rows: as in `Head.loss`: the side that gets gradients; [N, hidden].
        classes: [rows of `head`] int64, the class of each token, or LEFT_OUT: such tokens are taken as impossible.
        target, target_hidden, target_classes: of the side that is to be met; [N, its hidden size].
        n_classes: number of classes. Each has a token on both sides.
    """
    sides = (target, target_hidden, target_classes, n_classes)
    return _ClassDivergence.apply(hidden, rows.trainable, rows.ids, head, classes, *sides)


def _logits(head: Head, hidden: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
    logits = head_logits(hidden, head.weight, head.bias, head.scale, head.softcap)
    return logits if classes is None else logits.masked_fill_(classes == LEFT_OUT, -torch.inf)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, trained, trained_ids, head, targets):
        ctx.save_for_backward(hidden, trained, trained_ids, targets)
        ctx.head = head
        found = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        for part in chunks(len(hidden), len(head.weight)):
            logits = _logits(head, hidden[part])
            found.append(logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights):
        hidden, trained, trained_ids, targets = ctx.saved_tensors
        gradients = Gradients(ctx, hidden, trained, trained_ids, ctx.head)
        for part in gradients.chunks():
            logits = _logits(ctx.head, hidden[part])
            by_product = slope(ctx.head, logits)
            gradient = logits.softmax(-1).neg_()
            gradient.scatter_add_(1, targets[part, None], torch.ones_like(gradient[:, :1]))
            gradients.add(part, gradient.mul_(weights[part, None]).mul_(by_product))
        return gradients.hidden, gradients.rows, None, None, None


class _Products(torch.autograd.Function):
    """Products of some pairs of two lists of vectors, [P]: a chunk of pairs at a time."""

    @staticmethod
    def forward(ctx, left, right, i, j):
        ctx.save_for_backward(left, right, i, j)
        dtype = torch.promote_types(left.dtype, torch.float32)
        found = [left.new_empty(0, dtype=dtype)]
        for part in chunks(len(i), left.shape[1]):
            found.append((left[i[part]].to(dtype) * right[j[part]]).sum(-1))
        return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights):
        left, right, i, j = ctx.saved_tensors
        sides = (left, i, right, j), (right, j, left, i)
        gradients = [None, None, None, None]
        for number, (own, at, other, of_other) in enumerate(sides):
            if ctx.needs_input_grad[number]:
                gradient = own.new_zeros(own.shape, dtype=weights.dtype)
                for part in chunks(len(at), own.shape[1]):
                    gradient.index_add_(0, at[part], weights[part, None] * other[of_other[part]])
                gradients[number] = gradient.to(own.dtype)
        return tuple(gradients)


class _ClassDivergence(torch.autograd.Function):
    """Forward makes the gradients too; backward multiplies them by the loss's own."""

    @staticmethod
    def forward(ctx, hidden, trained, trained_ids, head, classes, target, target_hidden, target_classes, n_classes):
        gradients = Gradients(ctx, hidden, trained, trained_ids, head)
        count = max(1, len(hidden))
        loss = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in gradients.chunks(len(target.weight)):
            wanted = _logits(target, target_hidden[part], target_classes).softmax(-1)
            wanted = _by_class(wanted, target_classes, n_classes)
            logits = _logits(head, hidden[part], classes)
            by_product = slope(head, logits, count)
            given = logits.softmax(-1)
            found = _by_class(given, classes, n_classes).clamp_min_(torch.finfo(given.dtype).tiny)
            loss += (torch.xlogy(wanted, wanted) - torch.xlogy(wanted, found)).sum()
            surplus = 1 - wanted.div_(found)
            gradients.add(part, given.mul_(surplus[:, classes.clamp_min(0)]).mul_(by_product))
        ctx.save_for_backward(gradients.hidden, gradients.rows)
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_gradient):
        return *scaled_gradients(ctx, loss_gradient), *[None] * 7


def _by_class(probabilities: torch.Tensor, classes: torch.Tensor, n_classes: int) -> torch.Tensor:
    """[n, n_classes], the sums of probabilities ([n, rows]) by class; those that are left out are 0."""
    sums = probabilities.new_zeros(len(probabilities), n_classes)
    return sums.index_add_(1, classes.clamp_min(0), probabilities)
