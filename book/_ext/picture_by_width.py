"""Show a figure on a narrow screen by its second picture, in which its panels are below each other.

scripts/execute_book.py puts that picture into the metadata of a notebook's output, where only this extension looks for
it: here it becomes a file, which a browser fetches in place of the other one. Paper gets the wide one.
"""

from __future__ import annotations

import re
from base64 import b64decode
from hashlib import sha256
from pathlib import Path
from typing import Any

import nbformat
from light_pages import written
from sphinx.application import Sphinx

NARROW = "screen and (max-width: 600px)"
# A picture of an output, and the end of its link: myst-nb names its file by what is in it.
PICTURE = re.compile(r'(<img [^>]*src="([^"]*/)?([0-9a-f]{64})\.png"[^>]*>)(\s*</a>)?')
# Its size as a style, beside which the sizes that each of the two pictures has would not count.
STYLE = re.compile(r' style="width: \d+px; height: \d+px;"')
# Captions and alternative texts speak of the wide picture.
TURNED = '<span class="turned">On this screen, what is said to be on the left is at the top.</span>'


def second_pictures(notebook: Path) -> dict[str, dict[str, Any]]:
    """Return the pictures for narrow screens in a notebook, by the digests of the wide ones."""
    found = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", ()):
            if second := output.get("metadata", {}).get("image/png", {}).get("stacked"):
                found[sha256(b64decode(output.data["image/png"])).hexdigest()] = second
    return found


def add_pictures(app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    """Give the figures of one page their second pictures, just before it is written."""
    source = Path(app.env.doc2path(page))
    if app.builder.format != "html" or "body" not in context or source.suffix != ".ipynb":
        return
    second = second_pictures(source)

    def with_second(picture: re.Match[str]) -> str:
        image, folder, name, end = (part or "" for part in picture.groups())
        if name not in second:
            return picture[0]
        found = second[name]
        file = written(app, b64decode(found["data"]))
        source = f'srcset="{folder}{file}" width="{found["width"]}" height="{found["height"]}"'
        note = TURNED if found["panels"] > 1 else ""
        return f'<picture><source media="{NARROW}" {source}>{STYLE.sub("", image)}</picture>{end}{note}'

    context["body"] = PICTURE.sub(with_second, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    # After light_pages, which gives the wide picture its size as attributes.
    app.connect("html-page-context", add_pictures, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
