"""The commands of the page "Experiments to run": the real parser takes them, and all that they name is there."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from conftest import needs_tiny

from opdlab.cli import _parser
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.grid import RECORDED
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import SCALES, get_scale
from opdlab.lab.scheduler import missing_records

ROOT = Path(__file__).resolve().parents[2]
PAGE = nbformat.read(ROOT / "book" / "experiments.ipynb", as_version=4)


def texts():
    """Yield all that the page says: its text, and what its cells show as text."""
    for cell in PAGE.cells:
        if cell.cell_type == "markdown":
            yield cell.source
        else:
            yield from (
                output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})
            )


def commands():
    """Return the commands of the page, in order and once each."""
    return list(dict.fromkeys(found for text in texts() for found in re.findall(r"`(opdlab [^`]+)`", text)))


def table():
    """Return the rows of the table of experiments, as lists of cells."""
    (text,) = (text for text in texts() if text.startswith("| experiment |"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]


@pytest.mark.parametrize("command", commands())
def test_the_command_is_one(command):
    program, *words = shlex.split(command)
    assert program == "opdlab"
    options = _parser().parse_args(words)  # which exits if it is none
    scale = get_scale(getattr(options, "scale", None) or "tiny")
    assert scale.name in SCALES
    arms = getattr(options, "arm", None) or []
    arms = [arms] if isinstance(arms, str) else arms
    assert set(arms) <= set(RECORDED)
    assert len(set(arms)) == len(arms)
    analyses = getattr(options, "analysis", None) or []
    assert set(analyses) <= set(ANALYSES)
    for path in (getattr(options, "base", None), *(getattr(options, "tuned", None) or ())):
        # In capitals: the reader's own.
        assert path is None or path.isupper() or (ROOT / path).is_dir()


@needs_tiny
@pytest.mark.parametrize("command", [command for command in commands() if "reproduce" in command])
def test_what_is_reproduced_is_recorded(command):
    options = _parser().parse_args(shlex.split(command)[1:])
    names = (*(options.arm or ()), *(options.analysis or ()))
    assert not missing_records(names, tuple(options.seed or ()), Laboratory.at(options.scale or "tiny", ROOT))


def test_every_row_is_complete_and_its_links_lead_somewhere():
    rows = table()
    assert len(rows) >= 12
    for row in rows:
        title, command, _, look, expected = row
        assert "`opdlab " in command, title
        assert expected, title
        (target,) = re.findall(r"\]\(([^)]+)\)", look)
        assert (ROOT / "book" / target).is_file(), title
    assert len({row[0] for row in rows}) == len(rows)
