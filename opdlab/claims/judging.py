"""How a claim is judged: the statistic that tests it, one value per seed, and the verdict that follows from it.

The verdicts:

- *reproduced*: the effect exceeds the smallest that counts (one-sided t-test over seeds, corrected by Holm's method
  over all claims of the same finding), no control removes most of it, and no negative control shows it;
- *explained*: the effect exceeds the smallest that counts, but a control removes more than half of it (95 % interval,
  paired by seed), or a negative control, to which the paper's explanation does not apply, shows it too (95 % interval
  above the smallest that counts);
- *not reproduced*: the 95 % interval of the effect lies below the smallest that counts;
- *inconclusive*: anything else; more seeds could decide it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats

from opdlab.errors import OpdlabError
from opdlab.lab.records import Records, nearest, per_run
from opdlab.stats import Interval, mean_interval

#: What a verdict can be.
VERDICTS = ("reproduced", "explained", "not reproduced", "inconclusive")
#: Where the paper's number is from. It is printed, in the paper or in a neighbouring one; or said in words, without a
#: number; or found in the comments of a draft, not in the published text; or secondary, read off a figure by others.
KNOWN = ("printed", "words", "draft", "secondary")


@dataclass(frozen=True)
class Metric:
    """A number that each run has: the mean of one column over matrices.

    The column is one of the records' ``matrices``, or of their ``trajectory`` if ``progress`` is given. The columns
    "sampled" and "greedy" (accuracy), "entropy" and "kl_teacher" are those of their ``evaluations``.
    """

    column: str
    analysis: str = ""  #: the analysis to read instead (opdlab.lab.analyses.ANALYSES)
    where: dict[str, object] = field(default_factory=dict)  #: entries that pick the rows of an analysis, by column
    progress: float | None = None  #: a share of the training; the nearest snapshot is read
    since: float | None = None  #: a share of the training from which the change is taken, instead of the number itself
    block: str = ""  #: "attention" leaves the MLP out, as the paper does for trajectories
    log: bool = False  #: take the natural logarithm, for quantities that are compared by their ratio

    def of(self, records: Records, arm: str) -> pd.Series:
        """Return the metric of each run of an arm, by seed; all rows count if ``arm`` is empty.

        Raises:
            OpdlabError: if the records lack the analysis, or have no such column of the arm.
        """
        table = records.table_of(self.column, self.analysis, self.progress is not None)
        rows = table[table["arm"] == arm] if arm else table
        for column, entry in self.where.items():
            rows = rows[rows[column] == entry]
        if self.block:
            rows = rows[rows["block"] == self.block]
        if rows.empty or self.column not in rows:
            raise OpdlabError(f"the records have no {self.column!r} of the arm {arm!r}; record it first")
        runs = per_run(rows, (self.column,)) if "block" in rows else rows
        runs = runs if self.progress is None else nearest(runs, self.progress)
        values = runs.set_index("seed")[self.column]
        if self.log:
            values = np.log(values)
        if self.since is not None:
            values = values - replace(self, progress=self.since, since=None).of(records, arm)
        return values


@dataclass(frozen=True)
class Contrast:
    """A statistic with one value per seed: a metric of one arm minus that of another, another metric, or a number."""

    metric: Metric
    arm: str
    minus_arm: str = ""  #: the arm that is subtracted, if it is another
    minus: Metric | float | None = None  #: the metric that is subtracted, if it is another, or a number
    size: int = 0  #: 0 for the difference itself, 1 for its absolute value ("far"), -1 for minus that ("near")

    def of(self, records: Records) -> pd.Series:
        """Return the contrast by seed, for the seeds that both sides have."""
        difference = self.metric.of(records, self.arm)
        if isinstance(self.minus, (int, float)):
            difference = difference - self.minus
        else:
            other = (self.minus or self.metric).of(records, self.minus_arm or self.arm)
            difference = (difference - other).dropna()
        return self.size * difference.abs() if self.size else difference

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that it is made of."""
        return (self.metric, self.minus) if isinstance(self.minus, Metric) else (self.metric,)

    @property
    def arms(self) -> set[str]:
        """The arms whose runs must be recorded."""
        return set() if all(metric.analysis for metric in self.metrics) else {self.arm, self.minus_arm or self.arm}


def contrasts(records: Records, metric: Metric, arms: Sequence[str], baseline: str) -> pd.DataFrame:
    """Return a metric of several arms minus that of a baseline arm, one column per arm and one row per seed."""
    return pd.DataFrame({arm: Contrast(metric, arm, baseline).of(records) for arm in arms})


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and how it is tested."""

    name: str  #: in code and links
    finding: str  #: the finding that it belongs to, a key of opdlab.claims.paper.FINDINGS
    statement: str  #: the claim in one sentence
    source: str  #: where the paper makes it, and the numbers that it prints
    effect: Contrast  #: the statistic that tests it; positive speaks for the claim
    smallest: float  #: the smallest effect that counts, in the units of the statistic
    #: What is left of the effect without a simpler explanation, by that explanation.
    controls: dict[str, Contrast] = field(default_factory=dict)
    #: The same statistic where the paper's explanation does not apply, by the reason why not.
    negative_controls: dict[str, Contrast] = field(default_factory=dict)
    known: str = "words"  #: where the paper's number is from, one of KNOWN

    @property
    def arms(self) -> set[str]:
        """The arms that must be recorded to judge it."""
        return set().union(*(part.arms for part in self._parts))

    @property
    def analyses(self) -> set[str]:
        """The analyses that must be recorded to judge it."""
        return {metric.analysis for part in self._parts for metric in part.metrics if metric.analysis}

    @property
    def _parts(self) -> tuple[Contrast, ...]:
        return self.effect, *self.controls.values(), *self.negative_controls.values()


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim."""

    claim: Claim
    verdict: str  #: one of VERDICTS
    by: str  #: the control or negative control that explains the effect, or ""
    effect: Interval  #: the mean over seeds with Student's 95 % interval
    p: float  #: the one-sided p-value of an effect above the smallest that counts, corrected by Holm's method
    seeds: int  #: how many
    left: dict[str, Interval]  #: what each control leaves of the effect, and what each negative control shows of it
    perhaps: tuple[str, ...] = ()  #: the explanations of a reproduced claim that the seeds cannot rule out

    @property
    def text(self) -> str:
        """The verdict in words, with what explains the effect or may explain it."""
        if self.perhaps:
            return f"{self.verdict}, perhaps explained by {' or '.join(self.perhaps)}"
        return f"{self.verdict} by {self.by}" if self.by else self.verdict


def judge(claims: Sequence[Claim], records: Records) -> list[Verdict]:
    """Return the verdicts on claims; the p-values of one finding's claims are corrected together.

    Raises:
        OpdlabError: if the records lack an arm or a column, which it names (see :func:`judgeable`).
    """
    effects = [claim.effect.of(records) for claim in claims]
    p_values = [_p_above(effect, claim.smallest) for claim, effect in zip(claims, effects, strict=True)]
    for finding in {claim.finding for claim in claims}:
        family = [i for i, claim in enumerate(claims) if claim.finding == finding]
        for i, p in zip(family, holm([p_values[i] for i in family]), strict=True):
            p_values[i] = p
    verdicts = []
    for claim, effect, p in zip(claims, effects, p_values, strict=True):
        left = {name: control.of(records) for name, control in claim.controls.items()}
        shown = {name: control.of(records) for name, control in claim.negative_controls.items()}
        # Above zero where a control leaves less than half of the effect, seed by seed, or where a negative control
        # shows an effect that counts.
        explains = {name: mean_interval((effect / 2 - values).dropna()) for name, values in left.items()}
        explains |= {name: mean_interval(values - claim.smallest) for name, values in shown.items()}
        verdict, by = _verdict(effect, claim.smallest, p, explains)
        perhaps = [name for name, much in explains.items() if verdict == "reproduced" and much.high > 0]
        intervals = {name: mean_interval(values) for name, values in (left | shown).items()}
        found = mean_interval(effect)
        verdicts.append(Verdict(claim, verdict, by, found, p, len(effect), intervals, tuple(perhaps)))
    return verdicts


def judgeable(claims: Sequence[Claim], records: Records) -> list[Claim]:
    """Return the claims that can be judged, because the records have all arms and analyses that they need."""
    arms, analyses = set(records.runs["arm"]), set(records.analyses)
    return [claim for claim in claims if claim.arms <= arms and claim.analyses <= analyses]


def _verdict(effect: pd.Series, smallest: float, p: float, explains: dict[str, Interval]) -> tuple[str, str]:
    if p < 0.05:
        by = next((name for name, much in explains.items() if much.low > 0), "")
        return ("explained" if by else "reproduced"), by
    return ("not reproduced", "") if mean_interval(effect).high < smallest else ("inconclusive", "")


def _p_above(effect: pd.Series, smallest: float) -> float:
    """Return the one-sided p-value of Student's t-test, which is 1 for a single seed."""
    if len(effect) < 2:
        return 1.0
    if effect.std(ddof=1) == 0:
        return 0.0 if effect.mean() > smallest else 1.0
    return float(stats.ttest_1samp(effect, smallest, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being tested together, by the method of Holm (1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    raised = np.minimum(1.0, np.arange(len(order), 0, -1) * np.asarray(p_values)[order])
    return np.maximum.accumulate(raised)[np.argsort(order)].tolist()


def scorecard(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return the verdicts as a table, one row per claim."""
    columns = {
        "claim": [found.claim.statement for found in verdicts],
        "verdict": [found.text for found in verdicts],
        "paper": [found.claim.source for found in verdicts],
        "known": [found.claim.known for found in verdicts],
        "effect": [f"{found.effect:+.3g}" for found in verdicts],
        "counts from": [f"{found.claim.smallest:.3g}" for found in verdicts],
        "p": [f"{found.p:.2g}" for found in verdicts],
        "seeds": [found.seeds for found in verdicts],
    }
    return pd.DataFrame(columns)


def count_verdicts(verdicts: Sequence[Verdict], chapters: Mapping[str, tuple[str, str]]) -> str:
    """Return a Markdown table of how many claims of each finding have each verdict.

    The chapter of a finding is its title and its page (:data:`opdlab.claims.paper.FINDINGS`).
    """
    lines = ["| finding | " + " | ".join(VERDICTS) + " |", "| --- |" + " ---: |" * len(VERDICTS)]
    for finding, (title, page) in chapters.items():
        found = [verdict.verdict for verdict in verdicts if verdict.claim.finding == finding]
        numbers = " | ".join(str(found.count(name) or "") for name in VERDICTS)
        lines.append(f"| [{title}]({page}.ipynb) | {numbers} |")
    found = [verdict.verdict for verdict in verdicts]
    numbers = " | ".join(f"**{found.count(name)}**" for name in VERDICTS)
    return "\n".join([*lines, f"| **all {len(found)}** | {numbers} |"])
