"""How a claim is judged, from runs in blocks of seeds: what is tested, with which margin, and the verdict.

A claim says that a number of one arm lies *above* that of another, or *near* it. Both are tested against a margin, the
smallest difference that counts, and both ways: for the claim and against it. All tests of one finding that could give
the same verdict are corrected together by Holm's method. The verdicts:

- *reproduced*: the test for the claim is significant, no control explains it, and no rival passes as well;
- *seen*: the same, but nothing was tried that could explain it;
- *explained*: the test for the claim is significant, and so is that a control removes more than half of the effect;
- *uninformative*: the test for the claim is significant, and a rival, of which the claim should not hold, passes too;
- *not reproduced*: the test against the claim is significant;
- *inconclusive*: neither test is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from opdlab.errors import OpdlabError
from opdlab.lab.records import EVALUATED, MASK_PERCENTS, Records, nearest, per_run
from opdlab.models.files import read_json
from opdlab.stats import Estimate, Interval, block_estimate, holm, mean_estimate, ratio_interval

#: Where the paper's number is from. It is printed, in the paper or in a neighbouring one; or said in words, without a
#: number; or found in the comments of a draft, not in the published text; or secondary, read off a figure by others.
KNOWN = ("printed", "words", "draft", "secondary")
#: A trajectory counts from this share of the training on; before, an update is too small to have a shape.
FROM = 0.05
#: The level of every test.
LEVEL = 0.05


@dataclass(frozen=True)
class Metric:
    """A number of each run, or one at each snapshot: the mean of a column over matrices.

    The column "principal_position_a30" is where the overlap principal_overlap_a30 lies between the least and the most
    that counting allows, from 0 to 1; with _share, _ruler or _noise it is that of the random rate and of the nulls.

    The column is one of the records' ``matrices``, or of their ``trajectory`` if ``progress`` is given or ``curve`` is
    set. The columns "sampled" and "greedy" (mean reward), "entropy" and "kl_teacher" are those of their
    ``evaluations``, at the end of the training.
    """

    column: str
    minus: str = ""  #: a column that is subtracted run by run, such as a null
    analysis: str = ""  #: the analysis to read instead (opdlab.lab.analyses.ANALYSES)
    where: tuple[tuple[str, object], ...] = ()  #: pairs of a column and its entry, which pick the rows of an analysis
    progress: float | None = None  #: a share of the training; the nearest snapshot is read
    since: float | None = None  #: a share of the training from which the change is taken, instead of the number itself
    curve: bool = False  #: one number at each snapshot from FROM on
    block: str = ""  #: "attention" leaves the MLP out, as the paper does for trajectories
    log: bool = False  #: take the natural logarithm, for quantities that are compared by their ratio

    def points(self, records: Records, arms: Collection[str]) -> list[Metric]:
        """Return the metric itself, or of a curve its metrics at the snapshots that all these arms have."""
        if not self.curve:
            return [self]
        rows = records.trajectory[records.trajectory["arm"].isin(arms)].dropna(subset=["progress"])
        # Curves bend: the snapshot nearest to another arm's would make a difference of its own.
        shares = set.intersection(*(set(of_arm.round(3)) for _, of_arm in rows.groupby("arm")["progress"]))
        return [replace(self, curve=False, progress=share) for share in sorted(shares) if share >= FROM]

    def values(self, records: Records) -> pd.DataFrame:
        """Return the numbers of all runs that have one, seeds by arms.

        Raises:
            OpdlabError: if the records lack the analysis or the column.
        """
        rows, columns = self.rows(records), tuple(filter(None, (self.column, self.minus)))
        for column in columns:
            if column not in rows:
                raise OpdlabError(f"the records have no column {column!r}: record them again")
        runs = per_run(rows, columns) if "block" in rows else rows
        if self.progress is not None or self.column in EVALUATED:
            runs = nearest(runs, 1.0 if self.progress is None else self.progress)
        table = runs.pivot_table(index="seed", columns="arm", values=list(columns))
        if self.log:
            table = np.log(table.where(table > 0))  # a ratio to nothing is not defined
        found = table[self.column] - (table[self.minus] if self.minus else 0.0)
        if self.since is not None:
            found = found - replace(self, progress=self.since, since=None).values(records)
        return found.dropna(axis="columns", how="all")

    def rows(self, records: Records) -> pd.DataFrame:
        """Return the rows of the records that it is read from, of all arms."""
        table = records.table_of(self.column, self.analysis, self.curve or self.progress is not None)
        for column, entry in (*self.where, *([("block", self.block)] if self.block else ())):
            table = table[table[column] == entry]
        return table.assign(**_positions(table)) if "_position_" in self.column else table

    def recorded(self, records: Records) -> bool:
        """Tell whether the records have its analysis and its columns."""
        if self.analysis and self.analysis not in records.analyses:
            return False
        return {self.column, self.minus} - {""} <= set(self.rows(records))


def _positions(matrices: pd.DataFrame) -> dict[str, pd.Series]:
    """Return where an overlap lies between the least and the most that counting allows, from 0 to 1, and its nulls."""
    found, d = {}, matrices["density"]
    for mask, percent in product(("principal", "low"), MASK_PERCENTS):
        column, share = f"{mask}_overlap_a{percent}", percent / 100
        least, most = ((share + d - 1) / d).clip(lower=0), (share / d).clip(upper=1)
        nulls = [null for null in ("", "_ruler", "_noise") if column + null in matrices]
        overlaps = {null: matrices[column + null] for null in nulls} | {"_share": share}
        for null, overlap in overlaps.items():
            found[f"{mask}_position_a{percent}{null}"] = (overlap - least) / (most - least).where(most > least)
    return found


@dataclass(frozen=True)
class Contrast:
    """A metric of one arm minus that of another; or, without another, the metric itself, such as one minus its null."""

    metric: Metric
    arm: str
    minus_arm: str = ""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each arm."""
        return {self.arm: 1.0} | ({self.minus_arm: -1.0} if self.minus_arm else {})


class Runs:
    """The numbers of records, each computed once."""

    def __init__(self, records: Records):
        """Keep the records."""
        self.records = records
        self.values = cache(lambda metric: metric.values(records))
        self.estimates = cache(self._estimates)
        alike = records.runs.groupby("arm")[["seed", "student", "recipe.steps", "recipe.learning_rate"]]
        self._how = {arm: set(rows.itertuples(index=False, name=None)) for arm, rows in alike}

    def by_seed(self, contrast: Contrast) -> pd.Series:
        """Return a contrast of each seed that has its runs."""
        values = self.values(contrast.metric)
        if missing := contrast.weights.keys() - set(values):
            if unknown := missing - {*self.records.runs["arm"], *values}:
                arms = ", ".join(sorted(unknown))
                raise OpdlabError(f"the records have no {contrast.metric.column!r} of {arms}: record it")
            return pd.Series(dtype=float)  # such as the directions of an update that is nothing
        parts = [weight * values[arm] for arm, weight in contrast.weights.items()]
        return pd.Series(sum(parts)).dropna()

    def _estimates(self, contrast: Contrast) -> tuple[Estimate, ...]:
        """Return the mean of a contrast over seeds, at each snapshot if it is one of curves."""
        points = contrast.metric.points(self.records, contrast.weights)
        return tuple(self._estimate(replace(contrast, metric=point)) for point in points)

    def _estimate(self, contrast: Contrast) -> Estimate:
        by_seed, values = self.by_seed(contrast), self.values(contrast.metric)
        pooled = [arm for arm in self._peers(*contrast.weights) if arm in values]
        # One seed decides nothing, however little others scatter.
        if len(by_seed) > 1 and contrast.minus_arm and contrast.weights.keys() <= set(pooled):
            return block_estimate(values[pooled], contrast.weights)
        return mean_estimate(by_seed)

    def _peers(self, *arms: str) -> list[str]:
        """Return the arms whose noise is that of all these: in each seed the same start, as many steps, and one rate.

        They are none if these arms differ in that themselves.
        """

        def fits(one: set, other: set) -> bool:
            seeds = {row[0] for row in one} & {row[0] for row in other}
            return bool(seeds) and all(row in other for row in one if row[0] in seeds)

        how = self._how
        return [arm for arm, rows in how.items() if all(fits(rows, how.get(other, set())) for other in arms)]


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, and how it is tested."""

    name: str  #: in code and links
    finding: str  #: the finding that it belongs to
    statement: str  #: the claim in one sentence
    source: str  #: where the paper makes it, in its own words or with the numbers that it prints
    effect: Contrast  #: what tests it
    margin: float  #: the smallest difference that counts, in the units of the metric
    kind: str = "above"  #: "above", or "near" and "apart", where both signs count and a curve at all its snapshots
    controls: dict[str, Contrast] = field(default_factory=dict)  #: what each simpler explanation leaves of the effect
    rivals: dict[str, Contrast] = field(default_factory=dict)  #: of which the same should not hold
    known: str = "words"  #: where the paper's number is from, one of KNOWN
    elsewhere: str = ""  #: what other papers found

    @property
    def digest(self) -> str:
        """8 hex digits that change with all that decides the verdict, and not with words."""
        decides = {"name": self.name, "margin": self.margin, "kind": self.kind, "effect": asdict(self.effect)}
        decides |= {part: {k: asdict(v) for k, v in getattr(self, part).items()} for part in ("controls", "rivals")}
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """All that is looked at."""
        return self.effect, *self.controls.values(), *self.rivals.values()

    def judgeable(self, records: Records) -> bool:
        """Tell whether the records have the arms, the analyses and the columns that it needs."""
        arms = {arm for contrast in self.contrasts if not contrast.metric.analysis for arm in contrast.weights}
        recorded = all(contrast.metric.recorded(records) for contrast in self.contrasts)
        return recorded and arms <= set(records.runs["arm"])


def digests(claims: Sequence[Claim]) -> dict[str, str]:
    """Return the digests of claims by name, as records keep them."""
    return {claim.name: claim.digest for claim in claims}


def written_after(claims: Sequence[Claim], records: Records, folder: Path) -> set[str]:
    """Return the names of the claims that a run they look at, or a row of an analysis, was made without.

    A claim with another criterion is another. Each run and row names a set of claims, and claims.json, in the records'
    ``folder``, says what was in it; raises an OpdlabError if that file is damaged.
    """
    path = folder / "claims.json"
    sets = read_json(path) if path.is_file() else {}

    def named(contrast: Contrast) -> set[str]:
        rows = contrast.metric.rows(records) if contrast.metric.analysis else records.runs
        return set(rows[rows["arm"].isin(list(contrast.weights))].reindex(columns=["claims"])["claims"])

    return {
        claim.name
        for claim in claims
        for contrast in claim.contrasts
        for at_that_time in named(contrast)
        if sets.get(at_that_time, {}).get(claim.name) != claim.digest
    }


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim."""

    claim: Claim
    verdict: str  #: a key of opdlab.claims.scorecard.PLAIN
    by: str  #: the control that explains the effect, or the rival that passes too
    effect: Interval  #: the mean over seeds with its 95 % interval; of a curve, where it is farthest from zero
    p: float  #: the corrected p-value of the test for the claim
    p_against: float  #: the corrected p-value of the test against it
    seeds: int
    share: dict[str, Interval | None]  #: what each control leaves as a share of the effect; None if not defined
    at_half: str  #: the verdict at half the margin
    at_twice: str  #: the verdict at twice the margin
    needed: int | None = None  #: the seeds that would decide it (:func:`seeds_to_decide`)


def judge(claims: Sequence[Claim], records: Records) -> list[Verdict]:
    """Return the verdicts on claims, which are judged together: the tests of one finding are corrected together.

    Raises:
        OpdlabError: if the records lack an arm, an analysis or a column, which it names (:meth:`Claim.judgeable`).
    """
    runs = Runs(records)
    half, once, twice = (_words(claims, runs, factor) for factor in (0.5, 1.0, 2.0))
    verdicts = []
    for claim, (word, by, p, against), (at_half, *_), (at_twice, *_) in zip(claims, once, half, twice, strict=True):
        effect = max(runs.estimates(claim.effect), key=lambda estimate: abs(np.nan_to_num(estimate.mean))).interval()
        first = claim.effect.metric.points(records, claim.effect.weights)[0]
        seeds = len(runs.by_seed(replace(claim.effect, metric=first)))
        share = {name: _share(control, claim.effect, runs) for name, control in claim.controls.items()}
        needed = seeds_to_decide(claim, runs, seeds, (p, against)) if word == "inconclusive" else None
        verdicts.append(Verdict(claim, word, by, effect, p, against, seeds, share, at_half, at_twice, needed))
    return verdicts


def seeds_to_decide(claim: Claim, runs: Runs, seeds: int, corrected: tuple[float, float]) -> int | None:
    """Return about how many seeds would decide an undecided claim, if the effect and its scatter stayed as they are.

    The z-score of the test that is nearer to passing grows with the root of the number of seeds, and has to reach the
    one of :data:`LEVEL` over the number of tests that its p-value is ``corrected`` for, for and against the claim. A
    number of hundreds says that the effect lies on the margin; None that it is not known, or lies there exactly.
    """
    p, raw = min(zip(corrected, _both_ways(claim.kind, runs.estimates(claim.effect), claim.margin), strict=True))
    if not 0 < raw < 0.5:
        return None
    return ceil(seeds * float(norm.isf(LEVEL * raw / p) / norm.isf(raw)) ** 2)


def _share(left: Contrast, of: Contrast, runs: Runs) -> Interval | None:
    if left.metric.curve or of.metric.curve:
        return None
    both = pd.concat([runs.by_seed(left), runs.by_seed(of)], axis=1).dropna()
    return ratio_interval(both.iloc[:, 0], both.iloc[:, 1]) if len(both) else None


def _words(claims: Sequence[Claim], runs: Runs, factor: float) -> list[tuple[str, str, float, float]]:
    """Return verdict, reason and p-values for and against each claim, with margins times ``factor``."""
    rows = [(i, claims[i].finding, *test) for i in range(len(claims)) for test in _tests(claims[i], runs, factor)]
    tests = pd.DataFrame(rows, columns=["claim", "finding", "what", "by", "p"])
    # Those of a finding that lead to one verdict are corrected together.
    tests["p"] = tests.groupby(["finding", "what"])["p"].transform(holm)
    return [_verdict(claim, tests[tests["claim"] == i]) for i, claim in enumerate(claims)]


def _tests(claim: Claim, runs: Runs, factor: float) -> Iterator[tuple[str, str, float]]:
    """Yield what each test tells of a claim, by which control or rival, and its p-value."""
    margin = claim.margin * factor
    support, against = _both_ways(claim.kind, runs.estimates(claim.effect), margin)
    yield from (("support", "", support), ("against", "", against))
    for name, left in claim.controls.items():
        gone = (runs.by_seed(claim.effect) / 2 - runs.by_seed(left)).dropna()
        yield "explained", name, mean_estimate(gone).above(0.0)
    for name, rival in claim.rivals.items():
        yield "uninformative", name, _both_ways(claim.kind, runs.estimates(rival), margin)[0]


def _both_ways(kind: str, estimates: Sequence[Estimate], margin: float) -> tuple[float, float]:
    """Return the p-values of the test for a claim of some kind, and of the test against it."""
    if kind == "above":
        return estimates[0].above(margin), estimates[0].below(margin)
    # Near: within the margin on both sides, at every snapshot (two one-sided tests each).
    near = max(max(estimate.below(margin), estimate.above(-margin)) for estimate in estimates)
    # Apart: beyond it on one side, at some snapshot; so many chances are paid for.
    beyond = min(min(estimate.above(margin), estimate.below(-margin)) for estimate in estimates)
    apart = min(1.0, 2 * len(estimates) * beyond)
    return (near, apart) if kind == "near" else (apart, near)


def _verdict(claim: Claim, tests: pd.DataFrame) -> tuple[str, str, float, float]:
    support, against, *_ = tests["p"]
    reasons = tests.iloc[2:].query("p < @LEVEL")
    by = ""
    if against < LEVEL:
        word = "not reproduced"
    elif support >= LEVEL:
        word = "inconclusive"
    elif len(reasons):
        word, by = reasons.iloc[0][["what", "by"]]
    else:
        word = "reproduced" if claim.controls or claim.rivals else "seen"
    return word, by, support, against
