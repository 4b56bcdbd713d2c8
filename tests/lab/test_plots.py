"""The looks of the book's arms: told apart, and shared by an arm and its variants."""

from xml.etree import ElementTree

from opdlab.lab import plots
from opdlab.lab.grid import ARMS, PAPER, RECORDED


def test_each_of_the_paper_s_arms_has_a_colour_and_a_marker_of_its_own():
    assert set(plots.COLOURS) == set(plots.MARKERS) == set(PAPER)
    assert len(set(plots.COLOURS.values())) == len(set(plots.MARKERS.values())) == len(PAPER)


def test_a_variant_looks_like_the_arm_that_it_descends_from():
    assert plots.colour_of("opd_update4") == plots.colour_of("young_opd") == plots.COLOURS["opd"]
    assert plots.marker_of("rlvr_10") == plots.MARKERS["rlvr"]
    assert {plots.colour_of(arm) for arm in RECORDED} == set(plots.COLOURS.values())


def test_the_picture_of_the_experiment_lights_what_a_page_is_about():
    everything, one = plots.experiment(), plots.experiment("rlvr")
    assert everything._repr_html_().count("<svg") == 1 and 'opacity="0.4"' not in everything
    for arm in ("opd", "rlvr", "sft_matched", "random_signs"):
        assert plots.COLOURS[arm] in everything and ARMS[arm].label in everything
    parts = ElementTree.fromstring(one).findall("g")
    lit = ["".join(part.itertext()) for part in parts if part.get("opacity") == "1.0"]
    assert sum("a checker" in text for text in lit) == 1 and not any("a coin" in text for text in lit)
