"""Draw a figure a second time for a narrow screen: its panels below each other, its letters as large as the text's.

scripts/execute_book.py loads this into the kernel of a chapter as an extension of IPython. The first picture is what it
would be without; the second goes beside it into the metadata of the output, where only the site looks for it
(book/_ext/picture_by_width.py). A figure that cannot be drawn again with every word in its place keeps its one picture.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from functools import wraps
from itertools import combinations, pairwise
from math import inf
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
from IPython.core import pylabtools
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator
from matplotlib.transforms import Bbox

# Of a figure on a phone, in inches of 100 px: the first is taken in which no words lie on one another.
WIDTHS = (3.7, 4.0, 4.3)
PHONE = 368  # px that a phone has for a figure
# A figure of one panel stays as it is if its letters are this large on a phone, in px.
LETTERS = 9
STRIP = 4  # so many times as wide as high, it is a strip, and stays as it is too
GAP = 0.12  # between panels, in inches


def panels_of(figure: Figure) -> list[list[Axes]]:
    """Return the panels of a figure from left to right, each with its twins; none if they are not one plain row."""
    panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    places = [axis.get_subplotspec() for axis in panels]
    beside = [figure.subfigs, figure.lines, figure.patches, figure.images, figure.texts]
    layout = figure.get_layout_engine()
    # The layout that places colour bars by itself is the one that makes room for everything.
    if not places or None in places or any(beside) or layout is None or layout.colorbar_gridspec:
        return []
    grids = {place.get_gridspec() for place in places}
    if len(grids) > 1 or type(places[0].get_gridspec()) is not GridSpec:
        return []
    if places[0].get_gridspec().nrows > 1 or any(len(place.colspan) > 1 for place in places):
        return []
    columns: dict[int, list[Axes]] = {}
    for axis, place in zip(panels, places, strict=True):
        columns.setdefault(place.colspan.start, []).append(axis)
    return [columns[start] for start in sorted(columns)]


def words_of(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Return the words that a drawn figure shows, and where they are."""
    hidden: set[Any] = set()
    for axis in figure.findobj(Axes):
        if not axis.axison:
            hidden |= {*axis.xaxis.findobj(Text), *axis.yaxis.findobj(Text)}
        # Ticks beyond the limits have labels too, which are not drawn.
        box = axis.get_window_extent().padded(1)
        for labels, low, high in (
            (axis.get_xticklabels(which="both"), (box.x0, -inf), (box.x1, inf)),
            (axis.get_yticklabels(which="both"), (-inf, box.y0), (inf, box.y1)),
        ):
            for label in labels:
                x0, y0, x1, y1 = label.get_window_extent().extents
                if not (low[0] <= (x0 + x1) / 2 <= high[0] and low[1] <= (y0 + y1) / 2 <= high[1]):
                    hidden.add(label)
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text, text.get_window_extent()) for text in shown if text not in hidden]


def collisions(figure: Figure) -> int:
    """Return how many pairs of words lie on one another in a drawn figure, and how many points lie under legends."""
    # The box of a word that leans is larger than the word.
    upright = [place for text, place in words_of(figure) if text.get_rotation() % 90 == 0]
    words = sum(bool(one.overlaps(other)) for one, other in combinations(upright, 2))
    return words + sum(map(covered, figure.axes))


def covered(axis: Axes) -> int:
    """Return how many points of a drawn panel lie under its legend."""
    legend = axis.get_legend()
    if not legend:
        return 0
    places = [line.get_transform().transform(line.get_xydata()) for line in axis.lines]
    places += [points.get_offset_transform().transform(points.get_offsets()) for points in axis.collections]
    box = legend.get_window_extent()
    return sum(bool(box.contains(*point)) for points in places for point in points)


def letters(figure: Figure) -> float:
    """Return the height in px of the smallest letters of a drawn figure, as a phone shows it."""
    smallest = min((text.get_size() for text, _ in words_of(figure)), default=inf)
    return smallest / 72 * figure.dpi * min(1, PHONE / figure.bbox.width)


def name_alike(axis: Axes, left: Axes) -> None:
    """Give a panel what it left to the one on its left: the names of its rows, or its numbers and what they are."""
    if not axis.axison or (axis.get_ylim(), axis.get_yscale()) != (left.get_ylim(), left.get_yscale()):
        return
    names = [label.get_text() for label in left.get_yticklabels()]
    own = any(label.get_text() and label.get_visible() for label in axis.get_yticklabels())
    if any(names) and not own:
        axis.yaxis.set_major_locator(FixedLocator(left.get_yticks()))
        axis.yaxis.set_major_formatter(FixedFormatter(names))
        axis.tick_params(axis="y", labelleft=True)
    if not axis.get_ylabel():
        axis.set_ylabel(left.get_ylabel())


def refit(figure: Figure) -> None:
    """Let the words of a drawn figure keep to its width: titles break, names lean, legends go above the panels."""
    for axis in figure.axes:
        box, end = axis.get_window_extent(), figure.bbox.width
        said = {axis.get_title(loc=loc) for loc in ("left", "center", "right")} - {""}
        for title in axis.get_children():
            if not isinstance(title, Text) or title.get_text() not in said:
                continue
            taken = title.get_window_extent()
            over = any(taken.overlaps(text.get_window_extent()) for text in axis.texts if text.get_visible())
            break_lines(title, (box.x1 if over else end) - box.x0)
        break_lines(axis.xaxis.label, min(box.x0 + box.x1, 2 * end - box.x0 - box.x1))
        if (legend := axis.get_legend()) and covered(axis):
            if len(figure.axes) > 1:
                legend.set_loc("best")
            else:
                legend.remove()
                put_above(figure, legend)
                figure.set_figheight(figure.get_figheight() + figure.legends[0].get_window_extent().height / figure.dpi)
        names = [name for name in axis.get_xticklabels() if name.get_text()]
        places = [name.get_window_extent() for name in names]
        lean = any(name.get_rotation() for name in names)
        if not lean and any(one.overlaps(other) for one, other in pairwise(places)):
            if isinstance(axis.xaxis.get_major_locator(), LogLocator):
                axis.locator_params(axis="x", subs=(1,))
            else:
                lines = [name.get_text().replace("\n", " ") for name in axis.get_xticklabels()]
                axis.set_xticks(axis.get_xticks(), lines, rotation=40, ha="right", rotation_mode="anchor")
    for legend in list(figure.legends):
        figure.legends.remove(legend)  # what legend.remove does, but for the legend of a copy
        put_above(figure, legend)


def break_lines(text: Text, room: float) -> None:
    """Break a line of words so that it is no longer than the room for it, in px."""
    taken = text.get_window_extent().width
    if text.get_text() and taken > room:
        line = " ".join(text.get_text().split())
        text.set_text(fill(line, max(1, int(len(line) * room / taken)), break_long_words=False))


def put_above(figure: Figure, legend: Legend) -> None:
    """Put a legend of the whole figure above the panels, in as many columns as there is room for."""
    handles, names = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
    for columns in (3, 2, 1):
        legend = figure.legend(handles, names, loc="outside upper left", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width:
            return
        if columns > 1:
            legend.remove()


def stack(figure: Figure, width: float) -> Figure:
    """Return a copy of a figure, drawn in a width in inches, with its panels below each other."""
    copied = copy.deepcopy(figure)
    plt.close(copied)
    panels = panels_of(copied)
    for (left, *_), (axis, *_) in pairwise(panels):
        name_alike(axis, left)
    bars = len(copied.axes) > sum(map(len, panels))
    for place, twins in zip(GridSpec(len(panels), 1, figure=copied), panels, strict=True):
        # In a grid of its own a panel is not made narrow by the labels of another; but colour bars get lost there.
        cell = place if bars else place.subgridspec(1, 1)[0]
        for axis in twins:
            axis.set_subplotspec(cell)
    copied.get_layout_engine().set(h_pad=GAP / 2)
    copied.set_size_inches(width, figure.get_figheight() * len(panels))
    # What is broken or turned takes more room, and leaves less for the others.
    for _ in range(2):
        copied.draw_without_rendering()
        refit(copied)
    copied.draw_without_rendering()
    return copied


def for_phone(figure: Figure) -> Figure | None:
    """Return a figure that has been drawn as a phone should show it, or None if it stays as it is."""
    panels = panels_of(figure)
    wide, high = figure.get_size_inches()
    if not panels or (len(panels) == 1 and (letters(figure) >= LETTERS or wide > STRIP * high)):
        return None
    before = collisions(figure)
    for width in WIDTHS:
        # Matplotlib warns where it finds no room for the panels.
        with warnings.catch_warnings(), suppress(UserWarning):
            warnings.simplefilter("error", UserWarning)
            if collisions(made := stack(figure, width)) <= before:
                return made
    return None


def load_ipython_extension(_shell: InteractiveShell) -> None:
    """Let IPython put a second picture beside each that it makes of a figure at twice the resolution."""
    draw = pylabtools.retina_figure

    @wraps(draw)
    def draw_twice(figure: Figure, **options: Any) -> Any:
        first = draw(figure, **options)
        if first and (second := for_phone(figure)):
            data, size = draw(second, **options)
            first[1]["stacked"] = {"data": data, **size, "panels": len(panels_of(figure))}
        return first

    pylabtools.retina_figure = draw_twice
