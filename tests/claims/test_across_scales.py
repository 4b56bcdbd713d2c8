"""Scales are compared as far as they have records, and nothing is trained for it."""

import pandas as pd
import pytest

from opdlab.claims import judge, judgeable
from opdlab.claims.across_scales import judge_at, records_at
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import SCALES

LEARNING = "tiny-learning"


@pytest.fixture
def smoke(paper, monkeypatch):
    """The folder with the records of the paper's arms at smoke, which the scale of that name reads."""
    monkeypatch.setitem(SCALES, "smoke", paper.scale)
    return paper.root


def test_what_is_not_recorded_is_left_out(tmp_path):
    assert records_at(LEARNING, ("opd",), tmp_path) is None
    assert judge_at(LEARNING, tmp_path) == []


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
