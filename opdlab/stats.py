"""Confidence intervals: how certain a number is, given a few prompts or seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

import numpy as np
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
        """Format the mean, followed by the ends in brackets if they are known."""
        ends = "" if isnan(self.low) else f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.mean:{spec}}{ends}"


def proportion_interval(share: float, count: int) -> Interval:
    """Return Wilson's 95 % interval for a proportion of ``count`` independent trials, such as accuracy on prompts.

    >>> proportion_interval(0.5, 1024)
    Interval(mean=0.5, low=0.4694..., high=0.5305...)
    """
    ends = stats.binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return Interval(share, float(ends.low), float(ends.high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of a few values, one per seed; from a single value its ends are NaN.

    >>> mean_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = stats.t.ppf(0.5 + confidence / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return Interval(mean, mean - float(half), mean + float(half))


def prediction_interval(values: Sequence[float], confidence: float = 0.99) -> Interval:
    """Return the prediction interval for one more value, given a few: where a replication should fall.

    >>> prediction_interval([1.0, 2.0, 3.0], 0.95)
    Interval(mean=2.0, low=-2.968..., high=6.968...)
    """
    mean, low, high = mean_interval(values, confidence)
    factor = np.sqrt(len(values) + 1)
    return Interval(mean, mean - float((mean - low) * factor), mean + float((high - mean) * factor))
