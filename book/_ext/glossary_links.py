"""Link the words of the glossary to it, and show what they mean where a link is pointed at.

A page can link a term by hand, as plain Markdown does: ``[stable rank](glossary.md#stable-rank)`` is a link in Jupyter,
on GitHub and on the site. Sphinx calls the place of the term "term-stable-rank", which this extension tells the parser
of Markdown. Any other term becomes a link when the site is built, where a page uses it first. These links are many, so
they have a class of their own and look like the text around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

# Terms that pages use in another sense as well. Where a page means the term it sets the word in italics or in bold, and
# only there it is linked.
EVERYDAY = re.compile(
    "branch|claim|contrast|control|finding|group|growth|holds up|identity|loss|metric|mixture|not seen|parent|progress|"
    "projection|record|reduction|residual|run|scale|score|small|span|state|student|switch|tells nothing|tiny|trainer|"
    "undecided"
)
# Pages on which things are looked up.
NOT_READ = {"api", "bibliography"}
# What is no running text.
PASSED_OVER = (
    *(addnodes.desc, addnodes.toctree, nodes.citation, nodes.FixedTextElement, nodes.literal, nodes.math),
    *(nodes.rubric, nodes.thead, nodes.title, nodes.topic),
)


class Term(NamedTuple):
    """A term: its page and place, the first place of its entry, which may have several terms, and what it means."""

    text: str
    page: str
    place: str
    entry: str
    meaning: str


def in_words(definition: nodes.Element) -> str:
    """Return the sentences of a definition before the first with a formula, since a title is plain text."""
    text = definition.deepcopy()
    for formula in list(text.findall(nodes.math)):
        formula.replace_self(nodes.Text("$"))
    sentences = re.split(r"(?<=[.?!])\s+", " ".join(text.astext().split()))
    with_formula = [at for at, sentence in enumerate(sentences) if "$" in sentence]
    return " ".join(sentences[: with_formula[0]] if with_formula else sentences)


def note_terms(app: Sphinx, doctree: nodes.document) -> None:
    """Add the terms of a glossary to what can be linked to on its page, and keep what they mean."""
    page = app.env.docname
    found = app.env.metadata[page]
    for item in doctree.findall(nodes.definition_list_item):
        meaning = in_words(item.children[-1])
        places = [
            (term.astext(), name)
            for term in item.findall(nodes.term)
            for name in term["ids"]
            if name.startswith("term-")
        ]
        for text, place in places:
            slug = re.sub(r"[^a-z0-9_-]", "", text.lower().replace(" ", "-"))
            found.setdefault("myst_slugs", {})[slug] = (0, place, text)
            found.setdefault("terms", []).append((text, page, place, places[0][1], meaning))


def terms_of(env: BuildEnvironment) -> list[Term]:
    """Return the terms of all glossaries."""
    return [Term(*term) for told in env.metadata.values() for term in told.get("terms", [])]


def rewrite_if_changed(_app: Sphinx, env: BuildEnvironment) -> Iterable[str]:
    """Let all pages be written again if the glossary has changed, since all show what it says."""
    before, now = getattr(env, "glossary_terms", None), [tuple(term) for term in terms_of(env)]
    env.glossary_terms = now
    return env.found_docs if before != now else []


def plural(term: str) -> str:
    """Return the plural of a term, of its first noun if it is, for example, a share *of* something."""
    noun, of, rest = term.partition(" of ")
    for ending, many in ((r"sis$", "ses"), (r"([^aeiou])y$", r"\1ies"), (r"(s|x|ch)$", r"\1es"), (r"$", "s")):
        if re.search(ending, noun):
            return re.sub(ending, many, noun, count=1) + of + rest
    return term


def forms_of(terms: Iterable[Term]) -> dict[str, Term]:
    """Return the terms by how they may stand in a sentence."""
    forms: dict[str, Term] = {}
    for term in terms:
        for form in (term.text, plural(term.text)):
            forms |= {form: term, form[0].upper() + form[1:]: term}
    return forms


def join_lines(doctree: nodes.document) -> None:
    """Make one text of the lines of a paragraph, which the parser of Markdown keeps apart."""
    for element in doctree.findall(nodes.TextElement):
        pieces: list[nodes.Node] = []
        for child in element.children:
            if pieces and isinstance(child, nodes.Text) and isinstance(pieces[-1], nodes.Text):
                child = nodes.Text(pieces.pop() + child)
            pieces.append(child)
        element.children = []
        element.extend(pieces)


def running_text(node: nodes.Node) -> Iterator[nodes.Text | nodes.reference | nodes.raw]:
    """Yield the text of a page, the links in it, and what is HTML already, in the order of reading."""
    for child in node.children:
        if isinstance(child, (nodes.Text, nodes.reference, nodes.raw)):
            yield child
        elif not isinstance(child, PASSED_OVER):
            yield from running_text(child)


def in_order(doctree: nodes.document) -> list[nodes.Text | nodes.reference]:
    """Return the text of a page and the links in it: first what all readers see, then what is folded."""
    seen, folded, depth = [], [], 0
    for piece in running_text(doctree):
        if isinstance(piece, nodes.raw):
            depth += piece.astext().count("<details") - piece.astext().count("</details")
        else:
            (folded if depth else seen).append(piece)
    return seen + folded


def place_of(link: nodes.reference) -> str:
    """Return the place on a page that a link leads to."""
    return link.get("refid") or link.get("refuri", "").partition("#")[2]


def link_first_uses(app: Sphinx, doctree: nodes.document, page: str, terms: list[Term]) -> None:
    """Link each term where the page uses it first, unless it is linked before."""
    forms = forms_of(terms)
    entries = {term.place: term.entry for term in terms}
    # The longest first: "stable rank" is no use of "rank".
    either = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in sorted(forms, key=len, reverse=True))
    used = re.compile(rf"(?<![\w-])(?:{either})(?![\w-])")
    linked = set()
    join_lines(doctree)
    for text in in_order(doctree):
        if isinstance(text, nodes.reference):
            linked.add(entries.get(place_of(text)))
            continue
        pieces: list[nodes.Node] = []
        end = 0
        for use in used.finditer(text):
            term = forms[" ".join(use[0].split())]
            marked = isinstance(text.parent, (nodes.emphasis, nodes.strong)) and text.parent.astext() == use[0]
            if term.entry in linked or (EVERYDAY.fullmatch(term.text) and not marked):
                continue
            linked.add(term.entry)
            uri = f"{app.builder.get_relative_uri(page, term.page)}#{term.place}"
            link = nodes.reference("", use[0], internal=True, refuri=uri, classes=["first-use"])
            pieces += [nodes.Text(text[end : use.start()]), link]
            end = use.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def link_terms(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Link the terms of a page, and give each link to a term its definition as a title."""
    terms = terms_of(app.env)
    if terms and "terms" not in app.env.metadata[page] and page.rpartition("/")[2] not in NOT_READ:
        link_first_uses(app, doctree, page, terms)
    meanings = {term.place: term.meaning for term in terms}
    for link in doctree.findall(nodes.reference):
        if place_of(link) in meanings:
            link["classes"].append("term")
            if meanings[place_of(link)] and not link.get("reftitle"):
                link["reftitle"] = meanings[place_of(link)]


def setup(app: Sphinx) -> dict[str, bool | int]:
    """Connect to Sphinx."""
    app.connect("doctree-read", note_terms)
    app.connect("env-updated", rewrite_if_changed)
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 2}
