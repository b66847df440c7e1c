"""FOCUS' weights and rows beside deepfocus: memory, time and the largest difference, on the same vectors.

    .venv/bin/python benchmarks/bench_focus.py [TARGETS ANCHORS DIM HIDDEN]

By default 5,000 new and 20,000 shared tokens, 300 dimensions, rows of 576. Each side runs in a process of its own, on
one thread; seconds are its processor time; memory is what its peak grows by beyond the inputs, the result included.
Sizes beyond 3 * 10^8 pairs run without deepfocus, whose matrix of similarities may not fit:

    .venv/bin/python benchmarks/bench_focus.py 126000 262000 300 64

That run took 409 s of processor time and 637 MiB (the whole process 1.60 GiB at its peak); the matrix of similarities
would be 123 GiB.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from usage import arguments

from matt_fast.initializers.focus import sparsemax_coefficients
from matt_fast.initializers.mixtures import apply


def space(tokens: int, dim: int, seed: int) -> torch.Tensor:
    """Vectors around 200 directions and a common one, with as many non-zero weights a row as those of fastText."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(200, dim, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, dim)
    vectors = centres[torch.randint(200, (tokens,), generator=generator)]
    for part in vectors.split(10_000):
        part.add_(torch.randn(part.shape, generator=generator), alpha=2)
    return vectors


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure(work) -> dict:
    before, begin = peak(), time.process_time()
    rows = work()
    return {"rows": rows, "seconds": time.process_time() - begin, "bytes": peak() - before}


def ours(targets: torch.Tensor, anchors: torch.Tensor, table: torch.Tensor) -> dict:
    found = []

    def work() -> torch.Tensor:
        found.append(sparsemax_coefficients(targets, anchors))
        return apply(found[0], table)

    return {**measure(work), "coefficients": tuple(found[0])}


def theirs(targets: torch.Tensor, anchors: torch.Tensor, table: torch.Tensor) -> dict:
    from deepfocus.focus import entmax, fastdist, focus_additional_token_initialization

    def tokens(vectors: torch.Tensor) -> dict:
        return {
            i: types.SimpleNamespace(
                auxiliary_embedding=vector, source_embedding=row, target=types.SimpleNamespace(id=i)
            )
            for i, (vector, row) in enumerate(zip(vectors.numpy(), table[: len(vectors)], strict=True))
        }

    def work() -> torch.Tensor:
        out = torch.zeros(len(targets), table.shape[1])
        return focus_additional_token_initialization(tokens(anchors), tokens(targets), out, device="cpu")

    fastdist.cosine_matrix_to_matrix(targets[:2].numpy(), anchors[:2].numpy())  # compiles
    found = measure(work)
    scores = torch.from_numpy(fastdist.cosine_matrix_to_matrix(targets.numpy(), anchors.numpy()))
    return {**found, "weights": torch.stack([entmax.sparsemax(row).float() for row in scores])}


def main(n_targets: int = 5000, n_anchors: int = 20_000, dim: int = 300, hidden: int = 576) -> None:
    sides = ("matt-fast", "deepfocus") if n_targets * n_anchors <= 3 * 10**8 else ("matt-fast",)
    found = {}
    print(f"{n_targets} new tokens, {n_anchors} shared ones, {dim} dimensions, rows of {hidden}, float32, one thread")
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            file = Path(folder) / side
            command = [sys.executable, __file__, side, file, *map(str, (n_targets, n_anchors, dim, hidden))]
            subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
            found[side] = torch.load(file)
            seconds, extra = found[side]["seconds"], found[side]["bytes"]
            memory = f"peak extra memory {extra / 2**20:8,.0f} MiB"
            print(f"{side:9} {seconds:8.1f} s of processor time, {memory}", flush=True)
    offsets, columns, values = found["matt-fast"]["coefficients"]
    print(f"{len(values) / n_targets:.1f} non-zero weights a row; {12 * len(values) / 2**20:,.0f} MiB of result")
    if "deepfocus" in found:
        one, other = found["matt-fast"], found["deepfocus"]
        difference = other["weights"]
        difference[torch.arange(n_targets).repeat_interleave(offsets.diff()), columns] -= values
        weights, rows = difference.abs().max(), (one["rows"] - other["rows"]).abs().max()
        print(f"largest difference of a weight {weights:.1e}, of a row's entry {rows:.1e} (entries are normal, std 1)")
        time_ratio, memory_ratio = (other[key] / one[key] for key in ("seconds", "bytes"))
        print(f"deepfocus / matt-fast: time {time_ratio:.1f}, memory {memory_ratio:.1f}")


def one_side(side: str, file: str, n_targets: int, n_anchors: int, dim: int, hidden: int) -> None:
    torch.set_num_threads(1)
    targets, anchors = space(n_targets, dim, 1), space(n_anchors, dim, 2)
    table = torch.randn(n_anchors, hidden, generator=torch.Generator().manual_seed(3))
    torch.save({"matt-fast": ours, "deepfocus": theirs}[side](targets, anchors, table), file)


if __name__ == "__main__":
    if sys.argv[1:2] in (["matt-fast"], ["deepfocus"]):
        one_side(*sys.argv[1:3], *map(int, sys.argv[3:]))
    else:
        main(*arguments(__doc__, int))
