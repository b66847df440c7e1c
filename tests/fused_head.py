"""Run by test_head.py: liger-kernel's fused linear cross-entropy against whole logits in float64."""

import torch
from test_head import table
from torch.nn.functional import cross_entropy

from matt_fast.head import Head

ROUNDING = 32 * torch.finfo(torch.float32).eps  # of the largest number of a result; sums have up to 37 terms
torch.manual_seed(0)

for options in ({}, {"scale": 0.5}, {"scale": 3.0, "bias": torch.randn(37)}):  # soft-capping fails in the interpreter
    rows_of = table(37, 16)
    ids = torch.tensor([1, 2, 3, 8, 36, 20])
    targets = torch.randint(37, (5,))
    rows, hidden = rows_of.rows(ids), torch.randn(5, 16, requires_grad=True)
    loss = Head(rows_of.weight(), **options, fused=True).loss(hidden * 1.0, targets, rows)
    (loss * 1.7).backward()

    weight, states = rows_of.weight().double().requires_grad_(), hidden.detach().double().requires_grad_()
    logits = states @ weight.T + options.get("bias", torch.zeros(37)).double()
    reference = cross_entropy(logits * options.get("scale", 1.0), targets)
    (reference * 1.7).backward()
    for found, wanted in (
        (loss.detach(), reference.detach()),
        (hidden.grad, states.grad),
        (rows.trainable.grad, weight.grad[rows.ids[rows.positions]]),
    ):
        error = (found.double() - wanted).abs().max()
        assert error <= ROUNDING * wanted.abs().max(), (options, error)
