"""The committed chapters: executed as a whole, clean, described, and reachable."""

import base64
import importlib.util
import re
import struct
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from opdlab.claims import FINDINGS

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if re.match(r"\d\d_|(measure|train)_your_own", path.stem)]
# The chapters on findings, which have the same sections at their ends.
FINDING_PAGES = sorted({page for _, page in FINDINGS.values()} | {"05_place"})

# Home folders, temporary files, Windows drives; and this very clone, wherever it lies.
TOP_FOLDERS = ("home", "Users", "root", "tmp", "private", "opt")
MACHINE_PATH = re.compile(rf"(?<![\w.])/({'|'.join(TOP_FOLDERS)})/\w|\b[A-Z]:\\\w|{re.escape(str(ROOT))}")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    """One chapter."""
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    """Yield number and cell of the code cells, counted as readers see them."""
    return enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1)


def outputs(notebook):
    """Yield the number of the cell and the output, for every output."""
    for number, cell in code_cells(notebook):
        for output in cell.outputs:
            yield number, output


def images(notebook):
    """Yield number, cell and data of every image."""
    for number, cell in code_cells(notebook):
        for output in cell.outputs:
            for kind, data in output.get("data", {}).items():
                if kind.startswith("image/"):
                    yield number, cell, kind, data


def text_of(output):
    """Return all text of an output; images are not text."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(str(v) for k, v in data.items() if not k.startswith("image/"))])


def test_every_cell_was_run_from_top_to_bottom(notebook):
    assert [(number, cell.execution_count) for number, cell in code_cells(notebook)] == [
        (number, number) for number, _ in code_cells(notebook)
    ]


def test_no_errors_and_nothing_on_stderr(notebook):
    assert [(number, o.ename) for number, o in outputs(notebook) if o.output_type == "error"] == []
    assert [(number, o.text) for number, o in outputs(notebook) if o.get("name") == "stderr"] == []


def test_every_image_has_an_alternative_text_and_a_caption(notebook):
    for number, cell, _, _ in images(notebook):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt.split()) >= 5, f"code cell {number}: say in mystnb.image.alt what the figure shows"
        # The caption is a paragraph of the page, so that it is there in plain Jupyter, Colab and GitHub too.
        after = notebook.cells[notebook.cells.index(cell) + 1]
        assert after.cell_type == "markdown", f"code cell {number}: a caption comes after a figure"
        assert re.match(r"\*\*(The figure|Figure [\w.]+)\.\*\* (\S+\s+){5,}", after.source), (
            f"code cell {number}: {after.source[:40]}"
        )


def test_one_figure_per_cell(notebook):
    # Caption, number and alternative text belong to the cell.
    numbers = [number for number, *_ in images(notebook)]
    assert sorted(set(numbers)) == numbers


def test_nothing_in_it_depends_on_the_machine(notebook):
    for number, output in outputs(notebook):
        text = text_of(output)
        assert not MACHINE_PATH.search(text), f"code cell {number} shows a path of the machine"
        assert not re.search(r"\b0x[0-9a-f]{6,}", text), f"code cell {number} shows the address of an object"
    for cell in notebook.cells:
        assert not MACHINE_PATH.search(cell.source)
    for number, _, kind, data in images(notebook):
        if kind == "image/png":
            stamps = {"tEXt", "iTXt", "zTXt", "tIME"} & set(png_chunks(base64.b64decode(data)))
            assert not stamps, f"the figure of code cell {number} names its program or the time"


def png_chunks(png):
    """Return the names of the chunks of a PNG file."""
    names, position = [], 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        names.append(png[position + 4 : position + 8].decode("ascii"))
        position += 12 + length
    return names


def test_metadata_is_what_the_executor_writes(notebook):
    assert notebook.metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "version" not in notebook.metadata["language_info"]
    for cell in notebook.cells:
        # The last two fold code in Jupyter and in Colab.
        assert set(cell.metadata) <= {"mystnb", "tags", "jupyter", "cellView"}


def test_it_states_facts_that_are_checked(notebook):
    checked = [cell for _, cell in code_cells(notebook) if "nbval-check-output" in cell.metadata.get("tags", [])]
    for cell in checked:
        assert cell.outputs, f"nothing is compared in: {cell.source.splitlines()[0]}"
        # nbval never compares images, so a fact must be text.
        assert all(text_of(output).strip() for output in cell.outputs)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_the_skeleton_of_all_chapters(path):
    prose = prose_of(path)
    assert re.match(r"# .+\n\n\*About \d+ minutes\. .*\]\(.+\).*\*\n", prose), (
        "say how long it takes, and what to read before"
    )
    headings = re.findall(r"^(#+) (.+)", re.sub(r"```.*?```", "", prose, flags=re.S), re.M)
    levels = [len(marks) for marks, _ in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), "a heading skips a level"
    ends = [title for marks, title in headings if marks == "##"][-2:]
    assert ends == ["Exercises", "Further reading"]
    end = prose[prose.index("\n## Further reading") :]
    assert "](bibliography.md)" in end
    assert re.search(r"^Next: .*\]\(\w+\.(ipynb|md)\)", end, re.M), "say where to read on"


@pytest.mark.parametrize("name", FINDING_PAGES)
def test_a_chapter_on_a_finding_says_what_was_found_and_what_it_means(name):
    cells = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    prose = prose_of(ROOT / "book" / f"{name}.ipynb")
    assert sum("**In short.**" in source for source in code) == 1
    assert any("**What we see.**" in source for source in code)
    assert any("plots.experiment(" in source for source in code)
    assert '<details class="predict">' in prose and "What would have changed our mind" in prose
    titles = re.findall(r"^## (.+)", prose, re.M)
    assert titles[-4:] == ["What this means", "How the paper differs", "Exercises", "Further reading"]
    assert "What the paper says" in titles


def prose_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_it_sets_itself_up_where_opdlab_is_missing_and_leaves_torch_alone(notebook):
    _, first = next(code_cells(notebook))
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    assert f"git clone --quiet --depth 1 {address} " in first.source
    assert "pip install" in first.source and not re.search(
        r"pip install.*(torch|requirements|upgrade|-U)", first.source
    )
    # One cell for all, which the site leaves out.
    landing = next(code_cells(nbformat.read(ROOT / "book" / "index.ipynb", as_version=4)))[1]
    assert first.source == landing.source and first.metadata["tags"] == ["remove-cell"]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("cloned", [False, True])
def test_what_the_set_up_does(missing, cloned, tmp_path, monkeypatch):
    """On Colab, Kaggle and anywhere else; where opdlab is there, nothing."""
    source = next(code_cells(nbformat.read(ROOT / "book" / "index.ipynb", as_version=4)))[1].source
    asked, clone = [], tmp_path / "opdlab-book"
    shell = SimpleNamespace(
        system=asked.append, run_line_magic=lambda name, line: asked.append(f"%{name} {line}"), user_ns={}
    )
    if cloned:
        clone.mkdir()
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing else "found")
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: shell})
    # IPython puts the value of {clone} in when it runs a line.
    git = "git clone --quiet --depth 1 https://github.com/opdlab/opdlab {clone}"
    pip = "%pip install --quiet --editable {clone}"
    assert asked == ([] if not missing else [pip] if cloned else [git, pip])
    assert (sys.path[0] == str(clone)) == missing


def test_it_reads_well_in_plain_jupyter(notebook):
    # Roles, directives, targets, attributes and substitutions, which only MyST understands.
    myst_only = re.compile(r"\{[a-z:-]+\}`|^(`{3,}|:{3,})\s*\{|^\([\w-]+\)=\s*$|\{\{|^\{[.#]", re.MULTILINE)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = myst_only.search(cell.source)
            assert not found, f"only the site understands {found.group()!r} in: {cell.source.splitlines()[0]}"


def test_paths_of_machines_are_recognised():
    # Put together here, so that this file has none itself.
    for path in (*(f"in /{top}/someone" for top in TOP_FOLDERS), "C:" + "\\Users", f"'{ROOT}'"):
        assert MACHINE_PATH.search(path), path
    for text in ("runs/tiny/opd", *(f"example.org/{top}/page" for top in TOP_FOLDERS), "/" + "homework/x"):
        assert not MACHINE_PATH.search(text), text


def test_numbers_of_figures_are_used_once():
    for path in NOTEBOOKS:
        numbers = re.findall(r"^\*\*(Figure [\w.]+)\.\*\*", prose_of(path), re.M)
        assert sorted(set(numbers)) == sorted(numbers), path.stem


def test_the_table_of_contents_lists_all_pages_and_no_others():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    pages = [path for path in (ROOT / "book").rglob("*") if path.suffix in (".ipynb", ".md")]
    present = [str(path.relative_to(ROOT).with_suffix("")) for path in pages if ".ipynb_checkpoints" not in path.parts]
    assert sorted(listed) == sorted(present)
