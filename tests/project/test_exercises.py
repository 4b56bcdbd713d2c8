"""Exercises of the book: each says how hard and long it is, and its solution passes its check, as nothing else does."""

import re
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from conftest import code_of, needed

BOOK = Path(__file__).resolve().parents[2] / "book"
TITLE = re.compile(r"^### \d+(\.\d+)? .+ \((easy|medium|hard|project), \d+ minutes(, pencil)?\)$", re.M)
SOLUTION = re.compile(r'<details class="solution">.*?</details>', re.S)
WITH = [path for path in sorted(BOOK.glob("*.ipynb")) if "## Exercises" in path.read_text()]


@pytest.fixture(autouse=True)
def page_options():
    """What a page sets for its tables does not outlive it."""
    with pd.option_context("display.precision", pd.get_option("display.precision")):
        yield


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def exercises(path):
    """Yield, for each exercise, its title, the number of its check among the cells, and the code of its solution."""
    title = check = None
    asked = False
    for number, cell in enumerate(cells_of(path)):
        if cell.cell_type == "code":
            if asked and re.search(r"^check\(", cell.source, re.M):
                check = number
            continue
        for part in re.split(r"(?=^## |^### |<details class=\"solution\">)", cell.source, flags=re.M):
            if part.startswith("## "):
                asked = part.startswith("## Exercises")
            elif asked and part.startswith("### "):
                title, check = part.splitlines()[0], None
            elif asked and part.startswith("<details"):
                found = re.search(r"```python\n(.*?)```", part, re.S)
                yield title, check, found[1] if found else ""


@pytest.mark.parametrize("path", WITH, ids=lambda path: path.stem)
def test_exercises_say_how_hard_they_are_and_have_a_solution(path):
    prose = "\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "markdown")
    asked = prose[prose.index("## Exercises") : prose.index("## Further reading")]
    titles = re.findall(r"^### .+", asked, re.M)
    assert 2 <= len(titles) <= 5
    assert [title for title in titles if not TITLE.match(title)] == []
    assert [title for title, *_ in exercises(path)] == titles


@pytest.mark.parametrize("path", WITH, ids=lambda path: path.stem)
def test_solutions_pass_their_checks(path, monkeypatch):
    monkeypatch.setenv("OPDLAB_SCALE", "tiny")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(plt, "show", partial(plt.close, "all"))
    checks = {check: (title, solution) for title, check, solution in exercises(path) if check is not None}
    names = {"__name__": "chapter", "display": lambda *shown: None}
    code = code_of(path)
    read = [f"{source}\n{checks[number][1]}" if number in checks else source for number, source in enumerate(code)]
    for number in sorted(needed(read, checks.keys())):
        if number in checks:
            title, solution = checks[number]
            # The last line is the check itself, whose value a notebook shows.
            *before, last = re.split(r"^(?=check\()", code[number], flags=re.M)
            exec("".join(before), names)
            assert "Not answered yet" in eval(last, names), title
            exec(solution, names)
            exec("".join(before), names)
            assert eval(last, names) == "Right.", title
        else:
            exec(compile(code[number], f"{path.name}, cell {number}", "exec"), names)
    plt.close("all")
    assert checks
