"""Run by test_head.py: liger-kernel's fused linear cross-entropy against the chunked one."""

import torch
from test_head import table

from matt_fast.head import Head

for options in ({}, {"scale": 0.5}, {"scale": 3.0, "bias": torch.randn(37)}):  # soft-capping fails in the interpreter
    rows_of = table(37, 16)
    ids = torch.tensor([1, 2, 3, 8, 36, 20])
    targets = torch.randint(37, (5,))
    start = torch.randn(5, 16)
    found = []
    for fused in (False, True):
        rows, hidden = rows_of.rows(ids), start.clone().requires_grad_()
        loss = Head(rows_of.weight(), **options, fused=fused).loss(hidden * 1.0, targets, rows)
        (loss * 1.7).backward()
        found.append((loss.detach(), hidden.grad, rows.trainable.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
