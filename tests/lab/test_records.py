import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import needs_tiny

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.geometry import Resolution
from opdlab.lab import grid, scheduler
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.analyses.similarity import BASES, WHOLE
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import (
    TABLES,
    add_analysis,
    add_run,
    analyse,
    derived,
    find_tables,
    has_record,
    load,
    missing_parts,
    nearest,
    per_run,
    read_index,
    read_tables,
    recorded_analyses,
    recorded_arms,
    write_table,
)
from opdlab.lab.scales import SMOKE
from opdlab.lab.scheduler import all_models, build, compare, end_figures, missing_records, plan
from opdlab.measuring.tensors import Job, measured
from opdlab.training.config import config_key

ROOT = Path(__file__).resolve().parents[2]


def beside(lab, copy_of, folder):
    """A laboratory with the same models and runs, and records of its own."""
    own = copy_of(lab, folder)
    (own.root / "runs").symlink_to(lab.root / "runs")
    return own


@pytest.fixture(scope="module")
def kept(lab, copy_of, tmp_path_factory):
    """A laboratory with the records of two arms and two seeds."""
    own = beside(lab, copy_of, tmp_path_factory.mktemp("kept") / "root")
    for arm in ("sft", "opd"):
        for seed in (0, 1):
            add_run(find_tables(arm, seed, own), own)
    return own


@pytest.fixture(scope="module")
def records(kept):
    return load(kept, ("sft", "opd"), seeds=(0, 1))


@pytest.fixture
def own(lab, copy_of, tmp_path):
    """A laboratory with the same models and runs, and no record yet."""
    return beside(lab, copy_of, tmp_path / "own")


# --- the tables -------------------------------------------------------------------------------------------------------


def test_records_hold_every_table(records):
    assert set(records.runs["arm"]) == {"sft", "opd"} and {"OPD", "SFT"} == set(records.runs["label"])
    for name in TABLES:
        table = getattr(records, name)
        assert len(table.groupby(["arm", "seed"])) == 4
    assert set(records.trajectory["block"]) == {"attention", "mlp"}
    assert len(records.matrices) == 4 * 7, "a layer of seven matrices"
    last = records.trajectory[records.trajectory["progress"] == 1.0]
    ks = Resolution.of((128, 128)).sim_ks
    assert last[[f"sim_right_K{k}" for k in ks]].to_numpy() == pytest.approx(1.0)
    assert records.trajectory["frobenius"].gt(0).all()
    assert records.matrices["sparsity"].between(0, 1).all()


def test_per_run_averages_over_matrices_and_weighs_sparsity(records):
    runs = per_run(records.matrices).set_index(["arm", "seed"])
    for (arm, seed), part in records.matrices.groupby(["arm", "seed"]):
        row = runs.loc[(arm, seed)]
        assert row["nss"] == pytest.approx(part["nss"].mean())
        assert row["sparsity"] == pytest.approx(np.average(part["sparsity"], weights=part["parameters"]))
        assert row["matrices"] == 7
    steps = per_run(records.trajectory)
    assert len(steps) == len(records.trajectory) / 2 and set(steps["matrices"]) == {7}
    ends = steps[steps["progress"] == 1].set_index(["arm", "seed"])
    # The blocks count by their matrices, and sparsity by their parameters, so nothing is lost in between.
    for column in ("frobenius", "stable_rank", "sparsity"):
        assert ends[column].tolist() == pytest.approx(runs.loc[ends.index, column].tolist(), rel=1e-5)


def test_the_mean_of_a_few_columns_is_that_of_all(records):
    everything = per_run(records.matrices)
    few = per_run(records.matrices, ("sparsity", "nss"))
    pd.testing.assert_frame_equal(few, everything[few.columns])
    assert {"arm", "seed", "sparsity", "nss", "matrices", "parameters"} <= set(few.columns)


def test_the_rows_nearest_to_a_share_of_training(records):
    table = records.trajectory
    assert set(nearest(table, 1.0)["progress"]) == {1.0}
    for _, part in nearest(table, 0.3).groupby("arm"):
        of_arm = table[table["arm"] == part["arm"].iloc[0]]
        assert (part["progress"] - 0.3).abs().max() == (of_arm["progress"] - 0.3).abs().min()


def test_a_record_reads_back_what_was_measured(kept):
    run, experiment = kept.run("opd", 0), kept.experiment("opd", 0)
    origin, *ends = map(run.snapshot, experiment.kept)
    with measured(Job(origin, ends, experiment.kept[1:], blocks=("attention", "mlp"))) as (matrices, _):
        pass
    read = read_tables(kept.records / "opd")
    assert list(read["history"].query("seed == 0")["step"]) == list(range(1, run.steps + 1))
    # What follows from name and shape of a matrix is not stored, and is there again when it is read.
    header = (kept.records / "opd" / "matrices.csv").read_text().splitlines()[0].split(",")
    added = set(derived(matrices))
    assert added and not added & set(header) and added <= set(matrices.columns)
    again = read["matrices"].query("seed == 0").reset_index(drop=True)
    assert set(again) == {"arm", "seed", *matrices}
    pd.testing.assert_frame_equal(again[list(matrices)], matrices, rtol=1e-6, check_dtype=False)
    row = read_index(kept.records).query("arm == 'opd' and seed == 0").iloc[0]
    assert (row["key"], row["student"]) == (experiment.key, experiment.config["student"])
    assert row["recipe.steps"] == run.steps and row["arm.loss"] == "opd_sampled"
    assert all(row[name] for name in ("torch", "transformers", "device", "processor"))


# --- which records count ----------------------------------------------------------------------------------------------


def test_the_configuration_decides_the_key(lab):
    opd = lab.experiment("opd", 0)
    assert opd.key == config_key(opd.config) == config_key(json.loads(json.dumps(opd.config)))
    assert len({opd.key, lab.experiment("opd", 1).key, lab.experiment("opd_full", 0).key}) == 3
    other = replace(opd, recipe=replace(opd.recipe, learning_rate=1e-9))
    assert other.key != opd.key and other.folder != opd.folder
    # What it is called decides nothing.
    assert replace(opd, name="mine").key == opd.key


def test_loading_never_trains(kept, own, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing is trained by reading")

    monkeypatch.setattr("opdlab.lab.laboratory.train", refuse)
    monkeypatch.setattr("opdlab.training.loop.train", refuse)
    command = "run 'opdlab record --scale smoke --arm opd_full --arm rlvr'"
    with pytest.raises(OpdlabError, match=f"no record of opd_full, rlvr as it would be made now: {command}"):
        load(kept, ("sft", "opd_full", "rlvr"), seeds=(0,))
    with pytest.raises(OpdlabError, match=r"no record of sft .*--arm sft'"):
        load(kept, ("sft",), seeds=(0, 1, 2))
    with pytest.raises(OpdlabError, match=r"no record of any arm .*run 'opdlab record --scale smoke'"):
        load(own)
    with pytest.raises(OpdlabError, match=r"no record of the analysis 'span' .*--scale smoke --analysis span'"):
        load(kept, ("sft",), seeds=(0,), analyses=("span",))


def test_a_record_of_another_recipe_is_none(kept):
    budget = kept.scale.budget
    recipe = replace(budget.recipes["arm"], learning_rate=1e-9)
    other = replace(kept, scale=replace(kept.scale, budget=replace(budget, recipes=budget.recipes | {"opd": recipe})))
    assert has_record("opd", 0, kept) and not has_record("opd", 0, other) and has_record("sft", 0, other)
    with pytest.raises(OpdlabError, match="no record of opd as it would be made now"):
        load(other, ("sft", "opd"), seeds=(0,))


def test_only_arms_with_all_of_their_seeds_are_recorded(kept):
    more = replace(kept, scale=replace(kept.scale, policy=replace(kept.scale.policy, seeds=(0, 1, 2))))
    assert recorded_arms(more) == (), "two of the three seeds are recorded"
    assert set(recorded_arms(kept)) == {"sft", "opd"} and recorded_analyses(kept) == ()
    assert set(load(kept).runs["arm"]) == {"sft", "opd"}
    assert missing_records(("opd", "rlvr", "span"), (0,), kept) == ["rlvr", "span"]
    assert missing_records(("opd",), (0, 2), kept) == ["opd"]


@pytest.mark.parametrize("scale", ["tiny-learning", pytest.param("tiny", marks=needs_tiny)])
def test_the_records_are_whole_and_of_what_the_scale_says_now(scale):
    """Whoever changes the scale has to record it again, or the chapters could not read it."""
    lab = Laboratory.at(scale)
    policy, index = lab.scale.policy, read_index(lab.records)
    assert plan(lab, policy.arms, analyses=policy.analyses) == []
    assert recorded_arms(lab) == policy.arms and recorded_analyses(lab) == policy.analyses
    runs = [(arm, seed) for arm in policy.arms for seed in lab.seeds_of(arm)]
    assert sorted(zip(index["arm"], index["seed"], strict=True)) == sorted(runs)
    folders = {path.name for path in lab.records.iterdir() if path.is_dir()}
    assert folders - {"analyses"} == set(policy.arms)


def test_an_arm_that_is_added_leaves_every_record_valid(lab, copy_of, tmp_path):
    """By the very line of CONTRIBUTING.md: only the new arm is due, and the pairs that it is one of."""
    (line,) = re.findall(r"`(_vary\(.*\))`", (ROOT / "CONTRIBUTING.md").read_text())
    arms = dict(grid.ARMS)
    eval(line, vars(grid) | {"_vary": partial(grid.vary, arms)})
    (name,) = set(arms) - set(grid.ARMS)

    policy = replace(lab.scale.policy, arms=WHOLE, analyses=("similarity",), seeds=(0, 1), variant_seeds=(0,))
    before = beside(replace(lab, scale=replace(lab.scale, policy=policy)), copy_of, tmp_path / "root")
    for arm in WHOLE:
        for seed in policy.seeds:
            add_run(find_tables(arm, seed, before), before)
    for seed in policy.seeds:
        add_analysis(analyse("similarity", seed, before), before)
    more = replace(before.scale, policy=replace(policy, arms=(*WHOLE, name)))
    after = replace(before, arms=arms, scale=more)
    assert plan(before, WHOLE, analyses=policy.analyses) == plan(after, WHOLE) == []
    assert recorded_arms(after) == WHOLE
    # Chapters go on reading: pairs with an arm that is not recorded itself are not asked for.
    assert recorded_analyses(after) == recorded_analyses(before) == policy.analyses
    pairs = [load(at, ["opd"], analyses=["similarity"]).analyses["similarity"] for at in (before, after)]
    pd.testing.assert_frame_equal(*pairs)
    similarity = ANALYSES["similarity"]
    due = [part for seed in similarity.seeds(after) for part in missing_parts(similarity, seed, after)]
    assert [tuple(part.entries.values()) for part in due] == [(base, name, False) for base in BASES]
    jobs = plan(after, more.policy.arms, analyses=policy.analyses)
    # Of a recorded run the weights may be gone, so what the new pairs compare with is trained again.
    assert {job.what for job in jobs} == {name, "similarity", *BASES} and {job.seed for job in jobs} == {0}


def test_a_run_that_is_added_replaces_its_own_rows_and_no_others(tmp_path):
    """A recorded run, taken out of the records of a scale and put back, leaves every byte as it is."""
    lab = replace(Laboratory.at("tiny-learning"), root=tmp_path)
    arm, seed, folder = "opd", 1, tmp_path / "tables"
    recorded = ROOT / "data" / "records" / "tiny-learning"
    shutil.copytree(recorded / arm, lab.records / arm)
    shutil.copy(recorded / "runs.csv", lab.records)
    row = read_index(lab.records).query("arm == @arm and seed == @seed").iloc[0].dropna()
    folder.mkdir()
    (folder / "record.json").write_text(row.to_json())
    for name in TABLES:
        header, *lines = (recorded / arm / f"{name}.csv").read_text().splitlines()
        (folder / f"{name}.csv").write_text("\n".join([header, *(x for x in lines if x.startswith(f"{arm},{seed},"))]))

    def holds():
        return {path.relative_to(lab.records): path.read_bytes() for path in lab.records.rglob("*.csv")}

    before = holds()
    add_run(folder, lab)
    assert holds() == before
    # Another table of it changes its own lines, in their places.
    matrices = pd.read_csv(folder / "matrices.csv")
    write_table(folder / "matrices.csv", matrices.assign(nss=0.125))
    (folder / "record.json").write_text(json.dumps(row.to_dict() | {"weights": "0123456789abcdef"}, default=int))
    add_run(folder, lab)
    for path, text in before.items():
        old, new = text.decode().splitlines(), (lab.records / path).read_text().splitlines()
        changed = {tuple(b.split(",")[:2]) for a, b in zip(old, new, strict=True) if a != b}
        assert changed == ({(arm, str(seed))} if path.name in ("matrices.csv", "runs.csv") else set())


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_the_plan_makes_what_is_missing_first(lab, tmp_path):
    empty = Laboratory.at("tiny", tmp_path)
    assert [(job.what, job.seed, job.produces) for job in plan(empty, ("sft", "opd"), (0, 1))] == [
        ("base", 0, "base"),
        ("sft", 0, "anchor"),
        ("teacher", 0, "teacher"),
        ("opd", 0, ""),
        ("sft", 1, "anchor-1"),
        ("opd", 1, ""),
    ]
    assert [job.what for job in plan(empty, ("sft",), (0,))] == ["base", "sft"]
    assert [job.what for job in plan(lab, ("opd",), (0,))] == ["opd"]
    with pytest.raises(OpdlabError, match="no record is kept of arm 'base', as it only makes a model"):
        plan(empty, ("base",))
    # Directions of another run: that run first.
    tiny = replace(lab, scale=replace(empty.scale, models=lab.scale.models))
    other = plan(tiny, ("opd_of_seed4", "opd_of_rlvr4"), (2,))
    assert [job.name for job in other[:4]] == [
        "opd-seed3",
        "opd_of_seed4-seed2",
        "rlvr-seed2",
        "opd_of_rlvr4-seed2",
    ]
    assert other[1].needs == ("opd-seed3",)
    # As many seeds as the scale has for each arm.
    policy = replace(tiny.scale.policy, seeds=(0, 1), variant_seeds=(0,), other_seeds={"opd": (0, 1, 2)})
    few = replace(tiny, scale=replace(tiny.scale, policy=policy))
    assert [job.name for job in plan(few, ("opd", "opd_top25", "rlvr"))] == [
        "opd-seed0",
        "opd_top25-seed0",
        "rlvr-seed0",
        "opd-seed1",
        "rlvr-seed1",
        "opd-seed2",
    ]


def test_each_seed_starts_from_its_own_anchor(tmp_path):
    tiny = Laboratory.at("tiny", tmp_path)
    jobs = {job.name: job for job in plan(tiny, ("opd", "opd_rlvr_teacher"), (0, 3))}
    assert jobs["opd-seed0"].needs[:1] == ("anchor",) and jobs["opd-seed3"].needs[:1] == ("anchor-3",)
    assert jobs["sft-seed3"].produces == "anchor-3" and jobs["sft-seed0"].produces == "anchor"
    assert jobs["opd_rlvr_teacher-seed3"].needs == ("anchor-3", "teacher_rlvr-3")
    assert tiny.maker_of("teacher_rlvr-3")[0].name == "teacher_rlvr"
    teacher, arm = map(tiny.arm, ("teacher_rlvr", "rlvr"))
    assert teacher.seed_shift and not arm.seed_shift, "never the run of the arm, gone on with"


def test_what_is_recorded_is_not_planned_unless_a_run_needs_it(own):
    add_run(find_tables("opd", 0, own), own)
    assert plan(own, ("opd",), (0,)) == []
    # The other run's directions are read from this one's snapshots, which a record does not hold.
    assert [job.name for job in plan(own, ("opd", "opd_of_seed4"), (2,))][-1] == "opd_of_seed4-seed2"
    needed = [job.name for job in plan(own, ("opd",), (0,), analyses=("extrapolation",))]
    assert needed == ["opd-seed0", "rlvr-seed0", "sft_matched-seed0", "extrapolation-seed0"]


def test_a_second_laboratory_built_from_nothing_agrees_bit_for_bit(tmp_path, scale):
    """What 'opdlab reproduce' does, at a scale of seconds: two from nothing, two processes, one comparison."""
    scale = replace(scale, policy=replace(SMOKE.policy, seeds=(0, 1), variant_seeds=(0,)))
    first, second = (Laboratory(scale, tmp_path / name) for name in ("first", "second"))
    for lab in (first, second):
        build(plan(lab, ("sft", "opd"), (0, 1), analyses=("extrapolation",)), lab)
    names = ("sft", "opd", "extrapolation")
    table = compare(first, second, names, (0, 1))
    assert set(table["verdict"]) == {"bit for bit"} and table["same machine"].all()
    assert (~table["run"].str.startswith("extrapolation")).sum() == 4 * len({*scheduler.ACCURACIES, *scheduler.MEANS})
    # Which looks at the first seed only.
    assert set(table["run"]) == {"extrapolation seed 0"} | {
        f"{arm} seed {seed}" for arm in ("sft", "opd") for seed in (0, 1)
    }

    # A repetition that came out otherwise is caught: other weights, and a figure far outside the recorded spread.
    index = read_index(second.records)
    index.loc[(index["arm"] == "opd") & (index["seed"] == 0), "weights"] = "other"
    write_table(second.records / "runs.csv", index)
    path = second.records / "opd" / "matrices.csv"
    matrices = pd.read_csv(path)
    matrices.loc[matrices["seed"] == 0, "nss"] *= 1000
    write_table(path, matrices)
    table = compare(first, second, names, (0, 1))
    other = table[table["run"] == "opd seed 0"].set_index("figure")["verdict"]
    assert other["nss"] == "outside"
    assert set(other.drop("nss")) <= {"within the spread", "outside"}
    assert set(table[table["run"] != "opd seed 0"]["verdict"]) == {"bit for bit"}


def test_a_new_column_of_an_analysis_is_nothing_to_compare(lab, tmp_path):
    recorded, repeated = (replace(lab, root=tmp_path / name) for name in ("recorded", "repeated"))
    index = pd.DataFrame({"analysis": "span", "seed": range(3), "torch": "2"})
    table = pd.DataFrame({"seed": range(3), "key": "1", "arm": "opd", "residual": [0.5, 0.6, 0.7]})
    new = table.assign(key="2", claims="3", outside=[0.25, 0.36, 0.49])
    for at, found in ((recorded, table), (repeated, new)):
        write_table(at.records / "analyses.csv", index)
        write_table(at.records / "analyses" / "span.csv", found)
    found = compare(recorded, repeated, ("span",), (0, 1))
    assert set(found["figure"]) == {"residual"} and set(found["verdict"]) == {"bit for bit"}
    write_table(repeated.records / "analyses" / "span.csv", new.assign(residual=[0.5, 0.61, 0.7]))
    assert list(compare(recorded, repeated, ("span",), (0, 1))["verdict"]) == ["bit for bit", "within the spread"]


def test_end_figures_are_means_over_matrices(lab):
    tables = read_tables(find_tables("sft", 0, lab))
    figures = end_figures(tables)
    assert figures["nss"] == pytest.approx(tables["matrices"]["nss"].mean())
    assert figures["sampled"] == tables["evaluations"]["sampled"].iloc[-1]
    assert set(figures) == {*scheduler.ACCURACIES, *scheduler.MEANS}


def test_every_model_has_a_job(tmp_path):
    empty = Laboratory.at("tiny", tmp_path)
    jobs = plan(empty, (), models=all_models(empty))
    made = {job.produces for job in jobs}
    assert made > {"base", "teacher", "anchor"} and made | set(empty.scale.models.given) == set(all_models(empty))


def test_a_job_whose_model_nobody_makes_is_refused(own):
    job = replace(plan(own, ("opd",), (0,))[0], needs=("elsewhere",))
    with pytest.raises(OpdlabError, match="nothing makes elsewhere, which 'opd' needs"):
        build([job], own, processes=1)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys):
    home = ["--home", str(tmp_path), "--scale", "smoke"]
    assert main(["scales"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["models", *home]) == 0
    assert main(["train", "--arm", "opd", *home]) == 0
    out = capsys.readouterr().out
    assert "run folder: " in out and "sampled" in out
    assert main(["train", "--arm", "opd", *home]) == 0
    assert "finished before" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "smoke").glob("opd-*"))) == 1, "a finished run is not trained again"
    assert main(["record", "--arm", "opd", "--seed", "0", *home]) == 0
    lab = Laboratory.at("smoke", tmp_path)
    assert read_index(lab.records)[["arm", "seed"]].to_numpy().tolist() == [["opd", 0]]
    assert has_record("opd", 0, lab) and (lab.records / "opd" / "history.csv").is_file()


def test_a_repetition_may_keep_the_models(kept, tmp_path, monkeypatch):
    shutil.copytree(kept.models, tmp_path / "data" / "models" / "smoke")
    shutil.copytree(kept.records, tmp_path / "data" / "records" / "smoke")
    planned = []
    monkeypatch.setattr(scheduler, "build", lambda jobs, *rest, **options: planned.extend(jobs))
    monkeypatch.setattr(scheduler, "compare", lambda *rest: pd.DataFrame({"verdict": [], "same machine": []}))
    asked = ["reproduce", "--scale", "smoke", "--home", str(tmp_path), "--arm", "sft", "--seed", "0"]
    assert main(asked) == 0
    assert [job.what for job in planned] == ["base", "sft"]
    planned.clear()
    assert main([*asked, "--keep-models"]) == 0
    assert [job.what for job in planned] == ["sft"]
