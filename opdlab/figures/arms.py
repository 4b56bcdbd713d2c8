"""Figures that compare arms: methods that draw a table, one row per arm and seed, in one visual language.

A thin line or a small dot is one seed, a thick line the mean, a band its 95 % interval, and a dashed line the null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opdlab.figures.style import NULL, set_log
from opdlab.stats import mean_interval

# The smallest distance between two labels at the right of a panel, as a share of its height.
_GAP = 0.075


class Look(NamedTuple):
    """How one arm looks in every figure: its label, colour and marker, the last two as Matplotlib writes them."""

    label: str
    colour: str
    marker: str


@dataclass(frozen=True)
class ArmFigures:
    """Figures of arms that each have a look of their own."""

    looks: Mapping[str, Look]  #: by the arm's name in the column ``arm`` of the tables

    def colour_of(self, arm: str) -> str:
        """Return the colour of an arm."""
        return self.looks[arm].colour

    def marker_of(self, arm: str) -> str:
        """Return the marker of an arm."""
        return self.looks[arm].marker

    def draw_curves(
        self,
        axis: Axes,
        table: pd.DataFrame,
        x: str,
        y: str,
        *,
        null: str | None = None,
        labels: bool = True,
        log: bool = False,
        bands: Sequence[str] | None = None,
    ) -> None:
        """Draw ``y`` against ``x`` for each arm: every seed, the mean with its interval, and the mean of the null.

        Args:
            axis: the panel.
            table: one row per arm, seed and x.
            x: the column of the horizontal axis.
            y: the column of the vertical axis; rows where it is missing are left out.
            null: the column that holds the null of each row.
            labels: whether to write each arm's label at the end of its curve.
            log: whether the vertical axis is logarithmic.
            bands: the arms whose interval is drawn; by default all, but many bands hide the curves.
        """
        ends = []
        # An undefined value has no curve: an arm that gained nothing has no share of its gain, for instance.
        table = table.dropna(subset=[y])
        if table.empty:
            return
        for arm, rows in table.groupby("arm", sort=False):
            look = self.looks[arm]
            wide = rows.pivot_table(index=x, columns="seed", values=y)
            mean = wide.mean(axis=1)
            axis.plot(wide.index, wide, color=look.colour, linewidth=0.7, alpha=0.5)
            axis.plot(wide.index, mean, color=look.colour, linewidth=2, marker=look.marker, ms=4)
            if wide.shape[1] > 1 and (bands is None or arm in bands):
                _, low, high = zip(*map(mean_interval, wide.to_numpy()), strict=True)
                axis.fill_between(wide.index, low, high, color=look.colour, alpha=0.12, linewidth=0)
            if null:
                axis.plot(rows.groupby(x)[null].mean(), **NULL | {"color": look.colour}, zorder=0)
            ends.append((float(mean.iloc[-1]), arm))
        _fit(axis, table[y], log)
        if labels:
            self.label_ends(axis, ends)

    def label_ends(self, axis: Axes, ends: Sequence[tuple[float, str]]) -> None:
        """Write the arms' labels to the right of their curves, pushed apart where they would overlap.

        ``ends`` holds the height of the end of each curve, in data units, and its arm. Labels follow their curves when
        the limits of the axis change; whether it is logarithmic must be set before.
        """
        ends = sorted(ends)
        style: dict[str, Any] = {"xycoords": "axes fraction", "annotation_clip": False, "fontsize": 9, "va": "center"}
        looks = [self.looks[arm] for _, arm in ends]
        names = [axis.annotate(look.label, (1.02, 0.0), color=look.colour, **style) for look in looks]

        def place(axis: Axes) -> None:
            low, high, *heights = axis.yaxis.get_transform().transform([*axis.get_ylim(), *(y for y, _ in ends)])
            shares = np.clip([(height - low) / (high - low) for height in heights], 0.0, 1.0)
            risen = list(accumulate(shares, lambda below, share: max(share, below + _GAP)))
            # From the top down, a label that was pushed out of the panel is pushed back into it.
            sunk = accumulate(np.minimum(risen, 1.0)[::-1], lambda above, share: min(share, above - _GAP))
            for name, share in zip(reversed(names), sunk, strict=True):
                name.xy = (1.02, share)
                name.set_position(name.xy)

        place(axis)
        axis.callbacks.connect("ylim_changed", place)

    def draw_dots(
        self, axis: Axes, table: pd.DataFrame, y: str, *, null: str | None = None, log: bool = False, wrap: int = 11
    ) -> None:
        """Draw ``y`` for each arm: one dot per seed, a line at the mean, and a grey dashed line at the null.

        Args:
            axis: the panel.
            table: one row per arm and seed.
            y: the column of the vertical axis.
            null: the column that holds the null of each row.
            log: whether the vertical axis is logarithmic.
            wrap: the number of characters after which a label is broken; a longer word stays whole.
        """
        arms = list(dict.fromkeys(table["arm"]))
        for i, arm in enumerate(arms):
            rows, look = table[table["arm"] == arm], self.looks[arm]
            axis.plot([i - 0.28, i + 0.28], [rows[y].mean()] * 2, color=look.colour, linewidth=2)
            spread = np.linspace(-0.14, 0.14, len(rows)) if len(rows) > 1 else np.zeros(1)
            axis.plot(i + spread, rows[y], look.marker, color=look.colour, ms=5, alpha=0.8)
            if null:
                axis.plot([i - 0.38, i + 0.38], [rows[null].mean()] * 2, **NULL)
        labels = [fill(self.looks[arm].label, wrap, break_long_words=False) for arm in arms]
        axis.set_xticks(range(len(arms)), labels, fontsize=8)
        axis.set_xlim(-0.6, len(arms) - 0.4)
        if log:
            set_log(axis.yaxis)

    def draw_points(self, axis: Axes, table: pd.DataFrame, x: str, y: str) -> None:
        """Draw one point per row in the plane of ``x`` and ``y``, both logarithmic."""
        for arm, rows in table.groupby("arm", sort=False):
            look = self.looks[arm]
            axis.scatter(rows[x], rows[y], s=14, color=look.colour, marker=look.marker, alpha=0.6, linewidths=0)
        set_log(axis.xaxis)
        set_log(axis.yaxis)

    def draw_rows(self, axis: Axes, table: pd.DataFrame, *, names: bool = True) -> None:
        """Draw one row per arm: a small dot per seed, the mean and its 95 % interval, and a dashed line at zero.

        ``table`` has a column for each arm and a row for each seed; ``names`` writes their labels at the left.
        """
        for row, (arm, values) in enumerate(table.items()):
            look, values = self.looks[arm], values.dropna()
            found = mean_interval(values)
            axis.plot(values, np.full(len(values), row), "o", color=look.colour, ms=3, alpha=0.5)
            axis.plot([found.low, found.high], [row, row], color=look.colour, linewidth=2)
            axis.plot(found.mean, row, look.marker, color=look.colour, ms=6)
        axis.axvline(0, **NULL)
        axis.set_yticks(range(table.shape[1]), [self.looks[arm].label for arm in table] if names else [])
        axis.set_ylim(table.shape[1] - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=4)

    def arm_legend(self, place: Axes | Figure, arms: Sequence[str], *, null: str | None = None, **options: Any) -> None:
        """Add a legend of arms, and of the null by the name given, to a panel or to the whole figure.

        The options are those of Matplotlib's ``legend``, such as :data:`opdlab.figures.style.ABOVE`.
        """
        looks = [self.looks[arm] for arm in arms]
        line = partial(plt.Line2D, [], [])
        handles = [line(label=label, color=colour, marker=marker, linewidth=2, ms=5) for label, colour, marker in looks]
        if null:
            handles.append(line(label=null, **NULL))
        place.legend(handles=handles, **options)


def _fit(axis: Axes, values: pd.Series, log: bool) -> None:
    """Set the vertical limits so that every value is seen; a band may leave the panel, and so may a null."""
    if log:
        set_log(axis.yaxis)
        values = values[values > 0]
        if len(values):
            axis.set_ylim(values.min() / 1.2, values.max() * 1.2)
        return
    margin = 0.06 * (values.max() - values.min() or 1.0)
    axis.set_ylim(values.min() - margin, values.max() + margin)
