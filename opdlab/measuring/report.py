"""The report of a measurement: one self-contained HTML file with the means, and figures with what they show."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opdlab.figures.ruler import draw_ruler
from opdlab.figures.style import NULL, panels, set_log, use_style
from opdlab.geometry import feasible_range
from opdlab.geometry.matrices import TOWERS
from opdlab.geometry.summary import largest_k, means, means_over, of_layers, views
from opdlab.measuring.shown import as_html, beside_noise, on_views
from opdlab.measuring.where import published_sizes
from opdlab.models.files import write_text

if TYPE_CHECKING:
    from opdlab.measuring.compare import Comparison
    from opdlab.measuring.update import Update

_COLOURS = {"attention": "#0072B2", "mlp": "#D55E00"}
_BLUE, _ORANGE, _GREEN = *_COLOURS.values(), "#009E73"
_DOTTED: dict[str, Any] = {"color": "0.6", "linestyle": ":", "linewidth": 1}

_Panels = Mapping[str, Callable[[Axes], None]]


def write_report(path: Path, update: Update) -> None:
    """Write the report of an update."""
    use_style()
    dashes = " Dashes: the permuted null." if "stable_rank_null" in update.table else ""
    layers, steps, figures = _moved(of_layers(update.table)), update.trajectory, []
    if len(layers):
        figures += [_ruler(update), _by_layer(layers, "Sparsity, rotation and size of each matrix, by layer")]
        caption = f"Stable rank of each module's updates: one dot per matrix, and the mean.{dashes}"
        figures.append(_drawn(caption, {"": partial(_column, layers=layers, column="stable_rank")}))
        caption = (
            "Overlap of the visible update with the principal and the low-magnitude weights (share 0.3): one dot per "
            f"matrix. Shaded: what counting allows at that density. Dotted: the random rate.{dashes}"
        )
        stars = {"principal weights": "principal", "low-magnitude weights": "low"}
        masks = {title: partial(_mask, layers=layers, star=star) for title, star in stars.items()}
        figures.append(_drawn(caption, masks))
    for tower in TOWERS:
        rows = _moved(update.table[update.table["block"] == tower])
        if len(rows) and rows["layer"].nunique() > 1:
            figures.append(_by_layer(rows, f"Apart from the means, {tower}: sparsity, rotation and size, by layer"))
    if len(steps) and (steps := _moved(of_layers(steps))).size:
        caption = (
            "The update at each checkpoint, means over the matrices of each block: norm, stable rank, and similarity "
            "of the leading right subspace to the last one. Dashes are nulls: blue of permuted updates for the rank "
            f"and of a random walk for the similarity, orange the locked null. {' '.join(on_views(steps))}"
        )
        figures.append(_drawn(caption, _trajectory(steps)))
    over = means_over(update.table)
    _write_page(path, update, title=update.title, over=over, figures=figures, where=update.where())


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the report of a comparison."""
    use_style()
    caption = (
        "Each pair of updates, one dot per matrix, with the mean: similarity of the leading right subspaces, and "
        "Jaccard index of the visible masks at equal norm. Dashes: unrelated updates (random subspaces; permuted "
        "updates, rounded). Dotted: masks that are independent given their densities."
    )
    title, figures = f"{len(comparison.updates)} updates compared", [_drawn(caption, _pairs(comparison.pairs))]
    _write_page(path, comparison, title=title, over="", figures=figures)


def draw_column(layers: pd.DataFrame, column: str) -> Figure:
    """Draw a column of a table, a dot per matrix, or of a trajectory, a curve per block; dashes are nulls."""
    use_style()
    figure, (axis,) = panels(1, width=5.2 if "step" in layers else 9.2, height=3)
    _column(axis, layers, column)
    plt.close(figure)  # A notebook shows what is returned, and would show an open figure once more.
    return figure


def _column(axis: Axes, layers: pd.DataFrame, column: str) -> None:
    known, null = layers[column][np.isfinite(layers[column])], f"{column}_null"
    if "step" in layers:
        for block, rows in layers.groupby("block"):
            colour = _COLOURS.get(str(block), _GREEN)
            for name, style in ((column, {"marker": "o", "ms": 4, "label": block}), (null, NULL)):
                if name in rows:
                    axis.plot(means(rows, ["step"], [name]).set_index("step")[name], **style | {"color": colour})
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


def _write_page(path: Path, shown: Update | Comparison, **parts: object) -> None:
    pages = Environment(loader=PackageLoader("opdlab.measuring", ""), autoescape=True, undefined=StrictUndefined)
    # The page says itself how matrices are weighed.
    pages.filters["frame"] = lambda table: Markup(as_html(table.drop(columns="weighting", errors="ignore")))
    tables = [part for part in shown.parts() if not isinstance(part, str)]
    page = pages.get_template("report.html.jinja").render(parts, tables=tables, notes=shown.notes)
    write_text(path, page.lstrip() + "\n")


def _moved(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the matrices that moved, which is what there is to draw."""
    return rows[rows["stable_rank"].notna()] if "stable_rank" in rows else rows.head(0)


def _drawn(caption: str, draw: _Panels) -> dict[str, Any]:
    """Return a figure for the page: its caption, and a picture of each panel, under its title or one of its own."""
    pictures = []
    for title, of_panel in draw.items():
        # A phone shows it alone: as small as this its letters can still be read.
        figure, (axis,) = panels(1, width=4.2)
        of_panel(axis)
        if title:
            axis.set_title(title)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=200, metadata={"Software": None})
        plt.close(figure)
        title = axis.get_title(loc="left") or "what the colours mean"
        pictures.append({"title": title, "png": base64.b64encode(buffer.getvalue()).decode()})
    return {"caption": caption, "pictures": pictures}


def _ruler(update: Update) -> dict[str, Any]:
    """Draw what noise of any size does to these weights, with the update and those that were published."""
    found, others = means(of_layers(update.table), []).iloc[0], published_sizes()

    def draw(axis: Axes, column: str) -> None:
        draw_ruler(axis, update.ruler, column, others)
        if f"{column}_ruler" in found:
            axis.plot(found["relative_norm"], found[f"{column}_ruler"], "o", ms=9, mfc="none", mec="0.3", zorder=3)
        axis.plot(found["relative_norm"], found[column], "o", ms=6, color=_BLUE, zorder=4)

    views = {"unchanged in bfloat16": "sparsity", "of what changes, among the smallest 30 %": "low_overlap_a30"}
    listed = "; ".join(f"{number} {name}" for number, name in others["update"].items())
    caption = (
        f"The ruler: how much of an update's sparsity and masks is its size. {' '.join(beside_noise(update.table))} "
        "Blue: the update; circle: noise of its own norm in each matrix; dashes: noise of one relative norm in all "
        f"matrices of this base. Grey: published updates, {listed}. Those of Qwen3-8B are from arXiv 2606.07082, which "
        "prints no sizes: a bar is the size that noise needs for the printed sparsity. The others are from 2606.13657, "
        "at second hand, which calls unchanged what moved by 1e-5 at most, and not what bfloat16 leaves as it was."
    )
    return _drawn(caption, {title: partial(draw, column=column) for title, column in views.items()})


def _by_layer(rows: pd.DataFrame, caption: str) -> dict[str, Any]:
    """Draw a line per module over the layers; where a layer has several such matrices, their mean and range."""
    modules = dict(zip(rows["module"].unique(), sns.color_palette("colorblind", rows["module"].nunique()), strict=True))

    def draw(axis: Axes, column: str) -> None:
        look = {"marker": "o", "markersize": 4, "markeredgewidth": 0, "linewidth": 1.2, "legend": False}
        band = {"errorbar": ("pi", 100), "err_kws": {"alpha": 0.15, "linewidth": 0}}
        sns.lineplot(rows, x="layer", y=column, hue="module", palette=modules, ax=axis, **look, **band)
        axis.set_ylabel("")
        axis.locator_params(axis="x", integer=True)

    def explain(axis: Axes) -> None:
        axis.set_axis_off()
        for module, colour in modules.items():
            axis.plot([], [], "o-", color=colour, ms=3, label=module)
        axis.legend(loc="upper left", ncols=1 + (len(modules) > 12))

    views = {"bf16 sparsity": "sparsity", "mean angle, degrees": "angle_left_mean", "relative norm": "relative_norm"}
    several = rows.duplicated(["layer", "module"]).any()
    lines = "the mean of a module's matrices in each layer, and their range" if several else "one line per module"
    drawn = {title: partial(draw, column=column) for title, column in views.items()}
    return _drawn(f"{caption}; {lines}.", drawn | {"": explain})


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


def _mask(axis: Axes, layers: pd.DataFrame, star: str) -> None:
    _by_module(axis, layers, f"{star}_overlap_a30")
    for i, (_, rows) in enumerate(layers.groupby("module", sort=False)):
        limits = feasible_range(0.3, float(rows["density"].mean()))
        axis.fill_between([i - 0.45, i + 0.45], *limits, color="0.92", zorder=0, linewidth=0)
    axis.axhline(0.3, **_DOTTED)


def _trajectory(trajectory: pd.DataFrame) -> _Panels:
    """Return a panel for the norm, and one per block for rank and similarity, as stored and in bfloat16."""
    k, seen = largest_k(trajectory), views(trajectory)
    titles = {"stable_rank": "stable rank"} | ({f"sim_right_K{k}": f"similarity to the end, K = {k}"} if k else {})
    looks = {"": {"color": _BLUE, "marker": "o", "ms": 4, "label": "as stored"}, "_null": NULL | {"color": _BLUE}}
    looks |= {"_bf16": {"color": _ORANGE, "marker": "s", "ms": 4, "label": "between bf16 checkpoints"}}
    looks |= {"_locked": NULL | {"color": _ORANGE, "label": "locked null"}}

    def draw(axis: Axes, column: str, rows: pd.DataFrame) -> None:
        over_steps = means(rows, ["step"]).set_index("step")
        for view in (*seen, "_null"):
            axis.plot(over_steps[f"{column}{view}"], **looks[view])
        axis.set_xlabel("step")
        if column == "stable_rank":
            set_log(axis.yaxis)
        axis.legend()

    drawn = {"Frobenius norm": partial(_column, layers=trajectory, column="frobenius")}
    for column, title in titles.items():
        for block, rows in trajectory.groupby("block"):
            drawn[f"{title}, {block}"] = partial(draw, column=column, rows=rows)
    return drawn


def _pairs(pairs: pd.DataFrame) -> _Panels:
    groups = [(f"{a}\n{b}", rows, largest_k(rows)) for (a, b), rows in pairs.groupby(["a", "b"], sort=False)]
    ks = sorted({k for *_, k in groups if k})

    def draw(axis: Axes, column: str, null: str) -> None:
        for i, (_, rows, k) in enumerate(groups):
            _dots(axis, i, rows[column.format(k=k)], rows[null.format(k=k)])
            if column == "jaccard_matched":
                axis.plot([i - 0.4, i + 0.4], [rows["jaccard_independent_matched"].mean()] * 2, **_DOTTED)
        # A dollar would begin a formula.
        labels = [(f"{label}\nK = {k}" if len(ks) > 1 else label).replace("$", r"\$") for label, _, k in groups]
        axis.set_xticks(range(len(labels)), labels, rotation=40 if len(labels) > 1 else 0, ha="center", fontsize=8)
        axis.set_xlim(-0.6, len(labels) - 0.4)

    similarity = f"similarity of updates, K = {' or '.join(map(str, ks))}"
    return {
        similarity: partial(draw, column="sim_right_K{k}", null="sim_right_random_K{k}"),
        "Jaccard of masks, at equal norm": partial(draw, column="jaccard_matched", null="jaccard_permuted_matched"),
    }
