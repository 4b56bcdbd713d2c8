"""scripts/stacked_figures.py: which figures are drawn a second time for a narrow screen, and how."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from opdlab.figures.style import ABOVE, panels, set_log, use_style

SCRIPT = "scripts/stacked_figures.py"


@pytest.fixture(autouse=True)
def look():
    """A figure as a chapter draws it, and none left behind."""
    with plt.rc_context():
        use_style()
        yield
        assert [figure for figure in map(plt.figure, plt.get_fignums()) if not figure.axes] == []
        plt.close("all")


def drawn(figure):
    """The figure, as it is when IPython has made its picture."""
    figure.draw_without_rendering()
    return figure


def corners(figure):
    """Left, bottom, right and top of each panel, as shares of the figure."""
    return np.array([axis.get_position().extents for axis in figure.axes])


def test_panels_beside_each_other_are_put_below_each_other_with_letters_that_can_be_read(script):
    figure, axes = panels(3, width=3.5, height=3)
    for axis in axes:
        axis.plot([1, 2, 3])
        axis.set(title="A message of about forty characters here", xlabel="step")
    assert script.letters(drawn(figure)) < script.LETTERS
    made, numbers = script.for_phone(figure), plt.get_fignums()
    left, bottom, right, top = corners(made).T
    assert made.get_size_inches() == pytest.approx((script.WIDTHS[0], 9))
    assert (bottom[:-1] > top[1:]).all() and left.max() < 0.25 and right.min() > 0.9
    assert script.letters(made) >= 12
    assert numbers == [figure.number]


def test_the_figure_itself_stays_as_it_is(script):
    figure, (left, right) = panels(2, width=4)
    left.plot([0, 1])
    right.plot([0, 1])
    left.set_ylabel("share")
    before = corners(drawn(figure))
    script.for_phone(figure)
    assert right.get_ylabel() == "" and (corners(figure) == before).all()
    assert figure.get_size_inches() == pytest.approx((8, 2.9))


def test_a_panel_gets_the_names_that_it_left_to_the_one_on_its_left(script):
    figure, (left, right) = panels(2, width=4)
    left.plot([1, 2], ["one arm", "another arm"], "o")
    right.plot([3, 4], ["one arm", "another arm"], "o")
    right.set_yticklabels([])
    made = script.for_phone(drawn(figure))
    assert [label.get_text() for label in made.axes[1].get_yticklabels()] == ["one arm", "another arm"]


def test_an_axis_is_named_by_the_panel_on_the_left_only_where_it_is_the_same(script):
    figure, (first, same, other) = panels(3)
    for axis in (first, same, other):
        axis.set_ylim(0, 1)
    other.set_ylim(0, 2)
    first.set_ylabel("share")
    made = script.for_phone(drawn(figure))
    assert [axis.get_ylabel() for axis in made.axes] == ["share", "share", ""]


def test_titles_break_names_lean_and_powers_of_ten_are_enough(script):
    figure, (long, named, powers) = panels(3, width=5)
    long.set_title("This title has far more words than there is room for on the screen of a phone")
    named.set_xticks(range(7), [f"considerably\nlonger {i}" for i in range(7)])
    powers.set_xlim(1e-5, 10)
    set_log(powers.xaxis)
    long, named, powers = script.for_phone(drawn(figure)).axes
    assert "\n" in long.get_title(loc="left")
    assert {label.get_rotation() for label in named.get_xticklabels()} == {40}
    assert named.get_xticklabels()[0].get_text() == "considerably longer 0"
    assert all(np.log10(float(label.get_text())) % 1 == 0 for label in powers.get_xticklabels())


def test_legends_of_a_figure_go_above_in_as_many_columns_as_fit(script):
    figure, axes = panels(2, width=4)
    for name in "abc":
        axes[0].plot([1, 2], label=f"quite a long name, {name}")
    figure.legend(**ABOVE)
    made = script.for_phone(drawn(figure))
    (legend,) = made.legends
    box = legend.get_window_extent()
    assert box.x1 <= made.bbox.width and box.y0 >= made.axes[0].get_window_extent().y1
    assert [text.get_text()[-1] for text in legend.get_texts()] == ["a", "b", "c"]
    assert len(figure.legends) == 1


def test_twins_colour_bars_shared_axes_and_insets_stay_with_their_panels(script):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    twin, inset = axes[0].twinx(), axes[0].inset_axes((0.6, 0.6, 0.3, 0.3))
    twin.plot([5, 6])
    inset.plot([1, 2])
    heat = axes[1].imshow(np.eye(3), aspect="auto")
    figure.colorbar(heat, ax=axes[1])
    made = script.for_phone(drawn(figure))
    first, second, twin, bar = corners(made)
    assert (twin == first).all() and bar[[1, 3]] == pytest.approx(second[[1, 3]], abs=0.02)
    assert first[1] > second[3] and second[2] < bar[0] < bar[2] <= 1
    assert len(made.axes[0].child_axes) == 1
    assert any(label.get_visible() and label.get_text() for label in made.axes[1].get_yticklabels())


def test_a_figure_of_one_panel_is_made_narrower_only_if_its_letters_would_be_small(script):
    for width, height, narrower in ((4, 3, False), (6.5, 4, True), (9, 1.7, False)):
        figure, (axis,) = panels(1, width=width, height=height)
        axis.plot([1, 2])
        made = script.for_phone(drawn(figure))
        assert (made is not None) == narrower
        if made:
            assert made.get_size_inches() == pytest.approx((script.WIDTHS[0], height))


def test_what_has_no_safe_place_below_each_other_is_left(script):
    two_rows, _ = panels(4, columns=2, width=5)
    with_words, _ = panels(2, width=5)
    with_words.text(0.5, 0.5, "between")
    spanning = plt.figure(figsize=(9, 3))
    grid = spanning.add_gridspec(1, 3)
    spanning.add_subplot(grid[:2])
    spanning.add_subplot(grid[2])
    crowded, axes = panels(2, width=6)
    for axis in axes:
        for place in range(9):
            axis.text(place / 9, 0.5, "eight letters"[: 8 - place % 2])
    free = plt.figure(figsize=(9, 3), layout="none")
    free.add_axes((0, 0, 0.4, 1))
    free.add_axes((0.5, 0, 0.4, 1))
    no_room, axes = panels(2, width=10)
    for axis in axes:
        axis.set_yticks(
            [0, 1], ["a name that is longer than the screen of a phone is wide, and much longer than that"] * 2
        )
    for figure in (two_rows, with_words, spanning, crowded, free, no_room):
        assert script.for_phone(drawn(figure)) is None
