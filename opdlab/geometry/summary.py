"""Means over matrices: what a table of measurements says about a whole model, a block or a module.

Each mean names how it weighs matrices. It stands beside the same mean of its null, or, where size is what explains it
(sparsity, angles, drift), beside that of the update at equal norm.
"""

from __future__ import annotations

from math import inf, nan

import pandas as pd

from opdlab.geometry import enrichment, feasible_range

_RANKS = ("stable_rank", "effective_rank", "effective_rank_squared", "top_energy", "hill")
_MASKS = [(star, f"a{alpha}") for alpha in (30, 50) for star in ("principal", "low", "principal_only")]
# The column, its null, and whether matrices weigh by their parameters (the paper's rule for sparsity) or count alike
# (its rule for the rest).
SUMMARY = (
    *((column, None, "parameter") for column in ("sparsity", "sparsity_absolute", "sparsity_relative")),
    *((column, None, "matrix") for column in ("density", "frobenius", "relative_norm", "nss")),
    *((f"angle_{side}_{value}", None, "matrix") for value in ("mean", "max") for side in ("left", "right")),
    *((column, f"{column}_null", "matrix") for column in _RANKS),
    *((f"energy_{side}", f"energy_{side}_random", "matrix") for side in ("left", "right", "both")),
    *((f"{star}_overlap_{alpha}", f"{star}_overlap_{alpha}_null", "matrix") for star, alpha in _MASKS),
)


def of_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of attention and MLP, the matrices that the paper is about."""
    return table[table["block"].isin(["attention", "mlp"])]


def summarise(table: pd.DataFrame) -> dict[str, dict]:
    """Return the means of a table of measurements (one row per tensor): overall, by block and by module.

    Each entry has its value, the null, their ratio, the z-score of their difference over the matrices of this one
    model, the value and the null at equal norm, how matrices are weighed, and the k it depends on; an overlap also has
    that of noise at its density, its enrichment, and what counting allows (feasible). *Overall* is attention and MLP,
    as in the paper; the rest stands apart.
    """
    layers = of_layers(table)
    groups = {"overall": layers}
    groups |= {str(block): rows for block, rows in table.groupby("block", sort=False)}
    groups |= {f"{block}.{module}": rows for (block, module), rows in layers.groupby(["block", "module"], sort=False)}
    return {name: _summary(rows) for name, rows in groups.items() if len(rows)}


def overall_means(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per diagnostic of the matrices of attention and MLP, with the entries of :func:`summarise`."""
    rows = {name: entry for name, entry in _summary(of_layers(table)).items() if isinstance(entry, dict)}
    for entry in rows.values():
        if "feasible" in entry:
            entry["feasible"] = "{:.3f} to {:.3f}".format(*entry["feasible"])
    columns = [
        "value",
        "null",
        "noise",
        "ratio",
        "z",
        "enrichment",
        "feasible",
        "at equal norm",
        "null at equal norm",
        "weighting",
    ]
    means = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)
    return means.dropna(axis="columns", how="all")


def course_means(course: pd.DataFrame) -> pd.DataFrame:
    """Return one row per step: the means of a trajectory over the matrices of attention and MLP, with their nulls.

    Sim is on the right side, at the largest K: to the end, of a random walk, to the rest of the update, between
    consecutive intervals, at random.
    """
    by_step = of_layers(course).groupby("step")
    columns = ["frobenius", "relative_norm", "interval_norm", "interval_stable_rank", "sparsity"]
    columns += [f"{column}{null}" for column in ("stable_rank", "effective_rank", "hill") for null in ("", "_null")]
    k = largest_k(course)
    if k:
        columns += [f"sim_right_K{k}{kind}" for kind in ("", "_null", "_rest", "_interval")] + [f"sim_random_K{k}"]
    return by_step[columns].mean()


def largest_k(table: pd.DataFrame) -> int | None:
    """Return the largest K at which any similarity is defined: an update of rank r has no more than r directions.

    Args:
        table: with columns such as sim_right_K16. None is returned if it has none, the smallest K if none is defined.
    """
    names = [column.removeprefix("sim_right_K") for column in table if column.startswith("sim_right_K")]
    ks = sorted(int(name) for name in names if name.isdigit())
    return max((k for k in ks if table[f"sim_right_K{k}"].notna().any()), default=ks[0] if ks else None)


def _summary(rows: pd.DataFrame) -> dict:
    found: dict = {"tensors": len(rows), "parameters": int(rows["parameters"].sum())}
    for column, null, weighting in SUMMARY:
        columns = [name for name in (column, null) if name in rows and rows[name].notna().any()]
        # Where a diagnostic or its null is undefined or infinite, neither counts.
        known = rows.replace([inf, -inf], nan).dropna(subset=["parameters", *columns])
        if column not in columns or known.empty:
            continue
        weights = known["parameters"] if weighting == "parameter" else pd.Series(1.0, known.index)
        means = {name: float((known[name] * weights).sum() / weights.sum()) for name in columns}
        entry = {"value": means[column], "weighting": f"per {weighting}", "defined": len(known)}
        if column.startswith(("angle", "energy", "top_energy", "hill")) and "k" in known:
            entry["k"] = sorted(set(known["k"].astype(int)))
        if null in columns:
            difference = known[column] - known[null]
            entry["null"] = means[null]
            entry["ratio"] = means[column] / means[null] if means[null] else None
            error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
            entry["z"] = float(difference.mean() / error) if error > 0 else None
        if column == "stable_rank" and "stable_rank_gaussian" in known:
            entry["gaussian"] = float(known["stable_rank_gaussian"].mean())
        matched = {"at equal norm": f"{column}_matched", "null at equal norm": f"{null}_matched"}
        matched = {kind: name for kind, name in matched.items() if name in known and known[name].notna().any()}
        # A matrix that did not move has nothing to scale.
        moved = known.dropna(subset=list(matched.values()))
        for kind, name in matched.items():
            entry[kind] = float((moved[name] * weights[moved.index]).sum() / weights[moved.index].sum())
        if "_overlap_" in column:
            shares = known[column.replace("overlap", "share")]
            limits = [feasible_range(*pair) for pair in zip(shares, known["density"], strict=True)]
            gains = [enrichment(*pair) for pair in zip(known[column], shares, strict=True)]
            if f"{column}_noise" in known:
                entry["noise"] = float(known[f"{column}_noise"].mean())
            entry["enrichment"] = sum(gains) / len(gains)
            entry["feasible"] = [sum(side) / len(limits) for side in zip(*limits, strict=True)]
        found[column] = entry
    return found
