"""Analyses of finished runs: on runs of seconds, and on weights made by hand with known answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from opdlab.geometry import weight_matrices
from opdlab.lab.analyses import ANALYSES, RunSet
from opdlab.lab.analyses.gradients import second_moments
from opdlab.lab.analyses.landscape import EXTRAPOLATION, LANDSCAPE
from opdlab.lab.analyses.runset import add
from opdlab.lab.analyses.similarity import BASES, SIMILARITY, alike
from opdlab.lab.analyses.span import SPAN, residual
from opdlab.lab.grid import ARMS
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import add_analysis, add_run, analyse, find_tables, load, missing_parts, recorded_analyses
from opdlab.lab.scales import TINY
from opdlab.lab.scheduler import plan


class Made(RunSet):
    """Runs that are random updates of a small model, known in advance."""

    def __init__(self, lab, runs):
        super().__init__(lab, 0)
        self.runs, self.asked = runs, []

    def model(self, folder):
        return dict(reversed(self.runs[folder].items()))  # Models list their weights in another order than files.

    def update(self, arm, progress=1.0, seed=None):
        seed = self.seed if seed is None else seed
        self.asked.append((arm, seed))
        early = {1.0: 1.0}.get(progress, progress)
        return {name: early * w for name, w in self.runs[arm, seed].items()}

    def evaluate(self, weights):
        total = float(sum(w.sum() for w in weights.values()))
        return {"greedy": total, "sampled": total, "entropy": 0.0, "kl_teacher": 0.0}


NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")


@pytest.fixture
def made(lab):
    """Random updates of two matrices, one seed as like the next as chance has it."""
    random = torch.Generator().manual_seed(0)

    def weights():
        return {name: torch.randn(32, 32, generator=random, dtype=torch.float64) for name in NAMES}

    runs = {folder: weights() for folder in ("base", "anchor")}
    arms = {*SIMILARITY.arms, *SPAN.arms, *LANDSCAPE.arms, *alike(lab)}
    runs |= {(arm, seed): weights() for arm in sorted(arms) for seed in lab.scale.policy.seeds}
    return Made(lab, runs)


def read_by(analysis, lab, seed=0):
    """The runs that an analysis says it reads, as arms and seeds."""
    return {run for part in analysis.parts(lab, seed) for run in part.runs}


def measured(analysis, runs):
    """The table of an analysis with all of its parts."""
    return analysis.measure(runs, analysis.parts(runs.lab, runs.seed))


def test_the_next_seed_comes_round_again():
    seeds = TINY.policy.seeds
    assert [TINY.later_seed(seed) for seed in seeds] == [*seeds[1:], seeds[0]]
    assert TINY.later_seed(seeds[-2], 2) == seeds[0] and TINY.later_seed(99) == 100


@pytest.mark.parametrize("analysis", ANALYSES.values(), ids=lambda analysis: analysis.name)
def test_every_analysis_names_arms_that_exist(analysis):
    tiny = Laboratory.at("tiny")
    assert set(analysis.arms) <= set(ARMS)
    for seed in analysis.seeds(tiny):
        for arm, other in read_by(analysis, tiny, seed):
            assert other in TINY.policy.seeds and arm in ARMS


# --- subspaces and spans with known answers ---


def test_unrelated_updates_share_what_chance_gives(made):
    found = measured(SIMILARITY, made)
    mean = found["sim_right_K8"].mean()
    assert mean == pytest.approx(found["sim_right_random_K8"].mean(), abs=0.05)
    assert found["cosine"].abs().max() < 0.2


def test_equal_updates_share_everything(made):
    made.runs["rlvr", 0] = made.runs["opd", 0]
    found = measured(SIMILARITY, made).set_index(["arm", "other", "next_seed"])
    same = found.loc[("opd", "rlvr", False)]
    assert same["sim_right_K8"].to_numpy() == pytest.approx(1) and same["cosine"].to_numpy() == pytest.approx(1)
    # No run is compared with itself.
    assert ("opd", "opd", False) not in found.index


def test_similarity_reads_no_other_runs_than_it_says(made):
    measured(SIMILARITY, made)
    assert set(made.asked) <= read_by(SIMILARITY, made.lab)
    assert {*BASES, *alike(made.lab)} <= {arm for arm, _ in made.asked}


def test_a_pair_alone_is_what_it_is_among_all(made):
    """Pairs are recorded one by one: none may depend on which others are measured with it."""
    whole = measured(SIMILARITY, made)
    for part in SIMILARITY.parts(made.lab, 0)[::17]:
        alone = SIMILARITY.measure(made, [part])
        same = whole[(whole[list(part.entries)] == pd.Series(part.entries)).all(axis=1)]
        pd.testing.assert_frame_equal(alone, same.reset_index(drop=True))


def test_span_finds_a_combination(made):
    rlvr, sft = made.runs["rlvr", 0], made.runs["sft_matched", 0]
    made.runs["opd", 0] = {name: 0.5 * sft[name] - 2.0 * rlvr[name] for name in NAMES}
    found = measured(SPAN, made).set_index(["arm", "basis"])
    row = found.loc[("opd", "matched SFT and RLVR")]
    assert row["residual"] == pytest.approx(0, abs=1e-12)
    assert row["coefficient_first"] == pytest.approx(0.5) and row["coefficient_second"] == pytest.approx(-2.0)
    sft = {name: made.runs["anchor"][name] - made.runs["base"][name] for name in NAMES}
    made.runs["opd_full", 0] = {name: 3.0 * sft[name] + rlvr[name] for name in NAMES}
    row = measured(SPAN, made).set_index(["arm", "basis"]).loc[("opd_full", "SFT and RLVR")]
    assert row["residual"] == pytest.approx(0, abs=1e-12) and row["coefficient_first"] == pytest.approx(3.0)
    assert found.loc[("opd", "two random updates"), "residual"] == pytest.approx(1, abs=0.01)
    assert (found["residual_by_matrix"] <= found["residual"] + 1e-12).all()
    assert set(made.asked) <= read_by(SPAN, made.lab)


def test_what_the_other_estimator_leaves_outside(made):
    found = measured(SPAN, made).set_index(["arm", "basis"])
    assert found["outside"].to_numpy() == pytest.approx(found["residual"].to_numpy() ** 2)
    target, *basis = (
        np.concatenate([made.runs[arm, 0][name].numpy().ravel() for name in NAMES])
        for arm in ("opd", "opd_full", "rlvr")
    )
    missed = np.linalg.lstsq(np.stack(basis, 1), target, rcond=None)[1].item()
    own = found.loc["opd"].loc[["SFT and RLVR", "matched SFT and RLVR"], "outside_own"]
    assert own.to_numpy() == pytest.approx(missed / (target @ target))


def test_residual_agrees_with_a_projection():
    random = torch.Generator().manual_seed(1)
    target, *basis = torch.randn(3, 50, generator=random, dtype=torch.float64)
    q = torch.linalg.qr(torch.stack(basis, 1)).Q
    expected = float((target - q @ (q.T @ target)).norm() / target.norm())
    assert residual(target, basis)[0] == pytest.approx(expected, rel=1e-12)


# --- weights that no run visited ---


def test_landscape_visits_the_ends_and_the_way_between(made):
    found = measured(LANDSCAPE, made)
    total = {folder: sum(float(w.sum()) for w in made.runs[folder].values()) for folder in ("base", "anchor")}
    ends = {arm: sum(float(w.sum()) for w in made.runs[arm, 0].values()) for arm in LANDSCAPE.arms}
    paths = found.set_index("path")
    opd = paths.loc["opd"].set_index("opd")["sampled"]
    assert opd[0.0] == pytest.approx(total["anchor"]) and opd[1.0] == pytest.approx(total["anchor"] + ends["opd"])
    sft = paths.loc["sft"].set_index("sft")["sampled"]
    assert sft[-1.0] == pytest.approx(total["base"]) and sft[0.0] == pytest.approx(total["anchor"])
    between = paths.loc["sft_matched to rlvr"].set_index("rlvr")["sampled"][0.5]
    assert between == pytest.approx(total["anchor"] + (ends["sft_matched"] + ends["rlvr"]) / 2)
    averaged = paths.loc["opd to opd of the next seed", "sampled"]
    other = sum(float(w.sum()) for w in made.runs["opd", 1].values())
    assert averaged == pytest.approx(total["anchor"] + (ends["opd"] + other) / 2)
    plane = paths.loc["plane"].set_index(["opd", "rlvr"])["sampled"]
    assert plane[(0.5, 0.25)] == pytest.approx(total["anchor"] + 0.5 * ends["opd"] + 0.25 * ends["rlvr"])


def test_extrapolation_stretches_to_the_norm_of_the_end(made):
    # Early updates are shares of the last one here, so stretching one gives the end itself.
    found = measured(EXTRAPOLATION, made).set_index(["arm", "kind", "progress", "factor"]).sort_index()
    for arm in EXTRAPOLATION.arms:
        rows = found.loc[arm]
        if rows.loc[("end", 1.0, 1.0), "sampled"] > rows.loc[("anchor", 0.0, 0.0), "sampled"]:
            assert rows.loc[("stretched", 0.1, 1.0), "recovered"] == pytest.approx(1)
            # From 0.1 by 10 times (0.1 - 0.05) more: 0.6 of the way.
            assert rows.loc[("leap", 0.1, 10.0), "recovered"] == pytest.approx(0.6)


def test_what_is_recovered_of_the_kl(made, monkeypatch):
    def evaluate(weights):
        return {"sampled": 0.0, "kl_teacher": 9 - float(weights[NAMES[0]][0, 0])}

    monkeypatch.setattr(made, "evaluate", evaluate)
    made.runs["opd", 0][NAMES[0]][0, 0], made.runs["rlvr", 0][NAMES[0]][0, 0] = 2.0, -2.0
    found = measured(EXTRAPOLATION, made).set_index(["arm", "kind", "progress", "factor"]).sort_index()
    start = float(made.runs["anchor"][NAMES[0]][0, 0])
    half = found.loc[("opd", "stretched", 0.1, 0.5)]
    assert half["kl_teacher"] == pytest.approx(9 - start - 1) and half["recovered_kl"] == pytest.approx(0.5)
    assert found["recovered"].isna().all() and found.loc["rlvr", "recovered_kl"].isna().all(), "nothing was gained"


def test_add_is_exact():
    weights = {"w": torch.tensor([1.0])}
    assert add(weights, (2.0, {"w": torch.tensor([3.0])}), (-1.0, {"w": torch.tensor([0.5])}))["w"].item() == 6.5


# --- gradients ---


def test_second_moments_are_those_of_the_gradients():
    w = torch.nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    inputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    squares, means = second_moments(((w @ x).sum() for x in inputs), {"w": w})
    gradients = [torch.ones(3, 1).double() @ x[None].double() for x in inputs]
    assert torch.allclose(squares["w"], sum(g.T @ g for g in gradients) / 4)
    assert torch.allclose(means["w"], sum(gradients) / 4)


def test_a_completion_without_credit_counts_as_zero():
    w = torch.nn.Parameter(torch.ones(2, 2))
    squares, _ = second_moments(iter([w.sum(), torch.tensor(0.0)]), {"w": w})
    assert torch.allclose(squares["w"], torch.ones(2, 2).double())


def test_gradients_of_the_same_loss_share_everything(lab):
    found = measured(ANALYSES["gradients"], RunSet(lab, 0)).set_index("arm")
    assert found.loc["opd", "sim_right_K8"].to_numpy() == pytest.approx(1)
    # An untrained student earns no rewards, so RLVR has no gradient, which has no directions.
    assert found.loc["rlvr", ["sim_right_K8", "energy_K8"]].isna().all(axis=None)
    others = found.drop(["opd", "rlvr"])
    assert (others["sim_right_K8"] < 1).all() and (others["sim_right_K8"] > others["sim_right_random_K8"]).mean() > 0.9
    assert others["energy_K8"].between(0, 1 + 1e-9).all()


# --- runs, records and jobs ---


@pytest.fixture
def own(lab, copy_of, tmp_path):
    """A laboratory with the same models and runs, and records of its own."""
    own = copy_of(lab, tmp_path / "own")
    (own.root / "runs").symlink_to(lab.root / "runs")
    return own


def record(name, seed, lab):
    """Compute what is missing of an analysis and put it into the records, and return its file there."""
    add_analysis(analyse(name, seed, lab), lab)
    return lab.records / "analyses" / f"{name}.csv"


def test_a_run_set_reads_runs_and_puts_the_student_back_together(own):
    runs = RunSet(own, 0)
    start, end = runs.weights("opd", 0.0), runs.weights("opd")
    update = runs.update("opd")
    assert all(torch.equal(start[name].double() + update[name], end[name].double()) for name in start)
    assert set(weight_matrices(update)) < set(update)
    add_run(find_tables("opd", 0, own), own)
    recorded = load(own, ("opd",), seeds=(0,)).evaluations["sampled"].iloc[-1]
    assert runs.evaluate(end)["sampled"] == pytest.approx(recorded)


def test_an_analysis_is_recorded_and_found_again(own):
    assert "span" not in recorded_analyses(own) and len(missing_parts(SPAN, 0, own)) == 1
    stored = pd.read_csv(record("span", 0, own), dtype={"key": str})
    assert len(stored) == 10 and set(stored["seed"]) == {0}
    (part,) = SPAN.parts(own, 0)
    assert set(stored["key"]) == {part.key(own)} and ("opd", 1) in part.runs
    assert not missing_parts(SPAN, 0, own) and missing_parts(SPAN, 1, own)
    made = pd.read_csv(own.records / "analyses.csv")
    assert made[["analysis", "seed"]].to_numpy().tolist() == [["span", 0]] and made["torch"].notna().all()
    add_run(find_tables("opd", 0, own), own)
    loaded = load(own, ("opd",), seeds=(0,), analyses=("span",)).analyses["span"]
    pd.testing.assert_frame_equal(loaded, stored)


def test_a_new_seed_of_an_analysis_leaves_the_rows_of_others_as_they_are(own):
    path = record("span", 0, own)
    before = path.read_text().splitlines()
    record("span", 1, own)
    after = path.read_text().splitlines()
    assert after[: len(before)] == before and len(after) == 2 * len(before) - 1


def test_an_analysis_whose_runs_are_others_now_is_not_read(own):
    record("span", 0, own)
    budget = own.scale.budget
    recipe = replace(own.recipe("rlvr"), clip=0.5)
    other = replace(own, scale=replace(own.scale, budget=replace(budget, recipes=budget.recipes | {"rlvr": recipe})))
    assert missing_parts(SPAN, 0, other) and not missing_parts(SPAN, 0, own)


def test_a_seed_is_not_recorded_by_another_that_reads_the_same_runs(own):
    """With two seeds, each reads its own runs and the other's."""
    two = replace(own, scale=replace(own.scale, policy=replace(own.scale.policy, seeds=(0, 1))))
    record("span", 0, two)
    assert not missing_parts(SPAN, 0, two) and missing_parts(SPAN, 1, two)


def test_analyses_wait_for_their_runs(tmp_path):
    empty = Laboratory.at("tiny", tmp_path)
    jobs = {job.name: job for job in plan(empty, (), (0,), analyses=("span", "gradients"))}
    assert {"opd-seed0", "opd-seed2", "rlvr-seed1", "anchor", "teacher"} <= set(jobs["span-seed0"].needs)
    # The losses at the anchor need no run; the anchor of the next seed gives another batch.
    assert set(jobs["gradients-seed0"].needs) <= {"anchor", "anchor-1", "teacher"}
    assert list(jobs)[-1] == "gradients-seed0"
