"""The diagnostics on updates whose geometry is known, against float64 references, and their invariances.

Tolerances: 1e-12 where an answer is exact up to rounding; the others are said where they are used.
"""

from math import inf, isnan, nan, sqrt

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from opdlab import geometry as g
from opdlab.errors import OpdlabError
from opdlab.geometry.spectrum import eigenvalues, gram

torch.set_num_threads(1)
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
EXACT = 1e-12

seeds = st.integers(0, 2**31 - 1)
shares = st.floats(0, 1)
scales = st.integers(-40, 40).map(lambda power: 2.0**power)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(n, n, seed=seed)).Q


def turn(n: int, degrees: float, i: int, j: int) -> torch.Tensor:
    """The rotation of R^n by an angle in the plane of coordinates i and j."""
    q, angle = torch.eye(n, dtype=torch.float64), torch.tensor(degrees, dtype=torch.float64).deg2rad()
    q[i, i] = q[j, j] = angle.cos()
    q[j, i], q[i, j] = angle.sin(), -angle.sin()
    return q


@st.composite
def weights(draw, k: int = 1):
    m, n, seed = draw(st.integers(k + 1, 12)), draw(st.integers(k + 1, 12)), draw(seeds)
    return gaussian(m, n, seed=seed)


@st.composite
def updates(draw):
    """A matrix and the same after an update between 1e-6 and 10 times its size."""
    w0 = draw(weights())
    return w0, w0 + 10.0 ** draw(st.integers(-6, 1)) * gaussian(*w0.shape, seed=draw(seeds))


# --- fixtures with a known answer -------------------------------------------------------------------------------------


def test_no_update():
    w0 = gaussian(20, 12)
    nothing = torch.zeros_like(w0)
    angles = g.rotation(w0, w0, 4)
    assert g.bf16_sparsity(w0, w0) == 1 and g.spectral_drift(w0, w0) == 0 and g.frobenius(nothing) == 0
    assert torch.cat(angles).max() < EXACT
    assert isnan(g.stable_rank(nothing))
    assert g.top_right(nothing, 2).isnan().all() and g.top_left(nothing, 2).isnan().all()
    assert isnan(g.sim_k(g.top_right(nothing, 2), g.top_right(w0, 2)))
    assert isnan(g.overlap(g.low_magnitude_mask(w0, 0.3), g.update_mask(w0, w0)))
    assert all(isnan(limit) for limit in g.feasible_range(0.3, 0.0))


def test_zero_weights_have_no_relative_measure():
    w0, w1 = torch.zeros(4, 3), gaussian(4, 3)
    assert isnan(g.relative_norm(w0, w1)) and isnan(g.spectral_drift(w0, w1))
    assert torch.cat(g.rotation(w0, w1, 2)).isnan().all()


def test_rank_one_update():
    w0 = gaussian(20, 12)
    delta = torch.outer(gaussian(20, seed=1), gaussian(12, seed=2))
    assert g.stable_rank(delta) == pytest.approx(1, abs=EXACT)
    assert g.stable_rank(w0 + delta - w0) == pytest.approx(1, abs=EXACT)
    # Stored in float32, the update carries rounding noise of 1e-7, which is of full rank; its square is what counts.
    assert g.stable_rank((w0 + delta).float() - w0.float()) == pytest.approx(1, abs=1e-10)
    assert g.svd(delta).rank == 1
    assert g.sim_k(g.top_right(delta, 1), g.top_right(3 * delta, 1)) == pytest.approx(1, abs=EXACT)
    assert isnan(g.sim_k(g.top_right(delta, 2), g.top_right(3 * delta, 2)))


def test_rank_sixteen_update_with_equal_singular_values():
    u, v = orthogonal(40)[:, :16], orthogonal(24, seed=1)[:, :16]
    delta = 0.01 * u @ v.T
    assert g.stable_rank(delta) == pytest.approx(16, rel=EXACT)
    similarity = g.similarity_to_end([0.2 * delta, 0.7 * delta, delta], 16)
    assert similarity.left == pytest.approx([1, 1, 1], abs=EXACT)
    assert similarity.right == pytest.approx([1, 1, 1], abs=EXACT)


def test_rotation_of_the_outputs():
    w0 = gaussian(20, 12)
    skew = 1e-3 * gaussian(20, 20, seed=1)
    w1 = torch.linalg.matrix_exp(skew - skew.T) @ w0
    left, right = g.rotation(w0, w1, 4)
    assert g.spectral_drift(w0, w1) < EXACT and g.relative_norm(w0, w1) > 1e-3
    assert left.min() > 1e-3 and right.max() < 1e-10  # rounding of 1e-16, over the gaps between singular values


@pytest.mark.parametrize("c", [0.5, 1e-3, -1e-6])
def test_rescaled_weights(c: float):
    w0 = gaussian(20, 12)
    assert torch.cat(g.rotation(w0, (1 + c) * w0, 4)).max() < 1e-10
    assert g.spectral_drift(w0, (1 + c) * w0) == pytest.approx(abs(c), rel=1e-9)


def test_random_subspaces_and_masks_meet_their_baselines():
    k, n = 4, 64
    sims = [g.sim_k(orthogonal(n, seed=i)[:, :k], orthogonal(n, seed=i + 1000)[:, :k]) for i in range(60)]
    standard_error = np.std(sims) / sqrt(len(sims))
    assert abs(np.mean(sims) - k / n) < 4 * standard_error < 0.02
    w0, random_update = gaussian(200, 200), gaussian(200, 200, seed=1) > 0.3
    for alpha in (0.3, 0.5):
        for mask in (g.principal_mask(w0, 16, alpha), g.low_magnitude_mask(w0, alpha)):
            assert g.overlap(mask, random_update) == pytest.approx(alpha, abs=0.015)  # 4 standard errors


def test_one_bf16_step_on_one_weight():
    w0 = gaussian(16, 16).bfloat16()
    w1 = w0.clone()
    w1.view(torch.int16)[3, 5] += 1
    delta = w1.double() - w0.double()
    mask = g.update_mask(w0, w1)
    assert mask.sum() == 1 and mask[3, 5] and g.bf16_sparsity(w0, w1) == 1 - 1 / 256
    assert g.stable_rank(delta) == 1 and g.svd(delta).rank == 1
    assert g.frobenius(delta) / abs(float(w0[3, 5])) <= 2**-7
    assert 0 < g.spectral_drift(w0, w1) <= g.relative_norm(w0, w1)
    angles = g.rotation(w0, w1, 2)
    assert_angles_like_scipy(angles, w0.double(), w1.double(), 2)
    assert angles.left.max() > 1e-6


@pytest.mark.parametrize("degrees", [1e-10, 1e-4, 1e-3, 1.0, 44.999, 45.001, 89.9999])
def test_known_angle_of_a_turned_plane(degrees: float):
    s = torch.tensor([8.0, 5.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    u, v = orthogonal(9)[:, :5], orthogonal(7, seed=1)[:, :5]
    w0, w1 = (u * s) @ v.T, (u @ turn(5, degrees, 1, 3) * s) @ v.T
    left, right = g.rotation(w0, w1, 2)
    # The rounding of w1, 1e-15, over the gap of 2 gives 1e-13 degrees.
    assert left.tolist() == pytest.approx([0, degrees], abs=2e-13)
    assert right.max() < 2e-13


def test_angles_of_all_sizes_at_once():
    degrees = torch.tensor([1e-12, 1e-8, 1e-4, 30, 45, 60, 89.9999, 90], dtype=torch.float64)
    q, k = orthogonal(40), len(degrees)
    a, angle = q[:, :k], degrees.deg2rad()
    b = a * angle.cos() + q[:, k : 2 * k] * angle.sin()
    found = g.principal_angles(a @ orthogonal(k, seed=1), b @ orthogonal(k, seed=2))
    assert found.tolist() == pytest.approx(degrees.tolist(), abs=1e-13)
    # scipy 1.17 chooses sine or cosine by the cosine at the other end of the list: with small and large angles
    # together it is good to some square roots of a rounding error, 1e-6 degrees each (how many depends on the
    # processor). So it is no reference here, and the exact comparison is the one above.
    theirs = np.rad2deg(scipy.linalg.subspace_angles(a.numpy(), b.numpy()))[::-1]
    assert found.numpy() == pytest.approx(theirs, abs=1e-5)


# --- references -------------------------------------------------------------------------------------------------------


def assert_angles_like_scipy(angles: g.Rotation, w0: torch.Tensor, w1: torch.Tensor, k: int, tolerance: float = 1e-9):
    """Compare with scipy on a full numpy SVD; 1e-9 degrees is 1e-11 radians, rounding over the smallest gaps."""
    (u0, _, vh0), (u1, _, vh1) = np.linalg.svd(w0.numpy()), np.linalg.svd(w1.numpy())
    left = np.rad2deg(scipy.linalg.subspace_angles(u0[:, :k], u1[:, :k]))[::-1]
    right = np.rad2deg(scipy.linalg.subspace_angles(vh0[:k].T, vh1[:k].T))[::-1]
    assert angles.left.numpy() == pytest.approx(left, abs=tolerance)
    assert angles.right.numpy() == pytest.approx(right, abs=tolerance)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("shape", [(128, 384), (384, 128), (128, 128)])
def test_agrees_with_numpy_and_scipy(shape: tuple[int, int], size: float):
    w0, delta = gaussian(*shape), size * gaussian(*shape, seed=1)
    w1 = w0 + delta
    s0, s1, s = (np.linalg.svd(w.numpy(), compute_uv=False) for w in (w0, w1, delta))
    assert g.singular_values(w0).numpy() == pytest.approx(s0, rel=EXACT)
    assert g.spectral_drift(w0, w1) == pytest.approx(np.linalg.norm(s1 - s0) / np.linalg.norm(s0), rel=1e-8)
    assert g.stable_rank(delta) == pytest.approx(np.linalg.norm(delta.numpy()) ** 2 / s[0] ** 2, rel=EXACT)
    assert g.relative_norm(w0, w1) == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w0), rel=1e-9)
    if size < 0.1:  # at 0.1 small and large angles come together
        assert_angles_like_scipy(g.rotation(w0, w1, 16), w0, w1, 16)


def test_masks_agree_with_a_full_sort():
    w0 = gaussian(30, 20).round(decimals=1)  # many ties
    u, s, vh = np.linalg.svd(w0.numpy(), full_matrices=False)
    order = np.argsort(np.abs(w0.numpy()).ravel(), kind="stable")
    assert g.low_magnitude_mask(w0, 0.3).flatten().nonzero().squeeze(1).tolist() == sorted(order[:180].tolist())
    reconstruction = np.abs((u[:, :5] * s[:5]) @ vh[:5]).ravel()
    largest = np.argsort(-reconstruction, kind="stable")[:180]
    assert g.principal_mask(w0, 5, 0.3).flatten().nonzero().squeeze(1).tolist() == sorted(largest.tolist())


def test_bf16_equality_is_the_relative_rule_for_every_pair_of_neighbours():
    numbers = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)  # zero and all positive finite numbers
    for w0, w1 in ((numbers[:-1], numbers[1:]), (numbers, numbers), (numbers, -numbers)):
        assert torch.equal(g.bf16_equal(w0, w1), eta_rule(w0, w1))


def eta_rule(w0: torch.Tensor, w1: torch.Tensor, eta: float = 1e-3) -> torch.Tensor:
    w0, w1 = w0.bfloat16().double(), w1.bfloat16().double()
    return (w1 - w0).abs() <= eta * torch.maximum(w0.abs(), w1.abs())


@pytest.mark.parametrize("n", [1, 2, 3, 17, 130])
@pytest.mark.parametrize("kind", ["gaussian", "equal", "graded", "zero"])
def test_eigenvalues_agree_with_numpy(n: int, kind: str):
    q = orthogonal(n, seed=n)
    values = {"equal": torch.ones(n), "graded": torch.logspace(0, -12, n), "zero": torch.zeros(n)}
    a = gaussian(n + 5, n) if kind == "gaussian" else q * values[kind].double().sqrt()
    a = a if kind == "gaussian" else a.T
    squares = a.T @ a
    expected, reference = np.linalg.eigh(squares.numpy())
    size = max(expected[-1], 1.0)
    for k in {0, 1, n // 2, n}:
        found, vectors = eigenvalues(gram(a), k)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-14 * n * size)
        assert vectors.shape == (n, k)
        np.testing.assert_allclose((vectors.T @ vectors).numpy(), np.eye(k), rtol=0, atol=1e-11)
        residual = squares @ vectors - vectors * found[n - k :]
        assert float(residual.abs().max() if k else 0) <= 1e-13 * n * size
    if kind == "gaussian" and n > 2:
        k = n // 2
        overlap = np.linalg.svd(reference[:, -k:].T @ eigenvalues(gram(a), k)[1].numpy(), compute_uv=False)
        assert overlap.min() > 1 - 1e-10


@pytest.mark.parametrize("kind", ["gaussian", "bfloat16", "mostly zero", "one value", "in order"])
def test_selection_agrees_with_a_sort(kind: str):
    n = 150_000
    values = gaussian(n, seed=1)
    values = {
        "gaussian": values,
        "bfloat16": values.bfloat16().double(),
        "mostly zero": values * (gaussian(n, seed=2) > 0.7),
        "one value": torch.ones(n, dtype=torch.float64),
        "in order": values.sort().values,
    }[kind]
    for count in (0, 1, 77, n // 3, n // 2, n - 1, n):
        for select, sign in ((g.largest_entries, -1), (g.smallest_entries, 1)):
            first = np.argsort(sign * values.abs().numpy(), kind="stable")[:count]
            expected = np.zeros(n, dtype=bool)
            expected[first] = True
            assert np.array_equal(select(values, count).numpy(), expected)


@pytest.mark.parametrize("degrees", [1e-4, 1e-2, 3.0])
def test_a_table_sees_the_smallest_turns(degrees: float):
    # One direction inside the leading subspace turns towards one outside it: k - 1 angles are 0 and one is known.
    n, k = 40, 5
    u, v, s = orthogonal(n, 1), orthogonal(n, 2), torch.linspace(2, 1, n, dtype=torch.float64)
    w0, w1 = (u * s) @ v.T, (u @ turn(n, degrees, 0, n - 1) * s) @ v.T
    row = g.measure_matrix("w", w0, w1, g.Resolution(k=k, sim_ks=(2,), mask_rank=k, alphas=(0.3,)))
    assert row["angle_left_max"] == pytest.approx(degrees, rel=1e-7)
    assert row["angle_left_mean"] == pytest.approx(degrees / k, rel=1e-7)
    assert row["angle_right_max"] < 1e-11 and row["nss"] < 1e-14


def test_a_table_sees_one_step_of_one_weight():
    w0 = gaussian(48, 40, seed=3).bfloat16()
    w1 = w0.clone()
    w1[5, 7] = torch.nextafter(w1[5, 7], torch.tensor(9.0, dtype=torch.bfloat16))
    row = g.measure_matrix("w", w0, w1, g.Resolution(k=6, sim_ks=(2,), mask_rank=6, alphas=(0.3,)))
    assert row["sparsity"] == 1 - 1 / (48 * 40) and row["stable_rank"] == pytest.approx(1, abs=1e-12)
    assert row["effective_rank"] == pytest.approx(1, abs=1e-9) and isnan(row["hill"])
    (u0, s0, _), (u1, s1, _) = (np.linalg.svd(w.double().numpy()) for w in (w0, w1))
    expected = np.rad2deg(scipy.linalg.subspace_angles(u0[:, :6], u1[:, :6]))
    assert row["angle_left_max"] == pytest.approx(expected.max(), rel=1e-6, abs=1e-8)
    assert row["nss"] == pytest.approx(np.linalg.norm(s1 - s0) / np.linalg.norm(s0), rel=1e-6)


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (128, 128)])
@pytest.mark.parametrize("tail", [0.0, 2.0, 3.9, 4.9, 8.0])
@pytest.mark.parametrize("outliers", [False, True])
def test_the_gram_matrix_loses_nothing(shape: tuple[int, int], tail: float, outliers: bool):
    """A spectrum over ``tail`` decades, evenly or by a few outliers: beyond five the full SVD takes over by itself."""
    r, k = min(shape), 16
    s = torch.logspace(0, -tail, r, dtype=torch.float64) * (2 - torch.arange(r) / r)
    if outliers:
        s = torch.cat([torch.linspace(2, 1, r - 5, dtype=torch.float64), torch.full((5,), 10.0**-tail)])
    u, v = orthogonal(shape[0])[:, :r], orthogonal(shape[1], seed=1)[:, :r]
    w = (u * s) @ v.T
    fast, full = g.svd(w, k=k), g.svd(w)
    assert fast.u.shape == (shape[0], k) and fast.vh.shape == (k, shape[1])
    for values in (fast.s, g.singular_values(w)):
        assert (values - full.s).abs().max() < (1e-11 if tail < 3 else 2e-10) * s[0]
    assert g.principal_angles(fast.u, full.u[:, :k]).max() < 1e-9
    assert g.principal_angles(fast.vh.T, full.vh[:k].T).max() < 1e-9
    assert torch.allclose((fast.u * fast.s[:k]) @ fast.vh, (full.u[:, :k] * full.s[:k]) @ full.vh[:k], atol=1e-11)


def test_spectral_summaries_agree_with_numpy():
    delta = gaussian(40, 30)
    s = np.linalg.svd(delta.numpy(), compute_uv=False)
    for squared in (False, True):
        p = s ** (1 + squared) / (s ** (1 + squared)).sum()
        assert g.effective_rank(delta, squared) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=EXACT)
    assert g.top_energy(delta, 7) == pytest.approx((s[:7] ** 2).sum() / (s**2).sum(), rel=EXACT)
    assert g.hill(delta, 10) == pytest.approx(9 / np.log(s[:9] / s[9]).sum(), rel=1e-11)


def test_summaries_of_updates_with_few_directions():
    nothing, line = torch.zeros(6, 5), torch.outer(gaussian(6), gaussian(5, seed=1))
    for summary in (g.effective_rank, lambda d: g.top_energy(d, 2), lambda d: g.hill(d, 2)):
        assert isnan(summary(nothing))
    assert g.effective_rank(line) == pytest.approx(1) and g.effective_rank(line, squared=True) == pytest.approx(1)
    assert g.top_energy(line, 1) == pytest.approx(1)
    assert isnan(g.hill(line, 2)) and isnan(g.hill(g.svd(line), 2))
    assert g.hill(torch.eye(5), 3) == inf


def test_subspace_energy_agrees_with_projectors():
    w0, delta, k = gaussian(20, 12), gaussian(20, 12, seed=1), 3
    u, _, vh = np.linalg.svd(w0.numpy())
    left, right = u[:, :k] @ u[:, :k].T, vh[:k].T @ vh[:k]
    d = delta.numpy()
    expected = [np.linalg.norm(x) ** 2 / np.linalg.norm(d) ** 2 for x in (left @ d, d @ right, left @ d @ right)]
    assert g.subspace_energy(delta, w0, k) == pytest.approx(expected, rel=1e-10)
    assert g.subspace_energy(delta, g.svd(w0), k) == pytest.approx(expected, rel=1e-10)
    assert g.subspace_energy(w0, w0, 12) == pytest.approx((1, 1, 1))
    assert all(map(isnan, g.subspace_energy(0 * delta, w0, k)))
    assert all(map(isnan, g.subspace_energy(delta, torch.outer(w0[:, 0], w0[0]), k)))


def test_tolerance_rules():
    w0 = gaussian(50, 40).bfloat16()
    w1 = (w0.float() * (1 + 0.01 * gaussian(50, 40, seed=1))).bfloat16()
    assert g.relative_sparsity(w0, w1) == g.bf16_sparsity(w0, w1), "on rounded weights the two rules are one"
    assert g.relative_sparsity(w0, w1, 0.0) == g.absolute_sparsity(w0, w1, 0.0) == g.bf16_sparsity(w0, w1)
    assert g.absolute_sparsity(w0, w1, 1e9) == g.relative_sparsity(w0, w1, 2.0) == 1
    small = torch.full((10,), 1e-6)
    assert g.absolute_sparsity(small, 2 * small) == 1 and g.relative_sparsity(small, 2 * small) == 0


def test_enrichment():
    assert g.enrichment(0.45, 0.3) == pytest.approx(1.5)
    assert isnan(g.enrichment(0.5, 0.0)) and isnan(g.enrichment(nan, 0.3))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: g.bf16_sparsity(w, w.T), r"w1 has shape \(5, 6\); expected that of w0, \(6, 5\)"),
        (lambda w: g.bf16_sparsity(w, w / 0), "w1 has 30 entries that are NaN or infinite"),
        (lambda w: g.update_mask(w * nan, w), "w0 has 30 entries"),
        (lambda w: g.svd(w[0], "q_proj"), r"q_proj has shape \(5,\); expected a matrix"),
        (lambda w: g.svd(w[:, :0]), "not empty"),
        (lambda w: g.svd(w * nan, "layers.0.q_proj"), "layers.0.q_proj has 30 entries"),
        (lambda w: g.stable_rank(w * nan), "delta has 30"),
        (lambda w: g.frobenius(w * nan), "delta has 30"),
        (lambda w: g.rotation(w, w, 6), "k is 6; expected a whole number from 1 to 5"),
        (lambda w: g.rotation(w, w[:4], 2), "expected that of a"),
        (lambda w: g.spectral_drift(w, w[:4]), "expected that of the spectrum of w0"),
        (lambda w: g.top_right(w, 0), "k is 0"),
        (lambda w: g.top_left(w, 2.5), "k is 2.5"),
        (lambda w: g.principal_angles(w, w), "a is .* away from orthonormal"),
        (lambda w: g.sim_k(g.top_left(w, 2), 1.001 * g.top_left(w, 2)), "v_b is .* away from orthonormal"),
        (lambda w: g.sim_k(g.top_left(w, 2).T, g.top_left(w, 2).T), r"\(n, K\)"),
        (lambda w: g.similarity_to_end([], 2), "deltas is empty"),
        (lambda w: g.principal_mask(w, 6, 0.3), "r is 6"),
        (lambda w: g.low_magnitude_mask(w, 30), "alpha is 30; expected a share"),
        (lambda w: g.largest_entries(w, 31), "count is 31"),
        (lambda w: g.overlap(w, w > 0), "mask_star holds torch.float64"),
        (lambda w: g.overlap(w > 0, w[:3] > 0), "update has shape"),
        (lambda w: g.density(w), "mask holds"),
        (lambda w: g.feasible_range(0.3, 1.2), "density is 1.2"),
        (lambda w: g.gaussian_stable_rank(0, 3), "m is 0"),
        (lambda w: g.svd(w, k=6), "k is 6"),
        (lambda w: g.top_energy(w, 0), "k is 0"),
        (lambda w: g.hill(w, 1), "k is 1; expected a whole number from 2 to 5"),
        (lambda w: g.absolute_sparsity(w, w, -1), "atol is -1"),
        (lambda w: g.relative_sparsity(w, w, nan), "eta is nan"),
        (lambda w: g.enrichment(0.3, 2), "alpha is 2"),
        (
            lambda w: g.frobenius(torch.complex(w, w)),
            "delta holds torch.complex128 .*; expected a dense tensor of real",
        ),
        (lambda w: g.bf16_sparsity(w, torch.complex(w, w)), "w1 holds torch.complex128"),
        (lambda w: g.frobenius(w.to_sparse()), "delta holds torch.float64 as torch.sparse_coo"),
        (lambda w: g.stable_rank(w.to("meta")), "delta holds torch.float64 as torch.strided on meta"),
        (lambda w: g.stable_rank(w.numpy()), "delta is a ndarray; expected a torch tensor"),
        (lambda w: g.jaccard((w > 0).numpy(), w > 0), "a is a ndarray"),
        (lambda w: g.cosine(w * 1e160, w), "the largest entry of delta_a is .*e.160; expected one of 1e140 at most"),
        (lambda w: g.stable_rank(w * 1e160), "the largest entry of delta is .*e.160"),
        (lambda w: g.subspace_energy(w.T, w, 2), r"delta has shape \(5, 6\); expected that of w0, \(6, 5\)"),
    ],
)
def test_errors_name_the_argument(call, message: str):
    with pytest.raises(OpdlabError, match=message):
        call(gaussian(6, 5))


@pytest.mark.parametrize("size", [1e-139, 1e138])
def test_what_is_large_or_small_and_allowed_is_as_any(size: float):
    w, d = gaussian(6, 5), gaussian(6, 5, seed=1)
    assert g.cosine(size * d, w) == pytest.approx(g.cosine(d, w))
    assert g.subspace_energy(size * d, size * w, 2) == pytest.approx(g.subspace_energy(d, w, 2))
    assert g.stable_rank(size * d) == pytest.approx(g.stable_rank(d))


# --- properties -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=2))
def test_bf16_equal_is_the_relative_rule(bits: list[int]):
    w0, w1 = torch.tensor([b - 2**15 for b in bits], dtype=torch.int16).view(torch.bfloat16)
    assume(w0.isfinite() and w1.isfinite())
    assert g.bf16_equal(w0, w1) == eta_rule(w0, w1) == g.bf16_equal(w1, w0)


@PROPERTY
@given(updates(), scales)
def test_sparsity(update, scale: float):
    w0, w1 = update
    mask = g.update_mask(w0, w1)
    assert torch.equal(mask, ~g.bf16_equal(w0, w1))
    assert g.bf16_sparsity(w0, w1) == g.bf16_sparsity(w1, w0) == pytest.approx(1 - g.density(mask), abs=EXACT)
    # A power of two shifts exponents and leaves the rounding as it was.
    assert torch.equal(g.update_mask(scale * w0, -scale * w1), g.update_mask(w0, -w1))
    assert g.density(mask) + g.density(~mask) == pytest.approx(1)


@PROPERTY
@given(weights(), seeds)
def test_svd(w, seed: int):
    u, s, vh = g.svd(w)
    decomposed = g.svd(w.float())
    assert g.svd(decomposed) is decomposed and decomposed.s.dtype == torch.float64
    assert torch.allclose((u * s) @ vh, w, rtol=0, atol=EXACT)
    assert torch.equal(s, s.sort(descending=True).values)
    assert torch.allclose(g.singular_values(orthogonal(w.shape[0], seed) @ w), s, rtol=0, atol=EXACT)
    assert torch.allclose(g.singular_values(g.svd(w)), g.singular_values(w.T), rtol=0, atol=EXACT)
    assert g.svd(w[:, :1] @ w[:1]).rank == 1 and g.svd(0 * w).rank == 0


@PROPERTY
@given(updates(), seeds, scales)
@example((orthogonal(3), orthogonal(3)), 0, 1.0)
def test_drift_and_norms(update, seed: int, scale: float):
    w0, w1 = update
    drift, relative = g.spectral_drift(w0, w1), g.relative_norm(w0, w1)
    assert 0 <= drift <= relative + EXACT  # Mirsky
    q = orthogonal(w0.shape[0], seed)
    assert g.spectral_drift(q @ w0, w1) == pytest.approx(drift, abs=EXACT)  # each side may be turned on its own
    assert g.spectral_drift(scale * w0, scale * w1) == pytest.approx(drift, rel=1e-9, abs=EXACT)
    assert g.relative_norm(scale * (q @ w0), scale * (q @ w1)) == pytest.approx(relative, rel=1e-9)
    assert g.frobenius(scale * w0) == pytest.approx(scale * g.frobenius(w0))
    assert g.frobenius(w1 - w0) <= g.frobenius(w1) + g.frobenius(w0) + EXACT


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-142, 1e-30, 1e130])
def test_very_small_updates_are_measured_like_others(scale):
    w0, delta = torch.randn(2, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert g.frobenius(scale * delta) == pytest.approx(scale * g.frobenius(delta), rel=1e-12)
    assert g.cosine(scale * delta, w0) == pytest.approx(g.cosine(delta, w0), rel=1e-9)
    assert g.subspace_energy(scale * delta, w0, 3) == pytest.approx(g.subspace_energy(delta, w0, 3), rel=1e-9)
    for rank in (g.stable_rank, g.effective_rank):
        assert rank(scale * delta) == pytest.approx(rank(delta), rel=1e-9)
    known, found = g.svd(delta, k=4), g.svd(scale * delta, k=4)
    assert g.sim_k(found.vh.T, known.vh.T) == pytest.approx(1, abs=1e-9)


@PROPERTY
@given(weights(), seeds, st.sampled_from([1e-200, 1e-30, 1.0, -1e30]))
def test_stable_rank(delta, seed: int, scale: float):
    rank = g.stable_rank(delta)
    assert 1 - EXACT <= rank <= min(delta.shape) + EXACT
    q = orthogonal(delta.shape[1], seed)
    for same in (scale * delta, delta @ q, delta.T, g.svd(delta)):
        assert g.stable_rank(same) == pytest.approx(rank, rel=1e-9)


@PROPERTY
@given(weights(k=2), seeds, scales, st.booleans())
def test_counts_of_directions(delta, seed: int, scale: float, squared: bool):
    q, k = orthogonal(delta.shape[1], seed), min(delta.shape) - 1
    rank = g.effective_rank(delta, squared)
    assert 1 - EXACT <= rank <= min(delta.shape) + EXACT
    assert g.effective_rank(delta) >= g.effective_rank(delta, squared=True) - EXACT  # squares are less even
    energy, tail = g.top_energy(delta, k), g.hill(delta, k)
    assert 0 < energy <= 1 + EXACT and tail > 0
    assert energy >= k / min(delta.shape) - EXACT
    for same in (scale * delta, delta @ q, delta.T, g.svd(delta)):
        assert g.effective_rank(same, squared) == pytest.approx(rank, rel=1e-9)
        assert g.top_energy(same, k) == pytest.approx(energy, rel=1e-9)
        assert g.hill(same, k) == pytest.approx(tail, rel=1e-6)


@PROPERTY
@given(updates(), seeds, scales)
def test_subspace_energy(update, seed: int, scale: float):
    w0, w1 = update
    k, q = min(w0.shape) - 1, orthogonal(w0.shape[0], seed)
    left, right, both = g.subspace_energy(w1 - w0, w0, k)
    assert 0 <= both <= min(left, right) + EXACT and max(left, right) <= 1 + EXACT
    assert g.subspace_energy(scale * q @ (w1 - w0), q @ w0, k) == pytest.approx((left, right, both), abs=1e-6)
    swapped = g.subspace_energy((w1 - w0).T, w0.T, k)
    assert swapped == pytest.approx((right, left, both), abs=1e-6)


@PROPERTY
@given(updates(), scales, st.floats(0, 0.1))
def test_tolerances(update, scale: float, tolerance: float):
    w0, w1 = update
    relative, absolute = g.relative_sparsity(w0, w1, tolerance), g.absolute_sparsity(w0, w1, tolerance)
    assert 0 <= relative <= g.relative_sparsity(w0, w1, 2 * tolerance) <= 1
    assert 0 <= absolute <= g.absolute_sparsity(w0, w1, 2 * tolerance) <= 1
    assert g.relative_sparsity(scale * w1, scale * w0, tolerance) == relative
    assert g.absolute_sparsity(scale * w1, scale * w0, scale * tolerance) == absolute


@PROPERTY
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_gaussian_stable_rank(m: int, n: int):
    assert g.gaussian_stable_rank(m, n) == g.gaussian_stable_rank(n, m)
    assert min(m, n) / 4 - 1e-9 <= g.gaussian_stable_rank(m, n) < min(m, n)


def test_gaussian_stable_rank_predicts_a_gaussian_matrix():
    assert g.stable_rank(gaussian(200, 300)) == pytest.approx(g.gaussian_stable_rank(200, 300), rel=0.05)


@PROPERTY
@given(weights(k=2), seeds, scales)
def test_top_bases(delta, seed: int, scale: float):
    k = min(delta.shape) - 1
    for basis, other in ((g.top_right(delta, k), g.top_left(delta.T, k)), (g.top_left(delta, k), g.top_left(delta, k))):
        assert torch.allclose(basis.T @ basis, torch.eye(k, dtype=torch.float64), atol=EXACT)
        assert g.sim_k(basis, other) == pytest.approx(1, abs=1e-9)
    # Turning the inputs turns V, leaves U alone; scaling leaves both.
    q = orthogonal(delta.shape[1], seed)
    assert g.sim_k(q.T @ g.top_right(delta, k), g.top_right(scale * delta @ q, k)) == pytest.approx(1, abs=1e-6)
    assert g.sim_k(g.top_left(delta, k), g.top_left(scale * delta @ q, k)) == pytest.approx(1, abs=1e-6)


@PROPERTY
@given(st.integers(1, 6), st.integers(0, 6), seeds, seeds)
def test_angles_and_sim_k(k: int, more: int, seed_a: int, seed_b: int):
    n = k + more
    a, b = orthogonal(n, seed_a)[:, :k], orthogonal(n, seed_b)[:, :k]
    angles, sim = g.principal_angles(a, b), g.sim_k(a, b)
    assert (angles.diff() > -1e-12).all() and angles.min() >= 0 and angles.max() <= 90 + EXACT
    assert 0 <= sim <= 1
    # Sim_K is the mean squared cosine of the angles, so both look at the subspaces and not at their bases.
    assert sim == pytest.approx(float(angles.deg2rad().cos().square().mean()), abs=EXACT)
    q, basis = orthogonal(n, seed_a ^ seed_b), orthogonal(k, seed_b)
    for c, d in ((b, a), (q @ a, q @ b), (a @ basis, b)):
        assert g.principal_angles(c, d).tolist() == pytest.approx(angles.tolist(), abs=1e-6)
        assert g.sim_k(c, d) == pytest.approx(sim, abs=EXACT)
    assert g.principal_angles(a, a @ basis).max() < 1e-12 and g.sim_k(a, a) == pytest.approx(1)


@PROPERTY
@given(weights(k=2), seeds, seeds, st.integers(-6, -2))
def test_rotation(w0, seed: int, seed_q: int, power: int):
    k = min(w0.shape) - 1
    s = g.singular_values(w0)
    gap = float(s[k - 1] - s[k])
    delta = gap * 10.0**power * gaussian(*w0.shape, seed=seed)
    size = float(g.singular_values(delta)[0])
    assume(size < gap / 2)
    w1 = w0 + delta
    left, right = g.rotation(w0, w1, k)
    assert left.shape == right.shape == (k,)
    # Wedin's theorem, with Weyl's bound on how much of the gap the update can close.
    assert torch.cat([left, right]).deg2rad().sin().max() <= size / (gap - size) * (1 + 1e-6)
    q = orthogonal(w0.shape[0], seed_q)
    turned = g.rotation(3 * q @ w0, 3 * q @ w1, k)
    assert turned.left.tolist() == pytest.approx(left.tolist(), rel=1e-3, abs=1e-9)
    swapped = g.rotation(w1.T, g.svd(w0.T), k)
    assert swapped.right.tolist() == pytest.approx(left.tolist(), rel=1e-3, abs=1e-9)


@PROPERTY
@given(st.lists(seeds, min_size=1, max_size=4), st.integers(1, 4), scales)
def test_similarity_to_end(seeds_of_updates: list[int], k: int, scale: float):
    deltas = [gaussian(6, 5, seed=seed) for seed in seeds_of_updates]
    left, right = g.similarity_to_end(deltas, k)
    assert len(left) == len(right) == len(deltas)
    assert all(0 <= sim <= 1 for sim in left + right)
    assert [left[-1], right[-1]] == pytest.approx([1, 1])
    assert right[0] == g.sim_k(g.top_right(deltas[0], k), g.top_right(deltas[-1], k))
    scaled = g.similarity_to_end([g.svd(scale * delta.T) for delta in deltas], k)
    assert scaled.left == pytest.approx(right, abs=1e-9) and scaled.right == pytest.approx(left, abs=1e-9)


def test_sim_k_is_undefined_only_where_directions_are_missing():
    full, line = gaussian(5, 5), torch.outer(torch.ones(5), torch.arange(5.0))
    assert g.similarity_to_end([line, full], 1).right == pytest.approx(
        [g.sim_k(g.top_right(line, 1), g.top_right(full, 1)), 1]
    )
    sims = g.similarity_to_end([line, full], 2).right
    assert isnan(sims[0]) and sims[1] == pytest.approx(1)
    assert all(isnan(sim) for sim in g.similarity_to_end([full, line], 2).left)


@PROPERTY
@given(weights(k=2), shares, shares, seeds, scales)
def test_masks(w0, alpha: float, beta: float, seed: int, scale: float):
    low, high = sorted([alpha, beta])
    r = min(w0.shape) - 1
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(w0.shape[0], generator=generator)
    for mask in (lambda w, share: g.low_magnitude_mask(w, share), lambda w, share: g.principal_mask(w, r, share)):
        assert int(mask(w0, alpha).sum()) == round(alpha * w0.numel())
        assert not (mask(w0, low) & ~mask(w0, high)).any()  # nested
        assert torch.equal(mask(-scale * w0, alpha), mask(w0, alpha))
        assert torch.equal(mask(w0[rows], alpha), mask(w0, alpha)[rows])
    count = round(alpha * w0.numel())
    assert torch.equal(g.largest_entries(w0, w0.numel() - count), ~g.low_magnitude_mask(w0, count / w0.numel()))
    # At full rank the reconstruction is the matrix, up to rounding: take whole numbers far apart.
    distinct = torch.randperm(w0.numel(), generator=generator).reshape(w0.shape) + 1.0
    assert torch.equal(g.principal_mask(distinct, min(w0.shape), alpha), g.largest_entries(distinct, count))


def test_ties_go_to_the_first_entry():
    ones = torch.ones(3, 4)
    for mask in (g.low_magnitude_mask(ones, 0.5), g.largest_entries(ones, 6)):
        assert mask.flatten().tolist() == 6 * [True] + 6 * [False]


@PROPERTY
@given(st.integers(1, 60), shares, shares, seeds)
def test_overlap_is_feasible(n: int, alpha: float, beta: float, seed: int):
    mask, update = (g.largest_entries(gaussian(n, seed=seed + i), round(s * n)) for i, s in enumerate((alpha, beta)))
    found = g.overlap(mask, update)
    low, high = g.feasible_range(g.density(mask), g.density(update))
    assert isnan(found) == isnan(low) == isnan(high) == (not update.any())
    if update.any():
        assert low - EXACT <= found <= high + EXACT
        assert found + g.overlap(~mask, update) == pytest.approx(1)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        assert g.overlap(mask[order], update[order]) == found


@PROPERTY
@given(shares, shares.filter(lambda density: density > 1e-6))
def test_feasible_range(alpha: float, density: float):
    low, high = g.feasible_range(alpha, density)
    # A random update has overlap alpha, so that alpha is always feasible; the complement of the mask mirrors the range.
    assert 0 <= low <= alpha + 1e-9 and alpha - 1e-9 <= high <= 1
    mirrored = g.feasible_range(1 - alpha, density)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
