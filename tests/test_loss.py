"""aim_loss against a per-pair Python loop straight from the paper, in float64, on small awkward sizes."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from matt_fast.loss import AIMLoss, aim_loss, blockwise, tiles, workspace

ENGINES = ["torch", "eager"]
GRID = [{"variant": variant, "metric": metric} for variant in ("aim", "aim_star") for metric in ("mse", "cosine")]


# -- the reference -------------------------------------------------------------------------------------------------


def brute_force(
    teacher,
    student,
    teacher_segments,
    student_segments,
    *,
    teacher_documents=None,
    student_documents=None,
    variant="aim",
    metric="mse",
    reduction="pairs",
    scale=None,
    sliding_window=None,
    softcap=None,
    causal=True,
):
    segments, documents = [teacher_segments, student_segments], [teacher_documents, student_documents]
    documents = [torch.zeros_like(s) if d is None else d for s, d in zip(segments, documents, strict=True)]
    per_document = []
    for row in range(len(teacher_segments)):
        for document in sorted(set(documents[0][row].tolist()) - {-1}):
            ids = sorted(set(segments[0][row][documents[0][row] == document].tolist()) - {-100})
            terms = []
            for head, i in itertools.product(range(teacher[0].shape[1]), ids):
                weights, values = [], []
                for side, (q, k, v) in enumerate((teacher, student)):
                    kv_head = head // (q.shape[1] // k.shape[1])
                    last = max(t for t, s in enumerate(segments[side][row].tolist()) if s == i)
                    logits = {}
                    for t in range(q.shape[2]):
                        distance = last - t
                        seen = documents[side][row, t] == document and (distance >= 0 or not causal)
                        if sliding_window is not None:
                            seen &= distance < sliding_window if causal else abs(distance) <= sliding_window
                        if seen:
                            x = q[row, head, last] @ k[row, kv_head, t] * (scale or 1 / math.sqrt(q.shape[-1]))
                            logits[t] = x if softcap is None else softcap * torch.tanh(x / softcap)
                    probabilities = torch.stack(list(logits.values())).softmax(0)
                    weights.append(dict(zip(logits, probabilities, strict=True)))
                    values.append(v[row, kv_head])
                for j in ids if variant == "aim" else [None]:
                    if variant == "aim" and causal and j > i:
                        continue
                    vectors = []
                    for side in range(2):
                        total = torch.zeros_like(values[side][0])
                        for t, weight in weights[side].items():
                            if j is None or segments[side][row, t] == j:
                                total = total + weight * values[side][t]
                        vectors.append(total)
                    terms.append(distance_of(*vectors, metric))
            if terms:
                per_document.append(torch.stack(terms))
    if reduction == "documents":
        return torch.stack([x.mean() for x in per_document]).mean()
    return torch.cat(per_document).mean()


def distance_of(teacher, student, metric):
    if metric == "mse":
        return (teacher - student).square().mean()
    products = (teacher * student).sum() / ((teacher.square().sum() + 1e-12) * (student.square().sum() + 1e-12)).sqrt()
    return 1 - products


# -- data ----------------------------------------------------------------------------------------------------------


def segment_ids(sizes, specials=()):
    """Ids of segments of these sizes, with -100 inserted before the given token positions."""
    ids = [i for i, size in enumerate(sizes) for _ in range(size)]
    for position in sorted(specials, reverse=True):
        ids.insert(position, -100)
    return ids


def rows(*ids):
    return torch.tensor(ids)


def states(batch, heads, kv_heads, length, dim=4, value_dim=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    drawn = (
        torch.randn(batch, h, length, d, generator=generator, dtype=torch.float64, device="cpu") for h, d in shapes
    )
    return tuple(x.to(torch.get_default_device(), dtype) for x in drawn)


def inputs_for(teacher_segments, student_segments, heads=2, kv_heads=1, **options):
    batch = len(teacher_segments)
    teacher = states(batch, heads, kv_heads, teacher_segments.shape[1], seed=1, **options)
    student = states(batch, heads, kv_heads, student_segments.shape[1], seed=2, **options)
    return teacher, tuple(x.requires_grad_() for x in student), teacher_segments, student_segments


def two_sides():
    """Specials at the front, in the middle of a segment, between segments and at the end; one segment of 5 tokens."""
    teacher = rows(segment_ids([1, 2, 3, 1, 2], specials=[0, 4, 7]), segment_ids([5, 1, 2, 3], specials=[9]))
    student = rows(segment_ids([2, 1, 1, 1, 3], specials=[8]), segment_ids([2, 1, 1, 4], specials=[0]))
    return teacher, student


def packed():
    """Padding left and right, three documents in one row, one document without segments."""
    teacher_segments = rows(
        [-100, -100, 0, 0, 1, -100, 2, 3, 3, 4, 4, 4, -100, -100], [-100, 0, 1, 1, 2, 2, 3, 3] + [-100] * 6
    )
    teacher_documents = rows([-1, 7, 7, 7, 7, 3, 3, 3, 3, 9, 9, 9, 4, -1], [-1, 0, 0, 0, 0, 0, 0, 0] + [-1] * 6)
    student_segments = rows([0, 1, 1, 2, 2, 3, 4, -100, -100, -100], [0, 0, -100, 1, 2, 2, 3, -100, -100, -100])
    student_documents = rows([7, 7, 7, 3, 3, 3, 9, 4, -1, -1], [0, 0, 0, 0, 0, 0, 0, -1, -1, -1])
    documents = {"teacher_documents": teacher_documents, "student_documents": student_documents}
    return teacher_segments, student_segments, documents


def gradients(function, arguments, options):
    loss = function(*arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in arguments[1] if x.requires_grad])]


def assert_same(actual, expected, **tolerance):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **({"rtol": 1e-9, "atol": 1e-11} | tolerance))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Every element of an uninitialised buffer must be written before it is read."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))


def _poison(x):
    return x.fill_(float("nan")) if x.is_floating_point() else x


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of a few rows and tiles of two tokens, so that small inputs take every path."""
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(blockwise, "MIN_BLOCK_ROWS", 4)
    monkeypatch.setattr(tiles, "WIDTHS", (2,))


# -- against the reference -----------------------------------------------------------------------------------------


VARIATIONS = [
    {},
    {"reduction": "documents"},
    {"sliding_window": 3},
    {"sliding_window": 1},
    {"softcap": 0.7},
    {"causal": False},
    {"causal": False, "sliding_window": 2},
    {"scale": 1.7, "softcap": 2.0, "sliding_window": 4, "reduction": "documents"},
]


@pytest.mark.parametrize("options", VARIATIONS, ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_equals_the_paper(base, options, small_tiles):
    arguments = inputs_for(*two_sides())
    expected = gradients(brute_force, arguments, base | options)
    for backend in ENGINES:
        assert_same(gradients(aim_loss, arguments, base | options | {"backend": backend}), expected)


@pytest.mark.parametrize("options", VARIATIONS, ids=str)
@pytest.mark.parametrize("base", GRID, ids=str)
def test_packed_and_padded_equal_the_paper(base, options, small_tiles):
    teacher_segments, student_segments, documents = packed()
    arguments = inputs_for(teacher_segments, student_segments)
    options = base | options | documents
    expected = gradients(brute_force, arguments, options)
    for backend in ENGINES:
        assert_same(gradients(aim_loss, arguments, options | {"backend": backend}), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_heads(base, heads, kv_heads):
    arguments = inputs_for(*two_sides(), heads=heads, kv_heads=kv_heads, value_dim=3)
    expected = gradients(brute_force, arguments, base)
    for backend in ENGINES:
        assert_same(gradients(aim_loss, arguments, base | {"backend": backend}), expected)


AWKWARD = {
    "one token": ([1], [1], (), ()),
    "one segment": ([7], [3], (), ()),
    "one segment and specials": ([9], [5], (0, 3), (5,)),
    "one-token segments": ([1] * 9, [1] * 9, (), ()),
    "long on one side": ([1, 9, 1, 1], [1, 1, 1, 7], (), (0,)),
    "many specials": ([1, 2, 1], [2, 1, 1], (0,) * 5 + (2,) * 4, (4,) * 6),
}


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_segments(case, base, small_tiles):
    teacher, student, teacher_specials, student_specials = AWKWARD[case]
    arguments = inputs_for(rows(segment_ids(teacher, teacher_specials)), rows(segment_ids(student, student_specials)))
    for options in ({}, {"causal": False}, {"sliding_window": 3}):
        expected = gradients(brute_force, arguments, base | options)
        for backend in ENGINES:
            assert_same(gradients(aim_loss, arguments, base | options | {"backend": backend}), expected)


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize(
    "sizes", [([300], [211]), ([90, 1, 1, 70, 2] * 2, [1, 80, 1, 75, 1] * 2), ([3] * 150, [2] * 150)]
)
def test_real_blocks_and_long_segments_equal_eager(base, sizes):
    arguments = inputs_for(*(rows(segment_ids(x, specials=[0])) for x in sizes), dim=8)
    for options in ({}, {"causal": False}, {"sliding_window": 40}):
        expected = gradients(aim_loss, arguments, base | options | {"backend": "eager"})
        assert_same(gradients(aim_loss, arguments, base | options | {"backend": "torch"}), expected)


@pytest.mark.parametrize("base", GRID, ids=str)
def test_more_tokens_than_dimensions_in_a_segment(base):
    for sizes in (([3, 4, 1, 1, 1, 3], [1] * 6), ([1] * 6, [3, 4, 1, 1, 1, 3]), ([4, 6], [5, 4])):
        arguments = inputs_for(*(rows(segment_ids(x)) for x in sizes), heads=1)
        options = base | {"causal": False}
        expected = gradients(brute_force, arguments, options)
        assert_same(gradients(aim_loss, arguments, options | {"backend": "torch"}), expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_segmentation(data):
    count = data.draw(st.integers(1, 6))
    sides = []
    for _ in range(2):
        sizes = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
        specials = data.draw(st.lists(st.integers(0, sum(sizes)), max_size=3))
        sides.append(rows(segment_ids(sizes, specials)))
    arguments = inputs_for(*sides, heads=1)
    window = data.draw(st.none() | st.integers(1, 6))
    options = data.draw(st.sampled_from(GRID)) | {"sliding_window": window, "causal": data.draw(st.booleans())}
    expected = gradients(brute_force, arguments, options)
    for backend in ENGINES:
        assert_same(gradients(aim_loss, arguments, options | {"backend": backend}), expected)


@pytest.mark.parametrize("base", GRID, ids=str)
@pytest.mark.parametrize("case", ["plain", "packed", "window", "softcap", "encoder"])
def test_gradcheck(base, case, small_tiles):
    teacher_segments, student_segments, documents = packed()
    extra = {"window": {"sliding_window": 3}, "softcap": {"softcap": 1.5}, "encoder": {"causal": False}}.get(case, {})
    if case != "packed":
        (teacher_segments, student_segments), documents = two_sides(), {}
    teacher, student, *segments = inputs_for(teacher_segments, student_segments)
    options = base | documents | extra | {"backend": "torch"}
    assert torch.autograd.gradcheck(lambda *s: aim_loss(teacher, s, *segments, **options), student, fast_mode=True)


@pytest.mark.parametrize("backend", ENGINES)
def test_packed_documents_equal_one_by_one(backend):
    teacher_segments, student_segments, documents = packed()
    teacher, student, *_ = inputs_for(teacher_segments, student_segments)
    together = aim_loss(
        teacher, student, teacher_segments, student_segments, **documents, reduction="documents", backend=backend
    )
    alone = []
    for row, name in ((0, 7), (0, 3), (0, 9), (1, 0)):
        parts, ids = [], []
        for side, segments, tokens in (
            (teacher, teacher_segments, documents["teacher_documents"]),
            (student, student_segments, documents["student_documents"]),
        ):
            kept = tokens[row] == name
            parts.append(tuple(x[row : row + 1, :, kept] for x in side))
            own = segments[row : row + 1, kept]
            ids.append(torch.where(own >= 0, own - own[own >= 0].min(), own))
        alone.append(aim_loss(*parts, *ids, backend=backend))
    torch.testing.assert_close(together, torch.stack(alone).mean())


# -- behaviour -----------------------------------------------------------------------------------------------------


def text_like(length, seed=0):
    rng = np.random.default_rng(seed)
    teacher = rng.choice([1, 2, 3, 4], size=length, p=[0.6, 0.25, 0.1, 0.05])
    count = int(np.searchsorted(np.cumsum(teacher), length))
    student = rng.choice([1, 2, 3], size=count, p=[0.75, 0.2, 0.05])
    return rows(segment_ids(teacher[:count])), rows(segment_ids(student))


@pytest.mark.parametrize("base", GRID, ids=str)
def test_identical_sides_cost_nothing(base):
    segments, _ = text_like(200)
    teacher = states(1, 4, 2, segments.shape[1], dim=16, dtype=torch.float32)
    student = tuple(x.clone().requires_grad_() for x in teacher)
    loss, *found = gradients(aim_loss, (teacher, student, segments, segments), base | {"backend": "torch"})
    assert 0 <= loss <= (0 if base["metric"] == "mse" else 1e-6)
    noise = 0 if base["metric"] == "mse" else 1e-6
    assert all(x.abs().max() <= noise for x in found)


def test_same_bits_twice():
    arguments = inputs_for(*text_like(300), dim=16, dtype=torch.float32)
    first, second = (gradients(aim_loss, arguments, {"backend": "torch"}) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("base", GRID, ids=str)
def test_only_what_is_needed(base, needed):
    arguments = inputs_for(*two_sides())
    expected = gradients(aim_loss, arguments, base)
    for x, wanted in zip(arguments[1], needed, strict=True):
        x.requires_grad_(wanted)
    loss, gradient = gradients(aim_loss, arguments, base)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1 + needed.index(True)])


@pytest.mark.parametrize("backend", ENGINES)
def test_teacher_is_detached_and_no_grad_works(backend):
    teacher, student, *segments = inputs_for(*two_sides())
    teacher = tuple(x.requires_grad_() for x in teacher)
    loss = aim_loss(teacher, student, *segments, backend=backend)
    (2 * loss).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad.abs().sum() > 0 for x in student)
    with torch.no_grad():
        silent = aim_loss(teacher, student, *segments, backend=backend)
    assert not silent.requires_grad
    assert torch.equal(silent, loss)


def test_backward_twice_and_scaled():
    arguments = inputs_for(*two_sides())
    loss = aim_loss(*arguments)
    first = torch.autograd.grad(loss, arguments[1], retain_graph=True)
    second = torch.autograd.grad(3 * loss, arguments[1])
    assert_same(second, [3 * x for x in first])


@pytest.mark.parametrize("backend", ENGINES)
def test_non_contiguous(backend):
    teacher, student, *segments = inputs_for(*two_sides())
    expected = gradients(aim_loss, (teacher, student, *segments), {"backend": backend})
    scattered = [tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in s) for s in (teacher, student)]
    scattered[1] = tuple(x.requires_grad_() for x in scattered[1])
    assert not scattered[1][0].is_contiguous()
    assert_same(gradients(aim_loss, (*scattered, *segments), {"backend": backend}), expected)


@pytest.mark.parametrize("backend", ENGINES)
def test_autocast_does_not_reach_inside(backend):
    arguments = inputs_for(*two_sides(), dtype=torch.float32)
    expected = gradients(aim_loss, arguments, {"backend": backend})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = aim_loss(*arguments, backend=backend)
    inside = loss.detach(), *torch.autograd.grad(loss, arguments[1])
    assert all(torch.equal(x, y) for x, y in zip(inside, expected, strict=True))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, backend):
    arguments = inputs_for(*two_sides(), dtype=dtype)
    loss, *found = gradients(aim_loss, arguments, {"backend": backend})
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(x.dtype == dtype for x in found)


def test_mixed_dtypes():
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32)
    halves = (*student[:2], student[2].detach().bfloat16().requires_grad_())
    _, *found = gradients(aim_loss, (tuple(x.bfloat16() for x in teacher), halves, *segments), {})
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16]


def test_padding_content_is_never_read():
    teacher_segments, student_segments, documents = packed()
    teacher, student, *_ = inputs_for(teacher_segments, student_segments)
    expected = aim_loss(teacher, student, teacher_segments, student_segments, **documents)
    padding = documents["student_documents"] == -1
    spoilt = tuple(x.detach().masked_fill(padding[:, None, :, None], float("nan")).requires_grad_() for x in student)
    loss, *found = gradients(aim_loss, (teacher, spoilt, teacher_segments, student_segments), documents)
    assert torch.equal(loss, expected)
    assert all((x.transpose(1, 2)[padding] == 0).all() for x in found)


def allocations(step):
    """(peak, largest) bytes that tensors allocated during step hold.

    Triton's interpreter leaves the arguments of every launch in a reference cycle. None of an earlier step may be freed
    inside the measurement, and those of this one count as held to its end, whenever Python would have collected them.
    """
    step()
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(profile_memory=True) as profiler:
            step()
    finally:
        gc.enable()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = np.array([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())])
    return np.cumsum(sizes).max(), sizes.max()


@pytest.mark.parametrize("base", GRID, ids=str)
def test_memory_is_linear(base):
    """Twice the tokens, at most 2.1 times the memory, block buffers of a fixed size aside; nothing is n x n."""
    peaks, single = [], []
    for length in (2048, 4096):
        teacher_segments, student_segments = text_like(length)
        arguments = inputs_for(teacher_segments, student_segments, heads=2, dim=16, dtype=torch.float32)

        def step(arguments=arguments):
            torch.autograd.grad(aim_loss(*arguments, backend="torch", **base), arguments[1])

        peak, largest = allocations(step)
        peaks.append(peak)
        single.append(largest)
    assert peaks[1] <= 2.1 * peaks[0]
    assert single[1] <= 2.1 * single[0]
    # the largest piece is all buffers of one block
    assert single[1] / len(workspace.BUFFERS) < teacher_segments.shape[1] * student_segments.shape[1] * 4 / 8


def test_module_and_auto():
    arguments = inputs_for(*two_sides())
    module = AIMLoss(metric="cosine", sliding_window=4)
    assert torch.equal(module(*arguments), aim_loss(*arguments, metric="cosine", sliding_window=4, backend="torch"))
    assert "sliding_window=4" in repr(module)


def test_matches_torch_cosine_for_tiny_weights():
    teacher, student, *segments = inputs_for(*two_sides(), dtype=torch.float32)
    tiny = (teacher[0] * 30, teacher[1] * 30, teacher[2]), tuple((x.detach() * 20).requires_grad_() for x in student)
    expected = gradients(aim_loss, (*tiny, *segments), {"metric": "cosine", "backend": "eager"})
    found = gradients(aim_loss, (*tiny, *segments), {"metric": "cosine", "backend": "torch"})
    assert_same(found, expected, rtol=2e-4, atol=1e-5)


def test_reference_agrees_with_torch_cosine():
    x, y = torch.randn(2, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(distance_of(x[0], y[0], "cosine"), F.cosine_embedding_loss(x, y, torch.ones(1)))


# -- errors --------------------------------------------------------------------------------------------------------


def change(arguments, **changed):
    names = ["teacher", "student", "teacher_segments", "student_segments"]
    return dict(zip(names, arguments, strict=True)) | changed


def bad_calls():
    teacher_segments, student_segments = two_sides()
    good = inputs_for(teacher_segments, student_segments)
    q, k, v = good[1]
    fewer = student_segments.clone()
    fewer[0, 5:] = -100
    jump = student_segments.clone()
    jump[jump == 2] = -100
    documents = {"teacher_documents": torch.zeros_like(teacher_segments)}
    split = torch.zeros_like(student_segments)
    split[:, 3] = 1
    cut = torch.zeros_like(student_segments)
    cut[:, 1:] = 1
    return {
        "variant": ({"variant": "aim2"}, ValueError, "variant must be one of 'aim', 'aim_star'; got 'aim2'"),
        "metric": ({"metric": "l1"}, ValueError, "metric must be"),
        "reduction": ({"reduction": "sum"}, ValueError, "reduction must be"),
        "backend": ({"backend": "cuda"}, ValueError, "backend must be"),
        "triton": ({"backend": "triton"}, TypeError, "got float64: use backend='torch'"),
        "window": ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1; got 0"),
        "window kind": ({"sliding_window": 2.5}, TypeError, "sliding_window must be an int"),
        "scale zero": ({"scale": 0.0}, ValueError, "scale must be above 0"),
        "softcap": ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
        "scale kind": ({"scale": "x"}, TypeError, "scale must be a number"),
        "causal": ({"causal": 1}, TypeError, "causal must be a bool"),
        "plan": ({"plan": object(), "backend": "torch"}, ValueError, "plan: wanted None for an engine other than"),
        "tuple": ({"student": (q, k)}, TypeError, "student must be a tuple .q, k, v. of three tensors; got tuple of 2"),
        "tensor": ({"student": (q, k, 3)}, TypeError, "student v must be a tensor; got int"),
        "dtype": ({"student": (q.long(), k, v)}, TypeError, "student q must be float64"),
        "dimensions": ({"student": (q[0], k, v)}, ValueError, "student q must have the four dimensions"),
        "device": ({"student": (q, k.to("meta"), v)}, ValueError, "student k must be on the device of student q, cpu"),
        "lengths": ({"student": (q, k[:, :, 1:], v)}, ValueError, "student must have shapes"),
        "groups": ({"student": (torch.cat([q, q[:, :1]], 1), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))}, ValueError,
                   "multiple of H_kv of k and v; got 3 and 2"),
        "head count": ({"student": (q.repeat(1, 2, 1, 1), k, v)}, ValueError, "q must have the same number of heads"),
        "head dim": ({"student": (q[..., 1:], k[..., 1:], v)}, ValueError, "q must have the same head dimension"),
        "value dim": ({"student": (q, k, v[..., 1:])}, ValueError, "v must have the same head dimension"),
        "batch": (
            {"student": (q[:1], k[:1], v[:1]), "student_segments": student_segments[:1]}, ValueError, "batch size"
        ),
        "ids kind": ({"student_segments": student_segments.tolist()}, TypeError, "student_segments must be a tensor"),
        "ids dtype": ({"student_segments": student_segments.float()}, TypeError, "student_segments must be int64"),
        "ids shape": ({"student_segments": student_segments[:, 1:]}, ValueError, "student_segments must have shape"),
        "counts": ({"student_segments": fewer}, ValueError, "row 0, document 0 has 5 and"),
        "order": ({"student_segments": student_segments.flip(1)}, ValueError, "0..m-1 in order"),
        "gap": ({"student_segments": jump}, ValueError, "row 0 goes from 1 to 3"),
        "negative": ({"student_segments": student_segments - 1}, ValueError, "student_segments must be 0..m-1"),
        "nothing": ({"teacher_segments": torch.full_like(teacher_segments, -100),
                         "student_segments": torch.full_like(student_segments, -100)},
                    ValueError, "at least one segment"),
        "one side": (documents, ValueError, "given together"),
        "other documents": (documents | {"student_documents": torch.ones_like(student_segments)}, ValueError,
                            r"row 0 has \[0\] and \[1\]"),
        "document order": (documents | {"student_documents": split}, ValueError, "row 0 returns to document 0"),
        "cut segment": (documents | {"student_documents": cut}, ValueError, "no segment may lie in two documents"),
        "document id": (documents | {"student_documents": cut - 3}, ValueError, "-1 for padding; row 0 has -3"),
        "padding": (documents | {"student_documents": -torch.ones_like(student_segments)}, ValueError,
                    "must be -100 where student_documents is -1"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_errors(case):
    changed, error, message = bad_calls()[case]
    with pytest.raises(error, match=message):
        aim_loss(**change(inputs_for(*two_sides()), **changed))


def test_module_checks_at_once():
    with pytest.raises(ValueError, match="metric must be"):
        AIMLoss(metric="l1")
