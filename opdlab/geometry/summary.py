"""Summaries: what a table of measurements says about a whole model, a block or a module, as means over its matrices.

A mean stands beside that of its null or, where size explains it, of the norm-matched update and of the ruler.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

import pandas as pd

from opdlab.geometry import enrichment, feasible_range
from opdlab.geometry.matrices import LAYERS, TOWERS

_RANKS = ("stable_rank", "effective_rank", "effective_rank_squared", "top_energy", "hill")
_MASKS = [f"{star}_overlap_a{alpha}" for alpha in (30, 50) for star in ("principal", "low", "principal_only")]
# The columns that a summary is about, each with its null.
SUMMARY: dict[str, str | None] = {
    **dict.fromkeys(("sparsity", "sparsity_absolute", "sparsity_relative", "density")),
    **dict.fromkeys(("frobenius", "relative_norm", "relative_operator_norm", "nss")),
    **dict.fromkeys(f"angle_{side}_{value}" for value in ("mean", "max") for side in ("left", "right")),
    **{column: f"{column}_null" for column in _RANKS},
    **{f"energy_{side}": f"energy_{side}_random" for side in ("left", "right", "both")},
    **{column: f"{column}_null" for column in _MASKS},
}
# Columns that say which matrix a row is about and how it was measured, not what was found.
_NOT_MEASURED = ("layer", "rows", "cols", "matrices", "parameters", "k", "mask_rank", "matched_norm")


def means(table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str] = ()) -> pd.DataFrame:
    """Average over the rows that agree in ``keys``: sparsity by parameters, everything else with all matrices alike.

    A row of ``table`` is one matrix, with its number of ``parameters``, or a group that was averaged before, with the
    number of its ``matrices`` as well. Without keys all rows are one group; without columns everything that was
    measured is averaged, where what is NaN for a matrix does not count. The groups stand in the order of their first
    rows, with the totals ``matrices`` and ``parameters``. A matrix that did not move, as most of a LoRA do not, counts
    in the sparsity alone, unless none of its group did.

    Source: 2606.07082, Appendix C.3.

    >>> table = pd.DataFrame({"step": [1, 1], "parameters": [100, 300], "sparsity": [1.0, 0.5], "nss": [1.0, nan]})
    >>> means(table, ["step"])
       step  sparsity  nss  matrices  parameters
    0     1     0.625  1.0         2         400
    """
    numbers = list(columns) or table.select_dtypes("number").columns.difference([*keys, *_NOT_MEASURED], sort=False)
    groups = [table[key] for key in keys] or [pd.Series(0, table.index)]
    moved = _moved(table, groups)
    weights = {name: _weights(table, name).where(moved | name.startswith("sparsity"), 0) for name in numbers}
    parts = {
        "sum": pd.DataFrame({name: table[name] * weights[name] for name in numbers}),
        # What is undefined for a matrix does not count in the mean.
        "weight": pd.DataFrame({name: weights[name].where(table[name].notna(), 0) for name in numbers}),
        "size": pd.DataFrame({"matrices": _weights(table, "matrices"), "parameters": table["parameters"]}),
    }
    totals = pd.concat(parts, axis=1).groupby(groups, sort=False).sum()
    averaged = totals["sum"] / totals["weight"].where(totals["weight"] > 0)
    return pd.concat([averaged, totals["size"]], axis=1).reset_index(drop=not keys)


def of_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of attention and MLP of the language model, the matrices that the paper is about.

    A model without attention and MLP has those of its mixers instead, or else all matrices of its layers.
    """
    for blocks in (LAYERS, ("mixer",)):
        if (chosen := table["block"].isin(blocks)).any():
            return table[chosen]
    return _in_layers(table)


def _in_layers(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["layer"] >= 0) & (table["rows"] > 1) & (table["cols"] > 1)]


def means_over(table: pd.DataFrame) -> str:
    """Return what the means of a table of measurements are over, in words."""
    layers = of_layers(table)
    if layers.empty:
        return "nothing, as no matrix is in a layer"
    if not layers["block"].isin(LAYERS).all():
        return f"the {layers['matrix'].nunique()} matrices of the layers, as this model has no attention and no MLP"
    of = " of the language model" if table["block"].isin(TOWERS).any() else ""
    return f"the {layers['matrix'].nunique()} matrices of attention and MLP{of}"


def apart(table: pd.DataFrame) -> pd.DataFrame:
    """Return the means of the matrices of the layers that are apart, one row a block: towers, mixers, routers ..."""
    rest = _in_layers(table.drop(of_layers(table).index))
    columns = ["sparsity", "relative_norm", "stable_rank"]
    rest = rest.reindex(columns=[*rest, *(name for name in columns if name not in rest)])
    return means(rest, ["block"], columns).set_index("block").rename_axis("apart from the means") if len(rest) else rest


def summarise(table: pd.DataFrame) -> dict[str, dict]:
    """Return the summary of a table of measurements (one row per tensor): overall, by block and by module.

    Each entry has its value, the null, their ratio, the z-score of their difference over the matrices of this one
    model, the value and the null at equal norm, how matrices are weighed, and the k it depends on; sparsity and
    overlaps have the ruler, what noise of the same norm gives; an overlap also has that of noise at its density, its
    enrichment, and what counting allows (feasible). *Overall* is attention and MLP of the language model, as in the
    paper (:func:`of_layers`); everything else stands apart.
    """
    layers = of_layers(table)
    groups = {"overall": layers}
    groups |= {str(block): rows for block, rows in table.groupby("block", sort=False)}
    groups |= {f"{block}.{module}": rows for (block, module), rows in layers.groupby(["block", "module"], sort=False)}
    return {name: _summary(rows) for name, rows in groups.items() if len(rows)}


def overall_means(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per diagnostic of the matrices in :func:`of_layers`, with the entries of :func:`summarise`."""
    rows = {name: entry for name, entry in _summary(of_layers(table)).items() if isinstance(entry, dict)}
    for entry in rows.values():
        if "feasible" in entry:
            entry["feasible"] = "{:.3f} to {:.3f}".format(*entry["feasible"])
    columns = ["value", "ruler", "null", "noise", "ratio", "z", "enrichment", "feasible"]
    columns += ["at equal norm", "null at equal norm", "weighting"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).dropna(axis="columns", how="all")


def trajectory_means(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return one row per step: the means of a trajectory over the matrices in :func:`of_layers`, with their nulls.

    The similarities are on the right side at the largest K: to the end, that of a random walk, to the rest of the
    update, between consecutive intervals, and at random. Stable rank and similarity to the end are seen in all
    :func:`views`.
    """
    seen = views(trajectory)
    columns = ["frobenius", "relative_norm", "interval_norm", "interval_stable_rank", "sparsity"]
    columns += [f"stable_rank{view}" for view in (*seen, "_null")]
    columns += [f"{column}{null}" for column in ("effective_rank", "hill") for null in ("", "_null")]
    k = largest_k(trajectory)
    if k:
        columns += [f"sim_right_K{k}{kind}" for kind in (*seen, "_null", "_rest", "_interval")] + [f"sim_random_K{k}"]
    return means(of_layers(trajectory), ["step"], columns).set_index("step")[columns]


def views(trajectory: pd.DataFrame) -> tuple[str, ...]:
    """Return how the columns of a trajectory's views end: as stored, in bfloat16 if that is another, locked null."""
    one = trajectory["stable_rank"].equals(trajectory["stable_rank_bf16"])
    return ("", "_locked") if one else ("", "_bf16", "_locked")


def largest_k(table: pd.DataFrame) -> int | None:
    """Return the largest K of the columns sim_right_K16 and so on at which any similarity is defined.

    An update of rank r has no more than r directions. If none is defined, it is the smallest K; without columns, None.
    """
    names = [column.removeprefix("sim_right_K") for column in table if column.startswith("sim_right_K")]
    ks = sorted(int(name) for name in names if name.isdigit())
    return max((k for k in ks if table[f"sim_right_K{k}"].notna().any()), default=ks[0] if ks else None)


def _moved(table: pd.DataFrame, groups: list[pd.Series]) -> pd.Series:
    """Tell of each row whether its matrix moved, or no matrix of its group did."""
    moved = table["frobenius"] > 0 if "frobenius" in table else pd.Series(True, table.index)
    return moved | ~moved.groupby(groups).transform("any")


def _weights(table: pd.DataFrame, column: str) -> pd.Series:
    """Return what each row weighs in the mean of a column."""
    if column.startswith("sparsity"):
        return table["parameters"]
    # A row is one matrix, or the mean of several, whose parameters it has in all.
    return table["matrices"] if "matrices" in table else pd.Series(1, table.index)


def _mean(rows: pd.DataFrame, column: str) -> float:
    """Return the mean of a column that is defined in every row, as :func:`means` does for groups of rows."""
    weights = _weights(rows, column)
    return float((rows[column] * weights).sum() / weights.sum())


def _summary(rows: pd.DataFrame) -> dict:
    """Return the entries of one group of matrices."""
    found: dict = {"tensors": len(rows), "parameters": int(rows["parameters"].sum())}
    moved = rows[_moved(rows, [pd.Series(0, rows.index)])]
    for column, null in SUMMARY.items():
        counted = rows if column.startswith("sparsity") else moved
        columns = [name for name in (column, null) if name in counted and counted[name].notna().any()]
        # Where a diagnostic or its null is undefined or infinite, neither counts.
        known = counted.replace([inf, -inf], nan).dropna(subset=["parameters", *columns])
        if column in columns and len(known):
            found[column] = _entry(known, column, null if null in columns else None)
    return found


def _entry(known: pd.DataFrame, column: str, null: str | None) -> dict:
    """Return the entry of one diagnostic, from matrices where it and its null are defined."""
    value = _mean(known, column)
    weighting = "per parameter" if column.startswith("sparsity") else "per matrix"
    entry: dict = {"value": value, "weighting": weighting, "defined": len(known)}
    if column.startswith(("angle", "energy", "top_energy", "hill")) and "k" in known:
        entry["k"] = sorted(set(known["k"].astype(int)))
    if null:
        difference = known[column] - known[null]
        entry["null"] = _mean(known, null)
        entry["ratio"] = value / entry["null"] if entry["null"] else None
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        entry["z"] = float(difference.mean() / error) if error > 0 else None
    if column == "stable_rank" and "stable_rank_gaussian" in known:
        entry["gaussian"] = _mean(known, "stable_rank_gaussian")
    if (ruler := f"{column}_ruler") in known and known[ruler].notna().any():
        entry["ruler"] = _mean(known.dropna(subset=ruler), ruler)
    matched = {"at equal norm": f"{column}_matched", "null at equal norm": f"{null}_matched"}
    matched = {kind: name for kind, name in matched.items() if name in known and known[name].notna().any()}
    # A matrix that did not move has nothing to scale.
    moved = known.dropna(subset=list(matched.values()))
    entry |= {kind: _mean(moved, name) for kind, name in matched.items()}
    if "_overlap_" in column:
        shares = known[column.replace("overlap", "share")]
        gains = [enrichment(*pair) for pair in zip(known[column], shares, strict=True)]
        limits = [feasible_range(*pair) for pair in zip(shares, known["density"], strict=True)]
        if f"{column}_noise" in known:
            entry["noise"] = _mean(known, f"{column}_noise")
        entry["enrichment"] = sum(gains) / len(gains)
        entry["feasible"] = [sum(side) / len(limits) for side in zip(*limits, strict=True)]
    return entry
