"""How a claim is judged: the number that tests it, one per seed, and the verdict that follows from the records.

The verdicts:

- *reproduced*: the effect exceeds the smallest that counts (one-sided t-test over seeds, corrected after Holm over all
  claims of the same finding), no control takes most of it away, and no rival passes the same test;
- *explained*: so it does, but a control takes more than half of it away (95 % interval, paired by seed), or a rival, to
  which the paper's explanation does not apply, shows the effect too (95 % interval above the smallest that counts);
- *not reproduced*: the 95 % interval of the effect lies below the smallest that counts;
- *inconclusive*: anything else; more seeds could tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan

import numpy as np
import pandas as pd
from scipy import stats

from opdlab.errors import OpdlabError
from opdlab.lab.records import Records, nearest, per_run
from opdlab.stats import Interval, mean_interval

#: What a verdict can be.
VERDICTS = ("reproduced", "explained", "not reproduced", "inconclusive")
#: How sure the paper's number is. Printed in it, or in a neighbour's text; said in words without a number; in a draft's
#: comments, not in the published text; or secondary, as others read it off a figure.
KNOWN = ("printed", "words", "draft", "secondary")
_EVALUATED = ("sampled", "greedy", "entropy", "kl_teacher")


@dataclass(frozen=True)
class Value:
    """One number per run: the mean of a column over matrices.

    Attributes:
        column: of the records' ``matrices``, or of their ``trajectory`` where ``progress`` is given; "sampled" and
            "greedy" (accuracy), "entropy" and "kl_teacher" are of their ``evaluations``.
        analysis: the column is of this analysis instead (:data:`opdlab.lab.analyses.ANALYSES`).
        where: of an analysis, only rows with these entries.
        progress: share of the training; the snapshot nearest to it.
        since: the change since that share of the training, instead of the value itself.
        block: "attention" leaves the MLP out, as the paper does for trajectories.
        log: take the natural logarithm, for what is compared by its ratio.
    """

    column: str
    analysis: str = ""
    where: dict[str, object] = field(default_factory=dict)
    progress: float | None = None
    since: float | None = None
    block: str = ""
    log: bool = False

    def of(self, records: Records, arm: str) -> pd.Series:
        """Return the value of an arm's runs, by seed; of all rows if ``arm`` is ""."""
        table = records.matrices if self.progress is None else records.trajectory
        if self.column in _EVALUATED:
            table = records.evaluations
        if self.analysis:
            if self.analysis not in records.analyses:
                raise OpdlabError(f"the records were loaded without the analysis {self.analysis!r}")
            table = records.analyses[self.analysis]
        rows = table[table["arm"] == arm] if arm else table
        for column, entry in self.where.items():
            rows = rows[rows[column] == entry]
        if self.block:
            rows = rows[rows["block"] == self.block]
        if rows.empty or self.column not in rows:
            raise OpdlabError(f"the records have no {self.column!r} of the arm {arm!r}; record it first")
        values = _at(per_run(rows, (self.column,)) if "block" in rows else rows, self.column, self.progress)
        if self.log:
            values = np.log(values)
        if self.since is not None:
            values = values - replace(self, progress=self.since, since=None).of(records, arm)
        return values


def _at(runs: pd.DataFrame, column: str, progress: float | None) -> pd.Series:
    return (runs if progress is None else nearest(runs, progress)).set_index("seed")[column]


@dataclass(frozen=True)
class Difference:
    """A statistic: the value of one arm minus that of another (or minus another value, or a number), by seed.

    Attributes:
        value: of what.
        arm: of which arm.
        minus_arm: the other arm, if it is another.
        minus: the other value, if it is another, or a number.
        size: 1 for the size of the difference whatever its sign ("far"), -1 for minus that ("near"), 0 for itself.
    """

    value: Value
    arm: str
    minus_arm: str = ""
    minus: Value | float | None = None
    size: int = 0

    def of(self, records: Records) -> pd.Series:
        """Return the difference, by seed; only seeds that both sides have count."""
        difference = self.value.of(records, self.arm)
        if isinstance(self.minus, (int, float)):
            difference = difference - self.minus
        else:
            other = (self.minus or self.value).of(records, self.minus_arm or self.arm)
            difference = (difference - other).dropna()
        return self.size * difference.abs() if self.size else difference

    @property
    def values(self) -> tuple[Value, ...]:
        """The values that it is made of."""
        return (self.value, self.minus) if isinstance(self.minus, Value) else (self.value,)

    @property
    def arms(self) -> set[str]:
        """The arms whose runs it needs records of."""
        if all(value.analysis for value in self.values):
            return set()
        return {self.arm, self.minus_arm or self.arm}


def differences(records: Records, value: Value, arms: Sequence[str], baseline: str) -> pd.DataFrame:
    """Return what arms have of ``value`` beyond ``baseline``: one column per arm, one row per seed that both have.

    Args:
        records: of all these arms.
        value: of what.
        arms: in order.
        baseline: the arm that they are held against.
    """
    return pd.DataFrame({arm: Difference(value, arm, baseline).of(records) for arm in arms})


@dataclass(frozen=True)
class Claim:
    """What the paper says, and how it is tested.

    Attributes:
        name: the name in code and links.
        finding: the chapter that it belongs to.
        statement: the claim in one sentence.
        source: where the paper makes it, and what it prints.
        effect: the statistic that tests it; positive speaks for the claim.
        smallest: the smallest effect that counts, in its units.
        controls: by what could explain it: what is then left of the effect.
        rivals: by where the paper's explanation does not apply: the same statistic there.
        known: how sure the paper's number is, one of :data:`opdlab.claims.judging.KNOWN`.
    """

    name: str
    finding: str
    statement: str
    source: str
    effect: Difference
    smallest: float
    controls: dict[str, Difference] = field(default_factory=dict)
    rivals: dict[str, Difference] = field(default_factory=dict)
    known: str = "words"

    @property
    def arms(self) -> set[str]:
        """The arms that it needs records of."""
        return set().union(*(part.arms for part in self._parts))

    @property
    def analyses(self) -> set[str]:
        """The analyses that it needs records of."""
        return {value.analysis for part in self._parts for value in part.values if value.analysis}

    @property
    def _parts(self) -> tuple[Difference, ...]:
        return self.effect, *self.controls.values(), *self.rivals.values()


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim.

    Attributes:
        claim: which.
        verdict: one of :data:`opdlab.claims.judging.VERDICTS`.
        by: the control that explains it, or "".
        effect: mean and Student's 95 % interval over seeds.
        p: one-sided p-value of an effect above the smallest that counts, corrected after Holm.
        seeds: how many.
        left: what each control leaves of the effect, and what each rival shows of it, with its interval.
        perhaps: the controls and rivals of which the seeds do not tell whether they explain what is reproduced.
    """

    claim: Claim
    verdict: str
    by: str
    effect: Interval
    p: float
    seeds: int
    left: dict[str, Interval]
    perhaps: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The verdict in words, with what explains the effect, or may do so."""
        if self.perhaps:
            return f"{self.verdict}, perhaps explained by {' or '.join(self.perhaps)}"
        return f"{self.verdict} by {self.by}" if self.by else self.verdict


def judge(claims: Sequence[Claim], records: Records) -> list[Verdict]:
    """Return the verdicts on claims; those of one finding are a family, corrected together.

    Args:
        claims: to judge.
        records: of all arms and analyses that the claims need (:func:`judgeable`).

    Raises:
        OpdlabError: if the records lack an arm or a column, naming it.
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
        rivals = {name: rival.of(records) for name, rival in claim.rivals.items()}
        # Above zero where most of the effect is gone, in every seed's own measure, or where a rival has it, too.
        explains = {name: mean_interval((effect / 2 - values).dropna()) for name, values in left.items()}
        explains |= {name: mean_interval(values - claim.smallest) for name, values in rivals.items()}
        verdict, by = _verdict(effect, claim.smallest, p, explains)
        perhaps = [name for name, much in explains.items() if verdict == "reproduced" and much.high > 0]
        intervals = {name: mean_interval(values) for name, values in (left | rivals).items()}
        found = mean_interval(effect)
        verdicts.append(Verdict(claim, verdict, by, found, p, len(effect), intervals, tuple(perhaps)))
    return verdicts


def judgeable(claims: Sequence[Claim], records: Records) -> list[Claim]:
    """Return the claims of which the records have all arms and analyses: those that :func:`judge` can judge."""
    arms, analyses = set(records.sources["arm"]), set(records.analyses)
    return [claim for claim in claims if claim.arms <= arms and claim.analyses <= analyses]


def _verdict(effect: pd.Series, smallest: float, p: float, explains: dict[str, Interval]) -> tuple[str, str]:
    if p < 0.05:
        by = next((name for name, much in explains.items() if much.low > 0), "")
        return ("explained" if by else "reproduced"), by
    return ("not reproduced", "") if mean_interval(effect).high < smallest else ("inconclusive", "")


def _p_above(effect: pd.Series, smallest: float) -> float:
    """Return the one-sided p-value of Student's test; 1 where a single seed cannot tell."""
    if len(effect) < 2:
        return 1.0
    if effect.std(ddof=1) == 0:
        return 0.0 if effect.mean() > smallest else 1.0
    return float(stats.ttest_1samp(effect, smallest, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for testing them together, after Holm (1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order, corrected, largest = np.argsort(p_values), [nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def scorecard(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return the verdicts as a table, one row per claim."""
    rows = []
    for found in verdicts:
        rows.append(
            {
                "claim": found.claim.statement,
                "verdict": found.text,
                "paper": found.claim.source,
                "known": found.claim.known,
                "effect": f"{found.effect:+.3g}",
                "counts from": f"{found.claim.smallest:.3g}",
                "p": f"{found.p:.2g}",
                "seeds": found.seeds,
            }
        )
    return pd.DataFrame(rows)


def count_verdicts(verdicts: Sequence[Verdict], chapters: Mapping[str, tuple[str, str]]) -> str:
    """Return how many claims of each finding have each verdict, as a Markdown table.

    Args:
        verdicts: to count.
        chapters: title and page of the chapter of each finding (``FINDINGS``).
    """
    lines = ["| finding | " + " | ".join(VERDICTS) + " |", "| --- |" + " ---: |" * len(VERDICTS)]
    for finding, (title, page) in chapters.items():
        found = [verdict.verdict for verdict in verdicts if verdict.claim.finding == finding]
        numbers = " | ".join(str(found.count(name) or "") for name in VERDICTS)
        lines.append(f"| [{title}]({page}.ipynb) | {numbers} |")
    found = [verdict.verdict for verdict in verdicts]
    numbers = " | ".join(f"**{found.count(name)}**" for name in VERDICTS)
    return "\n".join([*lines, f"| **all {len(found)}** | {numbers} |"])
