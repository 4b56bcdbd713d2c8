"""Sentences and tables that are computed from the records, so that a chapter never says more than they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.lab.grid import ARMS
from opdlab.lab.scales import get_scale
from opdlab.stats import mean_interval


def states(*said: Any, at: str = "tiny") -> Any:
    """Return a paragraph of sentences that state results, for a notebook to show; each has to be true of the records.

    >>> states("Two is more than one.", 2 > 1, "Three is more.", 3 > 2, at="").data
    'Two is more than one. Three is more.'

    Args:
        said: sentences in Markdown, each followed by the condition under which it is true.
        at: the scale whose records the sentences are about. At another scale they are shown as what they say of that
            one, and nothing is checked; "" stands for sentences that are true at all scales.

    Raises:
        OpdlabError: if a condition does not hold, with its sentence.
    """
    from IPython.display import Markdown  # imported late: only notebooks have it

    pairs = list(zip(said[::2], said[1::2], strict=True))
    paragraph = " ".join(sentence for sentence, _ in pairs)
    if at and get_scale().name != at:
        return Markdown(f"*Not at this scale. At {at}:* {paragraph}")
    for sentence, holds in pairs:
        if not bool(holds):
            raise OpdlabError(f"the records do not say that {sentence!r}: rewrite the sentence, or find out why")
    return Markdown(paragraph)


def check(answer: Any, right: Any, near: float = 0.02, hint: str = "Not yet.") -> str:
    """Return what there is to say of a reader's answer to an exercise.

    >>> check(None, 1.5)
    'Not answered yet: put your answer in the place of None, and run both cells.'
    >>> check(1.51, 1.5), check(1.2, 1.5, hint="Not yet: is the update rounded?")
    ('Right.', 'Not yet: is the update rounded?')

    Args:
        answer: the reader's, or None.
        right: the right one; numbers may differ from it by a share of it.
        near: that share.
        hint: for an answer that is not right.
    """
    if answer is None:
        return "Not answered yet: put your answer in the place of None, and run both cells."
    if isinstance(right, (bool, str)):
        return "Right." if answer == right else hint
    return "Right." if abs(float(answer) - float(right)) <= near * abs(float(right)) else hint


def answer(values: pd.Series, above: float = 0.0, *, yes: str = "yes", no: str = "no", digits: int = 2) -> str:
    """Say whether the 95 % interval of values, one per seed, lies wholly above a threshold, and give mean and interval.

    Args:
        values: one value per seed; missing ones do not count.
        above: the threshold.
        yes: the answer if the interval lies above the threshold.
        no: the answer if it lies below. If it contains the threshold, or if there is a single seed, the answer is
            "undecided".
        digits: decimal places of the numbers.

    >>> answer(pd.Series([1.0, 2.0, 3.0]), -1)
    'yes (+2.00 [-0.48, +4.48])'
    """
    found = mean_interval(values.dropna().tolist() or [nan])
    word = yes if found.low > above else no if found.high < above else "undecided"
    return f"{word} ({found:+.{digits}f})"


def name_arms(arms: Sequence[str]) -> str:
    """Join the labels of arms.

    >>> name_arms(["opd", "sft_matched"]), name_arms([])
    ('OPD; matched SFT', 'none')
    """
    return "; ".join(ARMS[arm].label for arm in arms) or "none"


def list_results(lines: Sequence[str] | Mapping[str, str | pd.Series], about: str = "") -> str:
    """Return a Markdown list under the words "Computed from the records", and a few about which records these are.

    The lines are sentences, or answers by question, where values, one per seed, are answered by :func:`answer`.
    """
    if isinstance(lines, Mapping):
        answers = {question: found if isinstance(found, str) else answer(found) for question, found in lines.items()}
        lines = [f"{question}: {found}" for question, found in answers.items()]
    head = f"**Computed from the records**, {about}:" if about else "**Computed from the records.**"
    return f"{head}\n\n" + "\n".join(f"- {line}" for line in lines)


def effect_table(effects: Mapping[str, pd.DataFrame], arms: Sequence[str] | None = None) -> pd.DataFrame:
    """Return a table of means over seeds with 95 % intervals, one row per arm and one column per effect.

    An effect, by its title, is a table of seeds by arms (:meth:`opdlab.claims.rules.Metric.values`). By default all its
    arms are shown.
    """
    return pd.DataFrame(
        {
            title: {ARMS[arm].label: f"{mean_interval(effect[arm]):+.2f}" for arm in (effect if arms is None else arms)}
            for title, effect in effects.items()
        }
    )
