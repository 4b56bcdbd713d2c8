"""The place of a picture that moves: a still with its words, complete in itself."""

import base64
import re

import matplotlib.pyplot as plt
import pytest

from opdlab.figures.explorable import explorable


@pytest.fixture
def still(tmp_path):
    """A small picture on disk."""
    path = tmp_path / "size.png"
    plt.subplots(figsize=(1, 1))[0].savefig(path)
    plt.close()
    return path


def test_the_still_is_in_the_page_with_its_words_and_the_name_of_its_script(still):
    html = explorable(still, 'Curves that "fall".', "At one size <nothing> is left.").data
    assert 'class="explorable" data-name="size"' in html
    assert 'alt="Curves that &quot;fall&quot;."' in html
    assert "<figcaption>At one size &lt;nothing&gt; is left.</figcaption>" in html
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(picture) == still.read_bytes()
    assert not re.search(r"https?:|<script|<link|style sheet", html)
