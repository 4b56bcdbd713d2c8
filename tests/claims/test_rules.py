"""Verdicts follow from runs whose effects are known, and are wrong no more often than they say."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from opdlab.claims.rules import Claim, Contrast, Metric, digests, judge, written_after
from opdlab.errors import OpdlabError
from opdlab.lab.records import Records
from opdlab.models.files import write_json

PROGRESS = (0.02, 0.1, 0.5, 1.0)
RANK = Metric("stable_rank", curve=True, block="attention", log=True)
END = replace(RANK, curve=False, progress=1.0)


def made(arms: dict[str, float], seeds: int = 5, noise: float = 0.05, seed: int = 0, **curves) -> Records:
    """Return records in which the logarithm of each arm's stable rank is known, but for seeds and noise."""
    random = np.random.default_rng(seed)
    of_seed = random.normal(size=seeds)
    lines = [
        {"arm": arm, "label": arm, "seed": s, "step": round(100 * progress), "progress": progress, "block": block,
         "matrices": 2, "parameters": 8,
         "stable_rank": np.exp(3 + level + curves.get(arm, [0] * 4)[i] + of_seed[s] + noise * random.normal())}
        for arm, level in arms.items() for s in range(seeds)
        for i, progress in enumerate(PROGRESS) for block in ("attention", "mlp")
    ]  # fmt: skip
    trajectory = pd.DataFrame(lines)
    alike = {"recipe.steps": 100, "recipe.learning_rate": 1e-6}
    runs = trajectory[["arm", "label", "seed"]].drop_duplicates().assign(**alike)
    runs["student"] = "anchor " + runs["seed"].astype(str)
    nothing = pd.DataFrame(columns=["arm", "seed"])
    return Records(nothing, nothing, nothing, trajectory, runs)


def claim(kind: str = "above", metric: Metric = END, margin: float = 0.2, arms=("opd", "rlvr"), **others) -> Claim:
    return Claim("it", "rank", "It is so.", "Figure 0", Contrast(metric, *arms), margin, kind, **others)


def verdict(records: Records, *claims: Claim):
    return judge(claims, records)[0]


def test_each_verdict():
    far, same = made({"opd": 1.0, "rlvr": 0.0, "sft_matched": 1.0}), made({"opd": 0.0, "rlvr": 0.0, "sft_matched": 0.9})
    matched = {"SFT's recipe": Contrast(END, "opd", "sft_matched")}
    assert verdict(far, claim()).verdict == "seen"
    explained = verdict(far, claim(controls=matched))
    assert (explained.verdict, explained.by) == ("explained", "SFT's recipe")
    assert verdict(far, claim(controls={"nothing": Contrast(END, "sft_matched", "rlvr")})).verdict == "reproduced"
    assert verdict(far, claim(rivals={"matched SFT": Contrast(END, "sft_matched", "rlvr")})).verdict == "uninformative"
    assert verdict(same, claim()).verdict == "not reproduced"
    assert verdict(made({"opd": 0.2, "rlvr": 0.0}, noise=0.2), claim()).verdict == "inconclusive"
    assert verdict(same, claim("near", RANK)).verdict == "seen"
    assert verdict(same, claim("near", RANK, rivals={"another": matched["SFT's recipe"]})).verdict == "reproduced"
    assert verdict(far, claim("near", RANK)).verdict == "not reproduced"
    assert verdict(far, claim("apart", RANK)).verdict == "seen"
    assert verdict(same, claim("apart", RANK)).verdict == "not reproduced"


def test_a_curve_counts_at_all_its_snapshots_but_the_first():
    early = made({"opd": 0.0, "rlvr": 0.0}, rlvr=[1.0, 0, 0, 0])
    middle = made({"opd": 0.0, "rlvr": 0.0}, rlvr=[0, 0, 1.0, 0])
    assert verdict(early, claim("near", RANK)).verdict == "seen", "at 2 % of the training nothing counts"
    found = verdict(middle, claim("near", RANK))
    assert found.verdict == "not reproduced" and found.effect.mean == pytest.approx(-1, abs=0.1)
    assert verdict(middle, claim("near", END)).verdict == "seen", "at the end they are near"


def test_curves_are_compared_where_both_have_a_snapshot():
    steep = [0.0, 3.0, 1.0, 0.0]
    records = made({"opd": 0.0, "opd_top25": 0.0}, opd=steep, opd_top25=steep)
    path = records.trajectory
    fewer = replace(records, trajectory=path[(path["arm"] == "opd") | (path["progress"] != 0.5)])
    near = claim("near", RANK, arms=("opd_top25", "opd"))
    assert verdict(fewer, near).verdict == verdict(records, near).verdict == "seen"
    assert [point.progress for point in RANK.points(fewer, ("opd", "opd_top25"))] == [0.1, 1.0]


def test_margins_at_half_and_twice():
    found = verdict(made({"opd": 0.3, "rlvr": 0.0}, noise=0.02), claim())
    assert (found.at_half, found.verdict, found.at_twice) == ("seen", "seen", "not reproduced")


def test_the_seeds_that_would_decide_do_and_fewer_do_not():
    def scattered(seeds: int, effect: float = 0.25) -> Records:
        records = made({"opd": effect, "rlvr": 0.0}, seeds=seeds, noise=0)
        path = records.trajectory
        factors = np.exp(np.where(path["arm"] == "opd", 0.2 - 0.4 * (path["seed"] % 2), 0.0))
        return replace(records, trajectory=path.assign(stable_rank=path["stable_rank"] * factors))

    one, several = [claim()], [claim(), *(replace(claim(), name=name, margin=10.0) for name in ("other", "another"))]
    for claims in (one, several):
        found = judge(claims, scattered(20))[0]
        assert found.verdict == "inconclusive"
        even = 2 * (found.needed // 2)  # as many seeds of either sign
        assert judge(claims, scattered(even + 4))[0].verdict == "seen"
        fewer = judge(claims, scattered(even - 4))[0]
        assert fewer.verdict == "inconclusive" and fewer.needed == pytest.approx(found.needed, rel=0.06)
    # A test alone has to reach 1.645, of an effect of 0.05 beside a scatter of 0.2.
    assert judge(one, scattered(20))[0].needed == pytest.approx((1.645 * 0.2 / 0.05) ** 2, rel=0.15)
    assert verdict(scattered(20), claim()).needed and verdict(scattered(200), claim()).needed is None, "it is decided"
    on_the_margin = verdict(scattered(20, effect=0.2), claim()).needed
    assert on_the_margin is None or on_the_margin > 10_000


def test_what_a_control_leaves():
    records = made({"opd": 1.0, "rlvr": 0.0, "sft_matched": 0.75}, noise=0.01)
    found = verdict(records, claim(controls={"recipe": Contrast(END, "opd", "sft_matched")}))
    assert found.share["recipe"].mean == pytest.approx(0.25, abs=0.05)
    nothing = made({"opd": 0.0, "rlvr": 0.0, "sft_matched": 0.0})
    assert verdict(nothing, claim(controls={"recipe": Contrast(END, "opd", "sft_matched")})).share["recipe"] is None


def test_values_are_the_records():
    records = made({"opd": 0.0, "rlvr": 0.0})
    rows = records.trajectory.query("arm == 'opd' and block == 'attention' and progress == 1.0").set_index("seed")
    assert END.values(records)["opd"].to_dict() == pytest.approx(np.log(rows["stable_rank"]).to_dict())
    rise = replace(END, since=0.1).values(records)["opd"]
    before = records.trajectory.query("arm == 'opd' and block == 'attention' and progress == 0.1").set_index("seed")
    assert rise.to_dict() == pytest.approx(np.log(rows["stable_rank"] / before["stable_rank"]).to_dict())
    a, b = (END.values(records)[arm] for arm in ("opd", "rlvr"))
    p = scipy.stats.ttest_rel(a, b, alternative="greater").pvalue
    assert verdict(records, claim(margin=0.0)).p == pytest.approx(p)
    with pytest.raises(OpdlabError, match="no column 'nonsense'"):
        Metric("nonsense", progress=1.0).values(records)
    with pytest.raises(OpdlabError, match="'stable_rank' of sft: record it"):
        verdict(records, claim(arms=("opd", "sft")))


def test_noise_is_pooled_over_runs_that_are_alike():
    """What other arms scatter counts where they start alike and are as long; else the two arms stand alone."""
    records = made({"opd": 0.2, "rlvr": 0.0, "sft_matched": 0.0, "longer": 0.0}, seeds=3)
    a, b, c, d = (END.values(records)[arm] for arm in ("opd", "rlvr", "sft_matched", "longer"))
    table = np.array([a, b, c])
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    error = ((left**2).sum() / 4 * 2 / 3) ** 0.5
    p = scipy.stats.t.sf((a - b).mean() / error, 4)
    records.runs.loc[records.runs["arm"] == "longer", "recipe.steps"] = 1000
    assert verdict(records, claim(margin=0.0)).p == pytest.approx(p)
    alone = scipy.stats.ttest_rel(a, d, alternative="greater").pvalue
    assert verdict(records, claim(margin=0.0, arms=("opd", "longer"))).p == pytest.approx(alone)


def test_only_seeds_on_both_sides_count():
    records = made({"opd": 1.0, "rlvr": 0.0})
    lacking = records.trajectory.query("not (arm == 'rlvr' and seed == 4)")
    found = verdict(replace(records, trajectory=lacking), claim())
    assert (found.verdict, found.seeds) == ("seen", 4)


def test_claims_of_one_finding_are_corrected_together():
    records, one = made({"opd": 0.3, "rlvr": 0.0}), claim()
    (alone,) = judge([one], records)
    assert 0 < alone.p < 0.1
    assert judge([one] * 4, records)[0].p == pytest.approx(4 * alone.p)
    others = [replace(one, finding="locking")] * 3
    assert verdict(records, one, *others).p == pytest.approx(alone.p), "another finding is another family"


def test_values_of_an_analysis():
    pairs = [(seed, "opd", other, seed + len(other)) for seed in (0, 1) for other in ("b", "cc")]
    table = pd.DataFrame(pairs, columns=["seed", "arm", "other", "x"])
    records = replace(made({"opd": 1.0, "rlvr": 0.0}), analyses={"pairs": table})
    metric = Metric("x", analysis="pairs", where=(("other", "cc"),))
    assert metric.values(records)["opd"].to_dict() == {0: 2, 1: 3}
    one = replace(claim(), effect=Contrast(metric, "opd"))
    assert one.judgeable(records) and not one.judgeable(made({"opd": 1.0, "rlvr": 0.0}))
    lacks = replace(one, effect=Contrast(replace(metric, column="another"), "opd"))
    assert not lacks.judgeable(records), "older records have fewer columns"
    with pytest.raises(OpdlabError, match="without the analysis 'pairs'"):
        verdict(made({"opd": 1.0, "rlvr": 0.0}), one)


def test_older_records_can_decide_less():
    """Records that lack a column, of the effect or of a control, decide what needs none of it."""
    records = made({"opd": 1.0, "rlvr": 0.0})
    older = replace(records, trajectory=records.trajectory.drop(columns="stable_rank"))
    assert claim().judgeable(records) and not claim().judgeable(older)
    assert not claim("near", RANK).judgeable(older)
    controlled = claim(controls={"noise": Contrast(replace(END, minus="noise"), "opd", "rlvr")})
    assert not controlled.judgeable(records)
    with pytest.raises(OpdlabError, match="no column 'noise'"):
        judge([controlled], records)


def test_what_is_missing_decides_nothing():
    one = made({"opd": 5.0, "rlvr": 0.0, "sft_matched": 0.0}, seeds=4)
    one = replace(one, trajectory=one.trajectory.query("not (arm == 'opd' and seed > 0)"))
    found = verdict(one, claim())
    assert (found.verdict, found.seeds, found.effect.mean > 4) == ("inconclusive", 1, True)
    nothing = made({"opd": 1.0, "rlvr": 0.0, "sft_matched": 0.0})
    nothing.trajectory.loc[nothing.trajectory["arm"] == "rlvr", "stable_rank"] = float("nan")
    assert verdict(nothing, claim()).verdict == "inconclusive"
    nothing.trajectory.loc[nothing.trajectory["arm"] == "rlvr", "stable_rank"] = 0.0  # whose logarithm is not finite
    assert verdict(nothing, claim("near", RANK)).verdict == "inconclusive"


def test_verdicts_are_wrong_no_more_often_than_they_say():
    # Eight claims of one finding whose effects lie exactly on the margin: any verdict but "inconclusive" is wrong.
    wrong = {"above": 0, "near": 0}
    for trial in range(60):
        arms = {"opd": 0.2} | {f"arm{i}": 0.0 for i in range(8)}
        records = made(arms, seeds=4, seed=trial)
        for kind, metric in (("above", END), ("near", END)):
            claims = [claim(kind, metric, arms=("opd", arm)) for arm in arms if arm != "opd"]
            wrong[kind] += any(found.verdict != "inconclusive" for found in judge(claims, records))
    assert wrong["above"] < 60 * 0.2 and wrong["near"] < 60 * 0.2, wrong


def test_the_digest_of_a_claim_is_of_what_decides_it():
    one = claim(controls={"recipe": Contrast(END, "opd", "sft_matched")})
    assert replace(one, statement="Other words.", source="elsewhere").digest == one.digest
    others = [replace(one, margin=0.1), replace(one, kind="near"), replace(one, controls={}), claim(metric=RANK)]
    assert len({other.digest for other in (one, *others)}) == 5


def test_a_claim_that_was_written_after_a_run_is_found(tmp_path):
    records, one = made({"opd": 1.0, "rlvr": 0.0}, seeds=2), claim()
    assert written_after([one], records, tmp_path) == {"it"}, "records that name no claims"
    records.runs["claims"] = ["early", "early", "early", "late"]
    sets = {"early": digests([one]), "late": digests([one])}
    write_json(tmp_path / "claims.json", sets)
    assert written_after([one], records, tmp_path) == set()
    assert written_after([replace(one, statement="Other words.")], records, tmp_path) == set()
    assert written_after([replace(one, margin=0.1)], records, tmp_path) == {"it"}
    write_json(tmp_path / "claims.json", {"early": digests([one])})
    assert written_after([one], records, tmp_path) == {"it"}, "one of four runs was made with other claims"
