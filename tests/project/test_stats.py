import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.stats import mean_interval, prediction_interval, proportion_interval


@given(hits=st.integers(0, 50))
def test_wilson_by_its_formula(hits):
    n, z = 50, 1.959963984540054
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    interval = proportion_interval(share, n)
    assert interval.low == pytest.approx(max(0, centre - half), abs=1e-12)
    assert interval.high == pytest.approx(min(1, centre + half), abs=1e-12)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    mean_hits = next_hits = 0
    for _ in range(2000):
        *seen, following = rng.normal(3.0, 2.0, size=4)
        interval = mean_interval(seen)
        mean_hits += interval.low <= 3.0 <= interval.high
        interval = prediction_interval(seen, 0.95)
        next_hits += interval.low <= following <= interval.high
    assert mean_hits / 2000 == pytest.approx(0.95, abs=0.015)
    assert next_hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_spread():
    assert mean_interval([2.0]).mean == 2.0
    assert np.isnan(mean_interval([2.0]).low)
