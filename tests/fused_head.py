"""Run by test_head.py: the loss through liger-kernel's kernel against whole logits in float64, and what it holds."""

import torch
from test_head import some_rows, table
from test_loss import allocations
from torch.nn.functional import cross_entropy

from matt_fast.model.head import Head

ROUNDING = 32 * torch.finfo(torch.float32).eps  # of the largest number of a result; sums have up to 37 terms
torch.manual_seed(0)

for options in ({}, {"scale": 0.5}, {"scale": 3.0, "bias": torch.randn(37)}, {"scale": 2.0, "softcap": 3.0}):
    rows_of = table(37, 16)
    ids = torch.tensor([1, 2, 3, 8, 20, 36])
    targets = torch.randint(37, (5,))
    rows, hidden = some_rows(rows_of, ids), torch.randn(5, 16, requires_grad=True)
    loss = Head(rows_of.weight(), **options, fused=True).loss(hidden * 1.0, targets, rows)
    (loss * 1.7).backward()

    weight, states = rows_of.weight().double().requires_grad_(), hidden.detach().double().requires_grad_()
    logits = states @ weight.T + options.get("bias", torch.zeros(37)).double()
    logits, cap = logits * options.get("scale", 1.0), options.get("softcap")
    reference = cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets)
    (reference * 1.7).backward()
    for found, wanted in (
        (loss.detach(), reference.detach()),
        (hidden.grad, states.grad),
        (rows.trainable.grad, weight.grad[rows.ids]),
    ):
        error = (found.double() - wanted).abs().max()
        assert error <= ROUNDING * wanted.abs().max(), (options, error)

rows_of = table(8192, 1024)
weight, targets = rows_of.weight(), torch.randint(8192, (8,))
rows, hidden = some_rows(rows_of, torch.arange(0, 300, 7)), torch.randn(8, 1024, requires_grad=True)
head = Head(weight, fused=True)


def step():
    torch.autograd.grad(head.loss(hidden, targets, rows) * 1.7, (hidden, rows.trainable))


peak, largest = allocations(step)
assert largest <= 4 * 8 * 8192, largest  # the logits
assert peak < weight.nbytes / 32, peak
