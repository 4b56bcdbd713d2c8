import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from opdlab.figures import plots
from opdlab.lab.grid import PAPER


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


def test_every_recorded_arm_has_a_colour_and_a_marker_of_its_own():
    assert set(plots.COLOURS) == set(plots.MARKERS) == set(PAPER)
    assert len(set(plots.COLOURS.values())) == len(set(plots.MARKERS.values())) == len(PAPER)


def test_curves_draw_seeds_means_and_nulls(table):
    _, (axis,) = plots.panels(1)
    plots.draw_curves(axis, table, "step", "value", null="null")
    # Per arm: three seeds, their mean, the null.
    assert len(axis.lines) == 10 and len(axis.collections) == 2
    mean = axis.lines[3]
    np.testing.assert_allclose(mean.get_ydata(), [1.1, 2.1, 3.1])
    np.testing.assert_allclose(axis.lines[4].get_ydata(), [-1, -2, -3])
    assert [text.get_text() for text in axis.texts] == ["SFT", "OPD"]


def test_what_is_undefined_has_no_curve(table):
    _, (axis,) = plots.panels(1)
    plots.draw_curves(axis, table.assign(value=table["value"].where(table["arm"] == "sft")), "step", "value")
    assert [text.get_text() for text in axis.texts] == ["SFT"]
    plots.draw_curves(axis, table.assign(value=np.nan), "step", "value")


def test_labels_never_overlap(table):
    _, (axis,) = plots.panels(1)
    axis.set_ylim(0, 1)
    plots.label_ends(axis, [(0.5, "sft"), (0.5, "opd"), (0.51, "rlvr")])
    heights = [text.xy[1] for text in axis.texts]
    assert min(np.diff(heights)) >= 0.074


@pytest.mark.parametrize("log", [False, True])
def test_labels_stay_beside_their_curves_when_the_panel_changes(table, log):
    _, (axis,) = plots.panels(1)
    plots.draw_curves(axis, table, "step", "value", log=log)
    axis.set_ylim(0.5, 10)
    for text, value in zip(axis.texts, (3.1, 4.1), strict=True):
        middle = axis.transAxes.transform(text.xy)[1]
        assert middle == pytest.approx(axis.transData.transform((1, value))[1])


def test_a_logarithmic_panel_has_room_for_the_null(table):
    _, (axis,) = plots.panels(1)
    plots.draw_curves(axis, table.assign(null=100.0), "step", "value", null="null", log=True)
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "log" and 0 < low < 1 and high > 100
    # An arm that has not moved has no place on it, and does no harm.
    plots.draw_curves(
        axis, table.assign(value=table["value"].where(table["arm"] == "sft", 0)), "step", "value", log=True
    )
    assert axis.get_ylim()[0] > 0 and all(0 <= text.xy[1] <= 1 for text in axis.texts)
    plots.note_null(axis, 123.4)
    assert axis.texts[-1].get_text() == "permuted: 123 ↑"


def test_modules_have_one_panel_each_in_the_order_of_the_computation(table):
    matrices = pd.concat(
        table.rename(columns={"step": "layer"}).assign(module=module) for module in ("up_proj", "extra", "q_proj")
    )
    figure = plots.draw_modules(matrices, [("value", "a value", None, True), ("value", "again", "null", False)])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["q", "up", "extra", "", "", ""]
    assert len({axis.get_ylim() for axis in figure.axes[:3]}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SFT", "OPD", "permuted null"]


def test_scales_have_a_null_where_there_is_one(table):
    last = table[table["step"] == 3].assign(scale="tiny")
    both = pd.concat([last.assign(title="with"), last.assign(title="without", null=np.nan)])
    figure = plots.draw_scales(both, null="null")
    dashes = [[line for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert [sum(bool(np.isfinite(line.get_ydata()).all()) for line in lines) for lines in dashes] == [2, 0]


def test_only_the_bands_that_are_asked_for_are_drawn(table):
    _, axes = plots.panels(3)
    for axis, bands in zip(axes, (None, ("sft",), ()), strict=True):
        plots.draw_curves(axis, table, "step", "value", bands=bands)
    assert [len(axis.collections) for axis in axes] == [2, 1, 0]


def test_labels_stay_in_the_panel():
    _, (axis,) = plots.panels(1)
    plots.label_ends(axis, [(0.98, "sft"), (0.99, "opd"), (1.0, "rlvr")])
    assert [text.xy[1] for text in axis.texts] == pytest.approx([0.85, 0.925, 1.0])


def test_smoothed_curves_fill_the_panel(table):
    _, (axis,) = plots.panels(1)
    noisy = table.assign(value=table["value"] * (-1) ** table["step"])
    plots.draw_curves(axis, noisy, "step", "value", smooth=2)
    low, high = axis.get_ylim()
    drawn = np.concatenate([line.get_ydata() for line in axis.lines])
    assert low < drawn.min() < low + 0.1 * (high - low) and high > drawn.max() > high - 0.1 * (high - low)


def test_dots_draw_each_seed(table):
    _, (axis,) = plots.panels(1)
    plots.draw_dots(axis, table[table["step"] == 3], "value", null="null")
    dots = [line for line in axis.lines if line.get_marker() in plots.MARKERS.values()]
    assert [len(line.get_ydata()) for line in dots] == [3, 3]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["SFT", "OPD"]


def test_points_and_paths_hold_every_row(table):
    _, (left, right) = plots.panels(2)
    plots.draw_points(left, table, "step", "value")
    plots.draw_paths(right, table, "step", "value")
    assert sum(len(points.get_offsets()) for points in left.collections) == len(table)
    assert len(right.lines) == 6
    plots.arm_legend(right, ["sft", "opd"], null="random walk")
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["SFT", "OPD", "random walk"]


def test_panels_has_no_empty_panel():
    figure, axes = plots.panels(4)
    assert len(axes) == len(figure.axes) == 4


def test_rows_draw_seeds_mean_and_interval():
    effects = pd.DataFrame({"opd_top25": [0.1, 0.2, 0.3], "rlvr_short": [1.0, 1.0, np.nan]})
    _, (axis,) = plots.panels(1)
    plots.draw_rows(axis, effects, counts=0.25)
    seeds, interval, mean = axis.lines[:3]
    assert seeds.get_xdata().tolist() == [0.1, 0.2, 0.3] and mean.get_xdata() == pytest.approx([0.2])
    assert interval.get_xdata() == pytest.approx([-0.048, 0.448], abs=1e-3)
    assert len(axis.lines[3].get_xdata()) == 2  # a seed that is missing is not drawn
    assert [label.get_text() for label in axis.get_yticklabels()] == ["top 25 %", "RLVR"]
    # The first arm is on top.
    assert axis.get_ylim() == (1.5, -0.5)
    # A single seed has no interval, and does no harm.
    plots.draw_rows(axis, effects.iloc[:1], names=False)


def test_a_variant_looks_like_the_arm_that_it_descends_from(table):
    assert plots.colour_of("opd_top25_update4") == plots.COLOURS["opd"]
    assert plots.marker_of("rlvr_short") == plots.MARKERS["rlvr"]
    colours = plots.shades(("opd_top50", "opd_top25"), opd_short="opd")
    assert colours["opd_short"] == plots.COLOURS["opd"] and len(set(colours.values())) == 3
    _, (axis,) = plots.panels(1)
    plots.draw_curves(axis, table.replace({"arm": {"opd": "opd_top50"}}), "step", "value", colours=colours)
    assert [text.get_text() for text in axis.texts] == ["SFT", "top 50 %"]
    assert axis.lines[-1].get_color() == colours["opd_top50"]
    plots.arm_legend(axis, ("opd_top50", "sft"), colours=colours)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["top 50 %", "SFT"]
