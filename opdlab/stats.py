"""Intervals: how sure a number is, over prompts and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate with the two ends of its interval; a format holds for all three numbers.

    >>> f"{Interval(0.5, 0.25, 0.75):+.2f}"
    '+0.50 [+0.25, +0.75]'
    """

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Write the mean and, if they are known, the ends in brackets."""
        ends = "" if isnan(self.low) else f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.mean:{spec}}{ends}"


def proportion_interval(share: float, count: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval of a share of ``count`` independent trials: the accuracy of one model on its prompts.

    >>> proportion_interval(0.5, 1024)
    Interval(mean=0.5, low=0.4694..., high=0.5305...)
    """
    ends = stats.binomtest(round(share * count), count).proportion_ci(confidence, method="wilson")
    return Interval(share, float(ends.low), float(ends.high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's interval of the mean of a few values, one per seed; without spread if there is only one.

    >>> mean_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = stats.t.ppf(0.5 + confidence / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return Interval(mean, mean - float(half), mean + float(half))


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 20_000) -> Interval:
    """Return the bootstrap's percentile interval of the mean: exact, over all resamples, for six values or fewer.

    With a handful of values it is too short (it never leaves their range), so verdicts use :func:`mean_interval`.

    >>> bootstrap_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=1.0, high=3.0)
    """
    sample = np.asarray(values, dtype=float)
    count = len(sample)
    if count <= 6:
        means = sample[np.indices((count,) * count).reshape(count, -1)].mean(0)
    else:
        means = sample[np.random.default_rng(0).integers(count, size=(count, draws))].mean(0)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2], method="inverted_cdf")
    return Interval(float(sample.mean()), float(low), float(high))


def prediction_interval(values: Sequence[float], confidence: float = 0.99) -> Interval:
    """Return the interval in which one more value is expected, given a few: the spread that a replication must hit.

    >>> prediction_interval([1.0, 2.0, 3.0], 0.95)
    Interval(mean=2.0, low=-2.968..., high=6.968...)
    """
    mean, low, high = mean_interval(values, confidence)
    factor = np.sqrt(len(values) + 1)
    return Interval(mean, mean - float((mean - low) * factor), mean + float((high - mean) * factor))
