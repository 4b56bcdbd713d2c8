"""Give a page the scripts of the pictures that move on it, and no other page.

A picture is where a notebook's output has the placeholder of opdlab.figures.explorable. Its script is of the same name,
in book/_static/explore; what it needs beside is listed here.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

FOLDER = "explore"
PLACEHOLDER = re.compile(r'class="explorable" data-name="([a-z0-9]+)"')
#: Which data each picture shows, by the names of the scripts; and what all of them need.
DATA = {
    "size": ["weights-data"],
    "bf16": ["weights-data"],
    "token": ["token-data"],
    "subspace": ["subspace-data"],
    "ellipse": [],
}
SHARED = ["linalg", "stage"]


def scripts_of(body: str) -> list[str]:
    """Return the scripts of the pictures in a page, in the order in which they must run, none twice."""
    names = list(dict.fromkeys(PLACEHOLDER.findall(body)))
    data = dict.fromkeys(file for name in names for file in DATA[name])
    return [*data, *SHARED, *names] if names else []


def add_scripts(app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    """Add the scripts to one page, just before it is written."""
    scripts = scripts_of(context.get("body", ""))
    if scripts:
        app.add_css_file(f"{FOLDER}/explore.css")
    for script in scripts:
        app.add_js_file(f"{FOLDER}/{script}.js", defer="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
