"""The net under the chapters: with the Makefile's options, nbval passes what holds and fails what does not."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import v4, write

ROOT = Path(__file__).resolve().parents[2]


def makefile_options():
    """Return the words that ``make chapters-tiny`` gives to pytest, without the folder of the chapters."""
    makefile = (ROOT / "Makefile").read_text()
    side_by_side, common = (
        shlex.split(re.search(rf"^{of} (.*)$", makefile, re.MULTILINE)[1])
        for of in (r"PYTEST := .* -m pytest", r"NBVAL := .* \$\(PYTEST\)")
    )
    at_tiny = shlex.split(re.search(r"OPDLAB_SCALE=tiny \$\(NBVAL\) (.*)$", makefile, re.MULTILINE)[1])
    return [*side_by_side, *(word for word in common if word != "book"), *at_tiny]


def cell(source, stored, *tags):
    output = v4.new_output("stream", name="stdout", text=stored)
    return v4.new_code_cell(source, outputs=[output], execution_count=1, metadata={"tags": list(tags)})


def chapter():
    """A chapter in small: what may differ, and what may not."""
    cells = [
        cell("numbers = [1, 2, 3]\nprint(id(numbers))", "12345\n"),  # lax: other runs may print something else
        cell(
            "print('the mean is', sum(numbers) / 3, 'after 2.5 s')", "the mean is 2.0 after 7 s\n", "nbval-check-output"
        ),
    ]
    return v4.new_notebook(cells=cells)


def raise_an_error(notebook):
    notebook.cells[0].source += "\nnumbers[3]"


def state_another_fact(notebook):
    notebook.cells[1].outputs[0].text = "the mean is 2.1 after 7 s\n"


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (lambda notebook: None, 0, "2 passed"),
        (raise_an_error, 1, "IndexError"),
        (state_another_fact, 1, "the mean is 2.1"),
    ],
    ids=["as committed", "a cell raises", "a fact does not hold"],
)
def test_make_fails_where_a_chapter_does(tmp_path, change, status, said):
    notebook = chapter()
    change(notebook)
    write(notebook, tmp_path / "chapter.ipynb")
    configuration = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", *makefile_options(), *configuration, str(tmp_path / "chapter.ipynb")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr


def test_the_options_are_those_that_the_page_for_contributors_names():
    options = " ".join(makefile_options())
    for named in ("--nbval-lax", "--nbval-cell-timeout 600", "--nbval-sanitize-with nbval_sanitize.cfg"):
        assert named in options
        assert named.split()[0] in (ROOT / "CONTRIBUTING.md").read_text()
