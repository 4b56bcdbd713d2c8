"""What a reader of a page is given: its text, with tables and what its figures show, and nothing of its code's bulk.

python tests/reading/pages.py 04_size
"""

import hashlib
import html
import re
import sys
from pathlib import Path

import nbformat

BOOK = Path(__file__).resolve().parents[2] / "book"


def _plain(text: str) -> str:
    """Return Markdown or HTML as somebody sees it who unfolds all that is folded."""
    text = re.sub(r"</(td|th)>", " | ", text)
    text = re.sub(r"</text>", "; ", text)
    text = re.sub(r'<span class="verdict[^>]* aria-label="([^"]+)">[^<]*', r"\1", text)
    text = re.sub(r"<[a-z/!][^>]*>", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return re.sub(r"\n\s*\n\s*", "\n\n", html.unescape(text)).strip()


def page_text(name: str, folded: bool = True) -> str:
    """Return the text of a page of the book: prose, the code in view, tables, and the alternative texts of figures.

    Tables that are folded in the page are left out if ``folded`` is not set.
    """
    parts = []
    for cell in nbformat.read(BOOK / f"{name}.ipynb", as_version=4).cells:
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "markdown":
            parts.append(_plain(cell.source))
        elif "remove-cell" not in tags:
            if "hide-input" not in tags:
                parts.append(cell.source)
            for output in cell.outputs:
                data = output.get("data", {})
                shown = data.get("text/markdown") or data.get("text/html") or output.get("text") or ""
                if any(kind.startswith("image/") for kind in data):
                    shown = f"[Figure: {cell.metadata.get('mystnb', {}).get('image', {}).get('alt', '')}]"
                elif not shown:
                    shown = data.get("text/plain", "")
                if folded or not shown.startswith('<details class="numbers">'):
                    parts.append(_plain(shown))
    return "\n\n".join(filter(None, parts)) + "\n"


def page_hash(name: str) -> str:
    """Return 12 hex digits of a page's text without folded tables, and without numbers: a seed more may change them."""
    words = re.sub(r"\d+(\.\d+)?(\s?%)?", "0", page_text(name, folded=False))
    return hashlib.sha256(words.encode()).hexdigest()[:12]


if __name__ == "__main__":
    print(page_text(sys.argv[1]), end="")
