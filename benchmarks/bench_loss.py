"""aim_loss by engine, variant, metric, length, head_dim, dtype and part, beside SDPA of the student's shape.

    python -m pytest benchmarks/bench_loss.py --benchmark-enable --benchmark-only

Not every combination: a base case, and from it one axis at a time. Each case is checked at its own shape before it is
timed: value and gradients against float64 (the eager formula up to 512 tokens, beyond that the torch engine, whose
float64 is tested against the formula). Peak memory is what the step adds to its inputs, in a process of its own.
"""

import functools
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import peaks
import pytest
import torch
import torch.nn.functional as F
from machine import CLOCK
from usage import arguments

from matt_fast.loss import aim_loss
from matt_fast.loss.documents import find_documents
from matt_fast.loss.eager import eager_loss

HEADS, KV_HEADS = 9, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Norm of the error over the norm of the result. float32: some 25 roundings of 1.2e-7, which sums over thousands of keys
# and pairs add up; bfloat16: the plain formula rounds each weight and sum to 2^-8, and differences lose a little more.
TOLERANCES = {"float32": 3e-6, "bfloat16": 2e-2}
SECONDS_PER_CASE, ROUNDS = 2.0, (2, 40)


@dataclass(frozen=True)
class Case:
    engine: str
    n: int = 512
    head_dim: int = 64
    dtype: str = "float32"
    variant: str = "aim"
    metric: str = "mse"
    part: str = "both"

    def __str__(self) -> str:
        return "-".join(str(x) for x in asdict(self).values())


def cases() -> list[Case]:
    """The base case of each engine, then one axis at a time; SDPA has neither variants nor metrics."""
    fast = ["torch"] + ["triton"] * (DEVICE == "cuda")
    lengths = [(engine, n) for n in (256, 512, 1024, 2048, 4096, 8192) for engine in (*fast, "sdpa")]
    lengths += [("eager", n) for n in (256, 512, 768)] + [("compiled eager", n) for n in (256, 512)]
    found = [Case(*x) for x in lengths]
    found += [Case(engine, n, dtype="bfloat16") for n in (512, 1024, 2048, 4096) for engine in (*fast, "sdpa")]
    found.append(Case("eager", dtype="bfloat16"))
    for engine in (*fast, "eager", "sdpa"):
        found += [Case(engine, head_dim=x) for x in (80, 128)]
        found += [Case(engine, part=x) for x in ("forward", "backward")]
    for engine in (*fast, "eager"):
        found += [Case(engine, variant="aim_star"), Case(engine, metric="cosine")]
        found.append(Case(engine, variant="aim_star", metric="cosine"))
    # engines of one shape side by side, for their results in float64 and for the machine's mood
    return sorted(found, key=lambda x: (x.n, x.dtype, x.head_dim, x.variant, x.metric, x.engine == "sdpa", x.part))


def text_like(length: int, seed: int = 0) -> list[torch.Tensor]:
    """Segments of 1.6 teacher and 1.3 student tokens on average, as real tokenizers of two languages give."""
    rng = np.random.default_rng(seed)
    teacher = rng.choice([1, 2, 3, 4], size=length, p=[0.6, 0.25, 0.1, 0.05])
    count = int(np.searchsorted(np.cumsum(teacher), length)) + 1
    teacher[count - 1] -= teacher[:count].sum() - length
    student = rng.choice([1, 2, 3], size=count, p=[0.75, 0.2, 0.05])
    return [torch.arange(count).repeat_interleave(torch.as_tensor(x[:count]))[None] for x in (teacher, student)]


def make(case: Case) -> tuple:
    """(teacher, student, teacher ids, student ids); ids on the CPU but for the kernels."""
    generator = torch.Generator().manual_seed(0)
    segments = text_like(case.n)
    sides = [
        tuple(
            torch.randn(1, heads, x.shape[1], case.head_dim, generator=generator).to(DEVICE, getattr(torch, case.dtype))
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for x in segments
    ]
    segments = [x.to(DEVICE) for x in segments] if case.engine == "triton" else segments
    return sides[0], tuple(x.requires_grad_() for x in sides[1]), *segments


def loss_function(case: Case, segments: list[torch.Tensor]):
    """(teacher, student) -> loss; for SDPA the attention's output."""
    if case.engine == "sdpa":
        return lambda teacher, student: F.scaled_dot_product_attention(*student, is_causal=True, enable_gqa=True)
    chosen = {"variant": case.variant, "metric": case.metric}
    if case.engine != "compiled eager":
        return lambda teacher, student: aim_loss(teacher, student, *segments, backend=case.engine, **chosen)
    torch._dynamo.reset()
    count = int(segments[0].max()) + 1
    pairs = count if case.variant == "aim_star" else count * (count + 1) // 2
    weights = [1 / (pairs * HEADS * (case.head_dim if case.metric == "mse" else 1))]
    plain = {"scale": case.head_dim**-0.5, "sliding_window": None, "softcap": None, "causal": True}
    documents = find_documents(*segments)

    @torch.compile(dynamic=False)
    def compiled(teacher, student):
        return eager_loss(teacher, student, documents, weights, **chosen, **plain)

    return compiled


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def part_of(case: Case):
    """(prepare, step): step(*prepare()) is the part that is timed, synchronised."""
    teacher, student, *segments = make(case)
    function = loss_function(case, segments)

    def forward():
        value = function(teacher, student)
        synchronise()
        return value

    def backward(value):
        gradients = torch.autograd.grad(value, student, torch.ones_like(value))
        synchronise()
        return value.detach(), *gradients

    parts = {
        "forward": (lambda: (), forward),
        "backward": (lambda: (forward(),), backward),
        "both": (lambda: (), lambda: backward(forward())),
    }
    return parts[case.part]


@functools.lru_cache(maxsize=1)
def exact(case: Case) -> tuple[torch.Tensor, ...]:
    """Value and gradients in float64."""
    teacher, student, *segments = make(case)
    teacher, student = (tuple(x.detach().double() for x in side) for side in (teacher, student))
    student = tuple(x.requires_grad_() for x in student)
    value = loss_function(case, segments)(teacher, student)
    return value.detach(), *torch.autograd.grad(value, student, torch.ones_like(value))


def relative_error(case: Case) -> float:
    """The largest of value's and gradients' errors against float64.

    Raises:
        AssertionError: it is above the tolerance.
    """
    engine = case.engine if case.engine == "sdpa" else "eager" if case.n <= 512 else "torch"
    wanted = exact(replace(case, engine=engine, part="both"))
    _, step = part_of(replace(case, part="both"))
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(step(), wanted, strict=True)]
    assert max(errors) <= TOLERANCES[case.dtype], f"{case}: relative errors {errors} of value, dQ, dK, dV"
    return max(errors)


@pytest.mark.benchmark(group="loss", timer=CLOCK)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_loss(benchmark, case):
    error = relative_error(case)
    _, student, _, segments = make(case)
    prepare, step = part_of(case)
    benchmark.extra_info |= asdict(case) | {
        "student tokens": student[0].shape[2],
        "segments": int(segments.max()) + 1,
        "heads": HEADS,
        "kv heads": KV_HEADS,
        "device": DEVICE,
        "relative error": error,
        "peak MiB": peaks.in_own_process(__file__, json.dumps(asdict(case))),
    }
    step(*prepare())  # warm-up: compiles, where anything does
    given = prepare()
    begin = CLOCK()
    step(*given)
    least, most = ROUNDS
    rounds = max(least, min(most, int(SECONDS_PER_CASE / (CLOCK() - begin))))
    benchmark.pedantic(step, setup=lambda: (prepare(), {}), rounds=rounds)


def peak_mebibytes(case: Case) -> float:
    prepare, step = part_of(case)
    step(*prepare())
    given = prepare()
    return peaks.added_mebibytes(lambda: step(*given), DEVICE)


if __name__ == "__main__":
    print(peak_mebibytes(Case(**arguments(__doc__, json.loads, least=1)[0])))
