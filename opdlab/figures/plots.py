"""Figures: functions from a table to a figure, in one visual language.

Each arm has one colour (Okabe and Ito's, told apart by colour-blind readers) and one marker (told apart in grey). A
thin line or a small dot is a seed, a thick line the mean over seeds, a band its 95 % interval, and dashes are the null.
Nothing is computed here but means and intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from opdlab.lab.grid import ARMS
from opdlab.stats import mean_interval

# A variant has the colour and the marker of the paper's arm that it descends from, unless a figure gives it another.
COLOURS = {"sft": "#0072B2", "opd": "#D55E00", "opd_full": "#CC79A7", "rlvr": "#009E73", "sft_matched": "#56B4E9"}
MARKERS = {"sft": "s", "opd": "o", "opd_full": "D", "rlvr": "^", "sft_matched": "v"}
NULL: dict[str, Any] = {"color": "0.45", "linestyle": "--", "linewidth": 1.2}
# A legend above all panels, where names at the curves have no room.
ABOVE: dict[str, Any] = {"loc": "outside upper left", "ncols": 3}
# The matrices of a layer, in the order of the computation.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def colour_of(arm: str) -> str:
    """Return the colour of an arm, which a variant has from the paper's arm that it descends from."""
    return COLOURS[arm if arm in COLOURS else ARMS[arm].ancestor]


def marker_of(arm: str) -> str:
    """Return the marker of an arm."""
    return MARKERS[arm if arm in MARKERS else ARMS[arm].ancestor]


def shades(arms: Sequence[str], palette: str = "blend:#16002B,#6A3D9A,#C9B1E4", **fixed: str) -> dict[str, str]:
    """Return colours for arms in an order, from dark to light; those named in ``fixed`` have the colour of that arm.

    Args:
        arms: in order.
        palette: name of a seaborn palette, which begins dark; by default purples, which no arm has.
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
    log: bool = False,
    bands: Sequence[str] | None = None,
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
        log: make the vertical axis logarithmic, with room for the null, too.
        bands: the arms whose interval is drawn; by default all, but many bands hide the curves.
        colours: of arms that should not have their own (:func:`shades`).
    """
    ends, drawn = [], []
    # What is undefined has no curve, as where an arm gained nothing that could be recovered.
    table = table.dropna(subset=[y])
    if table.empty:
        return
    for arm, rows in table.groupby("arm", sort=False):
        colour, marker = (colours or {}).get(arm) or colour_of(arm), marker_of(arm)
        wide = rows.pivot_table(index=x, columns="seed", values=y)
        if smooth > 1:
            wide = wide.rolling(smooth, min_periods=1).mean()
        drawn.append(wide.to_numpy().ravel())
        axis.plot(wide.index, wide, color=colour, linewidth=0.7, alpha=0.5)
        intervals = [mean_interval(row) for row in wide.to_numpy()] if smooth == 1 else None
        mean = wide.mean(axis=1)
        axis.plot(wide.index, mean, color=colour, linewidth=2, marker=marker if smooth == 1 else None, ms=4)
        if intervals is not None and wide.shape[1] > 1 and (bands is None or arm in bands):
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            axis.fill_between(wide.index, low, high, color=colour, alpha=0.12, linewidth=0)
        if null:
            nulls = rows.groupby(x)[null].mean()
            axis.plot(nulls, **NULL | {"color": colour}, zorder=0)
            if log:
                drawn.append(nulls.to_numpy())
        ends.append((float(mean.iloc[-1]), arm))
    # Room for every seed; a band or a null may leave the panel.
    values = np.concatenate(drawn)
    if log:
        set_log(axis.yaxis)
        values = values[values > 0]
        if len(values):
            axis.set_ylim(values.min() / 1.2, values.max() * 1.2)
    else:
        lowest, highest = np.nanmin(values), np.nanmax(values)
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

    The names stay beside their curves if the limits of the axis change later; its scale must be set before.

    Args:
        axis: where to write.
        ends: height of the end in data units, and arm, of each curve.
        gap: smallest distance between two names, as a share of the axis.
        colours: of arms that should not have their own.
    """
    ends = sorted(ends)
    names = [
        axis.annotate(
            ARMS[arm].label,
            (1.02, 0.0),
            xycoords="axes fraction",
            color=(colours or {}).get(arm) or colour_of(arm),
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
        for _, arm in ends
    ]

    def place(axis: Axes) -> None:
        low, high, *heights = axis.yaxis.get_transform().transform([*axis.get_ylim(), *(y for y, _ in ends)])
        places: list[float] = []
        for height in heights:
            share = min(max((height - low) / (high - low), 0.0), 1.0)
            places.append(max(share, places[-1] + gap) if places else share)
        # From the top down, what has been pushed out of the panel is pushed back.
        ceiling = 1.0
        for i in range(len(places) - 1, -1, -1):
            places[i] = min(places[i], ceiling)
            ceiling = places[i] - gap
        for name, share in zip(names, places, strict=True):
            name.xy = (1.02, share)
            name.set_position(name.xy)

    place(axis)
    axis.callbacks.connect("ylim_changed", place)


def note_null(axis: Axes, value: float, name: str = "permuted") -> None:
    """Write at the top right of a panel that its null lies above, and where, so that the panel need not stretch to it.

    Args:
        axis: where to write.
        value: of the null.
        name: of the null.
    """
    style = {"color": NULL["color"], "fontsize": 9, "ha": "right", "va": "bottom"}
    axis.annotate(f"{name}: {value:.3g} ↑", (1.0, 1.0), xycoords="axes fraction", annotation_clip=False, **style)


def draw_dots(
    axis: Axes, table: pd.DataFrame, y: str, *, null: str | None = None, log: bool = False, wrap: int = 11
) -> None:
    """Draw one dot per seed and the mean of ``y`` for each arm, with the null as grey dashes beside it.

    Args:
        axis: where to draw.
        table: one row per arm and seed.
        y: column of the vertical axis.
        null: column with the null of each row.
        log: make the vertical axis logarithmic.
        wrap: characters in a line of an arm's name; a longer word stays whole.
    """
    arms = list(dict.fromkeys(table["arm"]))
    for i, arm in enumerate(arms):
        rows, colour = table[table["arm"] == arm], colour_of(arm)
        axis.plot([i - 0.28, i + 0.28], [rows[y].mean()] * 2, color=colour, linewidth=2)
        spread = np.linspace(-0.14, 0.14, len(rows)) if len(rows) > 1 else [0.0]
        axis.plot(i + np.asarray(spread), rows[y], marker_of(arm), color=colour, ms=5, alpha=0.8)
        if null:
            axis.plot([i - 0.38, i + 0.38], [rows[null].mean()] * 2, **NULL)
    axis.set_xticks(range(len(arms)), [fill(ARMS[arm].label, wrap, break_long_words=False) for arm in arms], fontsize=8)
    axis.set_xlim(-0.6, len(arms) - 0.4)
    if log:
        set_log(axis.yaxis)


def draw_modules(table: pd.DataFrame, views: Sequence[tuple[str, str, str | None, bool]]) -> Figure:
    """Draw every matrix: a row of panels for each view, a column for each module, in a panel the layers in order.

    Args:
        table: one row per run and matrix (``matrices`` of :class:`opdlab.lab.records.Records`).
        views: column, title, column of the null or None, and whether its axis is logarithmic.
    """
    present = set(table["module"])
    modules = [name for name in MODULES if name in present] + sorted(present - set(MODULES))
    size = (1.15 * len(modules), 1.75 * len(views) + 0.8)
    figure, axes = plt.subplots(len(views), len(modules), figsize=size, squeeze=False, sharex=True, sharey="row")
    for row, (column, title, null, log) in zip(axes, views, strict=True):
        limits = []
        for axis, module in zip(row, modules, strict=True):
            of_module = table[table["module"] == module]
            draw_curves(axis, of_module, "layer", column, null=null, labels=False, log=log)
            axis.xaxis.get_major_locator().set_params(integer=True)
            limits.append(axis.get_ylim())
        low, high = np.array(limits).T
        row[0].set_ylim(low.min(), high.max())
        row[0].set_ylabel(title)
    for axis, module in zip(axes[0], modules, strict=True):
        axis.set_title(module.removesuffix("_proj"), loc="center")
    axes[0, 0].margins(x=0.15)
    figure.supxlabel("layer", fontsize=10)
    arms, nulls = list(dict.fromkeys(table["arm"])), any(null for _, _, null, _ in views)
    arm_legend(figure, arms, null="permuted null" if nulls else None, **ABOVE)
    return figure


def draw_scales(
    table: pd.DataFrame,
    width: float = 4.2,
    height: float = 2.3,
    *,
    null: str | None = None,
    near: Mapping[str, float] | None = None,
    wrap: int = 11,
) -> Figure:
    """Draw values at several scales: a row of panels for each value, a panel for each scale, in it a dot per seed.

    Args:
        table: what :func:`opdlab.claims.across_scales.at_scales` returns.
        width: of a panel.
        height: of a panel.
        null: column with the null of each row; where it is missing, none is drawn.
        near: by title, how near to the first arm is near enough: what is, is shaded.
        wrap: characters in a line of an arm's name.
    """
    titles, scales = list(dict.fromkeys(table["title"])), list(dict.fromkeys(table["scale"]))
    figure, axes = panels(len(titles) * len(scales), len(scales), width, height)
    for i, axis in enumerate(axes):
        title, scale = titles[i // len(scales)], scales[i % len(scales)]
        rows = table[(table["title"] == title) & (table["scale"] == scale)]
        draw_dots(axis, rows, "value", null=null, wrap=wrap)
        axis.set_title(f"{title}, {scale}")
        if near and title in near:
            middle = rows.loc[rows["arm"] == rows["arm"].iloc[0], "value"].mean()
            axis.axhspan(middle - near[title], middle + near[title], color="0.93", zorder=0, linewidth=0)
    return figure


def set_log(axis: XAxis | YAxis) -> None:
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
    place: Axes | Figure,
    arms: Sequence[str],
    *,
    null: str | None = None,
    colours: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    """Add a legend with the arms; an empty panel is given up to it.

    Args:
        place: a panel, or the whole figure.
        arms: in order.
        null: what to call the null, if there is one.
        colours: of arms that should not have their own.
        options: of the method ``legend``, such as ``ABOVE``.
    """
    colours = {arm: colour_of(arm) for arm in arms} | dict(colours or {})
    handles = [
        plt.Line2D([], [], color=colours[arm], marker=marker_of(arm), linewidth=2, ms=5, label=ARMS[arm].label)
        for arm in arms
    ]
    if null:
        handles.append(plt.Line2D([], [], label=null, **NULL))
    if isinstance(place, Axes) and not place.has_data():
        place.set_axis_off()
        options = {"loc": "center left", "fontsize": 11} | options
    place.legend(handles=handles, **options)
