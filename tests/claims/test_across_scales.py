"""Scales are compared as far as they have records, and nothing is trained for it."""

import pandas as pd
import pytest

from opdlab.claims import CLAIMS, Metric, judge, judgeable
from opdlab.claims.across_scales import compare_order, compare_scales, judge_at, records_at
from opdlab.lab import plots
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import SMALL, TINY

METRICS = {"accuracy": Metric("sampled", progress=1.0), "stable rank": Metric("stable_rank", progress=1.0)}


def test_values_at_scales_are_those_of_the_records():
    table = compare_scales(METRICS, ("opd", "opd_random16"), ("tiny", "small"))
    of_tiny = table[table["scale"] == "tiny"]
    assert set(of_tiny["arm"]) == {"opd", "opd_random16"} and list(dict.fromkeys(of_tiny["title"])) == list(METRICS)
    evaluations = pd.read_csv(Laboratory.at("tiny").records / "opd" / "evaluations.csv").query("seed == 3")
    row = of_tiny[(of_tiny["title"] == "accuracy") & (of_tiny["arm"] == "opd") & (of_tiny["seed"] == 3)]
    assert row["value"].item() == pytest.approx(evaluations["sampled"].iloc[-1])
    # At small no such run is recorded, and none is trained for it.
    assert "opd_random16" not in {*table.loc[table["scale"] == "small", "arm"], *SMALL.policy.arms}


def test_a_scale_without_a_record_of_an_analysis_is_left_out():
    outside = {"outside": Metric("residual", "span", {"basis": "two other seeds"})}
    table = compare_scales(outside, ("opd",))
    assert set(table["scale"]) == {"tiny"} and len(table) == len(TINY.policy.seeds)
    assert "span" not in SMALL.policy.analyses


def test_what_is_not_recorded_is_left_out(tmp_path):
    assert records_at("small", ("opd",), tmp_path) is None
    assert compare_scales(METRICS, ("opd",), ("small",), tmp_path).empty
    assert judge_at("small", tmp_path) == []


def test_panels_by_scale():
    table = compare_scales(METRICS, ("opd", "rlvr"), ("tiny",))
    figure = plots.draw_scales(table)
    assert [axis.get_title() for axis in figure.axes] == ["accuracy, tiny", "stable rank, tiny"]


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


def test_the_claims_that_the_records_can_tell():
    records = records_at("tiny", ("sft", "opd", "rlvr", "sft_matched"))
    found = {claim.name: claim for claim in judgeable(CLAIMS, records)}
    assert "norm-opd-rlvr" in found and "rank-opd_mix1" not in found and "span" not in found
    (judged,) = judge([found["norm-opd-rlvr"]], records)
    assert (judged.verdict, judged.text, judged.seeds) == ("reproduced", "reproduced", 5)


def test_claims_about_runs_variants_and_analyses_are_judged_at_another_scale():
    found = judge_at("small")
    assert {"norm-opd-rlvr", "rank-opd_mix50"} <= {verdict.claim.name for verdict in found}
    # With two, an interval is so wide that hardly any negative control could explain an effect.
    assert {verdict.seeds for verdict in found} == {len(SMALL.policy.seeds)} == {3}
