"""What other papers found stands beside the claims, and every paper that is named is in the bibliography."""

import re
from pathlib import Path

import pytest

from opdlab.claims.literature import ELSEWHERE
from opdlab.claims.paper import CLAIMS

BOOK = Path(__file__).resolve().parents[2] / "book"
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def references():
    """The entries of the bibliography, field by field."""
    text = (BOOK / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", text, re.M | re.S)
    return {key: dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M)) for key, body in entries}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_the_papers_that_a_claim_names_are_in_the_bibliography(claim):
    known = {entry.get("eprint") for entry in references().values()}
    named = set(ARXIV.findall(f"{claim.source} {claim.elsewhere}"))
    assert named <= known, f"add to book/references.bib: {named - known}"
    assert not claim.elsewhere or ARXIV.search(claim.elsewhere)
    assert re.match(r"(agrees|contradicts)\b|$", claim.elsewhere)
    # Without the number of a paper a source is a place in the paper, and a place says what is there.
    assert ARXIV.search(claim.source) or re.match(r"(Section|Table|Appendix) .+: .+", claim.source)


def test_what_others_found_is_about_claims():
    elsewhere = {claim.name: claim.elsewhere for claim in CLAIMS}
    assert {name: elsewhere.get(name) for name in ELSEWHERE} == ELSEWHERE


def test_references_are_complete_and_one_for_each_paper():
    entries = references()
    text = (BOOK / "references.bib").read_text(encoding="utf-8")
    assert len(entries) == text.count("\n@")
    assert all({"title", "author", "year"} <= set(entry) for entry in entries.values())
    papers = [entry["eprint"] for entry in entries.values() if "eprint" in entry]
    assert len(set(papers)) == len(papers)
    assert all(ARXIV.fullmatch(paper) for paper in papers)
    # An identifier says the year and the month of a paper's first version.
    assert all(entry["eprint"][:2] == entry["year"][2:] for entry in entries.values() if "eprint" in entry)


def test_what_the_bibliography_cites_is_there():
    cited = re.findall(r"\{cite:\w\}`([^`]+)`", (BOOK / "bibliography.md").read_text(encoding="utf-8"))
    keys = {key.strip() for several in cited for key in several.split(",")}
    assert keys <= set(references())
