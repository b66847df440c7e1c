"""One update of the rows of a batch: RowAdamW beside torch's optimisers on the whole table.

    python -m pytest benchmarks/bench_rows.py --benchmark-enable --benchmark-only

A table of 128,000 × 576 in float32, all rows trainable. Making the gradient is not timed; the dense ones have a
gradient of the whole table. Each engine is checked before it is timed: after two updates with the same rows these are
as AdamW in float64 has them, and the others have not moved. Peak memory is of table, gradient, moments and one update
together, in a process of its own: what training these rows takes.
"""

import json

import peaks
import pytest
import torch
from machine import CLOCK
from usage import arguments

from matt_fast.model.embeddings import RowAdamW

ROWS, WIDTH, LR = 128_000, 576, 1e-3
CPU = "cpu"
DEVICE = "cuda" if torch.cuda.is_available() else CPU


def row_adamw(moments: str, backend: str = "torch"):
    def make(table, slots, gradient):
        optimizer = RowAdamW(table, LR, moments=moments, backend=backend)
        return lambda: optimizer.step(slots, gradient)

    return make


def dense_adamw(**options):
    def make(table, slots, gradient):
        table.grad = torch.zeros_like(table).index_copy_(0, slots, gradient)
        return torch.optim.AdamW([table.requires_grad_()], LR, weight_decay=0.0, **options).step

    return make


# Each makes a step of (table, slots, gradient); a further engine is one more line.
ENGINES = {
    "RowAdamW, lazy moments": row_adamw("lazy"),
    "RowAdamW, dense moments": row_adamw("dense"),
    "torch.optim.AdamW": dense_adamw(),
    "torch.optim.AdamW, fused": dense_adamw(fused=True),
}
if DEVICE != CPU:
    ENGINES["RowAdamW, lazy moments, kernel"] = row_adamw("lazy", "triton")


def make(engine: str, count: int):
    """(table, slots, gradient, step)."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(ROWS, WIDTH, generator=generator).to(DEVICE)
    slots = torch.randperm(ROWS, generator=generator)[:count].sort().values.to(DEVICE)
    gradient = torch.randn(count, WIDTH, generator=generator).to(DEVICE)
    step = ENGINES[engine](table, slots, gradient)

    def synchronised():
        step()
        if DEVICE != CPU:
            torch.cuda.synchronize()

    return table.detach(), slots, gradient, synchronised


def check(engine: str, count: int) -> None:
    table, slots, gradient, step = make(engine, count)
    before = table.clone()
    row = before[slots].double().requires_grad_()
    row.grad = gradient.double()
    exact = torch.optim.AdamW([row], LR, weight_decay=0.0)
    for _ in range(2):
        step()
        exact.step()
    torch.testing.assert_close(table[slots].double(), row.detach(), rtol=0, atol=1e-6)  # rows are of size 1
    others = torch.ones(ROWS, dtype=torch.bool, device=DEVICE).index_fill_(0, slots, False)
    assert torch.equal(table[others], before[others])


@pytest.mark.benchmark(group="row update", timer=CLOCK)
@pytest.mark.parametrize("count", [500, 5000])
@pytest.mark.parametrize("engine", ENGINES)
def test_row_update(benchmark, engine, count):
    check(engine, count)
    benchmark.extra_info |= {
        "engine": engine,
        "rows in the batch": count,
        "rows of the table": ROWS,
        "width": WIDTH,
        "dtype": "float32",
        "device": DEVICE,
        "peak MiB": peaks.in_own_process(__file__, json.dumps([engine, count])),
    }
    *_, step = make(engine, count)
    benchmark.pedantic(step, warmup_rounds=3, rounds=20)


def peak_mebibytes(engine: str, count: int) -> float:
    make(engine, 1)[3]()  # warm-up: threads and libraries
    found = []
    return peaks.added_mebibytes(lambda: (found.append(make(engine, count)), found[0][3]()), DEVICE)


if __name__ == "__main__":
    print(peak_mebibytes(*arguments(__doc__, json.loads, least=1)[0]))
