"""The looks of the book's arms: told apart, and shared by an arm and its variants."""

from opdlab.lab import plots
from opdlab.lab.grid import PAPER, RECORDED


def test_each_of_the_paper_s_arms_has_a_colour_and_a_marker_of_its_own():
    assert set(plots.COLOURS) == set(plots.MARKERS) == set(PAPER)
    assert len(set(plots.COLOURS.values())) == len(set(plots.MARKERS.values())) == len(PAPER)


def test_a_variant_looks_like_the_arm_that_it_descends_from():
    assert plots.colour_of("opd_top25_update4") == plots.COLOURS["opd"]
    assert plots.marker_of("rlvr_short") == plots.MARKERS["rlvr"]
    assert {plots.colour_of(arm) for arm in RECORDED} == set(plots.COLOURS.values())


def test_shades_are_no_arm_s():
    colours = plots.shades(("opd_top50", "opd_top25"))
    assert len({*colours.values(), *plots.COLOURS.values()}) == 2 + len(PAPER)
