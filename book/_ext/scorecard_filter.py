"""Give the page with the table of claims the script that filters it, and no other page."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

# As opdlab.claims.scorecard writes it.
TABLE = '<table class="scorecard">'


def add_filter(app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    """Add script and style to one page, just before it is written."""
    if TABLE in context.get("body", ""):
        app.add_css_file("scorecard/filter.css")
        app.add_js_file("scorecard/filter.js", defer="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("html-page-context", add_filter)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
