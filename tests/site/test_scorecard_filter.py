"""The table of all claims, alone on a page from file://: it can be filtered, and is whole where no script runs."""

from pathlib import Path

import pydata_sphinx_theme
import pytest
import sphinx_book_theme
from test_site import AXE, violations

from opdlab.claims import CLAIMS, FINDINGS, claims_table
from opdlab.claims.rules import Verdict
from opdlab.claims.scorecard import PLAIN
from opdlab.stats import Interval

STATIC = Path(__file__).resolve().parents[2] / "book" / "_static"
ONES = Interval(1.0, 0.5, 1.5)
RANK = FINDINGS["rank"][0]


def verdict(claim, word):
    return Verdict(claim, word, "", ONES, 0.01, 1.0, 5, {}, word, word)


# Every claim, its verdict in turn; the real model decides three of them, and says the same of all.
TOY = [verdict(claim, list(PLAIN)[i % len(PLAIN)]) for i, claim in enumerate(CLAIMS)]
REAL = {found.claim.name: verdict(found.claim, "seen") for found in TOY[::7][:3]}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page with the table, written as Sphinx would."""
    themes = (pydata_sphinx_theme, "pydata-sphinx-theme"), (sphinx_book_theme, "sphinx-book-theme")
    sheets = [STATIC / "custom.css", STATIC / "scorecard" / "filter.css"]
    for package, name in reversed(themes):
        sheets = [*Path(package.__file__).parent.glob(f"theme/*/static/styles/{name}.css"), *sheets]
    styles = "".join(f'<link rel="stylesheet" href="{sheet.as_uri()}">' for sheet in sheets)
    script = f'<script defer src="{(STATIC / "scorecard" / "filter.js").as_uri()}"></script>'
    page = tmp_path_factory.mktemp("pages") / "scorecard.html"
    page.write_text(
        f'<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>Test</title>'
        f"{styles}{script}"
        '</head><body><main class="bd-content"><article class="bd-article"><h1>Scorecard</h1><div class="cell_output">'
        f'<div class="text_html">{claims_table(TOY, REAL)}</div></div></article></main></body></html>'
    )
    return page.as_uri()


@pytest.fixture
def sheet(browser, address):
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def shown(page):
    """Return the claims whose rows can be seen."""
    rows = page.locator("table.scorecard tbody tr:visible th")
    return [text.split("\n")[0] for text in rows.all_inner_texts()]


def told(page):
    return page.get_by_role("status").inner_text()


def statements(verdicts):
    return [found.claim.statement for found in verdicts]


def test_at_first_all_claims_are_there(sheet):
    assert shown(sheet) == statements(TOY)
    assert told(sheet) == f"{len(TOY)} of {len(TOY)} claims"


def test_each_choice_narrows_the_table(sheet):
    sheet.get_by_label("Finding").select_option(RANK)
    of_rank = [found for found in TOY if found.claim.finding == "rank"]
    assert shown(sheet) == statements(of_rank)
    sheet.get_by_label("Verdict").select_option(PLAIN["explained"].name)
    both = [found for found in of_rank if found.verdict == "explained"]
    assert 0 < len(both) < len(of_rank)
    assert shown(sheet) == statements(both) and told(sheet) == f"{len(both)} of {len(TOY)} claims"
    sheet.get_by_role("button", name="Show all").click()
    sheet.wait_for_function(f"document.querySelectorAll('tbody tr:not([hidden])').length === {len(TOY)}")
    assert told(sheet) == f"{len(TOY)} of {len(TOY)} claims"


def test_the_verdict_asked_for_is_that_of_the_model(sheet):
    sheet.get_by_label("Model").select_option("real")
    assert shown(sheet) == [found.claim.statement for found in REAL.values()], "of the others there is no verdict"
    sheet.get_by_label("Verdict").select_option(PLAIN["explained"].name)
    assert shown(sheet) == []
    sheet.get_by_label("Verdict").select_option(PLAIN["seen"].name)
    assert len(shown(sheet)) == len(REAL)


def test_it_works_by_keyboard(sheet):
    focused = "document.activeElement.name || document.activeElement.textContent"
    order = []
    for _ in range(4):
        sheet.keyboard.press("Tab")
        order.append(sheet.evaluate(focused))
    assert order == ["finding", "model", "verdict", "Show all"]
    sheet.get_by_label("Finding").focus()
    sheet.keyboard.press("ArrowDown")
    first = FINDINGS[TOY[0].claim.finding][0]
    assert shown(sheet) == [found.claim.statement for found in TOY if FINDINGS[found.claim.finding][0] == first]


def test_details_open_on_demand(sheet):
    row = sheet.locator("table.scorecard tbody tr").first
    assert not row.locator("dl").is_visible()
    row.locator("summary").press("Enter")
    assert row.locator("dl").is_visible() and "margin" in row.locator("dl").inner_text()


def test_it_is_accessible_in_both_themes(sheet):
    sheet.evaluate(AXE)
    assert violations(sheet, "light") == []
    sheet.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert violations(sheet, "dark", ["color-contrast"]) == []


def test_without_a_script_the_table_is_whole(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("table.scorecard tbody tr:visible").count() == len(TOY)
    assert page.locator("select").count() == 0, "what would do nothing is not there"
    context.close()


def test_no_other_page_of_the_site_has_the_script(site):
    having = [path.stem for path in (site / "book").glob("*.html") if "scorecard/filter.js" in path.read_text()]
    assert having == ["scorecard"]
