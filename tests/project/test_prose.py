"""Sentences of the book that state results: each is true of the records, and would be found out if they said otherwise.

Every chapter is run four times: with the records as they are, with OPD and matched SFT exchanged in them, with every
effect reversed, and with what is alike made unlike. What a chapter states must hold in the first, and fail in one of
the others at least, so that no condition is one that always holds.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import code_of, needed

from opdlab.claims import sentences
from opdlab.lab import records

BOOK = Path(__file__).resolve().parents[2] / "book"
STATING = [path for path in sorted(BOOK.glob("*.ipynb")) if "states(" in path.read_text()]
# What a null or another view adds to the name of the quantity it belongs to.
VIEW = re.compile(r"(_(null|bf16|locked|ruler|noise|matched|rest|interval|random|share))+$")
# What says which row it is.
KEYS = {
    "seed",
    "step",
    "progress",
    "k",
    "mask_rank",
    "layer",
    "parameters",
    "rows",
    "cols",
    "matrices",
    "direction",
    "final",
    # shares of updates, in the landscape
    "opd",
    "rlvr",
    "sft_matched",
    "sft",
    "opd_next",
    "factor",
}
TABLES = ("history", "evaluations", "matrices", "trajectory", "runs")


def exchanged(table: pd.DataFrame) -> pd.DataFrame:
    """Call OPD matched SFT, and the reverse."""
    other = {"opd": "sft_matched", "sft_matched": "opd"}
    arms = [column for column in ("arm", "other") if column in table]
    return table.assign(**{column: table[column].replace(other) for column in arms})


def reversed_(table: pd.DataFrame) -> pd.DataFrame:
    """Turn all quantities round their middle, each with its nulls: what was above, or rose, is below, or falls."""
    numbers = [name for name in table.select_dtypes("number") if name not in KEYS]
    families = pd.Series(numbers, index=numbers).map(lambda name: VIEW.sub("", name))
    turned = table.copy()
    for _, columns in families.groupby(families):
        values = table[list(columns.index)].astype(float)
        flat = values.to_numpy().ravel()
        flat = flat[np.isfinite(flat)]
        if len(flat) and (flat > 0).all():
            turned[list(columns.index)] = np.exp(np.log(flat).max() + np.log(flat).min()) / values
        elif len(flat):
            turned[list(columns.index)] = flat.max() + flat.min() - values
    return turned


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """Multiply all quantities, but for their nulls, by a factor of each arm's own: what was near is not any more."""
    if "arm" not in table:
        return table
    factors = table["arm"].map({arm: 1.6**i for i, arm in enumerate(sorted(table["arm"].unique()))})
    numbers = [name for name in table.select_dtypes("number") if name not in KEYS and not VIEW.search(name)]
    return table.assign(**{name: table[name] * factors for name in numbers})


def changed(found: records.Records, change) -> records.Records:
    parts = {name: change(getattr(found, name)) for name in TABLES if name != "runs"}
    # A notebook may add columns to any of them.
    parts["runs"] = found.runs.copy()
    return replace(found, **parts, analyses={name: change(table) for name, table in found.analyses.items()})


def run(path: Path, change, monkeypatch, load) -> dict[tuple[int, int], tuple[str, bool]]:
    """Run a notebook, and return what it states: by cell and number the sentence, and whether it holds."""
    stated: dict = {}
    cell_number = 0

    def collect(*said, at="tiny"):
        for sentence, holds in zip(said[::2], said[1::2], strict=True):
            stated[cell_number, sum(key[0] == cell_number for key in stated)] = (sentence, bool(holds))
        return ""

    with monkeypatch.context() as patch:
        patch.setenv("OPDLAB_SCALE", "tiny")
        patch.chdir(path.parent)
        patch.setattr(sentences, "states", collect)
        patch.setattr(records, "load", lambda *args, **options: changed(load(*args, **options), change))
        patch.setattr(plt, "show", partial(plt.close, "all"))
        names: dict = {"__name__": "chapter", "display": lambda *shown: None}
        code = code_of(path)
        for cell_number in sorted(needed(code, {i for i, source in enumerate(code) if "states(" in source})):
            try:
                exec(compile(code[cell_number], f"{path.name}, cell {cell_number}", "exec"), names)
            except Exception:
                if change is unchanged:
                    raise
    plt.close("all")
    return stated


def unchanged(table: pd.DataFrame) -> pd.DataFrame:
    return table.copy()


def faults(path: Path, monkeypatch) -> list[str]:
    """Return the sentences that are false, or that no change of the records would make false."""
    read: dict = {}  # the four runs ask for the same records
    from_disk = records.load

    def load(*args, **options):
        key = repr((args, options))
        if key not in read:
            read[key] = from_disk(*args, **options)
        return read[key]

    told = run(path, unchanged, monkeypatch, load)
    others = [run(path, change, monkeypatch, load) for change in (exchanged, reversed_, spread)]
    found = []
    for where, (sentence, holds) in told.items():
        # A cell that cannot be run on changed records states nothing any more.
        stays = [where in other and other[where][1] for other in others]
        if not holds:
            found.append(f"is not so: {sentence}")
        elif all(stays):
            found.append(f"holds whatever the records say: {sentence}")
    return found


@pytest.mark.parametrize("path", STATING, ids=lambda path: path.stem)
def test_every_sentence_would_be_found_out(path, monkeypatch):
    assert faults(path, monkeypatch) == []


def test_conditions_that_prove_nothing_are_found(tmp_path, monkeypatch):
    cells = [
        "from opdlab.claims.sentences import states\nfrom opdlab.lab.records import load\n"
        "records = load('tiny', ['opd', 'sft_matched', 'rlvr'])\n"
        "ends = records.matrices.groupby('arm')['frobenius'].mean()",
        "states('OPD moves further than RLVR.', ends['opd'] > ends['rlvr'], 'All move.', (ends > 0).all())",
        "states('OPD moves not at all.', ends['opd'] == 0)\nstates('One is one.', True, at='')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "chapter.ipynb")
    assert faults(tmp_path / "chapter.ipynb", monkeypatch) == [
        "holds whatever the records say: All move.",
        "is not so: OPD moves not at all.",
        "holds whatever the records say: One is one.",
    ]
