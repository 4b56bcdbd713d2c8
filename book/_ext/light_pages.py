"""Make the pages light, and readable by every reader: what the theme leaves open, mended when the site is built.

Light: figures are fetched when the reader comes near them, pictures inside a page become files, of two thousand icons
those in use stay, and what serves running cells on a page (which this book leaves to Colab) goes. Readable: headers of
tables say what they head, and the line above the title names the part of the book.
"""

from __future__ import annotations

import re
from base64 import b64decode
from hashlib import sha256
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
HEAD = re.compile(r"<thead\b.*?</thead>", re.DOTALL)
EMPTY_HEADER = re.compile(r"<th\b[^>]*>\s*</th>")
UNSCOPED_HEADER = re.compile(r"<th(?![^>]*\bscope=)(?=[\s>])")
# A picture written into the page, and what else is said of it; smaller ones are not worth a request.
INLINE_PICTURE = re.compile(r'<img ([^>]*?)src="data:image/png;base64,([^"]{4096,})"')
# A picture whose size is in its style only: until it is fetched, a browser gives it no room.
SIZED_PICTURE = re.compile(r'<img (?![^>]*\b(?:width|height)=)(?=[^>]*style="width: (\d+)px; height: (\d+)px;)')
# One icon of Font Awesome's script: its name, its other names, and its drawing.
ICON = re.compile(r'"?([\w-]+)"?:\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?')
ICON_NAME = re.compile(r"\bfa-([a-z0-9-]+)")


def fetch_figures_late(app: Sphinx) -> None:
    """Let a figure be fetched when it is about to come into view."""
    app.env.settings["image_loading"] = "lazy"


def with_scopes(table: re.Match[str]) -> str:
    """Return a table whose headers say what they head; an empty one heads nothing."""

    def in_head(head: re.Match[str]) -> str:
        return UNSCOPED_HEADER.sub('<th scope="col"', head[0])

    html = EMPTY_HEADER.sub("<td></td>", table[0])
    return UNSCOPED_HEADER.sub('<th scope="row"', HEAD.sub(in_head, html))


def part_of(app: Sphinx, page: str) -> str:
    """Return the caption of the part that holds a page, or "" for a page outside the table of contents."""
    for part in app.env.external_site_map.root.subtrees:
        if page in part.items:
            return part.caption or ""
    return ""


def written(app: Sphinx, png: bytes) -> str:
    """Write a picture among those of the site, and return the name of its file, which is made of what is in it."""
    file = Path(app.outdir) / "_images" / f"{sha256(png).hexdigest()}.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(png)
    return file.name


def mend_page(app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    """Change what a page is made from, just before it is written."""
    if app.builder.format != "html":
        return
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{getattr(script, 'filename', script)}{getattr(script, 'attributes', '')}".lower()
    ]
    context["css_files"] = [sheet for sheet in context["css_files"] if "thebe" not in str(sheet).lower()]
    if part := part_of(app, page):
        context["parents"] = [{"title": part, "link": ""}]
    if "body" not in context:
        return

    def as_file(picture: re.Match[str]) -> str:
        data = b64decode(picture[2])
        name = written(app, data)
        width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
        size = "" if "width=" in picture[1] else f'width="{width}" height="{height}" '
        return f'<img {picture[1]}{size}loading="lazy" src="{context["pathto"](f"_images/{name}", 1)}"'

    body = TABLE.sub(with_scopes, INLINE_PICTURE.sub(as_file, context["body"]))
    body = SIZED_PICTURE.sub(r'<img width="\1" height="\2" ', body)
    # To a screen reader the entries of a bibliography are no items of a list.
    context["body"] = body.replace('role="list" class="citation-list"', 'class="citation-list"')


def keep_icons_in_use(app: Sphinx, error: Exception | None) -> None:
    """Take out of the theme's icons those that no page or script names: half a megabyte."""
    script = Path(app.outdir) / "_static" / "scripts" / "fontawesome.js"
    if error or not script.exists():
        return
    naming = [path for path in Path(app.outdir).rglob("*.html")]
    naming += [path for path in (Path(app.outdir) / "_static").rglob("*.js") if "mathjax" not in path.parts]
    used = {
        name
        for path in naming
        if path != script
        for name in ICON_NAME.findall(path.read_text(encoding="utf-8", errors="ignore"))
    }

    def if_in_use(icon: re.Match[str]) -> str:
        names = {icon[1], *re.findall(r'"([^"]+)"', icon[2])}
        return icon[0] if names & used else ""

    icons = script.read_text(encoding="utf-8")
    script.write_text(ICON.sub(if_in_use, icons), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("builder-inited", fetch_figures_late)
    # After the themes and the extensions, which add to the page at the default priority of 500.
    app.connect("html-page-context", mend_page, priority=900)
    app.connect("build-finished", keep_icons_in_use, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
