"""book/_ext/glossary_links.py: a link to a term arrives at it and tells what it means; one to no term is found out."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_parser", "glossary_links"]
html_theme = "basic"
"""
GLOSSARY = """# Glossary

```{glossary}
stable rank
  How many directions
  there are, unlike {term}`Sim_K`. It is *1* or more.

similarity to the end
Sim_K
  Another. It is {math}`K/n` by chance.
```
"""


def build(folder, text):
    """Build a page with a text beside the glossary; return its HTML, and what Sphinx warns of."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name, content in (("conf.py", CONFIG), ("glossary.md", GLOSSARY)):
        (source / name).write_text(content)
    (source / "index.md").write_text(f"# Start\n\n{text}\n\n```{{toctree}}\nglossary\n```\n")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "html", source, site], check=True, capture_output=True, text=True
    )
    return (site / "index.html").read_text(), done.stderr


def test_a_link_to_a_term_arrives_and_tells_what_it_means(tmp_path):
    html, warnings = build(tmp_path, "The [rank](glossary.md#stable-rank), and [its end](glossary.md#sim_k).")
    assert warnings == ""
    assert re.search(r'href="glossary.html#term-stable-rank" title="How many directions there are, [^"]* more."', html)
    assert re.search(r'href="glossary.html#term-Sim_K" title="Another."', html)


def test_a_link_to_no_term_is_found_out(tmp_path):
    _, warnings = build(tmp_path, "The [rank](glossary.md#unstable-rank).")
    assert "unstable-rank" in warnings


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
