"""The output side of the student: next-token losses over a large vocabulary that never hold all logits at once."""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from matt_fast.model.capture import capture
from matt_fast.model.embeddings import OutputRows

LOGITS_AT_ONCE = 1 << 24  # float32 logits of a chunk of tokens, 64 MiB; more where many rows are trained


class Head:
    """The student's output head: all its rows as they stand, and how the model makes logits of them.

    Args:
        weight: [student rows, hidden] in the model's dtype; `update` changes it in place.
        bias: [student rows], or None. It is used as it is, not trained.
        scale: factor on the logits.
        softcap: bound of their tanh soft-capping, applied after the factor; None without.
        fused: make the softmax and its gradient in liger-kernel's kernel. If None: where it is installed and `weight`
            is on a CUDA device.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        fused: bool | None = None,
    ):
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap
        if fused is None:
            fused = weight.is_cuda and find_spec("liger_kernel") is not None
        self.fused = fused

    @torch.no_grad()
    def update(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Take over trained rows: [r] int64 and [r, hidden]."""
        self.weight[ids] = rows.to(self.weight.dtype)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, rows: OutputRows) -> torch.Tensor:
        """Mean cross-entropy of `targets` ([N] int64) given the head's input `hidden` ([N, hidden]), in nats.

        The softmax is over the whole vocabulary. Gradients flow to `hidden` and to `rows.trainable`, whose values the
        head must have (see `update`). Without targets it is 0, with gradients of 0.
        """
        return _ChunkedCrossEntropy.apply(hidden, rows.trainable, rows.ids, self, targets)


def one_table(model: PreTrainedModel) -> bool:
    """Whether one table is embedding and head, or there is no head."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def logit_rule(model: PreTrainedModel) -> dict[str, float | None]:
    """The factor and soft-capping that `model` applies to its head's output: arguments of `Head`.

    What the configuration says is checked against the logits that the model gives for a few tokens.

    Raises:
        ValueError: the model makes its logits in a way that these two do not describe.
    """
    config = model.config.get_text_config(decoder=True)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    rule = {"scale": float(scale), "softcap": getattr(config, "final_logit_softcapping", None)}
    head = model.get_output_embeddings()
    ids = torch.arange(min(8, len(head.weight)), device=model.device)[None]
    with torch.no_grad():
        hidden = capture(model, head=True, input_ids=ids)
        ours = head_logits(hidden.head_input[0], head.weight, getattr(head, "bias", None), **rule)
        theirs = model(input_ids=ids).logits[0].float()
    tolerance = 1e-3 if theirs.dtype == torch.float32 and head.weight.dtype == torch.float32 else 0.05
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())):
        raise ValueError(
            f"objective: {type(model).__name__} does something to its logits beyond a factor and soft-capping; "
            "objectives that train output rows cannot describe it"
        )
    return rule


def head_logits(hidden, weight, bias, scale, softcap) -> torch.Tensor:
    """Logits, float32 or wider, of the head's input [N, hidden] by a head of `weight` and `bias`, see `Head`."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return logits if softcap is None else softcap * (logits / softcap).tanh_()


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross-entropies of `targets` ([n] int64), and its gradient in place of `logits` ([n, rows])."""
    target = targets[:, None]
    logits -= logits.logsumexp(-1, keepdim=True)
    loss = -logits.gather(1, target).sum()
    gradient = logits.exp_()
    return loss, gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1))


def _liger_loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one kernel. Liger's fused linear loss has a gradient for the whole table or for none of its rows."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits.requires_grad_()  # or it makes no gradient
    loss, *_, gradient = cross_entropy_forward(logits, targets.contiguous(), None, -100, 0.0, 0.0, "sum", None, False)
    return loss, gradient.detach()


def chunks(count: int, rows: int, numbers: int = 0) -> list[slice]:
    """Tokens whose logits, so many of each, are made at a time: LOGITS_AT_ONCE, or `numbers` if these are more."""
    size = max(1, max(LOGITS_AT_ONCE, numbers) // rows)
    return [slice(start, start + size) for start in range(0, count, size)]


def slope(head: Head, logits: torch.Tensor, count: int = 1) -> torch.Tensor | float:
    """The derivative of logits by what the head's product gives, over `count`."""
    factor = head.scale / count
    if head.softcap is None:
        return factor
    return (logits / head.softcap).square_().neg_().add_(1).nan_to_num_(neginf=0.0).mul_(factor)


class Gradients:
    """Gradients of `hidden` and of trained rows, gathered chunk by chunk from those of logits.

    Args:
        ctx: of an autograd function whose first two inputs are `hidden` and `trained`.
        hidden, trained: [N, hidden], [r, hidden].
        trained_ids: [r] int64, which of the head's rows are trained.
        head: that made the logits.
    """

    def __init__(self, ctx, hidden: torch.Tensor, trained: torch.Tensor, trained_ids: torch.Tensor, head: Head):
        self.source, self.trained_ids, self.head = hidden, trained_ids, head
        self.hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        self.rows = torch.zeros_like(trained) if ctx.needs_input_grad[1] else None

    def chunks(self, rows: int = 0) -> list[slice]:
        """Chunks of tokens, for logits of the head or of another one's `rows`, if these are more.

        Each passes over the gradient of the trained rows once. So its logits are half as many as that has numbers,
        where that is more than LOGITS_AT_ONCE.
        """
        numbers = 0 if self.rows is None else self.rows.numel() // 2
        return chunks(len(self.source), max(rows, len(self.head.weight)), numbers)

    def add(self, part: slice, gradient: torch.Tensor) -> None:
        """Take the gradient ([n, rows of the head]) of what the head's product gave for a chunk."""
        gradient = gradient.to(self.head.weight.dtype)
        if self.hidden is not None:
            self.hidden[part] = gradient @ self.head.weight
        if self.rows is not None:
            self.rows += (gradient[:, self.trained_ids].T @ self.source[part]).to(self.rows.dtype)


def scaled_gradients(ctx, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What forward saved of `Gradients`, times the gradient of a loss."""
    return tuple(None if x is None else x * loss_gradient.to(x.dtype) for x in ctx.saved_tensors)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too, a chunk of tokens at a time; backward multiplies them by the loss's own."""

    @staticmethod
    def forward(ctx, hidden, trained, trained_ids, head, targets):
        gradients = Gradients(ctx, hidden, trained, trained_ids, head)
        loss_and_gradient = _liger_loss_and_gradient if head.fused else _loss_and_gradient
        count = max(1, len(hidden))  # where there is nothing to predict the mean is 0, not 0/0
        loss = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in gradients.chunks():
            logits = head_logits(hidden[part], head.weight, head.bias, head.scale, head.softcap)
            by_product = slope(head, logits, count)
            part_loss, gradient = loss_and_gradient(logits, targets[part])
            loss += part_loss
            gradients.add(part, gradient.mul_(by_product))
        ctx.save_for_backward(gradients.hidden, gradients.rows)
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_gradient):
        return *scaled_gradients(ctx, loss_gradient), None, None, None
