"""What a loss costs the host: Triton launches, and torch operations that launch something, counted."""

from collections import Counter

import matt_kernels
import pytest
import torch
from kernel_checks import long_segments, record_launches
from matt_kernels import configs, device_plan, ops
from test_loss import GRID, inputs_for, packed, rows, segment_ids, two_sides
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("device")

STEP = ["softmax_kernel", "aim_factors_kernel", "aim_rows_kernel", "total_kernel", "aim_columns_kernel"]
STAR_STEP = ["attend_kernel", "attend_kernel", "attend_distance_kernel", "total_kernel"]
STAR_STEP += ["attend_rows_kernel", "attend_columns_kernel"]
LONG = {"aim_long_rows_kernel", "aim_long_columns_kernel"}


class Counting(TorchDispatchMode):
    """Counts torch operations that would launch something on a GPU, also inside our ops."""

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        namespace, name = str(function).split(".", 1)
        if namespace == "matt_kernels":
            op = name.removesuffix(".default")
            with self:
                return getattr(ops, "aim_plan_op" if op == "aim_plan" else op)._init_fn(*arguments, **options or {})
        if not function.is_view and name.split(".")[0] not in self.ALLOCATIONS:
            self.seen[name.removesuffix(".default")] += 1
        return function(*arguments, **options or {})


def counted(names: list[str], call) -> tuple[list[str], Counter]:
    names.clear()
    with Counting() as mode:
        call()
    return list(names), mode.seen


def a_step(segments, base, dtype, plan=None, dim=16):
    teacher, student, *ids = inputs_for(*segments, dtype=dtype, dim=dim)
    ids = () if plan is not None else ids
    gradient = torch.ones(())  # from what is made of the loss

    def step():
        torch.autograd.grad(matt_kernels.aim_loss(teacher, student, *ids, **base, plan=plan), student, gradient)

    return step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_a_step_with_a_plan(base, dtype, monkeypatch):
    names = record_launches(monkeypatch)
    segments = two_sides()
    plan = matt_kernels.aim_plan(*(x.cpu() for x in segments), variant=base["variant"]).to(segments[0].device)
    assert not plan.long_segments
    for dim in (16, 20):
        launched, operations = counted(names, a_step(segments, base, dtype, plan, dim))
        # of head dimensions that are no multiple of 16 the six tensors are copied, and gradients cut
        copied = {x: y for x, y in operations.items() if "pad" in x}
        operations = operations - Counter(copied)
        assert launched == (STEP if base["variant"] == "aim" else STAR_STEP)
        if base["variant"] == "aim":
            assert operations == {"zeros": 1, "mul.Tensor": 1, "mul.out": 1, "_foreach_zero_": 1}
        else:
            assert operations == {"mul.Tensor": 1, "_foreach_zero_": 1}


def test_kernels_of_long_segments_are_launched_where_one_may_be(monkeypatch):
    names = record_launches(monkeypatch)
    base = GRID[0]
    for segments, known in ((long_segments(), True), (two_sides(), False)):
        plan = matt_kernels.aim_plan(*(x.cpu() for x in segments), widths=(16, 16)).to(segments[0].device)
        assert plan.long_segments == known
        launched, _ = counted(names, a_step(segments, base, torch.float32, plan))
        assert LONG & set(launched) == (LONG if known else set())
        # ids on the device: nobody has looked
        launched, _ = counted(names, a_step(segments, base, torch.float32))
        assert set(launched) >= LONG


def test_a_plan_keeps_what_is_known(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: x)
    ids = rows(segment_ids([1, 40, 2])).cpu()
    for segments, known in (((ids, ids), True), ([x.cpu() for x in two_sides()], False)):
        plan = matt_kernels.aim_plan(*segments)
        assert plan.long_segments == plan.to("meta").long_segments == plan.pin_memory().long_segments == known


@pytest.mark.parametrize("with_documents", [False, True])
def test_a_plan_on_the_device(with_documents, monkeypatch):
    *segments, documents = packed()
    documents = documents.values() if with_documents else (None, None)
    options = {"widths": (16, 16), "variant": "aim", "causal": True, "sliding_window": None, "reduction": "pairs"}
    names = record_launches(monkeypatch)
    launched, operations = counted(names, lambda: device_plan.make_device_plan(*segments, *documents, **options))
    assert len(launched) == 7 + with_documents
    assert not operations


def test_a_config_is_looked_up_once(monkeypatch):
    record_launches(monkeypatch)
    step = a_step(two_sides(), GRID[0], torch.bfloat16)
    step()
    before = configs.choose_config.cache_info().misses
    for _ in range(3):
        step()
    assert configs.choose_config.cache_info().misses == before
