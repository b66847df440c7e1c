"""aim_loss forward + backward by engine, beside one SDPA forward + backward of the student's shape.

    python -m pytest benchmarks/bench_loss.py --benchmark-enable --benchmark-only -s

Each row is checked before it is timed: torch against eager where eager fits, and against float64 torch elsewhere. Peak
memory is what the step adds to its inputs in a process of its own (Linux's VmHWM). The last test prints the ratios, of
the best rounds: on shared cores the others measure the neighbours (pytest-benchmark's own table shows the spread).
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from matt_fast.loss import aim_loss

HEADS, KV_HEADS, SIZE = 9, 3, 64
CASES = [(engine, n) for n in (256, 512) for engine in ("eager", "torch", "sdpa")]
CASES += [(engine, n) for n in (1024, 4096) for engine in ("torch", "sdpa")]
TIMES: dict[tuple[str, int], float] = {}
PEAKS: dict[tuple[str, int], float] = {}


def text_like(length: int, seed: int = 0):
    """Segments of 1.6 teacher and 1.3 student tokens on average, as real tokenizers of two languages give."""
    rng = np.random.default_rng(seed)
    teacher = rng.choice([1, 2, 3, 4], size=length, p=[0.6, 0.25, 0.1, 0.05])
    count = int(np.searchsorted(np.cumsum(teacher), length)) + 1
    teacher[count - 1] -= teacher[:count].sum() - length
    student = rng.choice([1, 2, 3], size=count, p=[0.75, 0.2, 0.05])
    return [torch.arange(count).repeat_interleave(torch.as_tensor(x[:count]))[None] for x in (teacher, student)]


def make(length: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    segments = text_like(length)
    sides = [
        tuple(
            torch.randn(1, heads, x.shape[1], SIZE, generator=generator).to(dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for x in segments
    ]
    return sides[0], tuple(x.requires_grad_() for x in sides[1]), *segments


def step(engine: str, inputs):
    """Forward and backward; returns the loss and the student's gradients."""
    student = inputs[1]
    if engine == "sdpa":
        loss = F.scaled_dot_product_attention(*student, is_causal=True, enable_gqa=True).sum()
    else:
        loss = aim_loss(*inputs, backend=engine)
    return loss.detach(), *torch.autograd.grad(loss, student)


def check(length: int):
    inputs = make(length)
    if length <= 512:
        exact = step("eager", inputs)
    else:
        teacher, student, *segments = inputs
        double = tuple(x.double() for x in teacher), tuple(x.detach().double().requires_grad_() for x in student)
        exact = step("torch", (*double, *segments))
    for x, y in zip(step("torch", inputs), exact, strict=True):
        assert (x - y).norm() <= 3e-6 * y.norm()


def peak_mebibytes(engine: str, length: int) -> float:
    command = [sys.executable, __file__, engine, str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(("engine", "length"), CASES, ids=str)
def test_forward_backward(benchmark, engine, length):
    if engine == "torch":
        check(length)
    inputs = make(length)
    PEAKS[engine, length] = peak_mebibytes(engine, length)
    benchmark.extra_info |= {
        "engine": engine,
        "teacher tokens": length,
        "student tokens": inputs[3].shape[1],
        "segments": int(inputs[2].max()) + 1,
        "heads": HEADS,
        "kv heads": KV_HEADS,
        "head_dim": SIZE,
        "dtype": "float32",
        "variant": "aim",
        "metric": "mse",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak MiB": PEAKS[engine, length],
    }
    rounds = {"eager": 3}.get(engine, 5 if length > 2000 else 15)
    benchmark.pedantic(step, args=(engine, inputs), rounds=rounds, warmup_rounds=1 if engine == "eager" else 3)
    if benchmark.stats:
        TIMES[engine, length] = benchmark.stats.stats.min


def test_print_ratios(benchmark):
    """A row is printed only when every engine of its length has passed and been timed."""
    if not benchmark.enabled:
        pytest.skip("needs --benchmark-enable")
    benchmark.pedantic(lambda: None)
    print("\nteacher tokens | torch ms | eager ms | eager/torch | sdpa ms | torch/sdpa | MiB torch, eager, eager/torch")
    for length in sorted({n for _, n in TIMES}):
        ours, sdpa = TIMES["torch", length], TIMES["sdpa", length]
        row = f"{length} | {ours * 1e3:.2f} | "
        memory = f"{PEAKS['torch', length]:.1f}"
        if ("eager", length) in TIMES:
            eager = TIMES["eager", length]
            row += f"{eager * 1e3:.0f} | {eager / ours:.1f} | "
            memory += f", {PEAKS['eager', length]:.1f}, {PEAKS['eager', length] / PEAKS['torch', length]:.0f}"
        else:
            row += "- | - | "
        print(row + f"{sdpa * 1e3:.2f} | {ours / sdpa:.2f} | {memory}")


def _print_peak(engine: str, length: int):
    # A tiny step first, so that libraries and threads are not counted.
    step(engine, make(16))
    inputs = make(length)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    before = _high_water_mark()
    step(engine, inputs)
    print((_high_water_mark() - before) / 1024)


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))


if __name__ == "__main__":
    _print_peak(sys.argv[1], int(sys.argv[2]))
