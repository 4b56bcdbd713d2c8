"""Verdicts are computed, and each can come out either way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import opdlab
from opdlab.claims import (
    CLAIMS,
    FINDINGS,
    VERDICTS,
    Claim,
    Contrast,
    Metric,
    contrasts,
    count_verdicts,
    holm,
    judge,
    judgeable,
    scorecard,
)
from opdlab.claims.judging import KNOWN
from opdlab.errors import OpdlabError
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.grid import PAPER, RECORDED
from opdlab.lab.records import Records, load

CLAIM = Claim(
    "size", "regime", "A is larger than B", "nowhere", Contrast(Metric("x"), "a", "b"), 1.0,
    {"the control": Contrast(Metric("x"), "a", "c")},
    {"a negative control": Contrast(Metric("x"), "d", "b")},
)  # fmt: skip


def records(seeds=5, noise=0.05, **means):
    """Records of arms whose column x has these means, two matrices a run and three snapshots, rising to the mean."""
    rng, rows, path = np.random.default_rng(0), [], []
    for arm, mean in means.items():
        for seed in range(seeds):
            value = mean + noise * rng.standard_normal()
            for block in ("attention", "mlp"):
                row = {"arm": arm, "label": arm, "seed": seed, "matrix": block, "block": block, "layer": 0}
                row |= {"rows": 8, "cols": 8, "parameters": 64}
                rows.append(row | {"x": value})
                path += [row | {"progress": p, "step": 10 * p, "x": p * value} for p in (0.1, 0.2, 1.0)]
    empty = pd.DataFrame()
    return Records(empty, empty, pd.DataFrame(rows), pd.DataFrame(path), empty)


@pytest.mark.parametrize(
    ("means", "noise", "expected", "by"),
    [
        ({"a": 5, "b": 2, "c": 2.2, "d": 2}, 0.05, "reproduced", ""),
        ({"a": 5, "b": 2, "c": 4.5, "d": 2}, 0.05, "explained", "the control"),
        ({"a": 5, "b": 2, "c": 2.2, "d": 4}, 0.05, "explained", "a negative control"),
        ({"a": 2.5, "b": 2, "c": 2, "d": 2}, 0.05, "not reproduced", ""),
        ({"a": 1, "b": 2, "c": 2, "d": 9}, 0.05, "not reproduced", ""),
        ({"a": 4, "b": 2, "c": 2, "d": 2}, 3.0, "inconclusive", ""),
    ],
)
def test_a_verdict_can_come_out_any_way(means, noise, expected, by):
    (found,) = judge([CLAIM], records(noise=noise, **means))
    assert (found.verdict, found.by) == (expected, by) and found.verdict in VERDICTS
    assert found.seeds == 5 and found.effect.low < found.effect.mean < found.effect.high


@pytest.mark.parametrize(
    ("means", "perhaps"),
    [
        ({"c": 2.2, "d": 2}, ()),
        ({"c": 3.5, "d": 2}, ("the control",)),  # which takes about half of the effect
        ({"c": 2.2, "d": 3}, ("a negative control",)),  # which has about the smallest that counts
        ({"c": 3.5, "d": 3}, ("the control", "a negative control")),
    ],
)
def test_what_may_explain_an_effect_is_said(means, perhaps):
    (found,) = judge([CLAIM], records(a=5, b=2, **means))
    assert (found.verdict, found.perhaps) == ("reproduced", perhaps)
    assert found.text == "reproduced" + (f", perhaps explained by {' or '.join(perhaps)}" if perhaps else "")


def test_one_seed_cannot_tell():
    (found,) = judge([CLAIM], records(seeds=1, a=9, b=2, c=2, d=2))
    assert found.verdict == "inconclusive" and found.p == 1


def test_metrics_by_progress_block_and_change():
    made = records(a=5, b=2)
    end = made.matrices[made.matrices["block"] == "mlp"].groupby(["arm", "seed"])["x"].mean()
    assert Metric("x", progress=0.19, block="attention").of(made, "a").tolist() == pytest.approx(0.2 * end["a"])
    assert Metric("x", progress=1.0, since=0.1).of(made, "a").tolist() == pytest.approx(0.9 * end["a"])
    assert Metric("x", log=True).of(made, "a").tolist() == pytest.approx(np.log(end["a"]))
    assert Contrast(Metric("x"), "a", minus=3.0).of(made).tolist() == pytest.approx(end["a"] - 3)
    two = Contrast(Metric("x"), "a", minus=Metric("x", log=True)).of(made)
    assert two.tolist() == pytest.approx(end["a"] - np.log(end["a"]))
    with pytest.raises(OpdlabError, match="no 'x' of the arm 'z'"):
        Metric("x").of(made, "z")
    with pytest.raises(OpdlabError, match="no 'y' of the arm 'a'"):
        Metric("y").of(made, "a")


def test_only_seeds_on_both_sides_count():
    made = records(a=5, b=2, c=2, d=2)
    missing = (made.matrices["arm"] == "b") & (made.matrices["seed"] == 4)
    (found,) = judge([CLAIM], replace(made, matrices=made.matrices[~missing]))
    assert found.seeds == 4 and found.verdict == "reproduced"


def test_holm_corrects_for_testing_together():
    assert holm([0.04]) == [0.04]
    assert holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    # A claim that holds alone needs more beside others.
    close = Claim("close", "regime", "A is a little larger", "nowhere", Contrast(Metric("x"), "a", "b"), 2.93, {})
    made = records(a=5, b=2, c=2, d=2)
    alone = judge([close], made)[0].p
    assert judge([close] * 10, made)[0].p == pytest.approx(min(1, 10 * alone))
    # Claims of another finding are another family.
    others = [replace(close, finding="rank")] * 9
    assert judge([close, *others], made)[0].p == pytest.approx(alone)


def test_sizes_of_contrasts():
    made = records(a=5, b=7)
    plain = Contrast(Metric("x"), "a", "b").of(made)
    assert (plain < 0).all()
    assert Contrast(Metric("x"), "a", "b", size=1).of(made).tolist() == (-plain).tolist()
    assert Contrast(Metric("x"), "a", "b", size=-1).of(made).tolist() == plain.tolist()


def test_the_paper_s_claims_can_be_judged_from_the_records():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert set().union(*(claim.arms for claim in CLAIMS)) <= set(RECORDED)
    of_paper = [claim for claim in CLAIMS if claim.arms <= set(PAPER) and not claim.analyses]
    verdicts = judge(of_paper, load("tiny"))
    assert all(found.verdict in VERDICTS and bool(found.by) == (found.verdict == "explained") for found in verdicts)
    table = scorecard(verdicts)
    assert table["verdict"].str.len().min() > 0 and len(table) == len(of_paper)


def test_one_finding_is_judged_through_the_door():
    found = load("tiny", ("sft", "opd", "rlvr", "sft_matched"))
    claims = judgeable([claim for claim in CLAIMS if claim.finding == "rank"], found)
    pd.testing.assert_frame_equal(opdlab.judge(found, "rank"), scorecard(judge(claims, found)))
    assert 0 < len(claims) < len(opdlab.judge(found))
    with pytest.raises(OpdlabError, match="there is no finding 'size'; choose one of regime"):
        opdlab.judge(found, "size")


def test_every_finding_has_its_chapter_and_its_row():
    assert {claim.finding for claim in CLAIMS} == set(FINDINGS)
    pages = Path(__file__).resolve().parents[2] / "book"
    for title, page in FINDINGS.values():
        assert f"# {title}" in (pages / f"{page}.ipynb").read_text()
    of_paper = [claim for claim in CLAIMS if claim.arms <= set(PAPER) and not claim.analyses]
    *_, rank, total = count_verdicts(judge(of_paper, load("tiny")), dict(list(FINDINGS.items())[:2])).splitlines()
    of_rank = sum(claim.finding == "rank" for claim in of_paper)
    assert rank.startswith("| [Rank over time](05_rank_over_time.ipynb) |")
    assert sum(int(cell) for cell in rank.split("|")[2:] if cell.strip()) == of_rank
    assert total.startswith(f"| **all {len(of_paper)}** |")


def test_metrics_of_an_analysis():
    table = pd.DataFrame(
        [{"seed": seed, "arm": "a", "other": other, "x": seed + len(other)} for seed in (0, 1) for other in ("b", "cc")]
    )
    made = replace(records(a=5, b=2), analyses={"pairs": table})
    metric = Metric("x", "pairs", {"other": "cc"})
    assert metric.of(made, "a").to_dict() == {0: 2, 1: 3}
    contrast = Contrast(metric, "a", minus=replace(metric, where={"other": "b"}))
    assert contrast.of(made).tolist() == [1, 1] and contrast.arms == set()
    # Of all arms, where a table is about none.
    assert metric.of(replace(made, analyses={"pairs": table.drop(columns="arm")}), "").to_dict() == {0: 2, 1: 3}
    claim = Claim("of-pairs", "locking", "A is more like C than like B", "nowhere", contrast, 0.5)
    assert claim.analyses == {"pairs"} and claim.arms == set()
    with pytest.raises(OpdlabError, match="without the analysis 'pairs'"):
        judge([claim], records(a=5, b=2))
    with pytest.raises(OpdlabError, match="no 'x' of the arm 'z'"):
        metric.of(made, "z")


def test_contrasts_are_one_column_per_arm():
    made = records(a=5, b=2, c=2)
    table = contrasts(made, Metric("x"), ("a", "c"), "b")
    assert list(table) == ["a", "c"] and len(table) == 5
    assert table["a"].tolist() == Contrast(Metric("x"), "a", "b").of(made).tolist()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_claims_name_arms_and_analyses_that_exist(claim):
    assert claim.arms <= set(RECORDED) and claim.analyses <= set(ANALYSES)
    assert claim.known in KNOWN
