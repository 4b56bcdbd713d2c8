"""Let a page link to a term of the glossary as plain Markdown does, and show its definition where the link is pointed at.

``[stable rank](glossary.md#stable-rank)`` is a link in Jupyter, on GitHub and on the site. Sphinx calls the place of the
term "term-stable-rank", which this extension tells the parser of Markdown.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx


def in_words(definition: nodes.Element) -> str:
    """Return the sentences of a definition that have no formula, since a title is plain text."""
    text = definition.deepcopy()
    for formula in list(text.findall(nodes.math)):
        formula.replace_self(nodes.Text("$"))
    sentences = re.split(r"(?<=[.?!])\s+", " ".join(text.astext().split()))
    return " ".join(sentence for sentence in sentences if "$" not in sentence)


def note_terms(app: Sphinx, doctree: nodes.document) -> None:
    """Add the terms of a glossary to what can be linked to on its page, and keep what they mean."""
    found = app.env.metadata[app.env.docname]
    for item in doctree.findall(nodes.definition_list_item):
        meaning = in_words(item.children[-1])
        for term in item.findall(nodes.term):
            for name in filter(lambda name: name.startswith("term-"), term["ids"]):
                slug = re.sub(r"[^a-z0-9_-]", "", term.astext().lower().replace(" ", "-"))
                found.setdefault("myst_slugs", {})[slug] = (0, name, term.astext())
                found.setdefault("meanings", {})[name] = meaning


def add_meanings(app: Sphinx, doctree: nodes.document, _page: str) -> None:
    """Give each link to a term its definition as a title."""
    meanings: dict[str, str] = {}
    for told in app.env.metadata.values():
        meanings |= told.get("meanings", {})
    for link in doctree.findall(nodes.reference):
        name = link.get("refuri", "").partition("#")[2]
        if meanings.get(name) and not link.get("reftitle"):
            link["reftitle"] = meanings[name]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("doctree-read", note_terms)
    app.connect("doctree-resolved", add_meanings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
