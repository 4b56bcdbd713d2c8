"""The figure of the ruler: the curve dashed, points and bars of others, and their numbers."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from opdlab.figures.ruler import draw_ruler
from opdlab.figures.style import panels


def test_curve_points_and_bars():
    curve = pd.DataFrame({"relative_norm": [1e-4, 1e-2, 1.0], "sparsity": [0.9, 0.4, 0.01]})
    published = pd.DataFrame(
        {
            "relative_norm": [np.nan, 1e-3, 1e-2, 0.02],
            "low": [0.1, np.nan, np.nan, np.nan],
            "high": [0.2, np.nan, np.nan, np.nan],
            "sparsity": [0.1, 0.7, 0.3, np.nan],
        },
        index=[1, 2, 3, 4],
    )
    _, (axis,) = panels(1)
    draw_ruler(axis, curve, "sparsity", published)
    dashed, dots = axis.lines
    assert dashed.get_linestyle() == "--" and dashed.get_ydata().tolist() == [0.9, 0.4, 0.01]
    assert dots.get_xdata()[1:].tolist() == [1e-3, 1e-2] and axis.get_xscale() == "log"
    (bars,) = axis.collections
    assert bars.get_segments()[0].tolist() == [[0.1, 0.1], [0.2, 0.1]]
    numbers = {text.get_text(): text.xy for text in axis.texts}
    assert numbers == {"1": (0.2, 0.1), "2": (1e-3, 0.7), "3": (1e-2, 0.3)}, "what has no such value is not there"
    axis.figure.canvas.draw()
    assert {"1 %", "10 %"} <= {label.get_text() for label in axis.get_xticklabels()}
    plt.close("all")
