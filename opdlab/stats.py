"""Confidence intervals: how certain a number is, given a few prompts or seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Interval(NamedTuple):
    """An estimate and the ends of its interval; a format specification applies to all three numbers.

    >>> f"{Interval(0.5, 0.25, 0.75):+.2f}"
    '+0.50 [+0.25, +0.75]'
    """

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Format the mean, followed by the ends in brackets if they are known; a blank goes before a percent sign."""
        ends = "" if isnan(self.low) else f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.mean:{spec}}{ends}".replace("%", " %")


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of a few values, one per seed; from a single value its ends are NaN.

    >>> mean_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    return mean_estimate(values).interval(confidence)


def prediction_interval(values: Sequence[float], confidence: float = 0.99) -> Interval:
    """Return the prediction interval for one more value, given a few: where a replication should fall.

    >>> prediction_interval([1.0, 2.0, 3.0], 0.95)
    Interval(mean=2.0, low=-2.968..., high=6.968...)
    """
    mean, error, freedom = mean_estimate(values)
    return Estimate(mean, error * (len(values) + 1) ** 0.5, freedom).interval(confidence)


class Estimate(NamedTuple):
    """An estimated effect with its standard error and degrees of freedom; with none of these, nothing can be tested."""

    mean: float
    error: float
    freedom: int

    def interval(self, confidence: float = 0.95) -> Interval:
        """Return Student's interval."""
        half = float(stats.t.ppf(0.5 + confidence / 2, self.freedom)) * self.error if self.freedom > 0 else nan
        return Interval(self.mean, self.mean - half, self.mean + half)

    def above(self, bound: float) -> float:
        """Return the one-sided p-value of an effect above ``bound``; 1 where nothing can be tested.

        >>> round(Estimate(2.0, 1.0, 10).above(0.0), 4)
        0.0367
        """
        if self.freedom < 1 or isnan(self.error):
            return 1.0
        if self.error == 0:
            return float(self.mean <= bound)
        return float(stats.t.sf((self.mean - bound) / self.error, self.freedom))

    def below(self, bound: float) -> float:
        """Return the one-sided p-value of an effect below ``bound``."""
        return self._replace(mean=-self.mean).above(-bound)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of a few values, one per seed, as an :class:`Estimate`."""
    sample, count = np.asarray(values, dtype=float), len(values)
    mean = float(sample.mean()) if count else nan
    return Estimate(mean, float(sample.std(ddof=1) / count**0.5) if count > 1 else nan, max(count - 1, 0))


def block_estimate(values: pd.DataFrame, weights: Mapping[str, float]) -> Estimate:
    """Return a contrast of arms in a table of one number per run, whose rows are seeds and whose columns are arms.

    A seed is a block: all its runs start from one anchor, so arms are compared within seeds, by least squares on the
    sum of an effect of the arm and one of the seed. What is left over is pooled over all arms in the table, which gives
    three seeds of one arm the certainty of all. Runs that are missing are NaN.

    Raises:
        ValueError: if the weights do not add up to zero, which no contrast within seeds can have.

    >>> table = pd.DataFrame({"opd": [1.0, 2.0, 3.0], "rlvr": [0.0, 1.1, 1.9]})
    >>> f"{block_estimate(table, {'opd': 1, 'rlvr': -1}).interval():+.2f}"
    '+1.00 [+0.75, +1.25]'
    """
    if abs(sum(weights.values())) > 1e-12:
        raise ValueError("the weights of a contrast add up to zero")
    runs = values.stack().dropna()
    seeds, arms = (pd.Categorical(runs.index.get_level_values(level)) for level in (0, 1))
    of_arms = np.eye(len(arms.categories))[arms.codes]
    design = np.hstack([of_arms, np.eye(len(seeds.categories))[seeds.codes][:, 1:]])
    solution, _, rank, _ = np.linalg.lstsq(design, runs.to_numpy(float), rcond=None)
    contrast = np.zeros(design.shape[1])
    for arm, weight in weights.items():
        contrast[arms.categories.get_loc(arm)] += weight
    freedom = len(runs) - int(rank)
    left = float(np.square(runs.to_numpy(float) - design @ solution).sum())
    spread = contrast @ np.linalg.pinv(design.T @ design) @ contrast
    return Estimate(float(contrast @ solution), float((left / freedom * spread) ** 0.5) if freedom else nan, freedom)


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> Interval | None:
    """Return the ratio of two means, paired by seed, with Fieller's 95 % interval; None where it is not defined.

    It is not defined where the interval of ``under`` contains zero.

    >>> f"{ratio_interval([1.0, 1.1, 0.9], [2.0, 2.1, 2.0]):.2f}"
    '0.49 [0.39, 0.58]'
    """
    a, b = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
    count = len(a)
    below = mean_interval(b.tolist())
    if count < 2 or below.low <= 0 <= below.high:
        return None
    t = float(stats.t.ppf(0.975, count - 1))
    (va, cab), (_, vb) = np.cov(a, b) / count
    # The ratios r at which the mean of a - r b is not told apart from zero lie between the roots of a parabola.
    roots = np.roots([b.mean() ** 2 - t**2 * vb, -2 * (a.mean() * b.mean() - t**2 * cab), a.mean() ** 2 - t**2 * va])
    low, high = sorted(roots.real)
    return Interval(float(a.mean() / b.mean()), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being tested together, by the method of Holm (1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values)
    order = p.argsort()
    raised = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    return np.maximum.accumulate(raised)[order.argsort()].tolist()
