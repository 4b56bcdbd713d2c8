"""What a scale has records of, and the verdicts on what these can decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opdlab.claims import Verdict, judge, judgeable
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import Reading, Records, load, recorded_analyses, recorded_arms


def records_at(
    name: str, arms: Sequence[str], root: Path | None = None, analyses: tuple[str, ...] = ()
) -> Records | None:
    """Return the records of a scale for those of the arms that are recorded; None if there are none.

    It is None as well if the scale lacks one of the analyses. ``root`` holds data/records; by default it is the
    repository.
    """
    lab = Reading.of(Laboratory.at(name, root))
    there = recorded_arms(lab)
    found = tuple(arm for arm in arms if arm in there)
    if not found or (analyses and set(analyses) - set(recorded_analyses(lab))):
        return None
    return load(lab, found, analyses=analyses)


def judge_at(name: str, root: Path | None = None) -> list[Verdict]:
    """Return the verdicts on the claims that the records of a scale can decide."""
    lab = Reading.of(Laboratory.at(name, root))
    if not recorded_arms(lab):
        return []
    records = load(lab)
    return judge(judgeable(records), records)
