"""The figure with a slider: complete in itself, the same whenever it is drawn, and told in words."""

import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest

from opdlab.errors import OpdlabError
from opdlab.figures.slider import slider


def frames(count=3):
    """Return small frames."""
    made = []
    for i in range(count):
        figure, axis = plt.subplots(figsize=(1, 1))
        axis.plot([0, i])
        made.append((figure, f"step {i} < {count}", f"A line that rises to {i}."))
    return made


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_one_frame_is_in_view_and_all_are_told_in_words():
    elements = Elements(slider(frames(), "What to see.", start=1).data)
    pictures = elements.all("img")
    assert ["hidden" in picture for picture in pictures] == [True, False, True]
    assert [picture["alt"] for picture in pictures] == [f"A line that rises to {i}." for i in range(3)]
    (control,) = elements.all("input")
    assert (control["type"], control["min"], control["max"], control["value"]) == ("range", "0", "2", "1")
    assert control["aria-valuetext"] == "step 1 < 3" and control["aria-label"]
    assert len(elements.all("button")) == 2


def test_it_needs_nothing_from_elsewhere_and_repeats_itself():
    first = slider(frames(), "What to see.").data
    assert first == slider(frames(), "What to see.").data
    assert not re.search(r"https?:|<script|<link", first)


def test_figures_are_closed():
    before = plt.get_fignums()
    slider(frames(), "What to see.")
    assert plt.get_fignums() == before


def test_a_frame_that_is_not_there():
    with pytest.raises(OpdlabError, match="start is 3, but there are 3 frames"):
        slider(frames(), "What to see.", start=3)
