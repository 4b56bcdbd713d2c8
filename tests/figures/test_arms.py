"""Figures of arms, whichever they are: what is drawn, where it stands, and how it looks."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from opdlab.figures import style
from opdlab.figures.arms import ArmFigures, Look

FIGURES = ArmFigures(
    {"sft": Look("SFT", "blue", "s"), "opd": Look("OPD", "red", "o"), "rlvr": Look("RLVR", "green", "^")}
)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def table():
    rows = [
        {"arm": arm, "seed": seed, "step": step, "value": i + 0.1 * seed + step, "null": -step}
        for i, arm in enumerate(("sft", "opd"))
        for seed in (0, 1, 2)
        for step in (1, 2, 3)
    ]
    return pd.DataFrame(rows)


def test_curves_draw_seeds_means_and_nulls(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_curves(axis, table, "step", "value", null="null")
    # Per arm: three seeds, their mean, the null.
    assert len(axis.lines) == 10 and len(axis.collections) == 2
    mean = axis.lines[3]
    np.testing.assert_allclose(mean.get_ydata(), [1.1, 2.1, 3.1])
    np.testing.assert_allclose(axis.lines[4].get_ydata(), [-1, -2, -3])
    assert [text.get_text() for text in axis.texts] == ["SFT", "OPD"]


def test_what_is_undefined_has_no_curve(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_curves(axis, table.assign(value=table["value"].where(table["arm"] == "sft")), "step", "value")
    assert [text.get_text() for text in axis.texts] == ["SFT"]
    FIGURES.draw_curves(axis, table.assign(value=np.nan), "step", "value")


def test_labels_never_overlap(table):
    _, (axis,) = style.panels(1)
    axis.set_ylim(0, 1)
    FIGURES.label_ends(axis, [(0.5, "sft"), (0.5, "opd"), (0.51, "rlvr")])
    heights = [text.xy[1] for text in axis.texts]
    assert min(np.diff(heights)) >= 0.074


@pytest.mark.parametrize("log", [False, True])
def test_labels_stay_beside_their_curves_when_the_panel_changes(table, log):
    _, (axis,) = style.panels(1)
    FIGURES.draw_curves(axis, table, "step", "value", log=log)
    axis.set_ylim(0.5, 10)
    for text, value in zip(axis.texts, (3.1, 4.1), strict=True):
        middle = axis.transAxes.transform(text.xy)[1]
        assert middle == pytest.approx(axis.transData.transform((1, value))[1])


def test_a_logarithmic_panel_shows_what_can_be_shown(table):
    _, (axis,) = style.panels(1)
    # An arm that has not moved has no place on it, and does no harm.
    FIGURES.draw_curves(
        axis, table.assign(value=table["value"].where(table["arm"] == "sft", 0)), "step", "value", log=True
    )
    assert axis.get_ylim()[0] > 0 and all(0 <= text.xy[1] <= 1 for text in axis.texts)


def test_only_the_bands_that_are_asked_for_are_drawn(table):
    _, axes = style.panels(3)
    for axis, bands in zip(axes, (None, ("sft",), ()), strict=True):
        FIGURES.draw_curves(axis, table, "step", "value", bands=bands)
    assert [len(axis.collections) for axis in axes] == [2, 1, 0]


def test_labels_stay_in_the_panel():
    _, (axis,) = style.panels(1)
    FIGURES.label_ends(axis, [(0.98, "sft"), (0.99, "opd"), (1.0, "rlvr")])
    assert [text.xy[1] for text in axis.texts] == pytest.approx([0.85, 0.925, 1.0])


def test_dots_draw_each_seed(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_dots(axis, table[table["step"] == 3], "value", null="null")
    dots = [line for line in axis.lines if line.get_marker() in ("s", "o")]
    assert [len(line.get_ydata()) for line in dots] == [3, 3]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["SFT", "OPD"]


def test_points_hold_every_row(table):
    _, (left, right) = style.panels(2)
    FIGURES.draw_points(left, table, "step", "value")
    assert sum(len(points.get_offsets()) for points in left.collections) == len(table)
    FIGURES.arm_legend(right, ["sft", "opd"], null="random walk")
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["SFT", "OPD", "random walk"]


def test_panels_has_no_empty_panel():
    figure, axes = style.panels(4)
    assert len(axes) == len(figure.axes) == 4


def test_rows_draw_seeds_mean_and_interval():
    effects = pd.DataFrame({"opd": [0.1, 0.2, 0.3], "rlvr": [1.0, 1.0, np.nan]})
    _, (axis,) = style.panels(1)
    FIGURES.draw_rows(axis, effects)
    seeds, interval, mean = axis.lines[:3]
    assert seeds.get_xdata().tolist() == [0.1, 0.2, 0.3] and mean.get_xdata() == pytest.approx([0.2])
    assert interval.get_xdata() == pytest.approx([-0.048, 0.448], abs=1e-3)
    assert len(axis.lines[3].get_xdata()) == 2  # a seed that is missing is not drawn
    assert [label.get_text() for label in axis.get_yticklabels()] == ["OPD", "RLVR"]
    # The first arm is on top.
    assert axis.get_ylim() == (1.5, -0.5)
    # A single seed has no interval, and does no harm.
    FIGURES.draw_rows(axis, effects.iloc[:1], names=False)


def test_an_arm_has_one_colour_in_all_of_a_figure(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_curves(axis, table, "step", "value")
    assert [text.get_color() for text in axis.texts] == ["blue", "red"] and axis.lines[-1].get_color() == "red"
    FIGURES.arm_legend(axis, ("opd", "sft"))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["OPD", "SFT"]
    assert (FIGURES.colour_of("opd"), FIGURES.marker_of("opd")) == ("red", "o")
