"""The report of a measurement: one HTML file with the means, the figures and what they show, to be opened anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opdlab.figures.style import NULL, panels, use_style
from opdlab.geometry import feasible_range
from opdlab.geometry.summary import course_means, largest_k, of_layers, overall_means
from opdlab.models.files import write_whole

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
       background: #fff; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child { text-align: left; }
img { max-width: 100%; }
figcaption { color: #444; font-size: 14px; }
"""


def write_report(path: Path, table: pd.DataFrame, course: pd.DataFrame, title: str, notes: list[str]) -> None:
    """Write the report of a table of :func:`opdlab.measuring.update.measure_checkpoints`.

    Args:
        path: the HTML file.
        table: one row per tensor.
        course: one row per checkpoint and matrix; empty if there was one checkpoint only.
        title: what was measured.
        notes: sentences to keep in mind.
    """
    use_style()
    layers = of_layers(table)
    # Matrices that moved, which is what there is to draw.
    layers = layers[layers["stable_rank"].notna()] if "stable_rank" in layers else layers.head(0)
    figures = [
        (lambda: _by_layer(layers), "Sparsity, rotation and size of each matrix, by layer; one line per module."),
        (
            lambda: _ranks(layers),
            "Stable rank of each module's updates: one dot per matrix, the mean, and dashed the permuted null.",
        ),
        (
            lambda: _masks(layers),
            "Overlap of the visible update with the principal and the low-magnitude weights (share 0.3): one dot per "
            "matrix. Dashes: the permuted null. Shaded: what counting allows at that density. Dotted: the random rate.",
        ),
    ]
    if layers.empty:
        figures = []
    if len(course) and not of_layers(course)["stable_rank"].dropna().empty:
        figures.append(
            (
                lambda: _course(course),
                "The update at each checkpoint, means over the matrices of attention and of the MLP: stable rank, "
                "norm, and similarity of the leading right subspace to the last one. Dashes: the null, of permuted "
                "updates for the rank and of a random walk for the similarity.",
            )
        )
    parts = [_figure(draw, caption) for draw, caption in figures]
    text = f"""<p>{len(table)} tensors, {table["parameters"].sum():,} parameters. Means below are over the matrices of
attention and MLP and weigh each of them alike, but for sparsity, which weighs it by its parameters. A null is what the
same computation shows on an update without geometry; <i>z</i> is the difference from it in standard errors over the
matrices of this model, and says nothing about other seeds; the enrichment of an overlap is against the mask's share of
the entries; noise is the overlap of Gaussian noise at the same density; feasible is what counting allows.
{html.escape(" ".join(notes))}</p>
{_html(overall_means(table))}
{_html(course_means(course)) if len(course) and not of_layers(course).empty else ""}
{"".join(parts)}
<p>Every number for every tensor is in matrices.csv beside this file.</p>"""
    _write_page(path, title, text)


def write_comparison(path: Path, models: pd.DataFrame, pairs: pd.DataFrame, means: pd.DataFrame) -> None:
    """Write the report of :func:`opdlab.measuring.compare.compare_measurements`.

    Args:
        path: the HTML file.
        models: one row per diagnostic, one column per model and kind.
        pairs: one row per pair of models and matrix.
        means: one row per pair of models.
    """
    use_style()
    caption = (
        "Each pair of updates, one dot per matrix, with the mean: similarity of the leading right subspaces, and "
        "Jaccard index of the visible masks at equal norm. Dashes: unrelated updates (random subspaces; permuted "
        "updates, rounded). Dotted: masks that are independent given their densities."
    )
    text = f"""<p>Each model at its own size and, where nulls were measured, scaled to an equal relative norm.</p>
{_html(models)}
<p>Means over the matrices of attention and MLP, each alike. Two masks agree by their densities alone (independent) and
because rounding lets small weights show first (permuted); only what lies above both is agreement between the runs.</p>
{_html(means)}
{_figure(lambda: _pairs(pairs), caption)}
<p>Every matrix is in pairs.csv beside this file.</p>"""
    _write_page(path, f"{len(set(pairs['a']) | set(pairs['b']))} updates compared", text)


def _write_page(path: Path, title: str, text: str) -> None:
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{text}
</body></html>
"""
    write_whole(path, lambda temporary: temporary.write_text(page))


def _html(means: pd.DataFrame) -> str:
    return means.to_html(float_format=lambda value: f"{value:.4g}", na_rep="", border=0)


def _figure(draw: Callable[[], Figure], caption: str) -> str:
    figure, buffer, text = draw(), io.BytesIO(), html.escape(caption)
    figure.savefig(buffer, dpi=150, metadata={"Software": None})
    plt.close(figure)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"<figure><img alt='{text}' src='{source}'><figcaption>{text}</figcaption></figure>"


def _by_layer(layers: pd.DataFrame) -> Figure:
    modules = list(dict.fromkeys(layers["module"]))
    palette = dict(zip(modules, sns.color_palette("colorblind", len(modules)), strict=True))
    figure, axes = panels(4, columns=2, width=4.6, height=3)
    views = {"sparsity": "bf16 sparsity", "angle_left_mean": "mean angle, degrees", "relative_norm": "relative norm"}
    for axis, (column, title) in zip(axes, views.items(), strict=False):
        for module, rows in layers.groupby("module", sort=False):
            axis.plot(rows["layer"], rows[column], "o-", color=palette[module], ms=3, linewidth=1.2)
        axis.set(title=title, xlabel="layer")
        axis.locator_params(axis="x", integer=True)
    handles = [plt.Line2D([], [], color=colour, marker="o", ms=4, label=name) for name, colour in palette.items()]
    axes[3].set_axis_off()
    axes[3].legend(handles=handles, loc="center left")
    return figure


def _dots(axis: Axes, layers: pd.DataFrame, column: str) -> None:
    modules = list(dict.fromkeys(layers["module"]))
    for i, module in enumerate(modules):
        rows = layers[layers["module"] == module]
        spread = np.linspace(-0.25, 0.25, len(rows)) if len(rows) > 1 else [0.0]
        axis.plot(i + np.asarray(spread), rows[column], "o", ms=2.5, color="#0072B2", alpha=0.6)
        axis.plot([i - 0.35, i + 0.35], [rows[column].mean()] * 2, color="#0072B2", linewidth=2)
        if f"{column}_null" in rows:
            axis.plot([i - 0.4, i + 0.4], [rows[f"{column}_null"].mean()] * 2, **NULL)
    axis.set_xticks(range(len(modules)), modules, rotation=40, ha="right", fontsize=8)


def _ranks(layers: pd.DataFrame) -> Figure:
    figure, (axis,) = panels(1, width=9.2, height=3)
    _dots(axis, layers, "stable_rank")
    axis.set(title="stable rank", yscale="log")
    return figure


def _masks(layers: pd.DataFrame) -> Figure:
    figure, axes = panels(2, columns=2, width=4.6, height=3)
    for axis, star in zip(axes, ("principal", "low"), strict=True):
        _dots(axis, layers, f"{star}_overlap_a30")
        for i, (_, rows) in enumerate(layers.groupby("module", sort=False)):
            limits = feasible_range(0.3, float(rows["density"].mean()))
            axis.fill_between([i - 0.45, i + 0.45], *limits, color="0.92", zorder=0, linewidth=0)
        axis.axhline(0.3, color="0.6", linestyle=":", linewidth=1)
        axis.set_title("principal weights" if star == "principal" else "low-magnitude weights")
    return figure


def _course(course: pd.DataFrame) -> Figure:
    k = largest_k(course)
    views = {"stable_rank": "stable rank", "frobenius": "Frobenius norm"}
    if k:
        views[f"sim_right_K{k}"] = f"similarity to the end, K = {k}"
    figure, axes = panels(4, columns=2, width=4.6, height=3)
    for axis, (column, title) in zip(axes, views.items(), strict=False):
        for block, colour in (("attention", "#0072B2"), ("mlp", "#D55E00")):
            means = course[course["block"] == block].groupby("step")
            axis.plot(means[column].mean(), "o-", color=colour, ms=4, label=block)
            if f"{column}_null" in course:
                axis.plot(means[f"{column}_null"].mean(), **NULL | {"color": colour})
        axis.set(title=title, xlabel="step")
    axes[0].set_yscale("log")
    for spare in axes[len(views) :]:
        spare.set_axis_off()
    axes[3].legend(*axes[0].get_legend_handles_labels(), loc="center left")
    return figure


def _pairs(pairs: pd.DataFrame) -> Figure:
    k = largest_k(pairs)
    views = {
        f"sim_right_K{k}": (f"similarity of updates, K = {k}", f"sim_right_random_K{k}"),
        "jaccard_matched": ("Jaccard index of visible masks, at equal norm", "jaccard_permuted_matched"),
    }
    names = pairs[["a", "b"]].drop_duplicates()
    figure, axes = panels(2, columns=2, width=4.6, height=3 + 0.1 * len(names))
    for axis, (column, (title, null)) in zip(axes, views.items(), strict=True):
        for i, (a, b) in enumerate(names.itertuples(index=False)):
            rows = pairs[(pairs["a"] == a) & (pairs["b"] == b)]
            spread = np.linspace(-0.25, 0.25, len(rows)) if len(rows) > 1 else [0.0]
            axis.plot(i + np.asarray(spread), rows[column], "o", ms=2.5, color="#0072B2", alpha=0.6)
            axis.plot([i - 0.35, i + 0.35], [rows[column].mean()] * 2, color="#0072B2", linewidth=2)
            axis.plot([i - 0.4, i + 0.4], [rows[null].mean()] * 2, **NULL)
            if column == "jaccard_matched":
                independent = [rows["jaccard_independent_matched"].mean()] * 2
                axis.plot([i - 0.4, i + 0.4], independent, color="0.6", linestyle=":", linewidth=1)
        # A dollar would begin a formula.
        labels = [f"{a}\n{b}".replace("$", r"\$") for a, b in names.itertuples(index=False)]
        axis.set_xticks(range(len(names)), labels, rotation=40 if len(names) > 1 else 0, ha="center", fontsize=8)
        axis.set(title=title, xlim=(-0.6, len(names) - 0.4))
    return figure
