"""Verdicts as a reader meets them: under plain names, as badges and in a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd

from opdlab.claims.paper import CLAIMS, FINDINGS
from opdlab.claims.rules import Claim, Verdict
from opdlab.lab.records import Records
from opdlab.stats import Interval


class Plain(NamedTuple):
    """What a verdict means to a reader."""

    name: str  #: on its badge
    sentence: str  #: in full


#: What each verdict means, from the best for the claim to the worst.
#:
#: :meta hide-value:
PLAIN = {
    "reproduced": Plain(
        "holds up", "The effect is there, and nothing simpler that was tried takes half of it for sure."
    ),
    "seen": Plain("seen, not tested further", "The effect is there, and nothing was tried that could explain it."),
    "explained": Plain("seen, but explained", "The effect is there, and a simpler cause is enough for it."),
    "uninformative": Plain("tells nothing", "The test passes, and so does another for which it should have failed."),
    "not reproduced": Plain("not seen", "The effect is too small to count, or goes the other way."),
    "inconclusive": Plain("undecided", "The runs do not tell whether the effect is large enough to count."),
}


def badge(verdict: str, by: str = "") -> str:
    """Return a verdict as a coloured badge, in HTML, whose sentence shows when it is pointed at or reached by keyboard.

    >>> badge("inconclusive").split(" role")[0]
    '<span class="verdict verdict-inconclusive"'
    """
    plain = PLAIN[verdict]
    sentence = f"{plain.sentence} Here: {by}." if by else plain.sentence
    kind = verdict.replace(" ", "-")
    told = f'role="note" tabindex="0" title="{escape(sentence)}" aria-label="{escape(f"{plain.name}: {sentence}")}"'
    return f'<span class="verdict verdict-{kind}" {told}>{escape(plain.name)}</span>'


class Html(str):
    """HTML that a notebook shows."""

    def _repr_html_(self) -> str:
        return str(self)


def fold(table: pd.DataFrame, summary: str) -> Html:
    """Return a table under a line that opens it; cells may hold HTML, and ``table.attrs["note"]`` comes before it.

    >>> fold(pd.DataFrame({"arm": ["OPD"]}), "Which arms?")[:55]
    '<details class="numbers"><summary>Which arms?</summary>'
    """
    html = table.to_html(escape=False, border=0)
    note = f"<p>{table.attrs['note']}</p>" if "note" in table.attrs else ""
    return Html(f'<details class="numbers"><summary>{escape(summary)}</summary>{note}{html}</details>')


#: How the columns of a chapter's verdicts are read.
_NOTE = (
    "The effect is the difference that the claim is about, with its 95 % interval over seeds: as a factor where sizes "
    "or ranks are compared, which are those of the matrices of attention, else in the units of the quantity. To count "
    "it has to be as large as the margin below it, which is negative where the claim is that nothing is lost. Where "
    "the claim is that two arms are alike, it has to be smaller than the margin. Of a claim about a whole curve the "
    "effect is shown where it is largest. If the interval lies on both sides of the margin, the claim is undecided. A "
    "simpler cause is a control that could make the effect without the paper's reason, and the last column says how "
    "much of the effect is left when that is taken into account. If it is less than half for sure, the effect is "
    "explained. SFT's own recipe is its start, rate and number of steps, and matched SFT, which has OPD's, is SFT "
    "without it."
)
_POSITIONS = (
    " How many changes lie in a group of weights is counted from the least that is possible, 0, to the most, 1."
)


def _claimed(claim: Claim) -> str:
    """Return a claim with the view that it is about, where a run has several."""
    between = claim.effect.metric.column.endswith("_bf16")
    return f"{claim.statement} (between bf16 checkpoints)" if between else claim.statement


def _effect(found: Verdict) -> str:
    """Return an effect, and below it what it has to reach."""
    shown, margin = f"{found.effect:+.2g}", f"{found.claim.margin:.2g}"
    if found.claim.effect.metric.log:
        shown, margin = f"a factor of {Interval(*np.exp(found.effect)):.2f}", f"{np.exp(found.claim.margin):.2f}"
    return f"{'not measured' if np.isnan(found.effect.mean) else shown}<br><small>margin {margin}</small>"


def left_of_effect(share: Interval | None) -> str:
    """Say how much of an effect a simpler cause leaves."""
    if share is None or share.high - share.low > 2:
        return "cannot be told"
    if share.high <= 0:
        return "nothing left"
    return "all of it left" if share.mean >= 1 else f"{share:.0%} left"


def _causes(found: Verdict) -> str:
    """Say what simpler causes leave of an effect, and what passes a test that it should fail."""
    passes = [f"{found.by} passes the test as well"] if found.verdict == "uninformative" else []
    # What is said of a control after a comma is what was expected of it.
    left = (f"{name.partition(',')[0]}: {left_of_effect(share)}" for name, share in found.share.items())
    return "; ".join([*passes, *left])


def verdict_table(verdicts: Sequence[Verdict], names: Collection[str] = ()) -> pd.DataFrame:
    """Return what a chapter shows of its verdicts: claim, badge, effect, and what the controls leave of it.

    Only claims in ``names`` are shown, or all.
    """
    shown = [found for found in verdicts if not names or found.claim.name in names]
    columns = {
        "claim": [_claimed(found.claim) for found in shown],
        "verdict": [badge(found.verdict, found.by) for found in shown],
        "effect": [_effect(found) for found in shown],
        "left by a simpler cause": [_causes(found) for found in shown],
    }
    table = pd.DataFrame(columns).set_index("claim")
    positions = any("_position_" in found.claim.effect.metric.column for found in shown)
    table.attrs["note"] = _NOTE + (_POSITIONS if positions else "")
    return table


def judgeable(records: Records, finding: str = "", claims: Sequence[Claim] = CLAIMS) -> list[Claim]:
    """Return the claims that records can decide, of one finding or of all."""
    return [claim for claim in claims if finding in ("", claim.finding) and claim.judgeable(records)]


def scorecard(verdicts: Sequence[Verdict], after: Collection[str] = ()) -> pd.DataFrame:
    """Return verdicts as a table, one row per claim, under plain names.

    ``after`` has the names of the claims that were written after a run (:func:`opdlab.claims.rules.written_after`).
    """
    rows = []
    for found in verdicts:
        claim = found.claim
        share = next((share for share in found.share.values() if share), None)
        rows.append(
            {
                "claim": claim.statement,
                "verdict": PLAIN[found.verdict].name,
                "why": found.by,
                "paper": claim.source,
                "known": claim.known,
                "effect": f"{found.effect:+.3g}",
                "margin": f"{claim.margin:.3g}",
                "left by the controls": left_of_effect(share) if share else "",
                "p for": f"{found.p:.2g}",
                "p against": f"{found.p_against:.2g}",
                "seeds": found.seeds,
                "seeds that would decide": f"about {found.needed}" if found.needed else "",
                "at half the margin": PLAIN[found.at_half].name,
                "at twice": PLAIN[found.at_twice].name,
                "written": "after" if claim.name in after else "before",
                "elsewhere": claim.elsewhere,
            }
        )
    return pd.DataFrame(rows, index=[found.claim.name for found in verdicts])


def claims_table(
    verdicts: Sequence[Verdict], real: Mapping[str, Verdict] | None = None, after: Collection[str] = ()
) -> Html:
    """Return every claim as a row of four columns, in HTML; a script of the site lets a reader filter the rows.

    They are the claim with its finding, the verdict as a badge, what other papers found, and all else, folded. Beside
    the ``verdicts`` of the toy model stand those of the ``real`` one, by the names of the claims that it can decide;
    ``after`` is that of :func:`scorecard`.
    """
    real, table = real or {}, scorecard(verdicts, after)
    rows = [_row(found, real.get(found.claim.name), table.loc[found.claim.name]) for found in verdicts]
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("claim", "verdict", "other papers", "details"))
    return Html(f'<table class="scorecard"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _row(toy: Verdict, real: Verdict | None, written: pd.Series) -> str:
    title, _ = FINDINGS[toy.claim.finding]
    data = {"finding": title, "toy": PLAIN[toy.verdict].name, "real": PLAIN[real.verdict].name if real else ""}
    shown, more = badge(toy.verdict, toy.by), dict(written.drop(["claim", "verdict", "elsewhere"]))
    if real:
        shown += f'<br><span class="beside">real model:</span> {badge(real.verdict, real.by)}'
        more["effect in the real model"] = f"{real.effect:+.3g}"
    told = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in more.items() if value != ""
    )
    summary = f'<summary aria-label="Details of: {escape(toy.claim.statement)}">details</summary>'
    marks = " ".join(f'data-{key}="{escape(value)}"' for key, value in data.items())
    return (
        f"<tr {marks}>"
        f'<th scope="row">{escape(toy.claim.statement)}<br><span class="beside">{escape(title)}</span></th>'
        f"<td>{shown}</td><td>{escape(toy.claim.elsewhere)}</td>"
        f"<td><details>{summary}<dl>{told}</dl></details></td></tr>"
    )
