"""A report of 'opdlab measure' in Chromium: readable on a desk and on a phone."""

import pytest

from opdlab.measuring.update import measure

# Points in which the smallest letters of a figure are drawn, and the width of its picture in inches.
SMALLEST, WIDTH = 8, 4.2


@pytest.fixture(scope="module")
def report(pair, tmp_path_factory):
    """The report of a small update."""
    out = tmp_path_factory.mktemp("report")
    measure(*pair, out=out)
    return (out / "report.html").as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_is_readable(browser, report, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(report)
    assert page.evaluate("document.documentElement.scrollWidth") == width, "the page itself never scrolls sideways"
    pictures = page.evaluate("[...document.images].map(image => image.clientWidth)")
    assert len(pictures) == 9 and min(pictures) * SMALLEST / 72 / WIDTH >= 9, "letters of 9 pixels"
    tables = page.query_selector_all(".table")
    for table in tables:
        if table.evaluate("table => table.scrollWidth > table.clientWidth"):
            assert width == 390 and "gradient" in table.evaluate("table => getComputedStyle(table).backgroundImage")
    page.close()
