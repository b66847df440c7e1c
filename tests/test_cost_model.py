"""The cost model against brute force, and against what the kernels multiply in the interpreter."""

import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from matt_kernels import aim_loss, aim_plan
from matt_kernels.configs import Problem, choose_config
from test_loss import inputs_for, packed, rows, segment_ids, two_sides

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from cost_model import LOSSES, plan_as_shipped
from costs.gpus import GPUS, Shape
from costs.kernels import case_of, flash, kernels, ratio_to_flash, total, waste
from costs.texts import PAIRS
from costs.update import update_cost

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, dtype="fp32")


def text(length: int) -> list[torch.Tensor]:
    """A pattern of segments as text has them, the same at any length."""
    return [rows(segment_ids((sizes * length)[:length])) for sizes in ([1, 2, 1, 1, 3, 1], [1, 1, 1, 2, 2, 1])]


def useful_by_hand(segments, metric: str) -> int:
    """Every row, every token it sees, every segment: nothing shared with the model's sums."""
    dim, sizes = SHAPE.head_dim, [[int((x == j).sum()) for j in range(int(x.max()) + 1)] for x in segments]
    found = 0
    for row in range(len(sizes[0])):
        positions = [int((x[0] == row).nonzero().max()) for x in segments]
        teacher, student = (position + 1 for position in positions)
        pairs = list(zip(sizes[0][: row + 1], sizes[1][: row + 1], strict=True))
        ts, tt, ss = (sum(x) for x in zip(*((t * s, t * t, s * s) for t, s in pairs), strict=True))
        found += (teacher + student + student) * dim  # softmax, mean key
        found += 2 * (teacher + student + student) * dim  # dQ, dK
        found += ts + tt + ts + ss + ts  # mixture, remainders; mixture, dV
        found += 2 * ss if metric == "mse" else 2 * (6 * ss + ts) + tt + ts
    found *= SHAPE.heads
    for t, s in zip(*sizes, strict=True):
        once = (s * s + t * s + 4 * t * s) * dim + 3 * t * s * s
        rest = (t * s + t * t) * dim
        found += SHAPE.kv_heads * (once + rest + (2 * t * s + s * s) * dim)
    return 2 * found


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_useful_flops_by_hand(metric):
    segments = rows(segment_ids([1, 2, 1, 3], specials=[0, 4])), rows(segment_ids([2, 1, 1, 2], specials=[3]))
    plan = aim_plan(*segments, widths=(16, 16))
    costs = kernels(case_of(plan, SHAPE, metric, "cuda:90"), "aim", metric)
    assert sum(x.useful for x in costs) == useful_by_hand(segments, metric)


def counted(monkeypatch, arguments, **options) -> tuple[Counter, Counter]:
    """(flops, exponentials and reciprocal roots) by kernel that a call of the loss and its backward issue."""
    from triton.runtime import interpreter

    flops, exponentials, running = Counter(), Counter(), []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    plain_dot, plain_exp2, plain_rsqrt = builder.create_dot, builder.create_exp2, builder.create_rsqrt
    plain_call = executor.__call__

    def create_dot(self, a, b, *rest):
        flops[running[-1]] += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return plain_dot(self, a, b, *rest)

    def counting(plain):
        def count(self, x):
            exponentials[running[-1]] += x.data.size
            return plain(self, x)

        return count

    def call(self, *args, **kwargs):
        running.append(self.fn.__name__)
        return plain_call(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "create_exp2", counting(plain_exp2))
    monkeypatch.setattr(builder, "create_rsqrt", counting(plain_rsqrt))
    monkeypatch.setattr(executor, "__call__", call)
    aim_loss(*arguments, **options).backward()
    return flops, exponentials


CASES = {
    "plain": (two_sides, {}),
    "several tiles": (lambda: text(60), {}),
    "window": (two_sides, {"sliding_window": 3}),
    "encoder": (two_sides, {"causal": False}),
}


@interpreted
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("variant", "metric"), LOSSES)
def test_issued_is_what_the_kernels_multiply(monkeypatch, variant, metric, case, dtype):
    make, options = CASES[case]
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    arguments = inputs_for(*make(), dtype=precision, dim=24)
    shape = Shape(arguments[0][0].shape[1], arguments[0][1].shape[1], 24, dtype)
    options = options | {"variant": variant}
    flops, exponentials = counted(monkeypatch, arguments, metric=metric, **options)
    config = choose_config(Problem(24, 24, precision, metric, "cpu"))
    plan = aim_plan(*arguments[2:], widths=config.widths, **options)
    costs = kernels(case_of(plan, shape, metric, "cpu"), variant, metric)
    assert sum(flops.values()) == sum(x.products_issued for x in costs)
    assert sum(exponentials.values()) == sum(x.exponentials for x in costs)


@pytest.mark.parametrize(("variant", "metric"), LOSSES)
@pytest.mark.parametrize("widths", [(16, 16), (32, 16), (64, 64)])
def test_issued_covers_useful(variant, metric, widths):
    for segments in (text(300), two_sides()):
        plan = aim_plan(*segments, widths=widths, variant=variant)
        for cost in kernels(case_of(plan, Shape(head_dim=80), metric, "cuda:80"), variant, metric):
            assert cost.products_issued >= cost.useful
            assert cost.flops >= cost.products_issued


# Tokens of 300 consecutive segments of Russian manual pages under mistral v3; a new tokenizer has one token for each.
RUSSIAN = (
    "431311112131a712131132141323122112311222314111121211431124351342133111222322321354113114231133332141"
    "3143411233121242251132111323122314113121334321433134313351143511112211311231334411214121111213132153"
    "2211117241132314121111212231311415212211441221121111111132123311215134112431311213411312341221211115"
)


def real_texts() -> dict[str, list[torch.Tensor]]:
    (english,) = (x for x in PAIRS if not x.trained)
    sizes = [int(x, 16) for x in RUSSIAN] * 13
    russian = [rows(segment_ids(x)) for x in (sizes, [1] * len(sizes))]
    return {"English": english.segments(3000), "Russian": russian}


@pytest.mark.parametrize(("variant", "metric"), LOSSES)
def test_at_most_half_of_what_is_issued_is_wasted_on_real_text(variant, metric):
    for text, gpu, head_dim in product(real_texts().values(), GPUS, (64, 128, 256)):
        shape = Shape(head_dim=head_dim)
        plan = plan_as_shipped(text, shape, variant, metric, gpu.target)
        assert waste(kernels(case_of(plan, shape, metric, gpu.target), variant, metric)) <= 2.0


def test_visits_by_brute_force():
    *segments, documents = packed()
    plan = aim_plan(*segments, **documents, widths=(16, 16), sliding_window=9)
    geometry = case_of(plan, SHAPE, "mse", "cuda:80").geometry
    for block in (16, 32):
        row_visits = column_visits = 0
        for batch in range(plan.rows.shape[0]):
            row_count, tile_count, _ = plan.counts[batch].tolist()
            for start in range(0, row_count, block):
                mine = plan.rows[batch, :, start : min(start + block, row_count)]
                row_visits += len(range(int(mine[6].min()), int(mine[7].max())))
            for tile in range(tile_count):
                low, high, long = plan.tiles[batch, 4:7, tile].tolist()
                column_visits += len(range(low, high, block)) if long < 0 else 0
        assert geometry.tile_turns(block)[0] == row_visits
        assert geometry.column_turns(block, long=False)[0] == column_visits


@pytest.mark.parametrize(("variant", "metric"), LOSSES)
def test_scaling(variant, metric):
    def costs(length, batch=1):
        segments = [x.repeat(batch, 1) for x in text(length)]
        return kernels(case_of(aim_plan(*segments), SHAPE, metric, "cuda:90"), variant, metric)

    # quadratic in the length but for the diagonal and what is done once per tile, linear in the batch
    short, long, twice = costs(4608), costs(9216), costs(4608, 2)
    assert sum(x.useful for x in long) == pytest.approx(4 * sum(x.useful for x in short), rel=2e-3)
    assert sum(x.flops for x in long) == pytest.approx(4 * sum(x.flops for x in short), rel=3e-2)
    for x, y in zip(short, twice, strict=True):
        assert (y.flops, y.useful, y.exponentials) == (2 * x.flops, 2 * x.useful, 2 * x.exponentials)
        assert (y.private, y.common, y.each) == (2 * x.private, 2 * x.common, 2 * x.each)


def test_the_update_of_rows_by_hand():
    """Bytes of an element: gathers 3 x 8, lerp 12, mul 8, addcmul 12, four plain ones 5 x 8, division 12, sub 12, puts
    3 x 8; of a row's count and two corrections little; see RowAdamW."""
    operations, moved = update_cost(100, 4096)
    assert operations == 26
    assert moved / 100 / 4096 == pytest.approx(24 + 12 + 8 + 12 + 40 + 12 + 12 + 24, abs=0.1)


def test_flash_and_floors():
    plan = aim_plan(*text(2048))
    for gpu in GPUS:
        case = case_of(plan, Shape(), "mse", gpu.target)
        useful = sum(x.useful for x in flash(case))
        length = plan.student_segments.shape[1]
        assert useful == 7 * 32 * 128 * length * (length + 1)
        assert 1 < waste(flash(case)) < 1.15
        for cost in kernels(case, "aim", "mse"):
            assert cost.floor(gpu) == cost.seconds(gpu)[cost.binding(gpu)]
            assert cost.private + cost.common <= cost.bytes(gpu) <= cost.private + max(cost.common, cost.each)
        ratio = ratio_to_flash(plan, Shape(), gpu, "aim", "mse")
        assert ratio == total(kernels(case, "aim", "mse"), gpu) / total(flash(case), gpu)
