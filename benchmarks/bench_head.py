"""Peak memory and time of the next-token loss over a large vocabulary: whole logits against chunks of them.

    .venv/bin/python benchmarks/bench_head.py [VOCABULARY HIDDEN TOKENS]

Forward and backward with gradients for the hidden states and 4,096 rows; bfloat16; memory is what tensors take beyond
the weights. By default the size of Gemma 3 4B with the paper's extended vocabulary.
"""

import sys
import time
from pathlib import Path

import torch

from matt_fast.model.embeddings import OutputRows
from matt_fast.model.head import Head

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_loss import allocations
from usage import arguments

ROWS = 4096


def main(vocabulary: int = 388_000, width: int = 2560, tokens: int = 1024) -> None:
    if vocabulary < ROWS:
        raise SystemExit(f"VOCABULARY: wanted {ROWS} or more, the rows that are trained; got {vocabulary}")
    torch.manual_seed(0)
    weight = (torch.randn(1024, width) / width**0.5).bfloat16().repeat(vocabulary // 1024 + 1, 1)[:vocabulary]
    ids = torch.arange(ROWS)
    rows = OutputRows(ids, weight[ids].float().requires_grad_())
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    head = Head(weight)

    def chunked() -> torch.Tensor:
        return head.loss(hidden, targets, rows)

    def whole() -> torch.Tensor:
        logits = hidden @ weight.index_copy(0, ids, rows.trainable.bfloat16()).T
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    found = {}
    for name, loss in (("whole logits", whole), ("chunked", chunked)):
        losses = []

        def step(loss=loss, losses=losses):
            losses.append(loss())
            torch.autograd.grad(losses[-1], (hidden, rows.trainable))
            losses[-1] = losses[-1].item()

        peak, largest = allocations(step)
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        found[name] = peak, seconds
        sizes = f"peak {peak / 2**20:8,.0f} MiB, largest tensor {largest / 2**20:8,.0f} MiB"
        print(f"{name:13} loss {losses[-1]:.4f}, {sizes}")
    (one, slow), (other, fast) = found["whole logits"], found["chunked"]
    print(f"whole / chunked: memory {one / other:.1f}, time {slow / fast:.2f}")


if __name__ == "__main__":
    main(*arguments(__doc__, int))
