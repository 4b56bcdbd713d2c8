"""The data of the pictures that move is that of the runs, where they are on this computer."""

from pathlib import Path

import pytest

from opdlab.errors import OpdlabError

SCRIPT = "scripts/explorable_data.py"
EXPLORE = Path(__file__).resolve().parents[2] / "book" / "_static" / "explore"


@pytest.fixture
def runs(script):
    try:
        return script.recorded_runs()
    except OpdlabError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", ["weights", "token", "subspace"])
def test_the_committed_data_is_what_the_runs_give(script, runs, name):
    assert (EXPLORE / f"{name}-data.js").read_text() == script.script_of(name, runs)
