"""The report of a measurement: one self-contained HTML file with the means, and figures with what they show."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opdlab.errors import OpdlabError
from opdlab.figures.style import NULL, panels, set_log, use_style
from opdlab.geometry import feasible_range
from opdlab.geometry.summary import largest_k, means, of_layers, trajectory_means
from opdlab.measuring.update import Update, as_html
from opdlab.models.files import write_text

_BLUE = "#0072B2"
_DOTTED: dict[str, Any] = {"color": "0.6", "linestyle": ":", "linewidth": 1}


def write_report(path: Path, update: Update) -> None:
    """Write the report of an update."""
    use_style()
    layers, steps, figures = of_layers(update.table), update.trajectory, []
    steps = of_layers(steps) if len(steps) else steps
    # Matrices that moved, which is what there is to draw.
    layers = layers[layers["stable_rank"].notna()] if "stable_rank" in layers else layers.head(0)
    if len(layers):
        caption = "Sparsity, rotation and size of each matrix, by layer; one line per module."
        figures.append(_drawn(_by_layer(layers), caption))
        caption = "Stable rank of each module's updates: one dot per matrix, the mean, and dashed the permuted null."
        figures.append(_drawn(draw_column(layers, "stable_rank", over_steps=False), caption))
        caption = (
            "Overlap of the visible update with the principal and the low-magnitude weights (share 0.3): one dot per "
            "matrix. Dashes: the permuted null. Shaded: what counting allows at that density. Dotted: the random rate."
        )
        figures.append(_drawn(_masks(layers), caption))
    if len(steps) and steps["stable_rank"].notna().any():
        caption = (
            "The update at each checkpoint, means over the matrices of attention and of the MLP: stable rank, norm, "
            "and similarity of the leading right subspace to the last one. Dashes: the null, of permuted updates for "
            "the rank and of a random walk for the similarity."
        )
        figures.append(_drawn(_trajectory(steps), caption))
    tables = [update.means, *([trajectory_means(steps)] if len(steps) else [])]
    _write_page(path, title=update.title, notes=update.notes, table=update.table, tables=tables, figures=figures)


def write_comparison(path: Path, models: pd.DataFrame, pairs: pd.DataFrame, by_pair: pd.DataFrame) -> None:
    """Write the report of a :class:`opdlab.measuring.compare.Comparison`; ``by_pair`` is its means."""
    use_style()
    caption = (
        "Each pair of updates, one dot per matrix, with the mean: similarity of the leading right subspaces, and "
        "Jaccard index of the visible masks at equal norm. Dashes: unrelated updates (random subspaces; permuted "
        "updates, rounded). Dotted: masks that are independent given their densities."
    )
    title = f"{len(set(pairs['a']) | set(pairs['b']))} updates compared"
    _write_page(path, title=title, models=models, pairs=by_pair, figures=[_drawn(_pairs(pairs), caption)])


def draw_column(table: pd.DataFrame, column: str, *, over_steps: bool) -> Figure:
    """Draw a column of an update's table, a dot per matrix, or of its trajectory, a curve per block; dashes are nulls.

    Raises:
        OpdlabError: if the column has no numbers for the matrices of attention and MLP.
    """
    layers = of_layers(table)
    known, null = layers[column].replace([np.inf, -np.inf], np.nan).dropna(), f"{column}_null"
    if known.empty:
        raise OpdlabError(f"{column!r} has no numbers for the matrices of attention and MLP: choose another column")
    use_style()
    figure, (axis,) = panels(1, width=5.2 if over_steps else 9.2, height=3)
    if over_steps:
        _follow(axis, layers, column)
        axis.legend()
        axis.set_xlabel("step")
    else:
        _by_module(axis, layers, column)
    notes = ["dashes: its null"] if null in layers else []
    others = layers[null].mean() if null in layers else known.mean()
    # Some numbers lie far from their nulls, such as ranks.
    if known.min() > 0 and others > 0 and max(known.max(), others) > 5 * min(known.min(), others):
        set_log(axis.yaxis)
        notes.append("logarithmic axis")
    axis.set_title("; ".join([column.replace("_", " "), *notes]))
    plt.close(figure)  # A notebook shows what is returned, and would show an open figure once more.
    return figure


def _write_page(path: Path, **parts: object) -> None:
    pages = Environment(loader=PackageLoader("opdlab.measuring", ""), autoescape=True, undefined=StrictUndefined)
    pages.filters["frame"] = lambda table: Markup(as_html(table))
    write_text(path, pages.get_template("report.html.jinja").render(parts).lstrip() + "\n")


def _drawn(figure: Figure, caption: str) -> dict[str, str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return {"caption": caption, "png": base64.b64encode(buffer.getvalue()).decode()}


def _by_layer(layers: pd.DataFrame) -> Figure:
    palette = sns.color_palette("colorblind", layers["module"].nunique())
    figure, axes = panels(4, columns=2, width=4.6, height=3)
    views = {"sparsity": "bf16 sparsity", "angle_left_mean": "mean angle, degrees", "relative_norm": "relative norm"}
    for axis, (column, title) in zip(axes, views.items(), strict=False):
        for colour, (module, rows) in zip(palette, layers.groupby("module", sort=False), strict=True):
            axis.plot(rows["layer"], rows[column], "o-", color=colour, ms=3, linewidth=1.2, label=module)
        axis.set(title=title, xlabel="layer")
        axis.locator_params(axis="x", integer=True)
    _legend_alone(axes[3], axes[0])
    return figure


def _legend_alone(axis: Axes, of: Axes) -> None:
    """Use a spare panel for the legend of another."""
    axis.set_axis_off()
    axis.legend(*of.get_legend_handles_labels(), loc="center left")


def _dots(axis: Axes, i: int, values: pd.Series, null: pd.Series | None) -> None:
    """Draw values as dots around ``i``, with their mean, and the mean of their null as dashes."""
    spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else np.zeros(1)
    axis.plot(i + spread, values, "o", ms=2.5, color=_BLUE, alpha=0.6)
    axis.plot([i - 0.35, i + 0.35], [values.mean()] * 2, color=_BLUE, linewidth=2)
    if null is not None:
        axis.plot([i - 0.4, i + 0.4], [null.mean()] * 2, **NULL)


def _by_module(axis: Axes, layers: pd.DataFrame, column: str) -> None:
    for i, (_, rows) in enumerate(layers.groupby("module", sort=False)):
        _dots(axis, i, rows[column], rows.get(f"{column}_null"))
    modules = layers["module"].unique()
    axis.set_xticks(range(len(modules)), modules, rotation=40, ha="right", fontsize=8)


def _masks(layers: pd.DataFrame) -> Figure:
    figure, axes = panels(2, columns=2, width=4.6, height=3)
    for axis, star, title in zip(axes, ("principal", "low"), ("principal", "low-magnitude"), strict=True):
        _by_module(axis, layers, f"{star}_overlap_a30")
        for i, (_, rows) in enumerate(layers.groupby("module", sort=False)):
            limits = feasible_range(0.3, float(rows["density"].mean()))
            axis.fill_between([i - 0.45, i + 0.45], *limits, color="0.92", zorder=0, linewidth=0)
        axis.axhline(0.3, **_DOTTED)
        axis.set_title(f"{title} weights")
    return figure


def _follow(axis: Axes, trajectory: pd.DataFrame, column: str) -> None:
    """Draw the means of a column over the steps, and its null as dashes."""
    for block, colour in (("attention", _BLUE), ("mlp", "#D55E00")):
        rows = trajectory[trajectory["block"] == block]
        for name, style in ((column, {"marker": "o", "ms": 4, "label": block}), (f"{column}_null", NULL)):
            if len(rows) and name in rows:
                axis.plot(means(rows, ["step"], [name]).set_index("step")[name], **style | {"color": colour})


def _trajectory(trajectory: pd.DataFrame) -> Figure:
    k = largest_k(trajectory)
    views = {"stable_rank": "stable rank", "frobenius": "Frobenius norm"}
    views |= {f"sim_right_K{k}": f"similarity to the end, K = {k}"} if k else {}
    figure, axes = panels(4, columns=2, width=4.6, height=3)
    for axis, (column, title) in zip(axes, views.items(), strict=False):
        _follow(axis, trajectory, column)
        axis.set(title=title, xlabel="step")
    axes[0].set_yscale("log")
    for spare in axes[len(views) :]:
        _legend_alone(spare, axes[0])
    return figure


def _pairs(pairs: pd.DataFrame) -> Figure:
    k, groups = largest_k(pairs), pairs.groupby(["a", "b"], sort=False)
    views = {
        f"sim_right_K{k}": (f"similarity of updates, K = {k}", f"sim_right_random_K{k}"),
        "jaccard_matched": ("Jaccard index of visible masks, at equal norm", "jaccard_permuted_matched"),
    }
    # A dollar would begin a formula.
    labels = [f"{a}\n{b}".replace("$", r"\$") for (a, b), _ in groups]
    figure, axes = panels(2, columns=2, width=4.6, height=3 + 0.1 * len(labels))
    for axis, (column, (title, null)) in zip(axes, views.items(), strict=True):
        for i, (_, rows) in enumerate(groups):
            _dots(axis, i, rows[column], rows[null])
            if column == "jaccard_matched":
                axis.plot([i - 0.4, i + 0.4], [rows["jaccard_independent_matched"].mean()] * 2, **_DOTTED)
        axis.set_xticks(range(len(labels)), labels, rotation=40 if len(labels) > 1 else 0, ha="center", fontsize=8)
        axis.set(title=title, xlim=(-0.6, len(labels) - 0.4))
    return figure
