"""The paper's claims as data, and the verdict on each of them, computed from records.

A claim names the number that tests it, one per seed and oriented so that a positive one speaks for it, the smallest
effect that counts, and what would explain it away. The criteria are committed before the runs that they judge, which
the history of this file shows, with one exception: seeds 0 to 2 of the five first arms were known when they were
written. Those are a pilot; the seeds after them are the test.

The verdicts:

- *reproduced*: the effect exceeds the smallest that counts (one-sided t-test over seeds, corrected after Holm over all
  claims that were tested together), and no control takes most of it away;
- *explained*: so it does, but a control takes more than half of it away (95 % interval, paired by seed);
- *not reproduced*: the 95 % interval of the effect lies below the smallest that counts;
- *inconclusive*: anything else; more seeds could tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, log, nan

import numpy as np
import pandas as pd
from scipy import stats

from opdlab.errors import OpdlabError
from opdlab.records import Records, per_run
from opdlab.stats import Interval, mean_interval

#: What a verdict can be.
VERDICTS = ("reproduced", "explained", "not reproduced", "inconclusive")


@dataclass(frozen=True)
class Value:
    """One number per run: the mean of a column over matrices.

    Attributes:
        column: of the records' ``matrices``, or of their ``trajectory`` where ``progress`` is given.
        progress: share of the training; the snapshot nearest to it.
        since: the change since that share of the training, instead of the value itself.
        block: "attention" leaves the MLP out, as the paper does for trajectories.
        log: take the natural logarithm, for what is compared by its ratio.
    """

    column: str
    progress: float | None = None
    since: float | None = None
    block: str = ""
    log: bool = False

    def of(self, records: Records, arm: str) -> pd.Series:
        """Return the value of an arm's runs, by seed."""
        table = records.matrices if self.progress is None else records.trajectory
        rows = table[(table["arm"] == arm) & (table["block"].isin([self.block]) if self.block else True)]
        if rows.empty or self.column not in rows:
            raise OpdlabError(f"the records have no {self.column!r} of the arm {arm!r}; record it first")
        values = _at(per_run(rows), self.column, self.progress)
        if self.log:
            values = np.log(values)
        if self.since is not None:
            values = values - replace(self, progress=self.since, since=None).of(records, arm)
        return values


def _at(runs: pd.DataFrame, column: str, progress: float | None) -> pd.Series:
    if progress is not None:
        gap = (runs["progress"] - progress).abs()
        runs = runs[gap == gap.min()]
    return runs.set_index("seed")[column]


@dataclass(frozen=True)
class Difference:
    """A statistic: the value of one arm minus that of another (or minus another value, or a number), by seed."""

    value: Value
    arm: str
    minus_arm: str = ""
    minus: Value | float | None = None  # by default the same value of the other arm

    def of(self, records: Records) -> pd.Series:
        """Return the difference, by seed; only seeds that both sides have count."""
        first = self.value.of(records, self.arm)
        if isinstance(self.minus, (int, float)):
            return first - self.minus
        return (first - (self.minus or self.value).of(records, self.minus_arm or self.arm)).dropna()


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
    """

    name: str
    finding: str
    statement: str
    source: str
    effect: Difference
    smallest: float
    controls: dict[str, Difference]


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim.

    Attributes:
        claim: which.
        verdict: one of :data:`opdlab.claims.VERDICTS`.
        by: the control that explains it, or "".
        effect: mean and 95 % interval over seeds.
        p: one-sided p-value of an effect above the smallest that counts, corrected after Holm.
        seeds: how many.
        left: what each control leaves of the effect, with its interval.
    """

    claim: Claim
    verdict: str
    by: str
    effect: Interval
    p: float
    seeds: int
    left: dict[str, Interval]


def judge(claims: Sequence[Claim], records: Records) -> list[Verdict]:
    """Return the verdicts on claims that are tested together.

    Raises:
        OpdlabError: if the records lack an arm or a column, naming it.
    """
    effects = [claim.effect.of(records) for claim in claims]
    raw = [_p_above(effect, claim.smallest) for claim, effect in zip(claims, effects, strict=True)]
    verdicts = []
    for claim, effect, p in zip(claims, effects, holm(raw), strict=True):
        left = {name: control.of(records) for name, control in claim.controls.items()}
        verdict, by = _verdict(effect, claim.smallest, p, left)
        intervals = {name: mean_interval(values) for name, values in left.items()}
        verdicts.append(Verdict(claim, verdict, by, mean_interval(effect), p, len(effect), intervals))
    return verdicts


def _verdict(effect: pd.Series, smallest: float, p: float, left: dict[str, pd.Series]) -> tuple[str, str]:
    if p < 0.05:
        for name, values in left.items():
            # Most of the effect is gone, in every seed's own measure.
            if mean_interval((values - effect / 2).dropna()).high < 0:
                return "explained", name
        return "reproduced", ""
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
        effect = found.effect
        spread = "" if isnan(effect.low) else f" [{effect.low:+.3g}, {effect.high:+.3g}]"
        rows.append(
            {
                "claim": found.claim.statement,
                "paper": found.claim.source,
                "effect": f"{effect.mean:+.3g}{spread}",
                "counts from": f"{found.claim.smallest:g}",
                "p": f"{found.p:.2g}",
                "seeds": found.seeds,
                "verdict": f"{found.verdict} by {found.by}" if found.by else found.verdict,
            }
        )
    return pd.DataFrame(rows)


# --- the claims -------------------------------------------------------------------------------------------------------

_SPARSITY = Value("sparsity")
_ANGLE, _DRIFT = Value("angle_left_mean", log=True), Value("nss", log=True)
_PRINCIPAL, _LOW = Value("principal_overlap_a30"), Value("low_overlap_a30")
_END = {"progress": 1.0, "block": "attention"}
_RISE = Value("stable_rank", since=0.1, **_END)
# At 20 % of the training, about the paper's first checkpoint.
_EARLY = Value("sim_right_K16", progress=0.2, block="attention")


def _matched(value: Value) -> Value:
    return replace(value, column=f"{value.column}_matched")


def _order(name: str, what: str, value: Value, high: str, low: str, smallest: float, source: str) -> Claim:
    """Return the claim that one arm lies above another, with the controls for size and, for SFT, for its recipe."""
    controls = {"the size of the update": Difference(_matched(value), high, low)}
    if high == "sft":
        controls["SFT's own recipe"] = Difference(value, "sft_matched", low)
    if low == "sft":
        controls["SFT's own recipe"] = Difference(value, high, "sft_matched")
    return Claim(name, "regime", what, source, Difference(value, high, low), smallest, controls)


def _masked(arm: str, label: str) -> tuple[Claim, Claim]:
    """Return the claims that an arm avoids the principal weights and prefers the small ones."""
    source = "Figure 3: below and above the random 0.3"
    principal = Claim(
        f"principal-{arm}", "regime", f"{label} avoids the principal weights", source,
        Difference(Value("principal_share_a30"), arm, minus=_PRINCIPAL), 0.005,
        {
            "noise of the same density": Difference(Value("principal_overlap_a30_noise"), arm, minus=_PRINCIPAL),
            "the permuted update": Difference(Value("principal_overlap_a30_null"), arm, minus=_PRINCIPAL),
        },
    )  # fmt: skip
    low = Claim(
        f"low-{arm}", "regime", f"{label} prefers the small weights", source,
        Difference(_LOW, arm, minus=Value("low_share_a30")), 0.005,
        {
            "noise of the same density": Difference(_LOW, arm, minus=Value("low_overlap_a30_noise")),
            "the permuted update": Difference(_LOW, arm, minus=Value("low_overlap_a30_null")),
        },
    )  # fmt: skip
    return principal, low


#: The claims that the recorded arms can test.
CLAIMS = (
    _order("sparsity-opd-sft", "OPD leaves more weights unchanged than SFT", _SPARSITY, "opd", "sft", 0.01,
           "Table 1: 51.6 and 8.1 %"),
    _order("sparsity-rlvr-opd", "RLVR leaves more weights unchanged than OPD", _SPARSITY, "rlvr", "opd", 0.01,
           "Table 1: 77.2 and 51.6 %"),
    _order("rotation-sft-opd", "SFT turns subspaces further than OPD", _ANGLE, "sft", "opd", log(1.5),
           "Figure 2: above 10 and about 1 degree, the largest angles"),
    _order("rotation-opd-rlvr", "OPD turns subspaces further than RLVR", _ANGLE, "opd", "rlvr", log(1.2),
           "Figure 2: about 1 and below 0.5 degrees, the largest angles"),
    _order("drift-sft-opd", "SFT moves the spectrum further than OPD", _DRIFT, "sft", "opd", log(1.5),
           "Section 4: about 1e-3 and 1e-4"),
    _order("drift-opd-rlvr", "OPD moves the spectrum further than RLVR", _DRIFT, "opd", "rlvr", log(1.2),
           "Section 4: about 1e-4 and 1e-5"),
    *_masked("opd", "OPD"),
    *_masked("rlvr", "RLVR"),
    Claim("rank-sft-rises", "rank", "The stable rank of SFT rises", "Figure 4: from 20 to 75",
          Difference(_RISE, "sft", minus=0.0), 0.25, {}),
    Claim("rank-rlvr-falls", "rank", "The stable rank of RLVR falls", "Figure 4",
          Difference(Value("stable_rank", progress=0.1, block="attention"), "rlvr", minus=Value("stable_rank", **_END)),
          0.25, {}),
    Claim("rank-opd-flat", "rank", "The stable rank of OPD changes less than that of SFT", "Figure 4: 20 to 30",
          Difference(_RISE, "sft", "opd"), 0.25,
          {"SFT's own recipe": Difference(_RISE, "sft_matched", "opd")}),
    Claim("norm-opd-rlvr", "rank", "OPD moves further than RLVR", "Figure 4: norms of 0.45 and 0.17",
          Difference(Value("frobenius", log=True, **_END), "opd", "rlvr"), log(1.2), {}),
    Claim("locking-opd", "locking", "OPD's final subspace is there at 20 % of the training", "Figure 5",
          Difference(_EARLY, "opd", minus=replace(_EARLY, column="sim_right_K16_null")), 0.1,
          {"matched SFT, which has it as well": Difference(_EARLY, "opd", "sft_matched")}),
    Claim("locking-opd-sft", "locking", "OPD's final subspace is there earlier than SFT's", "Figure 5",
          Difference(_EARLY, "opd", "sft"), 0.05,
          {"SFT's own recipe": Difference(_EARLY, "opd", "sft_matched")}),
)  # fmt: skip
