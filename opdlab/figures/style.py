"""The look that all figures share: fonts, panels, logarithmic axes, and how a null is drawn."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

#: How the line of a null is drawn.
NULL: dict[str, Any] = {"color": "0.45", "linestyle": "--", "linewidth": 1.2}
#: Where a legend goes that serves all panels of a figure.
ABOVE: dict[str, Any] = {"loc": "outside upper left", "ncols": 3}


def use_style() -> None:
    """Set the look of all figures and, in a notebook, their format: PNG at twice the resolution, without metadata."""
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
    with suppress(ImportError):  # outside of notebooks there need be no IPython
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Without the Software field, every version of Matplotlib writes the same bytes for the same figure.
        set_matplotlib_formats("retina", metadata={"Software": None}, bbox_inches="tight")


def panels(count: int, columns: int = 3, width: float = 3.3, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels in rows of at most ``columns``; width and height of a panel in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def set_log(axis: XAxis | YAxis) -> None:
    """Make one axis of a panel logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())
