"""Figures: functions from a table to a figure, in one visual language.

Each arm has one colour (Okabe and Ito's, told apart by colour-blind readers) and one marker (told apart in grey). A
thin line or a small dot is a seed, a thick line the mean over seeds, a band its 95 % interval, and dashes are the null.
Nothing is computed here but means and intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from opdlab.arms import ARMS
from opdlab.stats import mean_interval

# A variant has the colour and the marker of the paper's arm that it descends from, unless a figure gives it another.
COLOURS = {"sft": "#0072B2", "opd": "#D55E00", "opd_full": "#CC79A7", "rlvr": "#009E73", "sft_matched": "#56B4E9"}
MARKERS = {"sft": "s", "opd": "o", "opd_full": "D", "rlvr": "^", "sft_matched": "v"}
NULL = {"color": "0.45", "linestyle": "--", "linewidth": 1.2}


def colour_of(arm: str) -> str:
    """Return the colour of an arm, which a variant has from the paper's arm that it descends from."""
    return COLOURS[arm if arm in COLOURS else ARMS[arm].ancestor]


def marker_of(arm: str) -> str:
    """Return the marker of an arm."""
    return MARKERS[arm if arm in MARKERS else ARMS[arm].ancestor]


def shades(arms: Sequence[str], palette: str = "viridis", **fixed: str) -> dict[str, str]:
    """Return colours for arms in an order, from dark to light; those named in ``fixed`` have the colour of that arm.

    Args:
        arms: in order.
        palette: name of a seaborn palette, which begins dark.
        fixed: arms with the colour of one of the paper's.

    >>> shades(["opd_mix75", "opd_mix50"], opd_short="opd")["opd_short"]
    '#D55E00'
    """
    colours = sns.color_palette(palette, len(arms) + 1).as_hex()
    return dict(zip(arms, colours, strict=False)) | {arm: COLOURS[like] for arm, like in fixed.items()}


def use_style() -> None:
    """Set the look of all figures; in a notebook also their format: PNG at double density, without metadata."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "savefig.facecolor": "white",
            "font.family": "DejaVu Sans",
        },
    )
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    # Without the Software field the same figure gives the same bytes under every version.
    set_matplotlib_formats("retina", metadata={"Software": None}, bbox_inches="tight")


def panels(count: int, columns: int = 3, width: float = 3.3, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels in rows of at most ``columns``."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]


def draw_curves(
    axis: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    null: str | None = None,
    labels: bool = True,
    smooth: int = 1,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw ``y`` against ``x`` for each arm: seeds, mean and interval, and dashed the mean of the column ``null``.

    Args:
        axis: where to draw.
        table: one row per arm, seed and x.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        null: column with the null of each row.
        labels: write each arm's name at the end of its curve.
        smooth: width of a running mean over rows, for noisy histories.
        colours: of arms that should not have their own (:func:`shades`).
    """
    ends, lowest, highest = [], np.inf, -np.inf
    # What is undefined has no curve, as where an arm gained nothing that could be recovered.
    table = table.dropna(subset=[y])
    if table.empty:
        return
    for arm, rows in table.groupby("arm", sort=False):
        colour, marker = (colours or {}).get(arm) or colour_of(arm), marker_of(arm)
        wide = rows.pivot_table(index=x, columns="seed", values=y)
        if smooth > 1:
            wide = wide.rolling(smooth, min_periods=1).mean()
        lowest, highest = min(lowest, wide.min(axis=None)), max(highest, wide.max(axis=None))
        axis.plot(wide.index, wide, color=colour, linewidth=0.7, alpha=0.5)
        intervals = [mean_interval(row) for row in wide.to_numpy()] if smooth == 1 else None
        mean = wide.mean(axis=1)
        axis.plot(wide.index, mean, color=colour, linewidth=2, marker=marker if smooth == 1 else None, ms=4)
        if intervals is not None and wide.shape[1] > 1:
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            axis.fill_between(wide.index, low, high, color=colour, alpha=0.12, linewidth=0)
        if null:
            axis.plot(rows.groupby(x)[null].mean(), **NULL | {"color": colour}, zorder=0)
        ends.append((float(mean.iloc[-1]), arm))
    # Room for every seed; a band or a null may leave the panel.
    margin = 0.06 * (highest - lowest or 1.0)
    axis.set_ylim(lowest - margin, highest + margin)
    if labels:
        label_ends(axis, ends, colours=colours)


def label_ends(
    axis: Axes,
    ends: Sequence[tuple[float, str]],
    gap: float = 0.075,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Write arms' names at the right of their curves, pushed apart where they would overlap.

    Args:
        axis: where to write.
        ends: height of the end in data units, and arm, of each curve.
        gap: smallest distance between two names, as a share of the axis.
        colours: of arms that should not have their own.
    """
    low, high = axis.get_ylim()
    places: list[float] = []
    for y, _ in sorted(ends):
        place = (y - low) / (high - low)
        if places:
            place = max(place, places[-1] + gap)
        places.append(place)
    # From the top down, what has been pushed out of the panel is pushed back.
    ceiling = 1.0
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    for place, (_, arm) in zip(places, sorted(ends), strict=True):
        axis.annotate(
            ARMS[arm].label,
            (1.02, place),
            xycoords="axes fraction",
            color=(colours or {}).get(arm) or colour_of(arm),
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def draw_dots(axis: Axes, table: pd.DataFrame, y: str, *, null: str | None = None, log: bool = False) -> None:
    """Draw one dot per seed and the mean of ``y`` for each arm, with the null as grey dashes beside it."""
    arms = list(dict.fromkeys(table["arm"]))
    for i, arm in enumerate(arms):
        rows, colour = table[table["arm"] == arm], colour_of(arm)
        axis.plot([i - 0.28, i + 0.28], [rows[y].mean()] * 2, color=colour, linewidth=2)
        spread = np.linspace(-0.14, 0.14, len(rows)) if len(rows) > 1 else [0.0]
        axis.plot(i + np.asarray(spread), rows[y], marker_of(arm), color=colour, ms=5, alpha=0.8)
        if null:
            axis.plot([i - 0.38, i + 0.38], [rows[null].mean()] * 2, **NULL)
    axis.set_xticks(range(len(arms)), [fill(ARMS[arm].label, 11) for arm in arms], fontsize=8)
    axis.set_xlim(-0.6, len(arms) - 0.4)
    if log:
        set_log(axis.yaxis)


def draw_scales(table: pd.DataFrame, width: float = 4.2, height: float = 2.3) -> Figure:
    """Draw values at several scales: a row of panels for each value, a panel for each scale, in it a dot per seed.

    Args:
        table: what :func:`opdlab.beside.at_scales` returns.
        width: of a panel.
        height: of a panel.
    """
    titles, scales = list(dict.fromkeys(table["title"])), list(dict.fromkeys(table["scale"]))
    figure, axes = panels(len(titles) * len(scales), len(scales), width, height)
    for i, axis in enumerate(axes):
        title, scale = titles[i // len(scales)], scales[i % len(scales)]
        draw_dots(axis, table[(table["title"] == title) & (table["scale"] == scale)], "value")
        axis.set_title(f"{title}, {scale}")
    return figure


def set_log(axis: Axis) -> None:
    """Make one axis of a panel logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def draw_points(axis: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw one point per row in the plane of ``x`` and ``y``, both logarithmic."""
    for arm, rows in table.groupby("arm", sort=False):
        axis.scatter(rows[x], rows[y], s=14, color=colour_of(arm), marker=marker_of(arm), alpha=0.6, linewidths=0)
    set_log(axis.xaxis)
    set_log(axis.yaxis)


def draw_paths(axis: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw where each run went in the plane of ``x`` (logarithmic) and ``y``: a line per seed, from early to late."""
    for (arm, _), rows in table.groupby(["arm", "seed"], sort=False):
        axis.plot(rows[x], rows[y], color=colour_of(arm), marker=marker_of(arm), ms=3.5, linewidth=0.9, alpha=0.8)
    set_log(axis.xaxis)


def draw_rows(
    axis: Axes,
    table: pd.DataFrame,
    *,
    names: bool = True,
    counts: float = 0.0,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw one row per arm: a small dot per seed, the mean and its 95 % interval; dashes at zero.

    Args:
        axis: where to draw.
        table: one column per arm, one row per seed (:func:`opdlab.claims.judging.differences`).
        names: write the arms' names at the left.
        counts: shade what lies closer to zero than this.
        colours: of arms that should not have their own.
    """
    for row, (arm, values) in enumerate(table.items()):
        colour, values = (colours or {}).get(arm) or colour_of(arm), values.dropna()
        found = mean_interval(values)
        axis.plot(values, np.full(len(values), row), "o", color=colour, ms=3, alpha=0.5)
        axis.plot([found.low, found.high], [row, row], color=colour, linewidth=2)
        axis.plot(found.mean, row, marker_of(arm), color=colour, ms=6)
    axis.axvline(0, **NULL)
    if counts:
        axis.axvspan(-counts, counts, color="0.93", zorder=0, linewidth=0)
    axis.set_yticks(range(table.shape[1]), [ARMS[arm].label for arm in table] if names else [])
    axis.set_ylim(table.shape[1] - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.locator_params(axis="x", nbins=4)


def arm_legend(
    axis: Axes,
    arms: Sequence[str],
    *,
    null: str | None = None,
    colours: Mapping[str, str] | None = None,
    **options: object,
) -> None:
    """Add a legend with the arms, and the null under the name ``null``; an empty panel is given up to it."""
    colours = {arm: colour_of(arm) for arm in arms} | dict(colours or {})
    handles = [
        plt.Line2D([], [], color=colours[arm], marker=marker_of(arm), linewidth=2, ms=5, label=ARMS[arm].label)
        for arm in arms
    ]
    if null:
        handles.append(plt.Line2D([], [], label=null, **NULL))
    if not axis.has_data():
        axis.set_axis_off()
        options = {"loc": "center left", "fontsize": 11} | options
    axis.legend(handles=handles, **options)
