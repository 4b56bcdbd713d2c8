"""The same metrics and the same arms at several scales, as far as each scale has records of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import pandas as pd

from opdlab.claims import Metric, Verdict, judge, judgeable
from opdlab.lab.grid import ARMS
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import Records, load, recorded_analyses, recorded_arms
from opdlab.stats import mean_interval

#: The scales that the book compares, at whichever scale a chapter is run.
SHOWN = ("tiny", "small")


def records_at(
    name: str, arms: Sequence[str], root: Path | None = None, analyses: tuple[str, ...] = ()
) -> Records | None:
    """Return the records of a scale for those of the arms that are recorded; None if there are none.

    It is None as well if the scale lacks one of the analyses. ``root`` holds data/records; by default it is the
    repository.
    """
    lab = Laboratory.at(name, root)
    there = recorded_arms(lab)
    found = tuple(arm for arm in arms if arm in there)
    if not found or set(analyses) - set(recorded_analyses(lab)):
        return None
    return load(lab, found, analyses=analyses)


def compare_scales(
    metrics: Mapping[str, Metric], arms: Sequence[str], scales: Sequence[str] = SHOWN, root: Path | None = None
) -> pd.DataFrame:
    """Return metrics, by title, of arms at several scales, one row per scale, title, arm and seed that is recorded.

    The columns are scale, title, arm, label, seed and value. A scale that lacks an analysis is left out.
    """
    rows = []
    analyses = tuple({metric.analysis for metric in metrics.values() if metric.analysis})
    for scale in scales:
        records = records_at(scale, arms, root, analyses)
        if records is None:
            continue
        for (title, metric), arm in product(metrics.items(), arms):
            values = metric.values(records)
            if arm in values:
                who = (scale, title, arm, ARMS[arm].label)
                rows += [(*who, seed, value) for seed, value in values[arm].dropna().items()]
    return pd.DataFrame(rows, columns=["scale", "title", "arm", "label", "seed", "value"])


def judge_at(name: str, root: Path | None = None) -> list[Verdict]:
    """Return the verdicts on the claims that the records of a scale can decide."""
    lab = Laboratory.at(name, root)
    records = records_at(name, lab.scale.policy.arms, root, recorded_analyses(lab))
    return judge(judgeable(records), records) if records else []


def compare_order(table: pd.DataFrame, title: str) -> str:
    """Say how a metric orders the arms at each of two scales, and on how many pairs of arms the scales agree.

    The table is that of :func:`compare_scales`. A pair is told apart at a scale if the 95 % interval of its difference,
    paired by seed, does not contain zero.
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
