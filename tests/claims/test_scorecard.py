"""The claims are well made, and a reader sees the verdicts on them under plain names."""

import re
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import needs_tiny

import opdlab
from opdlab.claims import CLAIMS, FINDINGS, judge, judgeable, scorecard
from opdlab.claims.rules import KNOWN, Claim, Contrast, Metric, Verdict
from opdlab.claims.scorecard import PLAIN, badge, claims_table, fold, verdict_table
from opdlab.errors import OpdlabError
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.grid import PAPER, RECORDED
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import load
from opdlab.lab.scales import SCALES
from opdlab.stats import Interval

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_claims_name_arms_and_analyses_that_exist(claim):
    # Analyses have names of their own for what they measure besides.
    of_runs = [contrast for contrast in claim.contrasts if not contrast.metric.analysis]
    assert {arm for contrast in of_runs for arm in contrast.weights} <= set(RECORDED)
    assert {contrast.metric.analysis for contrast in claim.contrasts} <= {"", *ANALYSES}
    assert claim.known in KNOWN and claim.finding in FINDINGS


def test_no_two_claims_are_the_same_and_every_finding_has_one():
    assert len({claim.name for claim in CLAIMS}) == len({claim.digest for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.finding for claim in CLAIMS} == set(FINDINGS)


@needs_tiny
def test_every_finding_has_its_chapter():
    for title, page in FINDINGS.values():
        assert f"# {title}" in (ROOT / "book" / f"{page}.ipynb").read_text()


def html_of(page):
    """Return the HTML that a page shows."""
    cells = nbformat.read(page, as_version=4).cells
    outputs = (output for cell in cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.get("data", {}).get("text/html", "") for output in outputs)


def test_every_claim_of_the_scorecard_is_taught_in_a_chapter():
    judged = html_of(ROOT / "book" / "scorecard.ipynb")
    named = {claim.name: claim.statement for claim in CLAIMS if f'<th scope="row">{escape(claim.statement)}<' in judged}
    assert len(named) > 50
    chapters = "".join(map(html_of, sorted((ROOT / "book").glob("[01][0-9]_*.ipynb"))))
    shown = {name for name, claim in named.items() if re.search(rf"<th>{re.escape(claim)}( \(|</th>)", chapters)}
    assert named.keys() - shown == set()


def test_what_records_can_decide(of_paper):
    found = {claim.name: claim for claim in judgeable(of_paper)}
    arms = {name: {arm for contrast in claim.contrasts for arm in contrast.weights} for name, claim in found.items()}
    assert set().union(*arms.values()) <= set(PAPER)
    assert "norm-opd-rlvr" in found and "rank-opd_mix1" not in found and "elicit-low" not in found
    of_rank = [claim for claim in found.values() if claim.finding == "rank"]
    assert judgeable(of_paper, "rank") == of_rank and 0 < len(of_rank) < len(found)
    pairs = Claim("pairs", "rank", "", "", Contrast(Metric("cosine", analysis="similarity"), "opd"), 0.1)
    assert judgeable(of_paper, claims=[pairs, of_rank[0]]) == [of_rank[0]]


def test_records_are_judged_through_the_door(of_paper):
    claims = judgeable(of_paper, "rank")
    verdicts = judge(claims, of_paper)
    assert all(found.verdict in PLAIN for found in verdicts)
    pd.testing.assert_frame_equal(opdlab.judge(of_paper, "rank"), scorecard(verdicts))
    everything = opdlab.judge(of_paper)
    assert set(everything.index) == {claim.name for claim in judgeable(of_paper)}
    assert everything["verdict"].isin([plain.name for plain in PLAIN.values()]).all()
    with pytest.raises(OpdlabError, match="there is no finding 'size'; choose one of regime"):
        opdlab.judge(of_paper, "size")


@pytest.fixture
def verdicts():
    effect = Contrast(Metric("x"), "opd", "rlvr")
    left = {"SFT's <own> recipe": Contrast(Metric("x"), "opd", "sft_matched"), "size": effect}
    claims = [
        Claim("one", "rank", "It is so.", "Figure 0", effect, 0.25, controls=left, known="printed"),
        Claim("two", "rank", "It is not.", "Figure 1", effect, 0.5, elsewhere="others agree"),
    ]
    interval = Interval(1.0, 0.5, 1.5)
    shares = {"SFT's <own> recipe": Interval(0.125, 0.1, 0.15), "size": None}
    return [
        Verdict(claims[0], "explained", "SFT's <own> recipe", interval, 0.01, 1.0, 5, shares, "seen", "explained"),
        Verdict(claims[1], "inconclusive", "", interval, 0.4, 0.6, 3, {}, "seen", "not reproduced"),
    ]


def test_a_scorecard_says_what_the_verdicts_do(verdicts):
    table = scorecard(verdicts, after={"two"})
    assert table.index.tolist() == ["one", "two"] and list(table["claim"]) == ["It is so.", "It is not."]
    one, two = table.loc["one"], table.loc["two"]
    assert (one["verdict"], one["why"]) == ("seen, but explained", "SFT's <own> recipe")
    assert (two["verdict"], two["why"]) == ("undecided", "")
    assert one["effect"] == "+1 [+0.5, +1.5]"
    assert (one["paper"], one["known"], two["elsewhere"]) == ("Figure 0", "printed", "others agree")
    assert (one["margin"], one["p for"], two["p against"], two["seeds"]) == ("0.25", "0.01", "0.6", 3)
    assert (one["left by the controls"], two["left by the controls"]) == ("12 % [10 %, 15 %] left", "")
    assert (two["at half the margin"], two["at twice"]) == ("seen, not tested further", "not seen")
    assert (one["written"], two["written"]) == ("before", "after")


def test_the_table_of_a_chapter_shows_only_what_it_is_about(verdicts):
    table = verdict_table(verdicts)
    assert table.index.tolist() == ["It is so.", "It is not."]
    assert verdict_table(verdicts, ("two",)).index.tolist() == ["It is not."]
    left = ["SFT's <own> recipe: 12 % [10 %, 15 %] left; size: cannot be told", ""]
    assert table["left by a simpler cause"].tolist() == left
    effects = [f"+1 [+0.5, +1.5]<br><small>margin {margin}</small>" for margin in (0.25, 0.5)]
    assert table["effect"].tolist() == effects
    assert "simpler cause" in table.attrs["note"] and table.attrs["note"] in fold(table, "Verdicts")
    assert table["verdict"]["It is not."] == badge("inconclusive")


def test_the_table_of_a_chapter_gives_ratios_as_factors_and_says_what_was_looked_at(verdicts):
    one = verdicts[0]
    metric = Metric("stable_rank_bf16", log=True)
    ratio = replace(
        one,
        claim=replace(one.claim, effect=Contrast(metric, "opd", "rlvr")),
        effect=Interval(*np.log([2.0, 1.5, 3.0])),
        share={"size": Interval(-0.3, -0.4, -0.2), "recipe": Interval(5.0, 1.0, 9.0)},
    )
    (row,) = verdict_table([ratio]).reset_index().to_dict("records")
    assert row["claim"] == "It is so. (between bf16 checkpoints)"
    assert row["effect"] == "a factor of 2.00 [1.50, 3.00]<br><small>margin 1.28</small>"
    assert row["left by a simpler cause"] == "size: nothing left; recipe: cannot be told"


@pytest.mark.parametrize("verdict", PLAIN)
def test_a_badge_has_a_colour_a_name_and_a_sentence(verdict):
    shown, plain = badge(verdict, 'a "control" <of>'), PLAIN[verdict]
    assert f'class="verdict verdict-{verdict.replace(" ", "-")}"' in shown
    assert f">{plain.name}</span>" in unescape(shown)
    for attribute in ('tabindex="0"', f'title="{plain.sentence}', f'aria-label="{plain.name}: {plain.sentence}'):
        assert attribute in unescape(shown), "read by keyboard and by screen readers"
    # What comes from elsewhere cannot end the attribute, nor the tag.
    assert shown.count("<") == shown.count(">") == 2 and shown.count('"') % 2 == 0
    assert "Here" not in badge(verdict)


def test_a_folded_table_opens_by_its_line():
    folded = fold(pd.DataFrame({"verdict": [badge("seen")]}), "Which & why?")
    assert folded._repr_html_() == folded and folded.startswith("<details") and folded.endswith("</details>")
    assert "<summary>Which &amp; why?</summary>" in folded and badge("seen") in folded


def test_the_table_of_all_claims_has_four_columns_and_the_rest_folded(verdicts):
    real = {"two": replace(verdicts[1], verdict="seen", effect=Interval(2.0, 1.5, 2.5))}
    html = claims_table(verdicts, real, after={"two"})
    assert html._repr_html_() == html and html.startswith('<table class="scorecard">')
    head, one, two = re.findall("<tr.*?</tr>", html)
    assert re.findall('scope="col">(.*?)<', head) == ["claim", "verdict", "other papers", "details"]
    for row in (one, two):
        assert row.count("<td") == 3 and row.count("<th") == 1 and row.count("<details>") == 1
    assert 'data-finding="Rank, and its shadow in bfloat16" data-toy="seen, but explained" data-real=""' in one
    assert 'data-toy="undecided" data-real="seen, not tested further"' in two
    assert badge("explained", "SFT's <own> recipe") in one and "<own>" not in html
    assert badge("seen") in two and "<dt>effect in the real model</dt><dd>+2 [+1.5, +2.5]</dd>" in two
    assert "<td>others agree</td>" in two and "<dt>elsewhere</dt>" not in html
    assert "<dt>paper</dt><dd>Figure 0</dd>" in one and "<dt>written</dt><dd>after</dd>" in two
    assert "<dt>left by the controls</dt><dd>12 % [10 %, 15 %] left</dd>" in one
    assert "left by the controls" not in two, "what is empty is left out"
    assert 'aria-label="Details of: It is not."' in two


# --- scales are compared as far as they have records, and nothing is trained for it -----------------------------------

LEARNING = "tiny-learning"


@pytest.fixture
def smoke(paper, monkeypatch):
    """The folder with the records of the paper's arms at smoke, which the scale of that name reads."""
    monkeypatch.setitem(SCALES, "smoke", paper.scale)
    return paper.root


def test_the_claims_that_a_scale_can_decide_are_judged(smoke):
    whole, records = (load("smoke", arms, root=smoke) for arms in (None, ("opd", "rlvr", "sft_matched")))
    assert set(records.runs["arm"]) == {"opd", "rlvr", "sft_matched"}
    few, found = judgeable(records), judge(judgeable(whole), whole)
    assert 0 < len(few) < len(found)
    assert {verdict.seeds for verdict in found} <= {0, 2}, "an update that is nothing has no directions"
    assert [verdict.claim for verdict in judge(few, records)] == few


def test_the_first_laboratory_s_verdicts_are_kept():
    """What it found is told, and its records are gone but for five arms: so the table is read, and not computed."""
    kept = pd.read_csv(Laboratory.at(LEARNING).root / "data" / "verdicts-v1.csv", keep_default_na=False)
    assert set(kept["scale"]) == {"tiny", "small"} and not kept.duplicated(["scale", "claim"]).any()
    counts = kept.groupby(["scale", "verdict"]).size().unstack(fill_value=0)
    assert counts.sum(axis=1).to_dict() == {"small": 23, "tiny": 43}
    assert set(counts) == {"reproduced", "explained", "not reproduced", "inconclusive"}
    assert (kept["by"].ne("") == kept["verdict"].eq("explained")).all()
    assert kept["p"].between(0, 1).all() and kept["seeds"].gt(1).all()
    assert (kept[["low", "effect", "high"]].dropna().diff(axis=1).dropna(axis=1) >= 0).all(axis=None)
