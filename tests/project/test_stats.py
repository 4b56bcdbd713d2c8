from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from opdlab.stats import (
    block_estimate,
    holm,
    mean_estimate,
    mean_interval,
    prediction_interval,
    ratio_interval,
)


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


def test_blocks_are_paired_where_two_arms_are_all_there_is():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 6)) + random.normal(size=6)
    found = block_estimate(pd.DataFrame({"a": a, "b": b}), {"a": 1, "b": -1})
    alone = mean_estimate(a - b)
    assert found.mean == pytest.approx(alone.mean) and found.freedom == alone.freedom == 5
    assert found.error == pytest.approx(alone.error)
    assert found.interval() == pytest.approx(mean_interval(a - b))
    assert found.above(0.1) == pytest.approx(scipy.stats.ttest_1samp(a - b, 0.1, alternative="greater").pvalue)


def test_blocks_pool_over_arms_and_bear_missing_runs():
    random = np.random.default_rng(1)
    seeds, arms = random.normal(size=8), np.arange(10.0)
    truth = seeds[:, None] + arms
    table = pd.DataFrame(truth + 0.1 * random.normal(size=truth.shape), columns=[f"arm{i}" for i in range(10)])
    table.iloc[3:, 4:] = np.nan
    found = block_estimate(table, {"arm9": 1, "arm0": -1})
    assert found.freedom == table.notna().sum().sum() - 10 - 8 + 1
    assert abs(found.mean - 9) < 4 * found.error and 0.04 < found.error < 0.15
    exact = block_estimate(pd.DataFrame(truth, columns=table.columns).where(table.notna()), {"arm9": 1, "arm0": -1})
    assert exact.mean == pytest.approx(9) and exact.error < 1e-12


def test_blocks_and_ratios_cover_as_often_as_they_say():
    random = np.random.default_rng(2)
    covered = {"block": 0, "ratio": 0}
    for _ in range(400):
        runs = random.normal(size=(3, 1)) + random.normal(size=(3, 6)) + [1, 0, 0, 0, 0, 0]
        low, high = block_estimate(pd.DataFrame(runs, columns=list("abcdef")), {"a": 1, "b": -1}).interval()[1:]
        covered["block"] += low <= 1 <= high
        pairs = random.multivariate_normal([1, 4], [[0.1, 0.05], [0.05, 0.2]], size=5)
        share = ratio_interval(*pairs.T)
        covered["ratio"] += share is not None and share.low <= 0.25 <= share.high
    assert all(abs(count / 400 - 0.95) < 0.035 for count in covered.values()), covered


def test_a_ratio_to_nothing_is_not_defined():
    assert ratio_interval([1.0, 2.0, 3.0], [-1.0, 0.5, 1.0]) is None
    assert ratio_interval([1.0], [2.0]) is None
    assert mean_estimate([1.0]).above(0) == 1.0 and np.isnan(mean_estimate([1.0]).interval().low)


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """A hypothesis is rejected if Bonferroni rejects every set of hypotheses that it is in."""
    every = [of for size in range(1, len(p_values) + 1) for of in combinations(range(len(p_values)), size)]
    together = {of: min(1.0, len(of) * min(p_values[i] for i in of)) for of in every}
    expected = [max(p for of, p in together.items() if i in of) for i in range(len(p_values))]
    assert holm(p_values) == pytest.approx(expected)
