"""Weights that are measured some rows at a time: the same numbers as at once, in a bounded memory."""

from math import nan

import pytest
import torch

from opdlab import geometry as g
from opdlab.geometry import measure


def readers(*weights):
    """What reads rows of weights."""
    return [lambda start, stop, w=w: w[start:stop] if w.ndim else w for w in weights]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 7), (280,), (3, 8, 5)])
def test_some_rows_at_a_time_are_the_whole(dtype, shape, monkeypatch):
    """Ties are many: a bfloat16 has few sizes; and blocks are small, so that they fall on either side."""
    monkeypatch.setattr(measure, "_BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    w0 = (torch.randn(shape, generator=generator) * 20).round().div(20).to(dtype)
    w1 = (w0 + 0.004 * torch.randn(shape, generator=generator)).to(dtype)
    alphas = (0.3, 0.5) if len(shape) == 2 else ()
    found = g.measure_rows("embed.weight", shape, *readers(w0, w1), alphas)
    moved = g.update_mask(w0, w1)
    expected = {"frobenius": g.frobenius(w1.double() - w0.double()), "relative_norm": g.relative_norm(w0, w1)}
    expected |= {"sparsity": g.bf16_sparsity(w0, w1), "density": g.density(moved)}
    expected |= {"sparsity_absolute": g.absolute_sparsity(w0, w1), "sparsity_relative": g.relative_sparsity(w0, w1)}
    for alpha in alphas:
        small = g.low_magnitude_mask(w0, alpha)
        expected[f"low_overlap_a{100 * alpha:g}"] = g.overlap(small, moved)
        expected[f"low_share_a{100 * alpha:g}"] = g.density(small)
        assert abs(found.pop(f"low_overlap_a{100 * alpha:g}_null") - alpha) < 0.25
    norms = {"frobenius", "relative_norm"}
    assert {key: found.pop(key) for key in norms} == pytest.approx({key: expected.pop(key) for key in norms}, rel=1e-14)
    assert found == expected, "counts are exact"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), ()])
def test_what_has_no_entries_or_no_rows(shape):
    w0, w1 = torch.ones(shape), 2 * torch.ones(shape)
    found = g.measure_rows("x", shape, *readers(w0, w1))
    assert found["sparsity"] == pytest.approx(nan if 0 in shape else 0, nan_ok=True)


def test_without_nulls_and_without_an_update():
    w0 = torch.randn(6, 4)
    found = g.measure_rows("x", (6, 4), *readers(w0, w0), (0.5,), nulls=False)
    assert found["frobenius"] == 0 and found["sparsity"] == 1 and found["low_share_a50"] == 0.5
    assert found["low_overlap_a50"] != found["low_overlap_a50"] and "low_overlap_a50_null" not in found
