"""Figures of arms, whichever they are: what is drawn, where it stands, and how it looks."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from opdlab.errors import OpdlabError
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


def test_a_logarithmic_panel_has_room_for_the_null(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_curves(axis, table.assign(null=100.0), "step", "value", null="null", log=True)
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "log" and 0 < low < 1 and high > 100
    # An arm that has not moved has no place on it, and does no harm.
    FIGURES.draw_curves(
        axis, table.assign(value=table["value"].where(table["arm"] == "sft", 0)), "step", "value", log=True
    )
    assert axis.get_ylim()[0] > 0 and all(0 <= text.xy[1] <= 1 for text in axis.texts)
    style.note_null(axis, 123.4)
    assert axis.texts[-1].get_text() == "permuted: 123 ↑"


def test_modules_have_one_panel_each_in_the_order_of_the_computation(table):
    matrices = pd.concat(
        table.rename(columns={"step": "layer"}).assign(module=module) for module in ("up_proj", "extra", "q_proj")
    )
    figure = FIGURES.draw_modules(matrices, [("value", "a value", None, True), ("value", "again", "null", False)])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["q", "up", "extra", "", "", ""]
    assert len({axis.get_ylim() for axis in figure.axes[:3]}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SFT", "OPD", "permuted null"]


def test_scales_have_a_null_where_there_is_one(table):
    last = table[table["step"] == 3].assign(scale="tiny")
    both = pd.concat([last.assign(title="with"), last.assign(title="without", null=np.nan)])
    figure = FIGURES.draw_scales(both, null="null")
    dashes = [[line for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert [sum(bool(np.isfinite(line.get_ydata()).all()) for line in lines) for lines in dashes] == [2, 0]


def test_only_the_bands_that_are_asked_for_are_drawn(table):
    _, axes = style.panels(3)
    for axis, bands in zip(axes, (None, ("sft",), ()), strict=True):
        FIGURES.draw_curves(axis, table, "step", "value", bands=bands)
    assert [len(axis.collections) for axis in axes] == [2, 1, 0]


def test_labels_stay_in_the_panel():
    _, (axis,) = style.panels(1)
    FIGURES.label_ends(axis, [(0.98, "sft"), (0.99, "opd"), (1.0, "rlvr")])
    assert [text.xy[1] for text in axis.texts] == pytest.approx([0.85, 0.925, 1.0])


def test_smoothed_curves_fill_the_panel(table):
    _, (axis,) = style.panels(1)
    noisy = table.assign(value=table["value"] * (-1) ** table["step"])
    FIGURES.draw_curves(axis, noisy, "step", "value", smooth=2)
    low, high = axis.get_ylim()
    drawn = np.concatenate([line.get_ydata() for line in axis.lines])
    assert low < drawn.min() < low + 0.1 * (high - low) and high > drawn.max() > high - 0.1 * (high - low)


def test_dots_draw_each_seed(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_dots(axis, table[table["step"] == 3], "value", null="null")
    dots = [line for line in axis.lines if line.get_marker() in ("s", "o")]
    assert [len(line.get_ydata()) for line in dots] == [3, 3]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["SFT", "OPD"]


def test_points_and_paths_hold_every_row(table):
    _, (left, right) = style.panels(2)
    FIGURES.draw_points(left, table, "step", "value")
    FIGURES.draw_paths(right, table, "step", "value")
    assert sum(len(points.get_offsets()) for points in left.collections) == len(table)
    assert len(right.lines) == 6
    FIGURES.arm_legend(right, ["sft", "opd"], null="random walk")
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["SFT", "OPD", "random walk"]


def test_panels_has_no_empty_panel():
    figure, axes = style.panels(4)
    assert len(axes) == len(figure.axes) == 4


def test_rows_draw_seeds_mean_and_interval():
    effects = pd.DataFrame({"opd": [0.1, 0.2, 0.3], "rlvr": [1.0, 1.0, np.nan]})
    _, (axis,) = style.panels(1)
    FIGURES.draw_rows(axis, effects, counts=0.25)
    seeds, interval, mean = axis.lines[:3]
    assert seeds.get_xdata().tolist() == [0.1, 0.2, 0.3] and mean.get_xdata() == pytest.approx([0.2])
    assert interval.get_xdata() == pytest.approx([-0.048, 0.448], abs=1e-3)
    assert len(axis.lines[3].get_xdata()) == 2  # a seed that is missing is not drawn
    assert [label.get_text() for label in axis.get_yticklabels()] == ["OPD", "RLVR"]
    # The first arm is on top.
    assert axis.get_ylim() == (1.5, -0.5)
    # A single seed has no interval, and does no harm.
    FIGURES.draw_rows(axis, effects.iloc[:1], names=False)


def test_a_figure_may_give_an_arm_another_colour(table):
    _, (axis,) = style.panels(1)
    FIGURES.draw_curves(axis, table, "step", "value", colours={"opd": "black"})
    assert [text.get_color() for text in axis.texts] == ["blue", "black"] and axis.lines[-1].get_color() == "black"
    FIGURES.arm_legend(axis, ("opd", "sft"), colours={"opd": "black"})
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["OPD", "SFT"]
    assert (FIGURES.colour_of("opd"), FIGURES.marker_of("opd")) == ("red", "o")


def test_an_arm_without_a_look_is_named(table):
    _, (axis,) = style.panels(1)
    with pytest.raises(OpdlabError, match="no entry for the arm 'dpo': add its label, colour and marker"):
        FIGURES.draw_dots(axis, table.replace({"arm": {"opd": "dpo"}}), "value")
