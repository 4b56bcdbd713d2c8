"""Scales are compared as far as they have records, and nothing is trained for it."""

import pandas as pd
import pytest

from opdlab.claims import Metric, judge, judgeable
from opdlab.claims.across_scales import compare_order, compare_scales, judge_at, records_at
from opdlab.lab import plots
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import SCALES

METRICS = {"accuracy": Metric("sampled", progress=1.0), "stable rank": Metric("stable_rank", progress=1.0)}
LEARNING = "tiny-learning"


@pytest.fixture
def smoke(paper, monkeypatch):
    """The folder with the records of the paper's arms at smoke, which the scale of that name reads."""
    monkeypatch.setitem(SCALES, "smoke", paper.scale)
    return paper.root


def test_values_at_scales_are_those_of_the_records():
    table = compare_scales(METRICS, ("opd", "opd_top25"), (LEARNING,))
    # No such run as the second is recorded there, and none is trained for it.
    assert set(table["arm"]) == {"opd"} and list(dict.fromkeys(table["title"])) == list(METRICS)
    evaluations = pd.read_csv(Laboratory.at(LEARNING).records / "opd" / "evaluations.csv").query("seed == 3")
    row = table[(table["title"] == "accuracy") & (table["seed"] == 3)]
    assert row["value"].item() == pytest.approx(evaluations["sampled"].iloc[-1])
    assert set(table["scale"]) == {LEARNING} and set(table["label"]) == {"OPD"}


def test_a_scale_without_records_is_left_out(smoke):
    table = compare_scales(METRICS, ("opd", "sft"), ("smoke", LEARNING), smoke)
    assert set(table["scale"]) == {"smoke"}, "in this folder there are no others"
    assert table.groupby(["title", "arm"])["seed"].apply(list).tolist() == [[0, 1]] * 4


def test_a_scale_without_a_record_of_an_analysis_is_left_out():
    outside = {"outside": Metric("residual", analysis="span", where=(("basis", "two other seeds"),))}
    assert compare_scales(outside, ("opd",), (LEARNING,)).empty


def test_what_is_not_recorded_is_left_out(tmp_path):
    assert records_at(LEARNING, ("opd",), tmp_path) is None
    assert compare_scales(METRICS, ("opd",), (LEARNING,), tmp_path).empty
    assert judge_at(LEARNING, tmp_path) == []


def test_panels_by_scale():
    table = compare_scales(METRICS, ("opd", "rlvr"), (LEARNING,))
    figure = plots.draw_scales(table)
    assert [axis.get_title() for axis in figure.axes] == [f"accuracy, {LEARNING}", f"stable rank, {LEARNING}"]


def test_the_order_of_arms_at_two_scales():
    values = {("tiny", "opd"): (3.0, 3.1, 2.9), ("tiny", "rlvr"): (1.0, 1.1, 0.9), ("tiny", "sft"): (0.5, 2.5, 1.4)}
    values |= {("small", "opd"): (1.0, 1.1, 0.9), ("small", "rlvr"): (2.0, 2.1, 2.2), ("small", "sft"): (0.5, 0.4, 0.5)}
    table = pd.DataFrame(
        [
            {"scale": scale, "title": "a value", "arm": arm, "label": arm, "seed": seed, "value": value}
            for (scale, arm), row in values.items()
            for seed, value in enumerate(row)
        ]
    )
    # At tiny OPD is clearly above RLVR, and the noisy arm like either; at small RLVR is above OPD.
    assert compare_order(table, "a value") == (
        "at tiny OPD 3, SFT 1.47, RLVR 1; at small RLVR 2.1, OPD 1, SFT 0.467; "
        "of 3 pairs the seeds tell apart 1 at tiny, 3 at small, 1 at both; of these in the same order: 0"
    )
    # One seed tells nothing apart.
    single = table[(table["scale"] == "tiny") | (table["seed"] == 0)]
    assert "1 at tiny, 0 at small, 0 at both" in compare_order(single, "a value")
    figure = plots.draw_scales(table, near={"a value": 0.25})
    assert [axis.patches[0].get_y() for axis in figure.axes] == [pytest.approx(2.75), pytest.approx(0.75)]


def test_the_claims_that_a_scale_can_decide_are_judged(smoke):
    records = records_at("smoke", ("opd", "rlvr", "sft_matched"), smoke)
    assert set(records.runs["arm"]) == {"opd", "rlvr", "sft_matched"}
    few, found = judgeable(records), judge_at("smoke", smoke)
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
