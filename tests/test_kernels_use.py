"""The Triton kernels in use: autograd, autocast, plans, memory, synchronisation, compilation, tuning."""

from collections import Counter
from itertools import product

import matt_kernels
import pytest
import torch
from kernel_checks import FLOAT32, assert_close, exact, found, long_segments, record_launches
from matt_kernels import configs, ops, tune
from test_loss import (
    GRID,
    allocations,
    inputs_for,
    packed,
    rows,
    segment_ids,
    text_like,
    two_sides,
)
from torch.utils._python_dispatch import TorchDispatchMode

from matt_fast.loss import aim_loss

pytestmark = pytest.mark.usefixtures("poisoned", "device")


@pytest.mark.parametrize("dtype", FLOAT32)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_identical_sides_cost_nothing(base, dtype, small_tiles):
    segments = rows(segment_ids([1, 2, 3, 1, 4, 2, 9, 1, 1, 20], specials=[0, 6]))
    teacher, *_ = inputs_for(segments, segments, dtype=dtype, dim=16)
    student = tuple(x.clone().requires_grad_() for x in teacher)
    loss, *gradient = found((teacher, student, segments, segments), base)
    noise = 1e-12 if base["metric"] == "mse" else 1e-5 if dtype == torch.bfloat16 else 1e-6
    assert 0 <= loss <= noise
    assert all(x.abs().max() <= max(noise, 1e-8) for x in gradient)


@pytest.mark.parametrize("dtype", FLOAT32)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_same_bits_twice(base, dtype, small_tiles):
    arguments = inputs_for(*long_segments(), dtype=dtype, dim=16)
    first, second = (found(arguments, base) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("base", GRID, ids=str)
def test_only_what_is_needed(base, small_tiles):
    arguments = inputs_for(*long_segments(), dtype=torch.float32, dim=16)
    loss, *every = found(arguments, base)
    for needed in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)):
        for x, wanted in zip(arguments[1], needed, strict=True):
            x.requires_grad_(bool(wanted))
        expected = [x for x, wanted in zip(every, needed, strict=True) if wanted]
        if not expected:
            assert torch.equal(aim_loss(*arguments, **base, backend="triton"), loss)
            continue
        results = found(arguments, base)
        assert torch.equal(results[0], loss)
        # a long segment's share of D is summed up in another order without dQ
        for x, y in zip(results[1:], expected, strict=True):
            assert (x - y).norm() <= 1e-6 * y.norm(), needed


def test_scaled_no_grad_and_detached_teacher(small_tiles):
    for base in GRID:
        teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
        teacher = tuple(x.requires_grad_() for x in teacher)
        loss = aim_loss(teacher, student, *segments, **base, backend="triton")
        first = torch.autograd.grad(loss, student, retain_graph=True)
        (3 * loss).backward()
        assert all(x.grad is None for x in teacher)
        for x, y in zip(student, first, strict=True):
            torch.testing.assert_close(x.grad, 3 * y)
        with torch.no_grad():
            assert torch.equal(aim_loss(teacher, student, *segments, **base, backend="triton"), loss)


@pytest.mark.parametrize("needed", [x for x in product((False, True), repeat=3) if any(x)], ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_second_derivatives_are_refused(base, needed, small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    student = tuple(x.detach().requires_grad_(wanted) for x, wanted in zip(student, needed, strict=True))
    wanted = [x for x in student if x.requires_grad]
    loss = aim_loss(teacher, student, *segments, **base, backend="triton")
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    for gradient, x in zip(first, wanted, strict=True):
        with pytest.raises(RuntimeError, match=r"matt_kernels\.\w+_backward.* no autograd formula"):
            torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)


def test_float16_gradients_survive_a_gradient_scaler(small_tiles):
    arguments = inputs_for(*two_sides(), dtype=torch.float16, dim=16)
    for base in GRID:
        loss = aim_loss(*arguments, **base, backend="triton")
        results = torch.autograd.grad(2.0**14 * loss, arguments[1])
        for x, y in zip(results, exact(arguments, base)[1:], strict=True):
            assert (x.double() / 2**14 - y).norm() <= 5e-3 * y.norm()


def test_mixed_dtypes_and_autocast(small_tiles, device):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    halves = (*student[:2], student[2].detach().bfloat16().requires_grad_())
    _, *gradient = found((tuple(x.bfloat16() for x in teacher), halves, *segments), {})
    assert [x.dtype for x in gradient] == [torch.float32, torch.float32, torch.bfloat16]
    expected = found((teacher, student, *segments), {})
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = aim_loss(teacher, student, *segments, backend="triton")
    results = loss.detach(), *torch.autograd.grad(loss, student)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_gradient_checkpointing(small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    expected = found((teacher, student, *segments), {})

    def step(*student):
        return aim_loss(teacher, tuple(1.0 * x for x in student), *segments, backend="triton")

    loss = torch.utils.checkpoint.checkpoint(step, *student, use_reentrant=False)
    results = loss.detach(), *torch.autograd.grad(loss, student)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_plan_from_elsewhere(small_tiles):
    *segments, documents = packed()
    teacher, student, *_ = inputs_for(*segments, dtype=torch.float32, dim=16)
    plan = matt_kernels.aim_plan(*segments, **documents, reduction="documents", sliding_window=3, widths=(16, 16))
    loss = matt_kernels.aim_loss(teacher, student, plan=plan)
    options = documents | {"reduction": "documents", "sliding_window": 3, "backend": "triton"}
    assert torch.equal(loss, aim_loss(teacher, student, *segments, **options))


def test_a_plan_is_pinned_by_a_data_loader(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: (pinned.append(x), x.clone())[1])
    plan = matt_kernels.aim_plan(*two_sides(), variant="aim_star", widths=(16, 32))
    batch = torch.utils.data._utils.pin_memory.pin_memory({"plans": [plan]})
    copy = batch["plans"][0]
    assert isinstance(copy, matt_kernels.AimPlan)
    assert (copy.widths, copy.variant) == (plan.widths, plan.variant)
    assert all(x is y for x, y in zip(pinned, plan.tensors(), strict=True))
    assert all(torch.equal(x, y) and x is not y for x, y in zip(copy.tensors(), plan.tensors(), strict=True))


# -- memory, synchronisation, compilation --------------------------------------------------------------------------


@pytest.mark.parametrize("base", GRID, ids=str)
def test_memory_is_linear(base, monkeypatch):
    """The same bytes per token for twice the tokens, in all and for the largest buffer: nothing is n x n.

    Kernels are launched and do not run: what they write does not matter, and the interpreter would hold its arguments.
    """
    record_launches(monkeypatch)
    peaks, single, lengths = [], [], []
    for length in (128, 256):
        arguments = inputs_for(*text_like(length), heads=2, dim=16, dtype=torch.float32)

        def step(arguments=arguments):
            torch.autograd.grad(aim_loss(*arguments, **base, backend="triton"), arguments[1])

        peak, largest = allocations(step)
        peaks.append(peak)
        lengths.append(arguments[2].shape[1] + arguments[3].shape[1])
        assert peak <= 500 * lengths[-1]  # bytes per token: 3 gradients, what is kept for them, integers of the plan
        single.append(largest)
    assert peaks[1] / lengths[1] <= 1.05 * peaks[0] / lengths[0]
    assert single[1] / lengths[1] <= 1.05 * single[0] / lengths[0]


KEPT = {torch.bfloat16: (2, 12, 8), torch.float16: (4, 12, 8), torch.float32: (4, 20, 16)}
FACTORS = {torch.bfloat16: (64, 64), torch.float16: (128, 128), torch.float32: (256, 128)}  # teacher's, student's


@pytest.mark.parametrize("dtype", KEPT)
@pytest.mark.parametrize("variant", ["aim", "aim_star"])
def test_what_is_kept_for_backward(variant, dtype):
    """The constants of the README, per token and query head: of a number, of a row for aim and for aim_star. Beside it
    factors per token and key head, and two scalars."""
    number, of_aim, of_star = KEPT[dtype]
    heads, dim = 4, 16
    teacher, student, *segments = inputs_for(*text_like(50), heads=heads, kv_heads=2, dim=dim, dtype=dtype)
    plan = matt_kernels.aim_plan(*segments, variant=variant)
    given = {x.data_ptr() for x in (*teacher, *student, *plan.tensors())}
    kept = {}
    hook = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x)
    with hook:
        matt_kernels.aim_loss(teacher, student, plan=plan, variant=variant)
    kept = sum(size for place, size in kept.items() if place not in given)
    student_tokens, rows_of = segments[1].numel(), min(x.numel() for x in segments)
    if variant == "aim":
        of_factors = FACTORS[dtype]
        tokens = 2 * (of_factors[0] * segments[0].numel() + of_factors[1] * student_tokens)
        assert kept == heads * (student_tokens * number * dim + rows_of * of_aim) + tokens + 4
    else:
        assert kept == heads * rows_of * (number * dim + of_star) + 4


def forbidden(*_, **__):
    raise AssertionError("a copy to the CPU")


class NoWaiting(TorchDispatchMode):
    """Fails at torch operations, also inside our ops, that make the CPU wait for a GPU. Counts the others."""

    WAIT = ("local_scalar_dense", "item", "nonzero", "unique", "masked_select", "is_nonzero", "equal.", "bincount")
    WAIT += ("repeat_interleave.Tensor", "allclose", "argwhere")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        namespace, name = str(function).split(".", 1)
        self.seen[name] += 1
        if namespace == "matt_kernels":
            op = name.removesuffix(".default")
            with self:
                return getattr(ops, "aim_plan_op" if op == "aim_plan" else op)._init_fn(*arguments, **(options or {}))
        assert not name.lstrip("_").startswith(self.WAIT), function
        masks = arguments[1] if name.lstrip("_").startswith(("index.", "index_put")) else ()
        assert not any(x is not None and x.dtype == torch.bool for x in masks), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: range(x[0].long()),
    ],
)
def test_what_waits_is_found(wait):
    with NoWaiting(), pytest.raises(AssertionError):
        wait(torch.arange(3.0))


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_never_waits_for_the_device(base, with_documents, monkeypatch, small_tiles):
    """Between ids on the device and the gradients."""
    record_launches(monkeypatch)
    for name in ("cpu", "numpy", "tolist"):  # no torch operation where the tensor is on the CPU already
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    *segments, documents = packed()
    documents = documents if with_documents else {}
    teacher, student, *_ = inputs_for(*segments, dtype=torch.float32, dim=16)
    for reduction, sliding_window, causal in product(("pairs", "documents"), (None, 3), (True, False)):
        options = base | documents | {"reduction": reduction, "sliding_window": sliding_window, "causal": causal}
        for softcap, needed in ((None, student), (2.0, student[:1]), (None, student[1:])):
            for x in student:
                x.requires_grad_(any(x is y for y in needed))
            with NoWaiting() as mode:
                loss = matt_kernels.aim_loss(teacher, student, *segments, **options, softcap=softcap)
                torch.autograd.grad(loss, needed)
            assert mode.seen["aim_plan.default"] == 1
            assert sum(x for name, x in mode.seen.items() if "_backward" in name) >= 1


@pytest.mark.parametrize("base", GRID, ids=str)
def test_opcheck(base, small_tiles):
    *segments, documents = packed()
    checks = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    options = base["variant"], True, None, "pairs"
    torch.library.opcheck(ops.aim_plan_op, (*segments, *documents.values(), 16, 16, *options), test_utils=checks)
    # Without padding: factors of tokens in no tile are never written, nor read.
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    plan = list(ops.aim_plan_op(*segments, None, None, 16, 16, *options))
    # Gradients go through the functions of autograd.py; ops have no formula.
    student = [x.detach() for x in student]
    arguments = *teacher, *student, plan, 16, 16
    options = base["metric"], 0.25, None
    if base["variant"] == "aim_star":
        for needed in (True, False):
            torch.library.opcheck(ops.attend_forward, (*arguments, *options, 1, needed), test_utils=checks)
        _, *kept = ops.attend_forward(*arguments, *options, 1, True)
        arguments = *arguments[3:], *options[1:], kept, torch.ones(())
        for needed in ((True, True, True), (True, False, False), (False, True, False)):
            torch.library.opcheck(ops.attend_backward, (*arguments, *needed), test_utils=checks)
        return
    for needed in ((True, True, True), (True, False, False), (False, False, True)):
        torch.library.opcheck(ops.aim_forward, (*arguments, True, *options, 1, *needed), test_utils=checks)
        _, *kept = ops.aim_forward(*arguments, True, *options, 1, *needed)
        arguments_of = *arguments, True, *options, kept, torch.ones(()), *needed[1:]
        if any(needed[1:]):
            torch.library.opcheck(ops.aim_backward, arguments_of, test_utils=checks)
        else:
            arguments_of = student[0], kept[1], kept[0], torch.ones(())
            torch.library.opcheck(ops.aim_query_backward, arguments_of, test_utils=checks)


# Each pair of variant, metric and dynamic shapes.
@pytest.mark.parametrize(("base", "dynamic"), list(zip(GRID, (False, True, True, False), strict=True)), ids=str)
def test_compiles_without_a_graph_break(base, dynamic, small_tiles):
    arguments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    torch.compiler.reset()
    compiled = torch.compile(aim_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    loss = compiled(*arguments, **base, backend="triton")
    results = loss.detach(), *torch.autograd.grad(loss, arguments[1])
    for x, y in zip(results, found(arguments, base), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plan_and_options_compile_without_a_graph_break(dynamic, small_tiles):
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    torch.compiler.reset()
    compiled = torch.compile(matt_kernels.aim_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    plan = matt_kernels.aim_plan(*segments, sliding_window=3, causal=False, widths=(16, 16))
    options = {"scale": 0.3, "softcap": 2.0}
    wanted = matt_kernels.aim_loss(teacher, student, plan=plan, **options)
    torch.testing.assert_close(compiled(teacher, student, plan=plan, **options), wanted)
    options |= {"sliding_window": 3, "causal": False}
    torch.testing.assert_close(compiled(teacher, student, *segments, **options), wanted)


def test_autotune_keeps_the_fastest_for_every_length(monkeypatch):
    monkeypatch.setattr(ops, "TUNED", {})
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32, dim=16)
    plain = ops.config_for(student[0], student[2], "aim", "mse")
    tried = []

    def measure(step):
        config = ops.config_for(student[0], student[2], "aim", "mse")
        if len(tried) == 3:
            step()
        tried.append(config)
        if config.columns.stages == 3:
            raise tune.OutOfResources(2, 1, "shared memory")
        return 1.0 + (config.rows.block_m - 32) ** 2 + (config.columns.warps - 8) ** 2

    found = matt_kernels.autotune(teacher, student, *segments, measure=measure)
    assert (found.rows.block_m, found.columns.warps) == (32, 8)
    assert (found.softmax, found.widths) == (plain.softmax, plain.widths)
    assert len(set(map(repr, tried))) == len(tried)
    longer = torch.zeros(3, 2, 999, 16)
    assert ops.config_for(longer, longer, "aim", "mse") == found
    assert ops.config_for(longer, longer, "aim", "cosine") != found
    assert ops.config_for(longer.half(), longer.half(), "aim", "mse") != found


@pytest.mark.parametrize("sizes", [([1, 2, 3], [1, 3, 2]), ([4, 4, 4], [1, 2, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autotune_of_aim_star_is_what_both_metrics_launch(dtype, sizes, monkeypatch):
    """Also where the teacher has more tokens, whether tiles are others for it or not, and of any head dimension."""
    monkeypatch.setattr(ops, "TUNED", {})
    arguments = inputs_for(*(rows(segment_ids(x)) for x in sizes), dtype=dtype, dim=20)
    launched = []
    plain = ops.attend_rows
    monkeypatch.setattr(ops, "attend_rows", lambda *a: (launched.append(a[5].attend_rows), plain(*a))[1])

    def measure(step):
        step()
        return 2.0 - (launched[-1].block_m == 32 and launched[-1].warps == 8)

    options = {"variant": "aim_star", "metric": "cosine"}
    with monkeypatch.context() as few:
        for name, values in (("BLOCKS_M", (32,)), ("WARPS", (8,)), ("STAGES", (1,))):
            few.setattr(tune, name, values)
        best = matt_kernels.autotune(*arguments, measure=measure, **options)
    assert (best.attend_rows.block_m, best.attend_rows.warps) == (32, 8)
    for metric in ("mse", "cosine"):
        assert_close(arguments, {"variant": "aim_star", "metric": metric})
        assert launched[-1] == best.attend_rows


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "80"), ((8, 6), "86"), ((8, 7), "80"), ((8, 9), "89"), ((9, 0), "90"), ((10, 0), "100"),
        ((10, 3), "100"), ((11, 0), "100"), ((12, 0), "120"), ((12, 1), "120"),
    ],
)  # fmt: skip
def test_every_device_has_the_configs_of_its_family(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert configs.target_of(torch.device("cuda", 0)) == f"cuda:{name}"


def test_devices_without_the_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer; got 7\.5 on cuda:0"):
        configs.target_of(torch.device("cuda", 0))
