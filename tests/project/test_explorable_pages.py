"""book/_ext/explorables.py: a page gets the scripts of the pictures on it, and no other page gets one."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

SCRIPT = "book/_ext/explorables.py"
ROOT = Path(__file__).resolve().parents[2]
EXPLORE = ROOT / "book" / "_static" / "explore"
KILOBYTES = 200  # of a page's scripts in all

CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["explorables"]
html_theme = "basic"
html_static_path = [{str(ROOT / "book" / "_static")!r}]
"""
PLACEHOLDER = '<figure class="explorable" data-name="{}"><img alt=""><figcaption></figcaption></figure>'


def test_scripts_come_in_the_order_in_which_they_run_and_none_twice(script):
    body = "".join(map(PLACEHOLDER.format, ("size", "bf16", "size")))
    assert script.scripts_of(body) == ["weights-data", "linalg", "stage", "size", "bf16"]
    assert script.scripts_of(PLACEHOLDER.format("ellipse")) == ["linalg", "stage", "ellipse"]
    assert script.scripts_of('<figure class="diagram">') == []


def test_a_picture_without_a_script_is_named(script):
    assert script.scripts_of('the source: class="explorable" data-name="<span>{name}</span>"') == []
    with pytest.raises(KeyError, match="sizes"):
        script.scripts_of(PLACEHOLDER.format("sizes"))


def test_every_picture_has_its_script_its_data_and_its_still(script):
    pictures = {path.stem for path in EXPLORE.glob("*.png")}
    assert pictures == set(script.DATA)
    wanted = {*script.SHARED, *pictures, *(file for files in script.DATA.values() for file in files)}
    assert {path.stem for path in EXPLORE.glob("*.js")} == wanted


def outputs_of(notebook):
    """Return the HTML that a page shows."""
    cells = nbformat.read(notebook, as_version=4).cells
    shown = (output for cell in cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.get("data", {}).get("text/html", "") for output in shown)


PAGES = {path.stem: outputs_of(path) for path in sorted((ROOT / "book").glob("*.ipynb"))}


def test_every_picture_is_on_a_page(script):
    on = {name for body in PAGES.values() for name in script.PLACEHOLDER.findall(body)}
    assert on == {path.stem for path in EXPLORE.glob("*.png")}


@pytest.mark.parametrize("page", PAGES)
def test_the_scripts_of_a_page_are_light(script, page):
    scripts = script.scripts_of(PAGES[page])
    assert sum((EXPLORE / f"{name}.js").stat().st_size for name in scripts) < 1000 * KILOBYTES


def test_pages_are_built_with_their_own_scripts_alone(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "conf.py").write_text(CONFIG)
    raw = f".. raw:: html\n\n   {PLACEHOLDER.format('ellipse')}\n"
    pages = {"index": "Start\n=====\n\n.. toctree::\n\n   moving\n   still\n", "moving": f"Moving\n======\n\n{raw}"}
    for name, text in (pages | {"still": "Still\n=====\n"}).items():
        (source / f"{name}.rst").write_text(text)
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", source, site], check=True)
    found = {name: re.findall(r"_static/explore/([\w.-]+)\?", (site / f"{name}.html").read_text()) for name in pages}
    assert found == {"index": [], "moving": ["explore.css", "linalg.js", "stage.js", "ellipse.js"]}
    assert "explore/" not in (site / "still.html").read_text()
    assert (site / "_static" / "explore" / "ellipse.js").is_file()
