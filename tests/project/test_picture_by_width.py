"""book/_ext/picture_by_width.py without a build: a figure with a second picture shows it on a narrow screen."""

import base64
import sys
from hashlib import sha256
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

SCRIPT = "book/_ext/picture_by_width.py"
sys.path.insert(0, str(ROOT / "book/_ext"))  # as Sphinx does
WIDE, NARROW, ALONE = (f"{name} picture".encode() for name in ("wide", "narrow", "lonely"))


def text(png):
    return base64.b64encode(png).decode()


def name(png):
    return f"{sha256(png).hexdigest()}.png"


@pytest.fixture
def app(tmp_path):
    """A site with one page that has two figures, one of which has two pictures."""
    second = {"data": text(NARROW), "width": 380, "height": 620, "panels": 2}
    both = {"image/png": {"width": 860, "height": 310, "stacked": second}}
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": text(WIDE)}, metadata=both),
        nbformat.v4.new_output("display_data", {"image/png": text(ALONE)}, metadata={"image/png": {"width": 400}}),
        nbformat.v4.new_output("stream", text="a word"),
    ]
    cells = [nbformat.v4.new_markdown_cell("a title"), nbformat.v4.new_code_cell("draw()", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    env = SimpleNamespace(doc2path=lambda page: tmp_path / (f"{page}.ipynb" if page == "page" else f"{page}.md"))
    return SimpleNamespace(outdir=tmp_path, builder=SimpleNamespace(format="html"), env=env)


def image(png):
    return f'<img width="860" height="310" alt="two &gt; one" src="../_images/{name(png)}" style="width: 860px; height: 310px;" loading="lazy" />'  # noqa: E501


def made(script, app, page="page"):
    context = {"body": f'<a href="../_images/{name(WIDE)}">{image(WIDE)}\n</a>{image(ALONE)}'}
    script.add_pictures(app, page, "page.html", context, None)
    return context["body"]


def test_a_browser_can_choose_the_second_picture_and_the_rest_of_the_page_stays(script, app):
    source = f'<source media="{script.NARROW}" srcset="../_images/{name(NARROW)}" width="380" height="620">'
    first = image(WIDE).replace(' style="width: 860px; height: 310px;"', "")
    link = f'<a href="../_images/{name(WIDE)}">'
    assert made(script, app) == f"{link}<picture>{source}{first}</picture>\n</a>{script.TURNED}{image(ALONE)}"
    assert [path.name for path in (app.outdir / "_images").iterdir()] == [name(NARROW)]
    assert (app.outdir / "_images" / name(NARROW)).read_bytes() == NARROW


def test_other_pages_and_other_formats_stay(script, app):
    assert "<picture>" not in made(script, app, "words")
    app.builder.format = "latex"
    assert "<picture>" not in made(script, app)
    assert not (app.outdir / "_images").exists()
