"""Scales beside each other: the same quantities of the same arms, as far as each scale has records of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from opdlab.claims import CLAIMS, Value, Verdict, judge, judgeable
from opdlab.lab.grid import ARMS
from opdlab.lab.records import Records, load_records, recorded_analyses, recorded_arms
from opdlab.lab.scales import SCALES
from opdlab.stats import mean_interval
from opdlab.training.store import Home

#: The scales that the book shows beside each other, whichever a chapter runs at.
SHOWN = ("tiny", "small")


def records_at(
    name: str, arms: Sequence[str], home: Home | None = None, analyses: tuple[str, ...] = ()
) -> Records | None:
    """Return the records of those of ``arms`` that a scale has, and of some analyses. Nothing is trained.

    It returns None if the scale has none of the arms, or lacks one of the analyses.
    """
    there = recorded_arms(SCALES[name], home)
    found = tuple(arm for arm in arms if arm in there)
    if not found or set(analyses) - set(recorded_analyses(SCALES[name], home)):
        return None
    return load_records(found, SCALES[name], home=home, progress=False, analyses=analyses)


def at_scales(
    values: Mapping[str, Value], arms: Sequence[str], scales: Sequence[str] = SHOWN, home: Home | None = None
) -> pd.DataFrame:
    """Return values of arms at several scales, one row for each scale, value, arm and seed that is recorded.

    Args:
        values: by title. Scales that have no record of an analysis that one of them is of are left out.
        arms: in order.
        scales: names of scales.
        home: by default the repository.

    Returns:
        A table with the columns scale, title, arm, label, seed and value.
    """
    rows = []
    analyses = tuple({value.analysis for value in values.values() if value.analysis})
    for scale in scales:
        records = records_at(scale, arms, home, analyses)
        if records is None:
            continue
        for title, value in values.items():
            for arm in arms:
                if arm in set(records.sources["arm"]):
                    found = value.of(records, arm)
                    who = {"scale": scale, "title": title, "arm": arm, "label": ARMS[arm].label}
                    rows += [who | {"seed": seed, "value": number} for seed, number in found.items()]
    return pd.DataFrame(rows, columns=["scale", "title", "arm", "label", "seed", "value"])


def judge_at(name: str, home: Home | None = None) -> list[Verdict]:
    """Return the verdicts on the claims that the records of a scale can test."""
    scale = SCALES[name]
    records = records_at(name, scale.recorded, home, recorded_analyses(scale, home))
    return judge(judgeable(CLAIMS, records), records) if records else []


def compare_order(table: pd.DataFrame, title: str) -> str:
    """Say in which order the arms lie at each scale, and in how many pairs of them the scales agree.

    A pair is told apart at a scale if the 95 % interval of its difference over the seeds there leaves out zero.

    Args:
        table: what :func:`at_scales` returns, of two scales.
        title: of which value.
    """
    wide = table[table["title"] == title].pivot_table(index=["scale", "seed"], columns="arm", values="value")
    scales, means = list(table["scale"].unique()), wide.groupby("scale").mean()
    pairs, said, apart, signs = list(combinations(means.dropna(axis=1), 2)), [], [], []
    for scale in scales:
        ranked = means.loc[scale].dropna().sort_values(ascending=False)
        said.append(f"at {scale} " + ", ".join(f"{ARMS[arm].label} {mean:.3g}" for arm, mean in ranked.items()))
        gaps = {pair: mean_interval((wide[pair[0]] - wide[pair[1]])[scale].dropna()) for pair in pairs}
        signs.append({pair: gap.mean > 0 for pair, gap in gaps.items() if gap.low > 0 or gap.high < 0})
        apart.append(f"{len(signs[-1])} at {scale}")
    both = set(signs[0]) & set(signs[1])
    same = sum(signs[0][pair] == signs[1][pair] for pair in both)
    said.append(f"of {len(pairs)} pairs the seeds tell apart {', '.join(apart)}, {len(both)} at both")
    return "; ".join([*said, f"of these in the same order: {same}"])
