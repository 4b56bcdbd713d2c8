"""Every page of the book in a real browser: nothing fails, nothing is cut off, nobody is left out, and it is light.

Each page is opened once, and its visit notes what the tests then look at. `make site-tests` builds the book and runs
them; they need Chromium or Chrome, which is never downloaded.
"""

import contextlib
import functools
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import axe_playwright_python
import pytest
from playwright.sync_api import Error, TimeoutError
from site_browser import table_of_contents

PART_OF = {page: caption for caption, pages in table_of_contents() for page in pages}
PAGES = list(PART_OF)

WIDTHS = (400, 1000, 1400)
MEGABYTES = 1.5  # of a page and what it fetches before the reader scrolls, as sent by a host that compresses
SECONDS = 1.0  # until something can be read, on a machine that does nothing else
IMPACTS = {"serious", "critical"}
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()

MATHS_DONE = "() => window.MathJax?.startup?.promise?.then(() => true) ?? true"
NO_PICTURE = """async () => {
    const pictures = [...document.querySelectorAll('img')].filter(p => p.checkVisibility());
    for (const picture of pictures) {
        picture.scrollIntoView();
        await Promise.race([picture.decode().catch(() => 0), new Promise(done => setTimeout(done, 10000))]);
    }
    scrollTo(0, 0);
    return pictures.filter(p => !p.naturalWidth).map(p => p.src);
}"""
# Sphinx fills a missing alternative text with the path of the picture.
FILE_NAME = re.compile(r"\S*\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)
ALTERNATIVE_TEXTS = "() => [...document.querySelectorAll('img')].map(picture => picture.getAttribute('alt') ?? '')"
LINKS = "() => [...new Set([...document.querySelectorAll('a[href]')].map(link => link.href))]"
MATHS = r"""() => {
    const text = document.querySelector('article').cloneNode(true);
    text.querySelectorAll('pre, code, script, mjx-container').forEach(element => element.remove());
    return {
        written: document.querySelectorAll('.math').length,
        typeset: document.querySelectorAll('.math mjx-container').length,
        wrong: document.querySelectorAll('mjx-merror').length,
        raw: text.textContent.match(/.{0,30}(\\\(|\\\[|\$\$).{0,30}/g) ?? [],
    };
}"""
# What sticks out of the window, but not of a box of its own that scrolls.
TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    const inBox = element => {
        for (let box = element.parentElement; box && box !== document.body; box = box.parentElement)
            if (getComputedStyle(box).overflowX !== 'visible') return true;
        return false;
    };
    return [`the page, ${document.documentElement.scrollWidth} px`,
        ...[...document.querySelectorAll('body *')]
            .filter(e => e.getBoundingClientRect().right > width + 1 && !inBox(e))
            .slice(0, 5).map(e => e.outerHTML.slice(0, 100))];
}"""
# Thousands of words of code have the same few colours, and hundreds of functions are described in one form: the first
# stand for all, which saves minutes.
THIN_OUT = """() => {
    const seen = new Set();
    for (const word of document.querySelectorAll('.highlight span[class]')) {
        if (seen.has(word.className)) word.replaceWith(word.textContent);
        seen.add(word.className);
    }
    [...document.querySelectorAll('mjx-container')].slice(3).forEach(formula => formula.remove());
    [...document.querySelectorAll('dl.py')].slice(40).forEach(description => description.remove());
}"""
# What scrolls in a box of its own and cannot be reached by keyboard.
UNREACHABLE = """() => [...document.querySelectorAll('main *')]
    .filter(box => box.scrollWidth > box.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(box).overflowX))
    .filter(box => box.tabIndex < 0 && ![...box.querySelectorAll('*')].some(inner => inner.tabIndex >= 0))
    .map(box => box.outerHTML.slice(0, 150))"""
# On a busy machine a page can have loaded before the browser says when it showed something first: wait for that.
PAINTED = """() => new Promise(resolve => new PerformanceObserver(list => {
    for (const entry of list.getEntriesByName('first-contentful-paint')) resolve(entry.startTime / 1000);
}).observe({ type: 'paint', buffered: true }) || setTimeout(() => resolve(Infinity), 10000))"""


@dataclass
class Visit:
    """What a browser met on a page."""

    problems: list[str]
    foreign: list[str]
    no_picture: list[str]
    alternative_texts: list[str]
    links: list[str]
    maths: dict
    too_wide: dict[int, list[str]]
    violations: list[str]
    megabytes: float
    seconds: float
    allowed_seconds: float
    where: str
    neighbours: list[str | None]


def slowness():
    """Return how many times longer everything takes just now because the machine does other things too."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.05:
        pass
    return max(1.0, (time.perf_counter() - wall) / 0.05)


def open_page(browser, host, name):
    """Open a page as a new reader would; return it with its notes: problems, requests elsewhere, bytes by request."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(180_000)  # of a busy machine
    page = context.new_page()
    problems, foreign, sizes, under_way = [], [], {}, set()
    page.on("request", lambda request: under_way.add(request))
    page.on("requestfinished", lambda request: under_way.discard(request))
    page.on("requestfailed", lambda request: under_way.discard(request))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"{request.url}: {request.failure}"))
    page.on("response", lambda answer: problems.append(f"{answer.url}: {answer.status}") if answer.status > 399 else 0)
    page.on("request", lambda request: None if request.url.startswith(host) else foreign.append(request.url))
    session = context.new_cdp_session(page)
    session.on("Network.loadingFinished", lambda event: sizes.update({event["requestId"]: event["encodedDataLength"]}))
    session.send("Network.enable")
    page.goto(f"{host}{name}.html", wait_until="load")
    page.evaluate(MATHS_DONE)
    for _ in range(300):
        if not under_way:
            break
        page.wait_for_timeout(100)
    problems += [f"{request.url}: no answer" for request in under_way]
    return page, problems, foreign, sizes


def violations(page, where, rules=None):
    """Return what axe finds, one line each."""
    options = {"resultTypes": ["violations"], "preload": False}
    if rules:
        options["runOnly"] = rules
    found = page.evaluate("options => axe.run(options).then(result => result.violations)", options)
    return [
        f"{where}: {rule['id']} ({rule['impact']}): {node['html'][:150]}: {node['failureSummary']}"
        for rule in found
        if rule["impact"] in IMPACTS
        for node in rule["nodes"]
    ]


@functools.cache
def anchors(page):
    """Return what a page can be linked at."""
    return set(re.findall(r'\bid="([^"]+)"', page.read_text()))


def leads_somewhere(site, link):
    """Tell whether the file of a link exists, and has its anchor."""
    parts = urlsplit(link)
    target = site / unquote(parts.path)
    target = target / "index.html" if target.is_dir() else target
    return target.exists() and (not parts.fragment or unquote(parts.fragment) in anchors(target))


@functools.cache
def visit(browser, host, name):
    """Return the notes of a page, or, if the visit broke off, why: it would do so in every test."""
    try:
        return look_at(browser, host, name)
    except Error as error:
        return f"the visit broke off: {error}"


def look_at(browser, host, name):
    """Open a page, look at it in every way, and return the notes."""
    seconds, allowed = [], SECONDS
    for _ in range(3):
        slow = slowness()
        page, problems, foreign, sizes = open_page(browser, host, name)
        seconds.append(page.evaluate(PAINTED))
        allowed = max(allowed, SECONDS * (slow + slowness()) / 2)
        if seconds[-1] <= allowed:
            break
        if len(seconds) < 3:
            page.context.close()
    notes = Visit(
        problems=problems,
        foreign=foreign,
        megabytes=sum(sizes.values()) / 1e6,
        seconds=min(seconds),
        allowed_seconds=allowed,
        no_picture=page.evaluate(NO_PICTURE),
        alternative_texts=page.evaluate(ALTERNATIVE_TEXTS),
        links=[link.removeprefix(host) for link in page.evaluate(LINKS) if link.startswith(host)],
        maths=page.evaluate(MATHS),
        too_wide={},
        violations=[],
        where="",
        neighbours=[
            link.evaluate("link => link.pathname.slice(1)") if (link := page.query_selector(selector)) else None
            for selector in (".prev-next-area .left-prev", ".prev-next-area .right-next")
        ],
    )
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        notes.too_wide[width] = page.evaluate(TOO_WIDE)
        # The theme looks for what scrolls a while after the size has changed.
        with contextlib.suppress(TimeoutError):
            page.wait_for_function(f"() => ({UNREACHABLE})().length === 0", timeout=10_000, polling=200)
        notes.violations += [f"{width} px: not reached by keyboard: {box}" for box in page.evaluate(UNREACHABLE)]
        if width == min(WIDTHS) and (trail := page.query_selector(".bd-breadcrumbs")) and trail.is_visible():
            notes.where = " ".join(trail.inner_text().split())
    page.evaluate(THIN_OUT)
    page.evaluate(AXE)
    notes.violations += violations(page, "light")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    notes.violations += violations(page, "dark", ["color-contrast"])
    page.context.close()
    return notes


@pytest.fixture(params=PAGES)
def name(request):
    return request.param


@pytest.fixture
def seen(browser, host, name):
    if isinstance(notes := visit(browser, host, name), str):
        pytest.fail(notes, pytrace=False)
    return notes


def test_nothing_fails_and_nothing_is_asked_of_another_host(seen):
    assert seen.problems == []
    assert seen.foreign == []


def test_all_pictures_are_there_and_told_in_words(seen):
    assert seen.no_picture == []
    assert [text for text in seen.alternative_texts if not text.strip() or FILE_NAME.fullmatch(text.strip())] == []


def test_links_and_anchors_lead_somewhere(seen, site):
    assert [link for link in seen.links if not leads_somewhere(site, link)] == []


def test_the_contents_lead_to_their_sections(page, name):
    """The last section of a page is at the top once it is asked for, though no figure before it has been fetched."""
    page.goto(f"{name}.html")
    entries = page.query_selector_all(".bd-sidebar-secondary .page-toc a[href^='#']")
    for entry in [entry for entry in entries if entry.is_visible()][-1:]:
        target = entry.get_attribute("href")
        entry.click()
        page.wait_for_timeout(300)
        top = page.evaluate("id => document.getElementById(id).getBoundingClientRect().top", target[1:])
        left = page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY")
        assert 0 <= top <= 100 or left < 2, f"{target} is {top:.0f} px from the top"


def test_maths_is_typeset(seen):
    assert seen.maths["typeset"] == seen.maths["written"]
    assert seen.maths["wrong"] == 0
    assert seen.maths["raw"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_of_the_window(seen, width):
    assert seen.too_wide[width] == []


def test_it_is_accessible_in_both_themes(seen):
    assert seen.violations == []


def test_it_is_light_and_quick(seen, name, measured):
    measured[name] = (seen.megabytes, seen.seconds)
    assert seen.megabytes < MEGABYTES
    assert seen.seconds < seen.allowed_seconds


def test_readers_know_where_they_are(seen, name):
    before, after = (PAGES[i] if 0 <= i < len(PAGES) else None for i in (PAGES.index(name) - 1, PAGES.index(name) + 1))
    assert seen.neighbours == [page and f"{page}.html" for page in (before, after)]
    assert seen.where.startswith(PART_OF[name])


def test_the_address_alone_leads_to_the_front_page(page):
    page.goto("")
    page.wait_for_url(f"**/{PAGES[0]}.html")


def theme(page):
    return page.evaluate("document.documentElement.dataset.theme")


def test_the_theme_can_be_changed_and_is_kept(page):
    page.goto("book/01_objectives.html")
    seen = set()
    for _ in range(3):
        seen.add(theme(page))
        page.click(".theme-switch-button")
    assert seen == {"light", "dark"}
    while theme(page) != "dark":
        page.click(".theme-switch-button")
    page.click(".right-next")
    page.wait_for_url("**/02_*")
    assert theme(page) == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


def test_search_finds_a_term_of_the_glossary(page):
    page.goto("book/04_size.html")
    page.click(".sidebar-primary__section .search-button__button")
    page.keyboard.type("stable rank")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=stable+rank")
    page.wait_for_selector("#search-results li a[href*='glossary.html']")


def test_search_finds_every_term_of_the_glossary(page, site):
    """As the page of the search does it, but for showing what is found."""
    terms = re.findall(r'<dt id="term-[^>]*>(.*?)<a class="headerlink', (site / "book/glossary.html").read_text())
    assert len(terms) > 100
    page.goto("search.html?q=rank")
    page.wait_for_selector("#search-results li")
    found = page.evaluate(
        "terms => terms.map(term => Search._performSearch(...Search._parseQuery(term)).map(result => result[0]))", terms
    )
    assert [term for term, pages in zip(terms, found, strict=True) if "book/glossary" not in pages] == []


TERM = re.compile(r'<a class="([^"]*\bterm\b[^"]*)" href="[^"#]*#([^"]*)" title="[^"]+">')


@pytest.mark.parametrize("name", PAGES)
def test_no_term_of_the_glossary_is_linked_twice_unasked(site, name):
    first_uses = [
        place for classes, place in TERM.findall((site / f"{name}.html").read_text()) if "first-use" in classes
    ]
    assert len(first_uses) == len(set(first_uses))
    if re.match(r"book/\d\d_|book/tour", name):
        assert 5 < len(first_uses) < 50
    if name in ("book/glossary", "book/api", "book/bibliography"):
        assert first_uses == []


@pytest.mark.parametrize("width", [400, 1400])
def test_what_a_term_means_is_shown_to_a_keyboard(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.goto("book/07_locking.html")
    link = page.locator("article a.first-use").first
    assert link.evaluate("link => getComputedStyle(link).color === getComputedStyle(link.parentNode).color")
    page.keyboard.press("Tab")
    link.focus()
    shown = link.evaluate(
        "link => (({content, position, width}) => [content, position, width])(getComputedStyle(link, '::after'))"
    )
    assert shown[:2] == [f'"{link.get_attribute("title")}"', "fixed"]
    assert 200 < float(shown[2].removesuffix("px")) < width
    assert page.evaluate(TOO_WIDE) == []


def test_search_and_text_are_reached_by_keyboard(page):
    page.goto("book/04_size.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "Skip to main content"
    page.wait_for_function("document.activeElement.getBoundingClientRect().top >= 0")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.search-button__button')"):
            break
    else:
        pytest.fail("ten times Tab does not reach the search")
    page.keyboard.press("Enter")
    assert page.is_visible("#pst-search-dialog input")


def test_the_code_behind_figures_is_shown_by_one_switch(page):
    page.goto("book/06_rank.html")
    code, switch = (
        page.locator(".tag_hide-input > details"),
        page.get_by_label("Show the code behind figures and tables"),
    )
    assert code.count() > 5 and not any(one.is_visible() for one in code.all())
    switch.focus()
    page.keyboard.press("Space")
    assert all(one.is_visible() for one in code.all())
    page.keyboard.press("Space")
    assert not code.first.is_visible()


def test_without_scripts_the_code_can_be_opened_cell_by_cell(browser, host):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{host}book/06_rank.html")
        assert page.locator(".tag_hide-input > details > summary").first.is_visible()


def test_the_diagram_is_of_the_page_in_the_dark(page):
    page.goto("book/06_rank.html")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    card = "getComputedStyle(document.querySelector('figure.diagram').closest('.text_html')).backgroundColor"
    assert page.evaluate(card) == "rgba(0, 0, 0, 0)"


def test_what_is_hidden_opens_by_keyboard(page):
    page.goto("book/06_rank.html")
    code = page.locator("details.predict").first
    code.locator("summary").focus()
    page.keyboard.press("Enter")
    assert code.evaluate("details => details.open")


# How large a figure is shown, and whether by its second picture; that one's width is meant for a phone.
SHOWN = """async figure => {
    figure.scrollIntoView();
    await figure.decode();
    const { width, height } = figure.getBoundingClientRect();
    const second = figure.parentElement.querySelector('source');
    return { width, height, second: figure.currentSrc === new URL(second.srcset, location).href, meant: second.width };
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("width", "media", "phone"), [(400, "screen", True), (1400, "screen", False), (400, "print", False)]
)
def test_a_phone_gets_the_panels_of_a_figure_below_each_other(page, theme, width, media, phone):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(media=media, color_scheme=theme)
    page.goto("book/06_rank.html")
    shown = page.locator("picture img").first.evaluate(SHOWN)
    assert shown["second"] == phone == page.locator(".turned").first.is_visible()
    if phone:
        assert shown["height"] > 1.5 * shown["width"]
        assert 0.9 * shown["meant"] <= shown["width"] <= shown["meant"]
    else:
        assert shown["width"] > 2 * shown["height"]


def test_paper_gets_the_text_alone_in_black_on_white(page):
    page.goto("book/06_rank.html")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})
    for chrome in (
        "#pst-primary-sidebar",
        "#pst-secondary-sidebar",
        ".bd-header-article",
        ".prev-next-area",
        ".copybtn",
        ".bd-footer-content",
    ):
        for element in page.query_selector_all(chrome):
            assert not element.is_visible(), chrome
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    colour = page.evaluate("getComputedStyle(document.querySelector('article p')).color")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 100
    assert page.evaluate(TOO_WIDE) == []
