"""The ruler gives what drawn noise gives, and the sparsities that were published for updates of known size."""

import pytest
import torch
from scipy import stats

from opdlab import geometry as g
from opdlab.errors import OpdlabError


def gaussian(rows: int = 600, cols: int = 500, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(rows, cols, generator=random, dtype=torch.float64)).bfloat16().double()


def drawn(kind: str, shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    of = {"gaussian": stats.norm(), "laplace": stats.laplace(scale=0.5**0.5), "t3": stats.t(3, scale=3**-0.5)}[kind]
    return torch.from_numpy(of.rvs(shape, random_state=seed))


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "t3"])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.01, 0.3])
def test_noise_of_this_size_changes_as_much_as_the_ruler_says(kind, size):
    for w0 in (gaussian(), gaussian() * 1.003):  # on the grid of bfloat16, and off it
        noise = size * g.frobenius(w0) / w0.numel() ** 0.5 * drawn(kind, w0.shape)
        visible = g.update_mask(w0, w0 + noise)
        assert g.noise_sparsity(w0, size, kind) == pytest.approx(1 - float(visible.double().mean()), abs=3e-3)
        chance, low = g.change_probability(w0, size, kind), g.low_magnitude_mask(w0, 0.3)
        assert g.noise_overlap(low, chance) == pytest.approx(g.overlap(low, visible), abs=4e-3)


def test_a_curve_of_some_entries_is_that_of_all():
    w0, sizes = gaussian() * torch.linspace(0.5, 2, 500), [3e-4, 3e-3, 0.03]
    curve, low = g.noise_curve(w0, sizes), g.low_magnitude_mask(w0, 0.3)
    assert curve["relative_norm"] == sizes
    assert curve["sparsity"] == pytest.approx([g.noise_sparsity(w0, size) for size in sizes], abs=0.01)
    overlaps = [g.noise_overlap(low, g.change_probability(w0, size)) for size in sizes]
    assert curve["low_overlap_a30"] == pytest.approx(overlaps, abs=0.01)
    small = w0[:80, :100]
    assert g.noise_curve(small, sizes, 0.5)["sparsity"] == [g.noise_sparsity(small, size) for size in sizes]


def test_published_sparsities_follow_from_published_sizes():
    # Relative norm in percent, then what Gaussian, Laplace and t3 noise leave unchanged in percent, drawn once by hand
    # on Gaussian weights in bfloat16.
    for size, *unchanged in ((0.497, 32.5, 41, 44), (0.142, 69, 74, 76), (0.073, 83, 85, 87), (0.036, 92, 93, 93)):
        found = [100 * g.noise_sparsity(gaussian(), size / 100, kind) for kind in ("gaussian", "laplace", "t3")]
        assert found == pytest.approx(unchanged, abs=1)


def test_a_sparsity_is_read_as_a_size():
    w0 = gaussian()
    for size in (1e-4, 3e-3, 0.2):
        assert g.noise_norm(w0, g.noise_sparsity(w0, size)) == pytest.approx(size, rel=1e-5)
    assert g.noise_norm(w0, 0.52) > g.noise_norm(w0, 0.77), "the less is unchanged, the larger the update"
    assert torch.tensor(g.noise_norm(w0, 1.5)).isnan()


def test_edges():
    assert g.change_probability(gaussian(), 0.0).count_nonzero() == 0
    assert g.noise_sparsity(torch.zeros(3, 3), 0.1) == 1
    assert g.change_probability(torch.zeros(3, 3), float("nan")).isnan().all()
    assert torch.tensor(g.noise_overlap(torch.ones(2, dtype=torch.bool), torch.zeros(2))).isnan()
    with pytest.raises(OpdlabError, match="no noise 'uniform'"):
        g.change_probability(gaussian(), 0.1, "uniform")
