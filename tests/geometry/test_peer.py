"""A third oracle: the metrics of SydCS/OPD-Param-Analysis (the code of 2606.13657), on four small stored updates.

Its values are in fixtures/peer_metrics.json. It computes in float32 and subtracts in bfloat16, and some of its
definitions differ from ours; each test applies the peer's convention to our functions and says in a line which.
"""

import hashlib
import json
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdlab.geometry import (
    absolute_sparsity,
    bf16_sparsity,
    density,
    effective_rank,
    enrichment,
    frobenius,
    low_magnitude_mask,
    overlap,
    principal_mask,
    relative_norm,
    rotation,
    spectral_drift,
    stable_rank,
    subspace_energy,
    svd,
    top_energy,
)

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "peer_metrics.json").read_text())
RATIO = 0.10  # of the smaller side for ranks, of the entries for masks
EPS = 1e-12  # what the peer adds to every denominator
FLOAT32 = 1e-5  # relative, of sums in float32


def _near_normal(rows: int, cols: int, seed: int) -> Tensor:
    """Sums of twelve uniform integers, of about unit variance: the same bits on any machine, as no logarithm is."""
    draws = torch.randint(-500, 501, (12, rows, cols), generator=torch.Generator().manual_seed(seed))
    return draws.sum(0).double() / 1001


def _integers(low: int, high: int, shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def synthetic_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs that the fixture was made of, stored in bfloat16.

    low_rank: an update of rank 2 (before it is rounded), of a third of the weights' size.
    dense: a Gaussian update of a quarter of the weights' size.
    step: every weight moves by 3e-5, as a few steps of Adam would; bfloat16 shows it on small weights only.
    grid: weights and steps are small multiples of 2^-24, some of them exactly the bfloat16 number next to 1e-5.
    """
    weights = {
        "low_rank": 0.02 * _near_normal(64, 48, 1),
        "dense": 0.02 * _near_normal(48, 96, 2),
        "step": 0.02 * _near_normal(40, 72, 3),
        "grid": 2.0**-24 * _integers(-200, 200, (33, 50), 4),
    }
    w0s = {name: w.to(torch.bfloat16) for name, w in weights.items()}
    updates = {
        "low_rank": 2.0**-12 * _integers(-8, 8, (64, 2), 5) @ _integers(-8, 8, (2, 48), 6),
        "dense": 0.005 * _near_normal(48, 96, 7),
        "step": 3e-5 * (2 * _integers(0, 1, (40, 72), 8) - 1),
        "grid": 2.0**-24 * 8 * _integers(-22, 22, (33, 50), 9) * _integers(0, 1, (33, 50), 10),
    }
    return {name: (w0, (w0.double() + updates[name]).to(torch.bfloat16)) for name, w0 in w0s.items()}


PAIRS = synthetic_pairs()


class Case:
    """One pair as the peer sees it, and the peer's values."""

    def __init__(self, name: str):
        self.values = FIXTURE["matrices"][name]
        self.w0, self.w1 = PAIRS[name]
        # The update is subtracted in bfloat16, and the weights after it are what that update leads to, in float32.
        self.delta = self.w1 - self.w0
        self.after = self.w0.float() + self.delta.float()
        self.k = max(1, int(RATIO * min(self.w0.shape)))
        self.marked = ceil(RATIO * self.w0.numel())
        self.alpha = self.marked / self.w0.numel()


@pytest.fixture(params=list(PAIRS))
def case(request):
    return Case(request.param)


def test_the_pairs_are_those_of_the_fixture():
    for name, (w0, w1) in PAIRS.items():
        content = b"".join(w.view(torch.int16).numpy().astype("<i2").tobytes() for w in (w0, w1))
        assert hashlib.sha256(content).hexdigest() == FIXTURE["matrices"][name]["sha256"], name


def test_relative_norm(case):
    assert relative_norm(case.w0, case.after) == pytest.approx(case.values["relative_delta_fro"], rel=FLOAT32)


def test_sparsity(case):
    # The bfloat16 difference is 0 exactly where the weights are equal: both count the same weights.
    assert bf16_sparsity(case.w0, case.w1) == case.values["frac_delta_eq_0"]
    zero = torch.zeros_like(case.delta)
    # The peer's comparisons are with 1e-5 rounded to bfloat16, 1.00136e-5: strictly below it is the same as up to 1e-5,
    assert absolute_sparsity(zero, case.delta, 1e-5) == case.values["frac_abs_delta_lt_1e-5"]
    # and up to and including it, which is the sparsity of the peer's paper, needs that number as our tolerance.
    rounded = float(torch.tensor(1e-5, dtype=torch.bfloat16))
    assert absolute_sparsity(zero, case.delta, rounded) == case.values["frac_isclose_zero_atol_1e-5"]


def test_the_threshold_of_the_peer_counts_a_number_that_ours_does_not():
    values = FIXTURE["matrices"]["grid"]
    assert values["frac_isclose_zero_atol_1e-5"] > values["frac_abs_delta_lt_1e-5"] + 0.01


def test_top_energy(case):
    assert top_energy(case.delta, 16) == pytest.approx(case.values["top16_energy_ratio"], rel=FLOAT32)


def test_stable_rank(case):
    # The peer adds 1e-12 to the squared spectral norm, which a small update feels.
    bias = 1 + EPS / float(svd(case.delta).s[0]) ** 2
    assert stable_rank(case.delta) / bias == pytest.approx(case.values["stable_rank"], rel=FLOAT32)


def test_effective_rank(case):
    # Shares of the singular values, not of their squares; the peer adds 1e-12 inside the logarithm.
    assert effective_rank(case.delta) == pytest.approx(case.values["effective_rank_entropy"], rel=FLOAT32)


def test_principal_projection(case):
    delta = case.delta.float()
    # The peer adds 1e-12 to the energy of the update.
    bias = 1 + EPS / frobenius(delta) ** 2
    ours = subspace_energy(delta, case.w0, case.k)
    for side, share in ours._asdict().items():
        # A singular subspace in float32 is good to about 1e-7 over the gap behind it.
        assert share / bias == pytest.approx(case.values[f"principal_projection_{side}"], rel=2e-5), side


def test_spectral_drift(case):
    ours = spectral_drift(case.w0, case.after)
    # Singular values in float32 carry an error of about 1e-7 of the largest, and the drift is their difference.
    assert ours == pytest.approx(case.values["spectral_drift_l2_ratio"], abs=1e-6)
    # The peer's second normalisation is by the update.
    size = relative_norm(case.w0, case.after)
    assert ours / size == pytest.approx(case.values["spectral_drift_to_delta_fro_ratio"], abs=1e-6 / size)


def test_rotation(case):
    # The peer reports the mean sine of the left angles.
    sines = rotation(case.w0, case.after, case.k).left.deg2rad().sin()
    # Its sines are sqrt(1 - cos^2) in float32: an error of 1e-6 in the square, and so of up to 1e-3 near zero.
    tolerance = float((1e-6 / sines).clamp(max=1e-3).mean())
    assert float(sines.mean()) == pytest.approx(case.values["top_subspace_rotation"], abs=tolerance)


@pytest.mark.parametrize("atol", ["0", "1e-5"])
def test_coverage_of_the_principal_weights(case, atol):
    # The rank of the mask is a tenth of the smaller side; it marks the next whole number of entries, not the nearest.
    mask = principal_mask(case.w0, case.k, case.alpha)
    assert int(mask.sum()) == case.marked
    update, values = case.delta.float().abs() > float(atol), case.values[f"update_atol_{atol}"]
    assert density(update) == values["update_density"]
    covered = overlap(mask, update)
    assert covered == values["principal_overlap"]
    assert enrichment(covered, case.alpha) == pytest.approx(values["principal_enrichment"], rel=1e-9)


@pytest.mark.parametrize("atol", ["0", "1e-5"])
def test_coverage_of_the_small_weights(case, atol):
    # Many stored weights tie at the threshold. Ours marks the first of them, the peer any: it may differ by as many.
    mask = low_magnitude_mask(case.w0, case.alpha)
    assert int(mask.sum()) == case.marked
    update, values = case.delta.float().abs() > float(atol), case.values[f"update_atol_{atol}"]
    sizes = case.w0.double().abs()
    limit = sizes[mask].max()
    tied = sizes == limit
    sure, free = int((update & (sizes < limit)).sum()), int((tied & mask).sum())
    moved_ties, still_ties = int((tied & update).sum()), int((tied & ~update).sum())
    fewest, most = sure + max(0, free - still_ties), sure + min(free, moved_ties)
    for covered in (overlap(mask, update), values["low_magnitude_overlap"]):
        assert fewest - 1e-6 <= covered * int(update.sum()) <= most + 1e-6
    assert most - fewest <= 5
