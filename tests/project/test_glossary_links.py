"""book/_ext/glossary_links.py: a link to a term arrives at it and tells what it means; one to no term is found out.

What a page does not link by hand is linked where it is used first, and only there.
"""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_parser", "glossary_links"]
myst_enable_extensions = ["dollarmath"]
html_theme = "basic"
"""
GLOSSARY = """# Glossary

```{glossary}
stable rank
  How many directions
  there are, unlike {term}`Sim_K`. It is *1* or more.

rank
  A count. It is less.

similarity to the end
Sim_K
  Another. It is {math}`K/n` by chance. This is lost.

trajectory
  A run from early to late.

share of the gradient
  A part of it.

state
  What there is before a token.

arm
  A way.

OPD
  On-policy distillation.

matched SFT
  A control.
```
"""
PAGE = """<details>
<summary>Guess.</summary>

An arm, and its similarity to the end.

</details>

An arm has a **rank**, a stable
rank and stable ranks. `trajectory` and $trajectory$ are no text. The state of a *state* is everyday, as is *no state*.

## Arms, and a trajectory

An [arm](index.md) again, and ranks. OPD's warm armrests are no arms, nor is an OPD-like opd.

| a trajectory | head |
| --- | --- |
| Trajectories | Shares of the gradient |

- The matched SFT of [matched SFT](glossary.md#matched-sft). Its [height](glossary.md#rank).

```python
the_similarity = "a share of the gradient"
```
"""


def build(folder, text, glossary=GLOSSARY, other=""):
    """Build a page with a text beside the glossary; return its HTML, and what Sphinx warns of."""
    source, site = folder / "source", folder / "site"
    source.mkdir(exist_ok=True)
    files = {"conf.py": CONFIG, "glossary.md": glossary, "api.md": f"# API\n\n{other}\n"}
    files["index.md"] = f"# Start\n\n{text}\n\n```{{toctree}}\nglossary\napi\n```\n"
    for name, content in files.items():
        if not (source / name).exists() or (source / name).read_text() != content:
            (source / name).write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "html", source, site], check=True, capture_output=True, text=True
    )
    return (site / "index.html").read_text(), done.stderr


def links(html, of_class="term"):
    """Return the links of a class in a page: words, place, and title."""
    found = re.findall(r'<a class="([^"]*)" href="[^"#]*#([^"]*)"(?: title="([^"]*)")?>(.*?)</a>', html, re.DOTALL)
    return [
        (" ".join(re.sub(r"<[^>]*>", "", words).split()), place, unescape(title))
        for classes, place, title, words in found
        if of_class in classes.split()
    ]


def test_a_link_to_a_term_arrives_and_tells_what_it_means(tmp_path):
    html, warnings = build(tmp_path, "The [way](glossary.md#stable-rank), and [its end](glossary.md#sim_k).")
    assert warnings == ""
    way, end = links(html)
    assert way[:2] == ("way", "term-stable-rank")
    assert re.fullmatch("How many directions there are, .* more.", way[2])
    assert end == ("its end", "term-Sim_K", "Another.")


def test_a_link_to_no_term_is_found_out(tmp_path):
    _, warnings = build(tmp_path, "The [rank](glossary.md#unstable-rank).")
    assert "unstable-rank" in warnings


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    html, warnings = build(folder, PAGE, other="An arm of OPD.")
    assert warnings == ""
    return html, folder


def test_each_term_is_linked_where_it_is_used_first(page):
    assert [(words, place) for words, place, _ in links(page[0], "first-use")] == [
        ("similarity to the end", "term-similarity-to-the-end"),  # used in what is folded only
        ("arm", "term-arm"),
        ("rank", "term-rank"),
        ("stable rank", "term-stable-rank"),
        ("state", "term-state"),
        ("OPD", "term-OPD"),
        ("Trajectories", "term-trajectory"),
        ("Shares of the gradient", "term-share-of-the-gradient"),
        ("matched SFT", "term-matched-SFT"),
    ]
    assert "a <em><a" in page[0], "an everyday word is linked where it is marked"


def test_what_is_linked_for_a_reader_tells_what_it_means_too(page):
    assert ("arm", "term-arm", "A way.") in links(page[0], "first-use")


def test_no_term_is_linked_where_things_are_looked_up(page):
    for name in ("api.html", "glossary.html"):
        assert links((page[1] / "site" / name).read_text(), "first-use") == []


def test_the_glossary_tells_what_its_own_links_mean(page):
    assert links((page[1] / "site" / "glossary.html").read_text()) == [("Sim_K", "term-Sim_K", "Another.")]


def test_a_changed_glossary_changes_every_page(page):
    html, _ = build(page[1], PAGE, GLOSSARY.replace("A way.", "Another way."), other="An arm of OPD.")
    assert ("arm", "term-arm", "Another way.") in links(html, "first-use")


def test_every_title_says_in_words_what_its_term_is(tmp_path):
    text = re.sub(r" ?\{cite:p\}`[^`]*`|\[\]\(notation.md\)", "", (ROOT / "book/glossary.md").read_text())
    terms = re.findall(r"^(?=\S)(.+)$", "".join(re.findall(r"^```\{glossary\}\n(.*?)^```", text, re.M | re.S)), re.M)
    slugs = [re.sub(r"[^a-z0-9_-]", "", term.lower().replace(" ", "-")) for term in terms]
    html, _ = build(tmp_path, "\n".join(f"- [{slug}](glossary.md#{slug})" for slug in slugs), text)
    titles = {words: title for words, _, title in links(html)}
    assert list(titles) == slugs
    lost = re.compile(r"(it|its|this|that|these|those|they|their|such|he|she|his|her)\b", re.IGNORECASE)
    assert {slug: title for slug, title in titles.items() if len(title.split()) < 6 or lost.match(title)} == {}


def linked():
    """Yield page and term of every link to the glossary."""
    for page in sorted((ROOT / "book").glob("*.*")):
        if page.suffix in (".ipynb", ".md"):
            for term in re.findall(r"\]\(glossary\.md#([^)]+)\)", page.read_text()):
                yield page.name, term


def test_every_link_of_the_book_is_to_a_term():
    entries = "".join(re.findall(r"^```\{glossary\}\n(.*?)^```", (ROOT / "book/glossary.md").read_text(), re.M | re.S))
    terms = {term.lower().replace(" ", "-") for term in re.findall(r"^(?=\S)(.+)$", entries, re.M)}
    missing = [(page, term) for page, term in linked() if term not in {re.sub(r"[^a-z0-9_-]", "", t) for t in terms}]
    assert missing == []
