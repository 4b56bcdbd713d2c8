"""The ruler: what noise of a given size does to weights, with the updates that were published beside it."""

from __future__ import annotations

from math import isnan
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from opdlab.figures.style import NULL

_PUBLISHED: dict[str, Any] = {"color": "0.5", "zorder": 1}


def draw_ruler(axis: Axes, curve: pd.DataFrame, column: str, published: pd.DataFrame) -> None:
    """Draw what noise does against its relative norm, dashed, and published updates in grey, numbered by their index.

    The curve is as :attr:`opdlab.measuring.update.Update.ruler`, the column "sparsity" or "low_overlap_a30", and the
    updates as :func:`opdlab.measuring.where.published_sizes`: dots, or bars where only a range of the size is known.
    """
    known = published.dropna(subset=column)
    axis.plot(curve["relative_norm"], curve[column], **NULL)
    axis.plot(known["relative_norm"], known[column], "o", ms=3.5, **_PUBLISHED)
    axis.hlines(known[column], known["low"], known["high"], linewidth=3, **_PUBLISHED)
    # The numbers of the smallest stand on the left, fanned out, so that fewer lie on one another.
    small = known[known["relative_norm"] < known["relative_norm"].quantile(0.3)]
    for number, row in known.iterrows():
        left = number in small.index
        place = (row["relative_norm"] if isnan(row["high"]) else row["high"], row[column])
        offset = (-4, 3 * np.sign(row[column] - small[column].median())) if left else (4, 0)
        style: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "fontsize": 8, "color": "0.35"}
        axis.annotate(str(number), place, offset, textcoords="offset points", **style)
    axis.set(xscale="log", ylim=(0, 1.03), xlabel="relative norm")
    axis.xaxis.set_major_locator(LogLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{100 * size:g} %"))
    axis.xaxis.set_minor_locator(NullLocator())
