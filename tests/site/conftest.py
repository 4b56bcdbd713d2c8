"""The built site, served on this computer, and Chromium. What needs a missing one is skipped, or fails if required."""

import os
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import site_browser

# CI sets it, so that no check is left out there without a word.
REQUIRED = os.environ.get("OPDLAB_BROWSER") == "required"
MEASURED = pytest.StashKey[dict[str, tuple[float, float]]]()


def pytest_configure(config):
    config.stash[MEASURED] = {}


def pytest_terminal_summary(terminalreporter, config):
    for reason in sorted({report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])}):
        terminalreporter.write_line(f"The tests of the site were left out. {reason.removeprefix('Skipped: ')}")
    if measured := config.stash[MEASURED]:
        heavy, slow = (max(measured, key=lambda name, i=i: measured[name][i]) for i in (0, 1))
        terminalreporter.write_line(
            f"heaviest page: {heavy}, {measured[heavy][0]:.2f} MB; "
            f"slowest to show something: {slow}, {measured[slow][1]:.2f} s"
        )


def _without(reason):
    if REQUIRED:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def measured(request):
    """Megabytes and seconds by page, told at the end."""
    return request.config.stash[MEASURED]


@pytest.fixture(scope="session")
def site():
    """The folder of the built site."""
    if not (site_browser.SITE / "index.html").exists():
        _without(f"They need the site in {site_browser.SITE}: run 'make book'.")
    return site_browser.SITE


@pytest.fixture(scope="session")
def host(site):
    """The address of the site."""
    with site_browser.serve(site) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    path = site_browser.chromium()
    if not path:
        _without(f"They need {site_browser.NO_CHROMIUM}.")
    with sync_playwright() as playwright:
        # Names of other hosts lead nowhere.
        browser = site_browser.launch(playwright, path, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, host):
    """A new reader's empty page, which knows the address of the site."""
    context = browser.new_context(base_url=host, viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(180_000)  # of a busy machine
    yield context.new_page()
    context.close()
