"""Add to the quick facts of each chapter when, at which scale and in which time it was executed last.

It is taken from data/status.json when the site is built, so that a notebook stays the same however often it is
executed. The chapter's own table needs no more than "quick facts" in its head.
"""

from __future__ import annotations

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

STATUS = Path(__file__).resolve().parents[2] / "data" / "status.json"


def last_executed(name: str) -> str:
    """Return the words for a notebook, or "" if it is not known when it was executed."""
    status = json.loads(STATUS.read_text()).get(name) if STATUS.exists() else None
    if not status:
        return ""
    return f"{status['executed']}, at {status['scale']}, in {status['seconds']:.0f} s on one CPU core"


def add_last_executed(app: Sphinx, doctree: nodes.document) -> None:
    """Append a row to the table whose head begins with "quick facts"."""
    name = f"{Path(app.env.docname).name}.ipynb"
    words = last_executed(name)
    for table in doctree.findall(nodes.table):
        head = next(table.findall(nodes.entry))
        if head.astext() != "quick facts" or not words:
            continue
        app.env.note_dependency(str(STATUS))
        cells = [
            nodes.entry("", nodes.paragraph(text=text))
            for text in ("last executed", words)
        ]
        next(table.findall(nodes.tbody)).append(nodes.row("", *cells))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("doctree-read", add_last_executed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
