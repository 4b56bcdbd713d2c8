"""Sentences and tables that are computed from records, so that a chapter never says more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan

import pandas as pd

from opdlab.lab.grid import ARMS
from opdlab.stats import mean_interval


def answer(values: pd.Series, above: float = 0.0, *, yes: str = "yes", no: str = "no", digits: int = 2) -> str:
    """Say whether values, one per seed, lie above a mark with their whole 95 % interval, and give it.

    Args:
        values: one per seed; what is undefined does not count.
        above: the mark.
        yes: the word if the interval lies above it.
        no: the word if it lies below; between the two the answer is "undecided", as it is with a single seed.
        digits: of the numbers.

    >>> answer(pd.Series([1.0, 2.0, 3.0]), -1)
    'yes (+2.00 [-0.48, +4.48])'
    """
    found = mean_interval(values.dropna().tolist() or [nan])
    word = yes if found.low > above else no if found.high < above else "undecided"
    return f"{word} ({found:+.{digits}f})"


def listed(arms: Sequence[str]) -> str:
    """Join the labels of arms.

    >>> listed([])
    'none'
    """
    return "; ".join(ARMS[arm].label for arm in arms) or "none"


def computed(lines: Sequence[str] | Mapping[str, str | pd.Series], about: str = "") -> str:
    """Return a list in Markdown under the words "Computed from the records".

    Args:
        lines: sentences; or questions with their answers, of which those that are values go through :func:`answer`.
        about: of which records, in a few words.
    """
    if isinstance(lines, Mapping):
        answers = {question: found if isinstance(found, str) else answer(found) for question, found in lines.items()}
        lines = [f"{question}: {found}" for question, found in answers.items()]
    head = f"**Computed from the records**, {about}:" if about else "**Computed from the records.**"
    return f"{head}\n\n" + "\n".join(f"- {line}" for line in lines)


def effect_table(effects: Mapping[str, pd.DataFrame], arms: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row per arm and one column per effect: the mean over seeds with its 95 % interval.

    Args:
        effects: by title, one column per arm and one row per seed (:func:`opdlab.claims.judging.differences`).
        arms: by default all that an effect has.
    """
    columns = {}
    for title, effect in effects.items():
        shown = effect if arms is None else arms
        columns[title] = {ARMS[arm].label: f"{mean_interval(effect[arm]):+.2f}" for arm in shown}
    return pd.DataFrame(columns)
