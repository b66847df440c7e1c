"""Orthogonal matching pursuit: tokens per second and peak memory of ours and mergekit's, on the same vectors.

    pip install --no-deps --target /tmp/mergekit mergekit
    python benchmarks/bench_omp.py [M S A K [MODEL.safetensors]]

M targets over S anchors of A dimensions, K anchors each; random vectors of length 1, or rows of a model's embedding
(A is then its own). Each run is a process of its own with one thread; the two take turns, and the best of three counts.
Time is the CPU's. Memory is the process's peak beyond what it had with the inputs loaded. mergekit's function takes all
targets at once, as `mergekit-tokensurgeon` does by default. Only that function's file is loaded, from the folder named
by the variable MERGEKIT (default /tmp/mergekit): the package needs more, which the function does not.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from safetensors import safe_open
from usage import arguments

from matt_fast.initializers import omp

ROUNDS = 3


def theirs():
    """mergekit's batch_omp, without the package's own imports."""
    folder = Path(os.environ.get("MERGEKIT", "/tmp/mergekit")) / "mergekit" / "tokensurgeon"
    if not (folder / "omp.py").exists():
        sys.exit(f"no {folder / 'omp.py'}: pip install --no-deps --target /tmp/mergekit mergekit")
    package = types.ModuleType("tokensurgeon")
    package.__path__ = [str(folder)]
    sys.modules["tokensurgeon"] = package
    return importlib.import_module("tokensurgeon.omp").batch_omp


def vectors(m: int, s: int, a: int, file: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if file is None:
        rows = torch.nn.functional.normalize(torch.randn(m + s, a, generator=generator))
    else:
        with safe_open(file, "pt") as tensors:
            rows = tensors.get_tensor("model.embed_tokens.weight").float()
        rows = rows[torch.randperm(len(rows), generator=generator)[: m + s]]
    return rows[:m].clone(), rows[m:].clone()


def memory(field: str) -> int:
    """Bytes, from Linux: VmRSS is what the process has, VmHWM the most it ever had."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def child(engine: str, inputs: str, output: str, k: int) -> None:
    torch.set_num_threads(1)
    targets, anchors = torch.load(inputs)
    run = omp.omp_coefficients if engine == "matt-fast" else theirs()
    run(targets[:2], anchors, k)  # loads what is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, begin = memory("VmRSS"), time.process_time()
    indices, values, *_ = run(targets, anchors, k)
    seconds = time.process_time() - begin
    torch.save((indices, values, seconds, memory("VmHWM") - before), output)


def main(m: int = 2000, s: int = 9000, a: int = 576, k: int = 64, file: str | None = None) -> None:
    theirs()
    targets, anchors = vectors(m, s, a, file)
    m, s, a = len(targets), *anchors.shape
    print(f"m={m} s={s} a={a} k={k}, {file or 'random'}, float32, one thread, torch {torch.__version__}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = f"{folder}/inputs", f"{folder}/output"
        torch.save((targets, anchors), inputs)
        for _ in range(ROUNDS):
            for engine in ("mergekit", "matt-fast"):
                subprocess.run([sys.executable, __file__, "--child", engine, inputs, output, str(k)], check=True)
                indices, values, seconds, peak = torch.load(output)
                fit = omp.apply(omp.SparseCoefficients(indices, values, s), anchors)
                residual = ((targets - fit).norm(dim=1) / targets.norm(dim=1)).mean().item()
                found.setdefault(engine, []).append((seconds, peak, residual, indices))
    best = {engine: min(runs, key=lambda run: run[0]) for engine, runs in found.items()}
    ours, other = best["matt-fast"], best["mergekit"]
    if ours[2] > 1.001 * other[2]:
        sys.exit(f"our residuals are larger: {ours[2]:.6f} against {other[2]:.6f}")
    for engine, (seconds, peak, residual, _) in best.items():
        times = ", ".join(f"{run[0]:.2f}" for run in found[engine])
        size = f"peak {peak / 2**20:,.0f} MiB, residual {residual:.6f}"
        print(f"{engine:9} {m / seconds:7.1f} tokens/s (seconds {times}), {size}")
    same = (ours[3].sort(dim=1).values == other[3].sort(dim=1).values).all(1).float().mean().item()
    print(f"same anchors for {same:.1%} of the targets")
    print(f"matt-fast / mergekit: {other[0] / ours[0]:.2f} times as fast, {ours[1] / other[1]:.2f} of the memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main(*arguments(__doc__, int, int, int, int, str))
