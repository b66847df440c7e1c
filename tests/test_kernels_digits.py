"""Where digits cancel: the kernels' error against float64 is at most twice the plain formula's own there too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

tensor_cores = pytest.importorskip("tensor_cores", reason="needs Triton")

import triton.language as tl  # noqa: E402
from matt_kernels import attention  # noqa: E402
from test_loss_accuracy import results  # noqa: E402

from matt_fast.loss import aim_loss  # noqa: E402

EPSILON = torch.finfo(torch.float32).eps / 4  # one rounding of the result is free


def ids(length, size, count, special=0):
    """`count` segments of `size` tokens behind `special` tokens, the last one with what is left."""
    return torch.tensor([[-100] * special + [min(i // size, count - 1) for i in range(length - special)]])


def draw(lengths, generator, heads=1, size=16, factor=1.0):
    return [
        [factor * torch.randn(1, x, length, size, generator=generator) for x in (heads, 1, 1)] for length in lengths
    ]


def errors(dtype, cases, **options):
    """([value, dq, dk, dv] of the plain formula, of the kernels): root mean squares of relative errors."""
    squares, count = np.zeros((2, 4)), 0
    for *sides, segments in cases:
        teacher, student = ([x.to(dtype) for x in side] for side in sides)
        exact = results(torch.float64, "eager", teacher, student, *segments, **options)
        for place, backend in enumerate(("eager", "triton")):
            found = results(dtype, backend, teacher, student, *segments, **options)
            squares[place] += [float((x - y).norm() / y.norm()) ** 2 for x, y in zip(found, exact, strict=True)]
        count += 1
    return np.sqrt(squares / count)


def sinking(boost, special, seed, lengths=(25, 20)):
    """Rows whose attention sinks into the first token, of a short value as in trained models: exp(-boost) is left to
    the others. That token is special, or one of the first segment."""
    sides = draw(lengths, torch.Generator().manual_seed(seed))
    axis = torch.ones(16) / 4
    for query, key, value in sides:
        query += (4 - query @ axis)[..., None] * axis
        key -= (key @ axis)[..., None] * axis
        key[..., 0, :] += boost * axis
        value[..., 0, :] *= 0.02
    return *sides, [ids(x, 3, 6, special) for x in lengths]


@pytest.mark.parametrize(
    ("variant", "metric", "boost"),
    [("aim", "mse", 12), ("aim", "cosine", 9), ("aim_star", "mse", 12), ("aim_star", "cosine", 20)],
)
def test_attention_that_sinks_into_the_first_token(variant, metric, boost):
    plain, found = errors(torch.float32, [sinking(boost, 1, x) for x in range(4)], variant=variant, metric=metric)
    assert (found <= 2 * plain + EPSILON).all(), (plain, found)


def test_every_row_has_a_sink_of_its_own():
    """In the middle of the text, under soft-capping, in several documents."""
    cases = []
    for seed in range(4):
        teacher, student, segments = sinking(14, 1, seed)
        for side in (teacher, student):
            for x in side:
                x[:] = x.roll(10, 2)  # rows before it see no sink
        cases.append((teacher, student, segments))
    options = {"variant": "aim_star", "metric": "cosine", "softcap": 60.0}
    for name, length in (("teacher", 25), ("student", 20)):
        options[f"{name}_documents"] = torch.tensor([[0] * 7 + [1] * (length - 7)])
    plain, found = errors(torch.float32, cases, **options)
    assert (found <= 2 * plain + EPSILON).all(), (plain, found)


def test_gradient_of_keys_alone_at_a_sink():
    """dK needs what dQ's kernel finds, whether dQ is wanted or not."""
    teacher, (query, key, value), segments = sinking(12, 1, 0)
    options = {"variant": "aim_star", "metric": "cosine"}
    wanted = results(torch.float32, "triton", teacher, (query, key, value), *segments, **options)[2]
    key = key.clone().requires_grad_()
    loss = aim_loss(teacher, [query, key, value], *segments, backend="triton", **options)
    assert torch.equal(torch.autograd.grad(loss, key)[0].double(), wanted)


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_a_sink_beside_longer_values_of_its_segment(metric):
    """Nearly all of the loss is that token's, however short its value is beside others of the segment."""
    cases = [sinking(6, 0, x) for x in range(4)]
    plain, found = errors(torch.bfloat16, cases, metric=metric)
    assert (found <= 2 * plain).all(), (plain, found)
    _, student, (_, segments) = cases[0]
    value, *_ = results(torch.bfloat16, "triton", student, student, segments, segments, metric=metric)
    assert value <= 1e-6 * results(torch.float64, "eager", *cases[0][:2], *cases[0][2], metric=metric)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [0, 1], ids=["teacher", "student"])
@pytest.mark.usefixtures("small_tiles")
def test_square_of_a_token_that_takes_all(side, dtype):
    """Rounded once for all rows, it would show in the value. Only the first block of rows sees the tile in part."""
    sides = [[torch.zeros(1, 1, 40, 16) for _ in "qkv"] for _ in range(2)]
    for query, key, _ in sides:
        query[..., 0] = 40
        key[:, :, 0, 0] = 40
    # its square has 12 digits and 16
    sides[side][2][:, :, 0] = torch.tensor([1.0] * 15 + [2**-4 if dtype == torch.bfloat16 else 2**-6])
    teacher, student = ([x.to(dtype) for x in side] for side in sides)
    value, *_ = results(dtype, "triton", teacher, student, ids(40, 1, 40), ids(40, 1, 40))
    exact, *_ = results(torch.float64, "eager", teacher, student, ids(40, 1, 40), ids(40, 1, 40))
    assert (value - exact).abs() <= 1e-6 * exact, value / exact - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lopsided_sides_with_sharp_attention(dtype):
    cases = []
    for seed in range(3):
        sides = draw((130, 3), torch.Generator().manual_seed(seed), heads=2, factor=3.0)
        cases.append((*sides, [ids(130, 41, 3), ids(3, 1, 3)]))
    plain, found = errors(dtype, cases)
    assert (found <= 2 * plain + EPSILON).all(), (plain, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_long_segments(softcap, dtype):
    cases = []
    for seed in range(2):
        sides = draw((90, 79), torch.Generator().manual_seed(seed), factor=2.0)
        cases.append((*sides, [ids(90, 37, 3, 1), ids(79, 35, 3, 1)]))
    plain, found = errors(dtype, cases, softcap=softcap)
    assert (found[1:] <= 2 * plain[1:]).all(), (plain, found)
    assert found[0] <= torch.finfo(dtype).eps


@pytest.mark.parametrize("variant", ["aim", "aim_star"])
def test_keys_with_a_common_offset(variant):
    """What all keys share moves every score of a row alike: nothing of it may be left in dQ."""
    cases = []
    for seed in range(4):
        sides = draw((41, 36), torch.Generator().manual_seed(seed))
        for _, key, _ in sides:
            key += 30
        cases.append((*sides, [ids(41, 3, 11, 1), ids(36, 3, 11, 1)]))
    plain, found = errors(torch.float32, cases, variant=variant)
    assert (found <= 2 * plain + EPSILON).all(), (plain, found)


@pytest.mark.parametrize("variant", ["aim", "aim_star"])
def test_sums_of_tensor_cores(monkeypatch, variant):
    """They round towards zero: a sum over a row that never left them would lose digits, and does so here."""
    # few rows, so that the interpreter has little to do, of many tokens with keys and values of one sign
    sides = draw((330, 307), torch.Generator().manual_seed(0))
    for _, key, value in sides:
        key += 2
        value += 2
    cases = [(*sides, [ids(x, 15, 20, 1) for x in (330, 307)])]
    tensor_cores.emulate(monkeypatch)
    plain, found = errors(torch.float32, cases, variant=variant)
    assert (found[1:] <= 2 * plain[1:]).all(), (plain, found)
    # all that is rounded inside a tile makes squares smaller: no average of errors of both signs
    assert found[0] <= 8e-7
    monkeypatch.undo()
    tensor_cores.emulate(monkeypatch, carried=True)
    plain, found = errors(torch.float32, cases, variant=variant)
    assert (found[1:] > 2 * plain[1:]).any() or found[0] > 8e-7, (plain, found)


@pytest.mark.parametrize("variant", ["aim", "aim_star"])
def test_scores_of_tensor_cores(monkeypatch, variant):
    """Cut off over the whole head dimension they come out smaller, and all that is made of them with them."""
    cases = []
    for seed in range(2):
        sides = draw((45, 40), torch.Generator().manual_seed(seed), size=128)
        cases.append((*sides, [ids(x, 2, 20, 1) for x in (45, 40)]))
    tensor_cores.emulate(monkeypatch)
    plain, found = errors(torch.float32, cases, variant=variant)
    assert (found <= 2 * plain + EPSILON).all(), (plain, found)
    monkeypatch.setattr(attention, "PART", tl.constexpr(128))
    plain, found = errors(torch.float32, cases, variant=variant)
    assert found[0] > 2 * plain[0] + EPSILON, (plain, found)


@pytest.mark.parametrize("target", ["80", "90"])
def test_tf32x3_starts_from_zero(target):
    """The sum over a loop is added to in float32 and is no accumulator of a tensor core."""
    command = sys.executable, Path(__file__).with_name("tf32x3.py"), target
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    code = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    (total,) = re.findall(r"scf\.for .*iter_args\((%\w+) = %\w+\) -> \(tensor<32x32xf32", code) or re.findall(
        r"scf\.for .*iter_args\(.*?(%\w+) = %cst\w*[,)]", code
    )
    products, sums = ([x for x in code.splitlines() if y in x] for y in (" tt.dot ", " arith.addf "))
    assert len(products) == 3
    assert not any(re.search(rf"{total}\b", x) for x in products)
    assert any(re.search(rf"{total}\b", x) for x in sums)
