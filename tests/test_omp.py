"""Orthogonal matching pursuit against scikit-learn's and against plain least squares."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp

from matt_fast.initializers import omp
from matt_fast.initializers.omp import SparseCoefficients, apply, omp_coefficients, outliers


@pytest.fixture(params=["bfloat16 first", "full precision"])
def search(request, monkeypatch):
    """Both ways to find the best anchor, at any size; the first runs on every CPU, only slowly on some."""
    screened = request.param == "bfloat16 first"
    monkeypatch.setattr(omp, "_multiplies_bfloat16", lambda device: screened)
    monkeypatch.setattr(omp, "SCREEN_FROM", 1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random(dtype):
    return normal(20, 40, dtype=dtype), normal(300, 40, seed=1, dtype=dtype)


def correlated(dtype):
    """Anchors in a few directions, of lengths that differ."""
    mixing = normal(40, 40, seed=2) * torch.logspace(0, -2, 40)[:, None]
    lengths = normal(300, 1, seed=3).exp()
    return (normal(20, 40) @ mixing).to(dtype), (lengths * normal(300, 40, seed=1) @ mixing).to(dtype)


def nearly_parallel(dtype):
    """Pairs of anchors a ten-thousandth apart."""
    anchors = normal(150, 40, seed=1, dtype=torch.float64)
    twins = anchors + 1e-4 * normal(150, 40, seed=4, dtype=torch.float64)
    return normal(20, 40, dtype=dtype), torch.cat([anchors, twins]).to(dtype)


def exactly_sparse(dtype):
    anchors = normal(300, 80, seed=1, dtype=dtype)
    return 2 * anchors[::30] - anchors[1::30] + 3 * anchors[2::30], anchors


PROBLEMS = random, correlated, nearly_parallel, exactly_sparse


def residual(targets, anchors, found):
    return targets.double() - apply(found, anchors.double())


def unit(vectors):
    return torch.nn.functional.normalize(vectors.double(), dim=-1)


def reference(targets, anchors, k):
    """scikit-learn over anchors of length 1, in float64: a dense [m, s] of coefficients."""
    lengths = anchors.double().norm(dim=1, keepdim=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it stops early
        found = orthogonal_mp((anchors.double() / lengths).T.numpy(), targets.double().T.numpy(), n_nonzero_coefs=k)
    return torch.from_numpy(found.reshape(len(anchors), -1)).T / lengths.T


def dense(found):
    out = torch.zeros(len(found.indices), found.anchors, dtype=torch.float64)
    return out.scatter_add_(1, found.indices, found.values.double())


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_like_scikit_learn_in_float64(problem, k):
    targets, anchors = problem(torch.float64)
    found = omp_coefficients(targets, anchors, k)
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(dense(found), reference(targets, anchors, k), rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_as_good_as_scikit_learn_in_float32(problem):
    """A near tie may fall otherwise; then the fit differs, but is not worse."""
    targets, anchors = problem(torch.float32)
    found, expected = omp_coefficients(targets, anchors, 12), reference(targets, anchors, 12)
    ours = residual(targets, anchors, found).norm(dim=1)
    best = (targets.double() - expected @ anchors.double()).norm(dim=1)
    noise = 3e-6 * targets.norm(dim=1)
    same = ((dense(found) != 0) == (expected != 0)).all(1) | (problem is exactly_sparse)
    assert same.double().mean() > 0.7
    assert (ours <= best + noise)[same].all()
    assert ours.mean() <= 1.01 * best.mean() + noise.mean()


@pytest.mark.usefixtures("search")
def test_exactly_sparse_targets_are_recovered():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        targets, anchors = exactly_sparse(dtype)
        found = omp_coefficients(targets, anchors, 20)
        expected = torch.zeros(10, 300, dtype=torch.float64)
        expected[range(10), range(0, 300, 30)] = 2
        expected[range(10), range(1, 300, 30)] = -1
        expected[range(10), range(2, 300, 30)] = 3
        torch.testing.assert_close(dense(found), expected, rtol=0, atol=tolerance)
        assert not found.values[:, 3:].any()
        assert not found.indices[:, 3:].any()


@pytest.mark.usefixtures("search")
def test_k_is_at_most_the_anchors_and_the_dimensions():
    targets = normal(5, 12)
    for s, k in ((200, 64), (7, 64), (200, 12)):
        anchors = normal(s, 12, seed=1)
        found = omp_coefficients(targets, anchors, k)
        assert found.indices.shape == found.values.shape == (5, min(s, 12))
        best = torch.linalg.lstsq(anchors.T.double(), targets.T.double()).solution.T @ anchors.double()
        assert (residual(targets, anchors, found) - (targets - best)).norm() < 1e-4


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("apart", "beyond"), [(None, 1), (None, 0.003), (0.004, 1)])
def test_dependent_anchors_are_never_chosen(dtype, apart, beyond):
    """Anchors of low rank, each many times, some a rounding error away.

    Half of them are twins, so far `apart`. The targets reach `beyond` the anchors' span. Both parameters are powers of
    the rounding error in float32's terms, so that what cancels is as much of the precision in float64.
    """
    eps = torch.finfo(dtype).eps
    apart, beyond = (x and x ** (np.log(eps) / np.log(1.2e-7)) for x in (apart, beyond))
    core = normal(6, 30, seed=1, dtype=torch.float64)
    if apart is not None:
        core = torch.cat([core, core + apart * normal(6, 30, seed=5, dtype=torch.float64)])
    mixed = normal(60, len(core), seed=2, dtype=torch.float64) @ core
    inside = normal(40, 30, dtype=torch.float64) @ torch.linalg.pinv(core) @ core
    outside = normal(40, 30, seed=4, dtype=torch.float64)
    outside -= outside @ torch.linalg.pinv(core) @ core
    exact = torch.cat([core, mixed])
    away = 1 + eps * normal(*exact.shape, seed=3, dtype=torch.float64)
    anchors = torch.cat([exact, exact * away, -3 * core]).to(dtype)
    targets = (inside + beyond * outside).to(dtype)
    found = omp_coefficients(targets, anchors, 30)
    counts = (found.values != 0).sum(1)
    assert counts.max() == len(core)
    assert counts.min() == len(core) or apart  # a twin's last part may be too small to be seen
    for chosen, count in zip(found.indices, counts, strict=True):
        assert torch.linalg.svdvals(unit(anchors[chosen[:count]])).min() > 10 * eps
    left = residual(targets, anchors, found)
    rounding = found.values.abs().sum(1) * anchors.norm(dim=1).max() / left.norm(dim=1)
    cosines = (unit(left) @ unit(anchors).T).abs().amax(1)
    assert (cosines < eps * (omp.DEPENDENT + rounding)).all()


@pytest.mark.usefixtures("search")
def test_zeros_have_no_coefficients_and_are_not_chosen():
    targets, anchors = normal(6, 8), normal(90, 8, seed=1)
    targets[2], anchors[::2] = 0, 0
    found = omp_coefficients(targets, anchors, 4)
    assert not found.values[2].any()
    assert not found.indices[2].any()
    assert (found.indices[[0, 1, 3, 4, 5]] % 2 == 1).all()
    assert not omp_coefficients(targets, torch.zeros(9, 8), 4).values.any()
    assert omp_coefficients(targets[:0], anchors, 4).indices.shape == (0, 4)


@pytest.mark.usefixtures("search")
def test_of_equal_anchors_the_first_is_chosen():
    anchors = normal(80, 16, seed=1).repeat(3, 1)
    assert (omp_coefficients(normal(30, 16), anchors, 8).indices < 80).all()


def test_both_searches_choose_the_same_at_full_size(monkeypatch):
    targets, anchors = normal(60, 128), normal(3000, 128, seed=1) * normal(3000, 1, seed=2).exp()
    found = []
    for screened in (True, False):
        monkeypatch.setattr(omp, "_multiplies_bfloat16", lambda device, screened=screened: screened)
        found.append(omp_coefficients(targets, anchors, 32))
    assert torch.equal(found[0].indices, found[1].indices)
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    targets, anchors = random(dtype)
    found = omp_coefficients(targets, anchors, 8)
    expected = omp_coefficients(targets.float(), anchors.float(), 8)
    assert found.values.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)
    torch.testing.assert_close(apply(found, anchors), apply(found, anchors.float()))


@pytest.mark.usefixtures("search")
def test_blocks_change_nothing_but_rounding():
    targets, anchors = random(torch.float64)
    seen = []
    whole = omp_coefficients(targets, anchors, 10)
    small = omp_coefficients(targets, anchors, 10, block_bytes=1, on_progress=lambda *done: seen.append(done))
    assert seen == [(i + 1, 20) for i in range(20)]
    assert torch.equal(whole.indices, small.indices)
    torch.testing.assert_close(whole.values, small.values)
    again = omp_coefficients(targets, anchors, 10)
    assert torch.equal(whole.values, again.values)
    torch.testing.assert_close(apply(whole, anchors, block_bytes=1), apply(whole, anchors))


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_long_and_very_short_vectors(scale):
    targets, anchors = random(torch.float32)
    expected = omp_coefficients(targets, anchors, 6)
    found = omp_coefficients(targets, anchors * scale, 6)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values * scale, expected.values)


def test_a_caller_who_asked_for_less_precision_gets_it_back():
    targets, anchors = random(torch.float32)
    expected = omp_coefficients(targets, anchors)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = omp_coefficients(targets.requires_grad_(), anchors)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.values, expected.values)


def problems():
    return st.tuples(st.integers(0, 2**31), st.integers(2, 24), st.integers(1, 90), st.integers(1, 12))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(problems(), st.booleans())
def test_the_residual_is_orthogonal_to_the_chosen_and_never_grows(problem, screened):
    seed, a, s, k = problem
    targets, anchors = normal(4, a, seed=seed), normal(s, a, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omp, "_multiplies_bfloat16", lambda device: screened)
        patch.setattr(omp, "SCREEN_FROM", 1)
        sizes = []
        for some in range(1, k + 1):
            found = omp_coefficients(targets, anchors, some)
            left = residual(targets, anchors, found)
            products = torch.bmm(anchors[found.indices].double(), left[:, :, None])[:, :, 0]
            chosen = found.values != 0
            scale = anchors.norm(dim=1).max() * targets.norm(dim=1).max() * (1 + found.values.abs().max())
            assert (products[chosen].abs() <= 1e-5 * scale).all()
            assert all(
                len(set(row[row_chosen].tolist())) == row_chosen.sum()
                for row, row_chosen in zip(found.indices, chosen, strict=True)
            )
            sizes.append(left.norm(dim=1))
        growth = torch.stack(sizes).diff(dim=0) / targets.norm(dim=1)
        assert (growth <= 1e-5).all()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(problems(), st.sampled_from([-4.0, 2.0**-20, 1024.0]))
def test_permuted_anchors_and_scaled_targets(problem, scale):
    seed, a, s, k = problem
    targets, anchors = normal(3, a, seed=seed, dtype=torch.float64), normal(s, a, seed=seed + 1, dtype=torch.float64)
    found = omp_coefficients(targets, anchors, k)
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    permuted = omp_coefficients(targets, anchors[order], k)
    torch.testing.assert_close(dense(permuted), dense(found)[:, order], rtol=1e-6, atol=1e-9)
    scaled = omp_coefficients(scale * targets, anchors, k)
    assert torch.equal(scaled.indices, found.indices)
    torch.testing.assert_close(scaled.values, scale * found.values)


def test_apply_is_the_product():
    found = SparseCoefficients(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.5, 0.0], [2.0, -1.0]]), 3)
    weight = normal(3, 7).bfloat16()
    rows = apply(found, weight)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.stack([0.5 * weight[2].float(), 2 * weight[1].float() - weight[2].float()]))


def test_poisoned_tokens_stand_out():
    targets, anchors, weight = normal(500, 32), normal(400, 32, seed=1), normal(400, 48, seed=2)
    found = omp_coefficients(targets, anchors, 8)
    found.values[17] *= 40
    found.values[30] = 0
    rows = apply(found, weight)
    rows[400] *= 1e-3
    report = outliers(found, rows)
    assert set(report.tokens.tolist()) == {17, 400}
    assert report.empty.tolist() == [30]
    assert report.scores["row"][400] > 8 > report.scores["coefficients"][400]
    np.testing.assert_allclose(report.measures["sum"], found.values.double().sum(1))
    np.testing.assert_allclose(report.measures["row"], rows.double().norm(dim=1))
    output = apply(found, normal(400, 24, seed=3))
    output[50] *= 1e3
    both = outliers(found, rows, output)
    assert set(both.tokens.tolist()) == {17, 50, 400}
    np.testing.assert_allclose(both.measures["output row"], output.double().norm(dim=1))
    equal = SparseCoefficients(torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1), 1)
    assert len(outliers(equal, torch.ones(9, 4)).tokens) == 0
    equal.values[3] = 2
    assert outliers(equal, torch.ones(9, 4)).tokens.tolist() == [3]


def test_bad_arguments_are_named():
    targets, anchors = normal(3, 4), normal(5, 4)
    bad = [
        (TypeError, r"targets: wanted a floating point tensor, got torch.int64", (targets.long(), anchors)),
        (TypeError, r"anchors: wanted a floating point tensor, got <class 'list'>", (targets, [[1.0]])),
        (ValueError, r"anchors: wanted \[tokens, dimensions\], got \(4,\)", (targets, anchors[0])),
        (ValueError, r"wanted vectors of one space on one device, got \(3, 4\)", (targets, normal(5, 6))),
        (ValueError, r"anchors: wanted at least one vector, got \(0, 4\)", (targets, anchors[:0])),
        (ValueError, r"targets: wanted vectors of finite length, got NaN", (targets / 0, anchors)),
        (ValueError, r"anchors: wanted vectors of finite length, got NaN", (targets, anchors * torch.nan)),
        (ValueError, r"k: wanted at least 1, got 0", (targets, anchors, 0)),
        (TypeError, r"k: wanted an integer, got float", (targets, anchors, 2.0)),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=message):
            omp_coefficients(*arguments)
    found = omp_coefficients(targets, anchors)
    with pytest.raises(ValueError, match=r"block_bytes: wanted at least 1, got 0"):
        omp_coefficients(targets, anchors, block_bytes=0)
    with pytest.raises(ValueError, match=r"weight: wanted a row for each of the 5 anchors, got \(4, 2\)"):
        apply(found, normal(4, 2))
    with pytest.raises(TypeError, match=r"weight: wanted floating point, got torch.int64"):
        apply(found, torch.ones(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rows: wanted one for each of the 3 tokens, got \(2, 2\)"):
        outliers(found, normal(2, 2))
    with pytest.raises(ValueError, match=r"output_rows: wanted one for each of the 3 tokens, got \(2, 2\)"):
        outliers(found, normal(3, 2), normal(2, 2))
