"""Analyses of the laboratory in the regime: on runs of six steps, and against numbers that numpy computes anew."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shallow

from opdlab.claims.paper import CLAIMS
from opdlab.claims.rules import digests, judge, written_after
from opdlab.geometry import random_walk
from opdlab.geometry.measure import generator_of
from opdlab.lab.analyses import ANALYSES, RunSet, gradients
from opdlab.lab.analyses.linearity import of_matrix, straightness
from opdlab.lab.analyses.retention import RETENTION, Exam
from opdlab.lab.analyses.similarity import SIMILARITY, WEIGHTS, WHOLE
from opdlab.lab.analyses.taught import PUPIL, TAUGHT, TEACHER
from opdlab.lab.grid import ARMS
from opdlab.lab.laboratory import Laboratory, default_root
from opdlab.lab.records import add_analysis, add_run, analyse, find_tables, load, read_index
from opdlab.lab.scales import TINY, TINY_LEARNING
from opdlab.lab.tasks import TASKS
from opdlab.models.files import read_json
from opdlab.models.folders import load_model, load_tokenizer, round_model
from opdlab.training import trainer as trainers
from opdlab.training.loop import install_model
from opdlab.training.projection import Projector

WHOLE_MODEL = Laboratory.at("tiny")
SHOWN = ("sft", "opd", "opd_full", "rlvr", "sft_matched", "random_signs", "young_opd", "opd_top25", PUPIL)


def odd(prompt, completion):
    """A reward that untrained models earn now and then."""
    return float(len(completion) % 2)


@pytest.fixture(scope="module")
def regime(tmp_path_factory):
    """The laboratory in the regime with six steps a run, a few arms, and models of two seeds."""
    recipes = {
        name: replace(recipe, steps=6, prompts=8, samples=min(recipe.samples, 4), warmup=2)
        for name, recipe in TINY.budget.recipes.items()
    }
    budget = replace(TINY.budget, recipes=recipes, max_new_tokens=16, evaluation_prompts=8, evaluation_samples=2)
    kept = {"snapshots": (0.15, 0.5, 1.0), "variant_snapshots": (0.5, 1.0)}
    policy = replace(TINY.policy, arms=SHOWN, seeds=(0, 1, 2), variant_seeds=(0,), other_seeds={}, **kept)
    tasks = TASKS | {"running_sum": replace(TASKS["running_sum"], score=odd)}
    scale = shallow(replace(TINY, budget=budget, policy=policy))
    lab = Laboratory(scale, tmp_path_factory.mktemp("regime"), dict(ARMS), tasks, digests(CLAIMS))
    made = (("base", 0), ("teacher", 0), ("sft", 0), ("sft", 1), ("sft", 2), ("teacher_rlvr", 0))
    for arm, seed in made:
        install_model(lab.train(arm, seed), lab.models / lab.place(lab.arm(arm).produces, seed), scale.models.dtype)
    round_model(lab.models / "base", "bfloat16", lab.models / "young")
    return lab


# --- what is compared with what ---


def test_pairs_of_the_regime_are_of_arms_that_are_as_long():
    pairs = [part.entries for part in SIMILARITY.parts(WHOLE_MODEL, 0)]
    told = [(pair["arm"], pair["other"], pair["next_seed"]) for pair in pairs]
    assert len(told) == len(set(told)), "no pair twice"
    whole = {pair for pair in told if set(pair[:2]) <= set(WHOLE) | {WEIGHTS}}
    assert len(whole) == 5 * 5 + 5 * 4 + 5 and ("random_signs", "opd", True) in whole
    others = {pair[1] for pair in told} - set(WHOLE) - {WEIGHTS}
    assert {"opd_top25", "opd_rlvr_teacher", "opd_half_rate"} <= others
    assert not {name for name in others if name.startswith(("young", "sft"))}
    assert not {"rlvr_3", "rlvr_10", "opd_update4"} & others, "as long as OPD, and free to move"
    later = {pair[:2] for part in SIMILARITY.parts(WHOLE_MODEL, 4) for pair in [tuple(part.entries.values())]}
    assert later < {pair[:2] for pair in told}, "variants have fewer seeds"


def test_arms_that_are_no_variants_are_all_there():
    arms = ANALYSES["linearity"].arms_at(WHOLE_MODEL)
    assert {"sft", "opd", "random_signs", "young_opd", "young_random_signs"} <= set(arms) and len(arms) == 11
    assert ANALYSES["retention"].arms_at(Laboratory.at("tiny-learning")) == (
        "sft",
        "opd",
        "opd_full",
        "rlvr",
        "sft_matched",
    )


def test_the_directions_of_another_seed_are_of_its_own_update(regime, monkeypatch):
    found = {}

    class Kept(Projector):
        def __init__(self, *args):
            super().__init__(*args)
            found.update(self.of)

    monkeypatch.setattr(trainers, "Projector", Kept)
    regime.train("opd_of_seed4", 0)
    other = regime.run("opd", 1)
    begin = regime.run("opd_of_seed4", 0).config["projection"]["begin"]
    before, after = other.snapshot(0), other.snapshot(begin)
    assert len(found) == 7
    for name, basis in found.items():
        rows = np.linalg.svd(after[name].double().numpy() - before[name].double().numpy())[2][:4]
        assert np.square(rows @ basis.double().numpy()).sum() / 4 == pytest.approx(1, abs=1e-6)


def test_each_seed_has_its_own_anchor_and_another_batch_stays_there(regime, monkeypatch):
    runs, asked = RunSet(regime, 1), []
    mine, other = (load_model(regime.models / name).double().state_dict() for name in ("anchor-1", "anchor-2"))
    assert all(torch.equal(weight, mine[name]) for name, weight in runs.model("anchor").items())
    start = {seed: runs.weights("opd", 0.0, seed) for seed in (1, 2)}
    assert all(torch.equal(start[1][name].double(), mine[name]) for name in start[1])
    assert all(torch.equal(start[2][name].double(), other[name]) for name in start[2])
    assert any(not torch.equal(mine[name], other[name]) for name in start[1])
    trainer = gradients.Trainer
    monkeypatch.setattr(gradients, "Trainer", lambda experiment: asked.append(experiment) or trainer(experiment))
    monkeypatch.setattr(gradients, "second_moments", lambda losses, matrices: None)
    for seed in (1, runs.later()):
        gradients._moments(runs, "opd", seed)
    assert [experiment.seed for experiment in asked] == [1, 2]
    assert {experiment.arm.student.folder for experiment in asked} == {str(regime.models / "anchor-1")}


# --- paths ---


def rounded(weights):
    """Round float32 numbers to bfloat16, to the nearest and ties to even, by their bits."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(float)


def straight(updates, progress):
    """The three numbers of a path (T, N), by least squares."""
    progress = np.asarray(progress)
    fitted, early = progress >= 0.05, np.abs(progress - 0.15).argmin()
    slope, *_ = np.linalg.lstsq(progress[fitted, None], updates[fitted], rcond=None)
    left = np.square(updates[fitted] - progress[fitted, None] * slope).sum()
    then, end = updates[early], updates[-1]
    return {
        "r2": 1 - left / np.square(updates[fitted]).sum(),
        "cosine": then @ end / np.linalg.norm(then) / np.linalg.norm(end),
        "error": np.linalg.norm(then / progress[early] - end) / np.linalg.norm(end),
    }


def truncated(matrix):
    """The first singular direction of a matrix, and its share of the squared norm."""
    u, s, vt = np.linalg.svd(matrix)
    return s[0] * np.outer(u[:, 0], vt[0]), s[0] ** 2 / np.square(s).sum()


def test_straightness_agrees_with_least_squares():
    random, progress = np.random.default_rng(0), (0.02, 0.06, 0.16, 0.5, 1.0)
    updates = random.normal(size=(5, 6, 4)).cumsum(0)
    path = of_matrix(list(torch.from_numpy(updates)), progress)
    assert straightness(path.products, progress) == pytest.approx(straight(updates.reshape(5, -1), progress))
    first = [truncated(update) for update in updates]
    expected = straight(np.stack([matrix.ravel() for matrix, _ in first]), progress)
    assert straightness(path.rank1, progress) == pytest.approx(expected) and path.first == pytest.approx(first[-1][1])
    values = np.linalg.svd(updates[1:].reshape(4, -1), compute_uv=False)
    assert path.along == pytest.approx(values[0] ** 2 / np.square(values).sum())


def test_a_line_and_nothing():
    progress = (0.05, 0.15, 1.0)
    line = of_matrix([share * torch.ones(3, 2).double() for share in progress], progress)
    found = straightness(line.products, progress)
    assert found == pytest.approx({"r2": 1, "cosine": 1, "error": 0}, abs=1e-7)
    assert line.along == pytest.approx(1) and line.first == pytest.approx(1)
    nothing = of_matrix([torch.zeros(3, 2).double()] * 3, progress)
    assert np.isnan([*straightness(nothing.products, progress).values(), nothing.first, nothing.along]).all()


def test_paths_of_runs_agree_with_numpy(regime):
    runs = RunSet(regime, 0)
    analysis = ANALYSES["linearity"]
    found = analysis.measure(runs, analysis.parts(regime, 0)).set_index(["arm", "block"])
    assert set(found.index.get_level_values("arm")) == set(SHOWN) - {"opd_top25", PUPIL}
    run = runs.run("opd")
    steps = run.experiment.kept
    progress = [step / run.steps for step in steps[1:]]
    snapshots = [{name: w.numpy() for name, w in run.snapshot(step).items()} for step in steps]
    names = {block: [n for n in snapshots[0] if f".{block}." in n and "proj" in n] for block in ("self_attn", "mlp")}
    for block, chosen in (("attention", names["self_attn"]), ("all", [*names["self_attn"], *names["mlp"]])):
        row = found.loc[("opd", block)]
        assert row["matrices"] == len(chosen) and row["parameters"] == sum(snapshots[0][n].size for n in chosen)
        views = {"": lambda w: w.astype(float), "_bf16": rounded}
        paths = {
            view: {n: np.stack([see(s[n]) - see(snapshots[0][n]) for s in snapshots[1:]]) for n in chosen}
            for view, see in views.items()
        }
        paths["_null"] = {}
        for name, updates in paths[""].items():
            lengths = np.linalg.norm(np.diff(updates, axis=0, prepend=0), axis=(1, 2))
            walk = random_walk(lengths.tolist(), updates.shape[1:], generator_of(0, name))
            paths["_null"][name] = torch.stack(list(walk)).numpy()
        for view, of in paths.items():
            whole = np.concatenate([updates.reshape(len(progress), -1) for updates in of.values()], 1)
            for key, value in straight(whole, progress).items():
                assert row[f"{key}{view}"] == pytest.approx(value, rel=1e-6), (block, key, view)
            first = [[truncated(update) for update in updates] for updates in of.values()]
            ones = np.concatenate([np.stack([matrix.ravel() for matrix, _ in each]) for each in first], 1)
            for key, value in straight(ones, progress).items():
                assert row[f"{key}_rank1{view}"] == pytest.approx(value, rel=1e-6), (block, key, view)
            assert row[f"first{view}"] == pytest.approx(np.mean([each[-1][1] for each in first]))
            # All snapshots of six steps come after 5 % of the training.
            values = [np.linalg.svd(u.reshape(len(u), -1), compute_uv=False) for u in of.values()]
            assert row[f"along{view}"] == pytest.approx(np.mean([v[0] ** 2 / np.square(v).sum() for v in values]))


# --- forgetting ---


@pytest.fixture(scope="module")
def schooled():
    """Runs of a model that knows the short tasks: from the first base to its anchor, with 32 prompts."""
    scale = replace(TINY_LEARNING, budget=replace(TINY_LEARNING.budget, evaluation_prompts=32))
    lab = Laboratory(scale, default_root())
    base, anchor = (dict(load_model(lab.models / name).named_parameters()) for name in ("base", "anchor"))
    before, after = ({name: w.detach() for name, w in of.items()} for of in (base, anchor))
    update = {name: after[name].double() - w.double() for name, w in before.items()}
    return SimpleNamespace(
        lab=lab, seed=3, weights=lambda arm, progress: before, update=lambda arm: update, after=after, before=before
    )


def log_softmax(logits):
    logits = logits.astype(float) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@torch.no_grad()
def test_an_exam_agrees_with_each_prompt_alone(schooled):
    exam = Exam(schooled)
    (before, said), (after, says) = exam.take(schooled.before), exam.take(schooled.after)
    models = [load_model(schooled.lab.models / name) for name in ("base", "anchor")]
    tokenizer = load_tokenizer(schooled.lab.models / "base")
    assert len(exam.prompts) == 32 and not any(prompt.startswith("Q") for prompt in exam.prompts)
    right, divergence, tokens = np.zeros(2), 0.0, 0
    for prompt in exam.prompts:
        answer = schooled.lab.tasks["short_tasks"].demonstration(prompt)
        asked, told = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, answer + "$"))
        for i, model in enumerate(models):
            made = model.generate(asked, max_new_tokens=48, do_sample=False)[0, asked.shape[1] :]
            right[i] += tokenizer.decode(made) == answer + "$"
        read = torch.cat([asked, told], 1)
        p, q = (log_softmax(model(read).logits[0, asked.shape[1] - 1 : -1].numpy()) for model in models)
        divergence += (np.exp(p) * (p - q)).sum()
        tokens += told.shape[1]
    assert [before, after] == pytest.approx(right / 32) and before > after
    assert exam.kl(said, says) == pytest.approx(divergence / tokens, rel=1e-4)
    assert exam.kl(said, said) == 0


def test_forgetting_is_compared_with_noise_of_the_same_norms(schooled):
    parts = [SimpleNamespace(arms=("sft", "again"))]
    found = RETENTION.measure(schooled, parts)
    row = found.iloc[0]
    assert found.iloc[1].drop("arm").equals(row.drop("arm")), "one draw, the same for all arms"
    sizes = [
        np.sqrt(sum(np.square(w.numpy()).sum() for w in of.values()))
        for of in (schooled.update("sft"), schooled.before)
    ]
    assert row["relative_norm"] == pytest.approx(sizes[0] / sizes[1])
    exam = Exam(schooled)
    accuracy, before = exam.take(schooled.before)
    random = torch.Generator().manual_seed(3)
    noisy = {}
    for name in sorted(schooled.before):
        draw = torch.randn(schooled.before[name].shape, generator=random).double()
        size = float(schooled.update("sft")[name].norm() / draw.norm())
        noisy[name] = schooled.before[name].double() + size * draw
    for which, weights in (("", schooled.after), ("_noise", noisy)):
        then, after = exam.take(weights)
        assert row[f"accuracy{which}"] == then and row["accuracy_before"] == accuracy
        assert row[f"kl{which}"] == pytest.approx(exam.kl(before, after), rel=1e-5)
        assert row[f"lost{which}"] == pytest.approx(accuracy - then)
        assert row[f"lost_per_norm{which}"] == pytest.approx((accuracy - then) / row["relative_norm"])
        assert row[f"kl_per_norm{which}"] == pytest.approx(row[f"kl{which}"] / row["relative_norm"])


# --- a pupil and its teacher ---

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")


def test_a_pupil_s_update_beside_its_teacher_s():
    random = np.random.default_rng(0)
    shapes = dict(zip(NAMES, ((24, 20), (40, 20)), strict=True))
    start = {name: rounded(random.normal(size=shape)) for name, shape in shapes.items()}
    size = {PUPIL: 0.003, "rlvr": 0.001, "opd": 0.002, TEACHER: 0.01}
    updates = {arm: {n: s * random.normal(size=shape) for n, shape in shapes.items()} for arm, s in size.items()}
    for name in NAMES:
        updates[PUPIL][name] += 0.2 * updates[TEACHER][name]
    as_tensors = {arm: {name: torch.from_numpy(w) for name, w in update.items()} for arm, update in updates.items()}
    runs = SimpleNamespace(
        weights=lambda arm, progress: {name: torch.from_numpy(w).float() for name, w in start.items()},
        update=lambda arm: as_tensors[arm],
        model=lambda folder: {name: torch.from_numpy(start[name] + updates[TEACHER][name]) for name in reversed(NAMES)},
    )
    found = TAUGHT.measure(runs, [SimpleNamespace(arms=(PUPIL, "rlvr", "opd"))]).set_index(["arm", "block"])
    for block, names in (("all", NAMES), ("attention", NAMES[:1]), ("mlp", NAMES[1:])):
        flat = {arm: np.concatenate([update[name].ravel() for name in names]) for arm, update in updates.items()}
        norms = {arm: np.linalg.norm(update) for arm, update in flat.items()}
        for arm in size:
            row = found.loc[(arm, block)]
            cosine = flat[arm] @ flat[TEACHER] / norms[arm] / norms[TEACHER]
            values = [np.linalg.svd(updates[arm][name], compute_uv=False) for name in names]
            shares = [np.square(v).cumsum() / np.square(v).sum() for v in values]
            changed = np.concatenate(
                [(rounded(start[name] + updates[arm][name]) != start[name]).ravel() for name in names]
            )
            expected = {
                "norm": norms[arm],
                "norm_to_teacher": norms[arm] / norms[TEACHER],
                "norm_to_rlvr": norms[arm] / norms["rlvr"],
                "cosine": cosine,
                "inside": cosine**2,
                "outside": 1 - cosine**2,
                "stable_rank": np.mean([np.square(v / v[0]).sum() for v in values]),
                "changed": changed.mean(),
            }
            expected |= {f"energy_{k}": np.mean([share[k - 1] for share in shares]) for k in (1, 4, 16)}
            assert row[list(expected)].to_dict() == pytest.approx(expected, rel=1e-6)
    assert found.loc[(TEACHER, "all"), "outside"] == pytest.approx(0, abs=1e-9)


def test_the_teacher_is_that_of_the_seed(regime):
    found = TAUGHT.measure(RunSet(regime, 0), TAUGHT.parts(regime, 0)).set_index(["arm", "block"])
    start, teacher = (load_model(regime.models / name).state_dict() for name in ("anchor", "teacher_rlvr"))
    chosen = [name for name in start if "proj" in name]
    moved = np.sqrt(sum(float((teacher[n].double() - start[n].double()).square().sum()) for n in chosen))
    assert found.loc[(TEACHER, "all"), "norm"] == pytest.approx(moved) and moved > 0
    assert TAUGHT.seeds(WHOLE_MODEL) == (0, 1, 2), "those of variants"


# --- records ---


@pytest.fixture(scope="module")
def recorded(regime):
    """The same laboratory with one seed of everything recorded, and the records."""
    for arm in SHOWN:
        add_run(find_tables(arm, 0, regime), regime)
    for name in TINY.policy.analyses:
        add_analysis(analyse(name, 0, regime), regime)
    return regime, load(regime, SHOWN, seeds=(0,), analyses=TINY.policy.analyses)


def test_every_analysis_of_the_regime_is_recorded_under_its_claims(recorded):
    lab, records = recorded
    assert tuple(records.analyses) == TINY.policy.analyses == tuple(ANALYSES)
    sets = read_json(lab.records / "claims.json")
    assert list(sets.values()) == [digests(CLAIMS)]
    for name, table in records.analyses.items():
        assert set(table["claims"]) == set(sets), name
        assert len(table) and set(table["seed"]) == {0}
    assert set(read_index(lab.records, "analyses")["analysis"]) == set(ANALYSES)


def test_every_claim_about_analyses_finds_its_numbers(recorded):
    lab, records = recorded
    about = [claim for claim in CLAIMS if any(contrast.metric.analysis for contrast in claim.contrasts)]
    assert {contrast.metric.analysis for claim in about for contrast in claim.contrasts} == {
        "linearity", "extrapolation", "similarity", "span", "taught", "gradients", "retention",
    }  # fmt: skip
    assert all(claim.judgeable(records) for claim in about)
    for claim in about:
        for contrast in claim.contrasts:
            rows, column = contrast.metric.rows(records), contrast.metric.column
            assert contrast.weights.keys() <= set(rows["arm"]), (claim.name, contrast)
            assert len(contrast.metric.values(records).columns) or rows[column].isna().all(), (claim.name, contrast)
    assert {found.verdict for found in judge(about, records)} == {"inconclusive"}, "of one seed"
    assert written_after(about, records, lab.records) == set()


def test_a_claim_that_came_after_an_analysis_is_found(recorded):
    (lab, records), (claim,) = recorded, [claim for claim in CLAIMS if claim.name == "channel-own"]
    table = records.analyses["similarity"]
    rows = (table["arm"] == "rlvr") & (table["other"] == "opd")

    def found(claims):
        similar = {"similarity": table.assign(claims=claims) if claims is not None else table.drop(columns="claims")}
        return written_after([claim], replace(records, analyses=records.analyses | similar), lab.records)

    others = table["claims"].mask(rows & ~table["next_seed"], "others")
    assert rows.any() and found(others) == set(), "rows that it does not look at"
    assert found(table["claims"].mask(rows & table["next_seed"], "others")) == {"channel-own"}
    assert found(None) == {"channel-own"}, "rows that name no claims"
