"""Sentences of the book that state results: each is true of the records, and would be found out if they said otherwise.

Every chapter is run four times: with the records as they are, with OPD and matched SFT exchanged in them, with every
effect reversed, and with what is alike made unlike. What a chapter states must hold in the first, and be found false in
one of the others at least, so that no condition is one that always holds.
"""

import re
import warnings
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
    """Call OPD matched SFT, and the reverse, where a table has both; analyses name them in other ways, too."""
    if "basis" in table:
        return _exchanged_span(table)
    if "path" in table:
        return _exchanged_landscape(table)
    found = table.copy()
    for columns, names in ((("arm", "other"), ("opd", "sft_matched")), (("label",), ("OPD", "matched SFT"))):
        columns = [column for column in columns if column in table]
        if set(names) <= {name for column in columns for name in table[column]}:
            found[columns] = table[columns].replace(dict(zip(names, reversed(names), strict=True)))
    return found


def _exchanged_landscape(table: pd.DataFrame) -> pd.DataFrame:
    """Exchange how much of each update is added; the plane of OPD and RLVR and OPD's next seed have no counterpart."""
    names = {"opd": "sft_matched", "sft_matched": "opd"}
    ways = {"opd to rlvr": "sft_matched to rlvr", "sft_matched to rlvr": "opd to rlvr"}
    other = table.rename(columns=names)[list(table)].assign(path=table["path"].replace(names | ways))
    alone = table["path"].isin(["plane", "opd to opd of the next seed"])
    return other.where(~alone, table)


def _exchanged_span(table: pd.DataFrame) -> pd.DataFrame:
    """Exchange the two updates in their pairs with RLVR, as far as the cosines of the record tell."""
    known = table.set_index(["seed", "arm", "basis"])
    found = known.copy()
    for at in known.index:
        seed, arm, basis = at
        if arm != "opd" or "RLVR" not in basis:
            continue
        row = known.loc[at].copy()
        a, b, c = (row[f"cosine_{of}"] for of in ("first", "second", "between"))
        # The lengths of OPD's update in those of the first and of the second of the pair.
        first = row["coefficient_first"] * (1 - c**2) / (a - b * c)
        second = row["coefficient_second"] * (1 - c**2) / (b - a * c)
        if basis == "SFT and RLVR":
            # Matched SFT's cosine with SFT is not recorded, so it is taken to be OPD's.
            b = known.loc[(seed, arm, "matched SFT and RLVR"), "cosine_between"]
        else:
            b, c, first, second = c, b, 1 / first, second / first
            # OPD's other estimator in OPD's place.
            full = known.loc[(seed, "opd_full", basis)]
            row["outside_own"] = _outside(*full[["cosine_first", "cosine_between", "cosine_second"]])
        row[["cosine_first", "cosine_second", "cosine_between"]] = a, b, c
        row["coefficient_first"] = first * (a - b * c) / (1 - c**2)
        row["coefficient_second"] = second * (b - a * c) / (1 - c**2)
        row["outside"] = _outside(a, b, c)
        row["residual_by_matrix"] *= np.sqrt(row["outside"]) / row["residual"]
        row["residual"] = np.sqrt(row["outside"])
        found.loc[at] = row
    return found.reset_index()[list(table)]


def _outside(a: float, b: float, c: float) -> float:
    """Return what two updates leave of a third one's squared norm: its cosines with both, and the one between these."""
    return 1 - (a**2 + b**2 - 2 * a * b * c) / (1 - c**2)


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
    """Return the sentences that are false, or that no change of the records makes false.

    Sentences on OPD and matched SFT that say the same of both cannot be found out by exchanging them: they are shown
    among the warnings, to be read.
    """
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
        # A cell that cannot be run on changed records says nothing, and so proves nothing.
        exchange, *_ = stays = [where not in other or other[where][1] for other in others]
        if not holds:
            found.append(f"is not so: {sentence}")
        elif all(stays):
            found.append(f"holds whatever the records say: {sentence}")
        elif exchange and re.search(r"\bOPD\b", sentence) and re.search(r"[Mm]atched SFT", sentence):
            warnings.warn(f"{path.stem}: with OPD and matched SFT exchanged it is true, too: {sentence}", stacklevel=2)
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
        "middle = ends.map(float)\nassert middle['opd'] > middle['rlvr']",
        "states('OPD has moved.', middle['opd'] > 0)\ndel middle",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "chapter.ipynb")
    assert faults(tmp_path / "chapter.ipynb", monkeypatch) == [
        "holds whatever the records say: All move.",
        "is not so: OPD moves not at all.",
        "holds whatever the records say: One is one.",
        "holds whatever the records say: OPD has moved.",
    ]


def test_what_is_said_of_both_is_shown(tmp_path, monkeypatch):
    cell = (
        "from opdlab.claims.sentences import states\nfrom opdlab.lab.records import load\n"
        "ends = load('tiny', ['opd', 'sft_matched', 'rlvr']).matrices.groupby('arm')['frobenius'].mean()\n"
        "states('OPD and matched SFT move further than RLVR.', ends.idxmin() == 'rlvr', "
        "'OPD moves less far than matched SFT.', ends['opd'] < ends['sft_matched'])"
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), tmp_path / "chapter.ipynb")
    with pytest.warns(UserWarning, match="OPD and matched SFT move further than RLVR") as shown:
        assert faults(tmp_path / "chapter.ipynb", monkeypatch) == []
    assert len(shown) == 1


def test_the_exchange_reaches_pairs():
    cosines = {"cosine_first": [0.9, 0.87], "cosine_second": [0.6, 0.55], "cosine_between": [0.74, 0.74]}
    span = pd.DataFrame({"seed": 0, "arm": ["opd", "opd_full"], "basis": "matched SFT and RLVR"} | cosines)
    left = [_outside(*row) for row in span[list(cosines)].to_numpy()]
    # Lengths of 2 for OPD, 4 for matched SFT and 1 for RLVR.
    first, second = (np.linalg.solve([[1, 0.74], [0.74, 1]], [a, b]) for a, b in ((0.9, 0.6), (0.87, 0.55)))
    span = span.assign(
        coefficient_first=[first[0] / 2, second[0] / 2], coefficient_second=[2 * first[1], 2 * second[1]]
    )
    span = span.assign(outside=left, outside_own=0.05, residual=np.sqrt(left), residual_by_matrix=np.sqrt(left))
    other = exchanged(span).iloc[0]
    assert other[["cosine_first", "cosine_second", "cosine_between"]].tolist() == [0.9, 0.74, 0.6]
    share, of_rlvr = np.linalg.solve([[1, 0.6], [0.6, 1]], [0.9, 0.74])
    assert other["coefficient_first"] == pytest.approx(2 * share)
    assert other["coefficient_second"] == pytest.approx(4 * of_rlvr)
    assert other["outside"] == pytest.approx(other["residual"] ** 2) == pytest.approx(_outside(0.9, 0.74, 0.6))
    assert other["outside_own"] == pytest.approx(_outside(0.87, 0.74, 0.55))

    land = {"path": ["opd", "opd to rlvr", "opd to sft_matched", "plane"], "opd": [1.0, 0.25, 0.25, 0.5]}
    land = pd.DataFrame(land | {"sft_matched": [0, 0, 0.75, 0], "rlvr": [0, 0.75, 0, 0.5], "greedy": [1.0, 2, 3, 4]})
    other = exchanged(land).set_index("path")
    assert other.loc["sft_matched", "sft_matched"] == 1 and other.loc["sft_matched", "opd"] == 0
    assert other.loc["sft_matched to rlvr", ["sft_matched", "rlvr", "greedy"]].tolist() == [0.25, 0.75, 2]
    assert other.loc["opd to sft_matched", ["opd", "sft_matched"]].tolist() == [0.75, 0.25]
    assert other.loc["plane", "opd"] == 0.5

    both = pd.DataFrame({"arm": ["opd", "sft_matched", "rlvr"], "other": ["rlvr", "rlvr", "opd"]})
    assert exchanged(both)["arm"].tolist() == ["sft_matched", "opd", "rlvr"]
