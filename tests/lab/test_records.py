import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from opdlab.cli import main
from opdlab.geometry import overall_sparsity
from opdlab.lab import scheduler as reproduction
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.records import (
    TABLES,
    load_records,
    per_run,
    read_record,
    recorded_analyses,
    recorded_arms,
    write_record,
)
from opdlab.lab.scales import SCALES, SMALL, TINY
from opdlab.lab.scheduler import all_models, build, compare, end_figures, plan
from opdlab.training.store import Home, config_key, default_home, resolve


@pytest.fixture(scope="module")
def records(scale, home):
    return load_records(("sft", "opd"), scale, seeds=(0, 1), home=home, progress=False)


def test_records_hold_every_table(records, scale):
    assert set(records.sources["arm"]) == {"sft", "opd"}
    for name in TABLES:
        table = getattr(records, name)
        assert len(table.groupby(["arm", "seed"])) == 4
    assert set(records.trajectory["block"]) == {"attention", "mlp"}
    assert len(records.matrices) == 4 * 3 * 7, "three layers of seven matrices"
    last = records.trajectory[records.trajectory["progress"] == 1.0]
    ks = scale.geometry.sim_ks
    assert last[[f"sim_right_K{k}" for k in ks]].to_numpy() == pytest.approx(1.0)
    assert records.trajectory["frobenius"].gt(0).all()
    assert records.matrices["sparsity"].between(0, 1).all()


def test_per_run_averages_over_matrices_and_weighs_sparsity(records):
    runs = per_run(records.matrices).set_index(["arm", "seed"])
    for (arm, seed), part in records.matrices.groupby(["arm", "seed"]):
        row = runs.loc[(arm, seed)]
        assert row["nss"] == pytest.approx(part["nss"].mean())
        assert row["sparsity"] == pytest.approx(overall_sparsity(part))
        assert row["matrices"] == 21
    steps = per_run(records.trajectory)
    assert len(steps) == len(records.trajectory) / 2 and set(steps["matrices"]) == {21}
    ends = steps[steps["progress"] == 1].set_index(["arm", "seed"])
    # The blocks count by their matrices, and sparsity by their parameters, so nothing is lost in between.
    for column in ("frobenius", "stable_rank", "sparsity"):
        assert ends[column].tolist() == pytest.approx(runs.loc[ends.index, column].tolist(), rel=1e-5)


def test_a_record_reads_back_what_was_measured(scale, home):
    folder = write_record("opd", 0, scale, home)
    description, tables = read_record(folder)
    assert folder == home.records(scale) / "opd-seed0"
    assert description["config"]["arm"]["name"] == "opd"
    assert {"torch", "transformers", "device", "processor"} <= set(description["provenance"])
    assert load_records(("opd",), scale, seeds=(0,), home=home).sources["recorded"].all()
    assert list(tables["history"]["step"]) == list(range(1, scale.recipe("opd").steps + 1))
    shutil.rmtree(folder)


def test_the_mean_of_a_few_columns_is_that_of_all(records):
    everything = per_run(records.matrices)
    few = per_run(records.matrices, ("sparsity", "nss"))
    pd.testing.assert_frame_equal(few, everything[few.columns])
    assert {"arm", "seed", "sparsity", "nss", "matrices", "parameters"} <= set(few.columns)


def test_records_of_some_seeds_are_those_that_are_loaded_alone(records):
    seed = int(records.sources["seed"].iloc[0])
    chosen = records.of_seeds((seed,))
    for name in (*TABLES, "sources"):
        table = getattr(chosen, name)
        assert set(table["seed"]) == {seed}
        assert len(table) == (getattr(records, name)["seed"] == seed).sum()
    assert records.of_seeds(set(records.sources["seed"])).colophon() == records.colophon()


def test_the_configuration_decides_the_key(scale, home):
    config = resolve(scale, "opd", 0, home)
    assert config_key(config) == config_key(json.loads(json.dumps(config)))
    assert config_key(config) != config_key(resolve(scale, "opd", 1, home))
    assert config_key(config) != config_key(resolve(scale, "opd_full", 0, home))


def test_the_plan_makes_what_is_missing_first(home, scale, tmp_path):
    empty = plan(TINY, Home(tmp_path), ("sft", "opd"), (0, 1))
    assert [(job.what, job.seed, job.makes) for job in empty] == [
        ("base", 0, "base"),
        ("sft", 0, "anchor"),
        ("teacher", 0, "teacher"),
        ("opd", 0, ""),
        ("sft", 1, ""),
        ("opd", 1, ""),
    ]
    assert [job.what for job in plan(TINY, Home(tmp_path), ("sft",), (0,))] == ["base", "sft"]
    assert [job.what for job in plan(scale, home, ("opd",), (0,))] == ["opd"]
    # Directions of another run: that run first.
    other = plan(TINY, home, ("opd_of_seed4", "opd_of_rlvr4"), (2,))
    assert [job.name for job in other[:4]] == [
        "opd_short-seed3",
        "opd_of_seed4-seed2",
        "rlvr_short-seed2",
        "opd_of_rlvr4-seed2",
    ]
    assert other[1].needs == ("opd_short-seed3",)
    # As many seeds as the scale has for each arm.
    assert [job.name for job in plan(replace(TINY, seeds=(0, 1), variant_seeds=(0,)), home, ("opd", "opd_short"))] == [
        "opd-seed0",
        "opd_short-seed0",
        "opd-seed1",
    ]


def test_what_is_recorded_is_not_planned_unless_a_run_needs_it(scale, home):
    folder = write_record("opd", 0, scale, home)
    assert plan(scale, home, ("opd",), (0,)) == []
    # The other run's constraint is read from this one's snapshots, which a record does not hold.
    assert [job.name for job in plan(scale, home, ("opd", "opd_of_seed4"), (2,))][-1] == "opd_of_seed4-seed2"
    needed = [job.name for job in plan(scale, home, ("opd",), (0,), analyses=("directions",))]
    assert needed == ["opd-seed0", "rlvr-seed0", "sft_matched-seed0", "directions-seed0"]
    shutil.rmtree(folder)


def test_a_second_home_built_from_nothing_agrees_bit_for_bit(tmp_path, monkeypatch):
    """What 'opdlab reproduce' does, at a scale of seconds: two homes from nothing, two processes, one comparison."""
    few = replace(SCALES["smoke"], evaluation_prompts=8, seeds=(0, 1))
    # Worker processes look the scale up by name, so it keeps the name and the tests keep to what smoke does there.
    smoke, homes = SCALES["smoke"], [Home(tmp_path / name) for name in ("first", "second")]
    for home in homes:
        build(plan(smoke, home, ("sft", "opd"), (0, 1)), smoke, home)
    table = compare(replace(smoke, seeds=few.seeds), homes[0], homes[1], ("sft", "opd"), (0, 1))
    assert set(table["verdict"]) == {"bit for bit"}
    assert len(table) == 4 * len(reproduction.FIGURES)

    # A record that says otherwise is caught: other weights, and a figure far outside the recorded spread.
    folder = homes[1].records(smoke) / "opd-seed0"
    description = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(description | {"weights": "other"}))
    matrices = pd.read_csv(folder / "matrices.csv")
    matrices.assign(nss=matrices["nss"] * 1000).to_csv(folder / "matrices.csv", index=False)
    table = compare(replace(smoke, seeds=few.seeds), homes[0], homes[1], ("sft", "opd"), (0, 1))
    other = table[table["run"] == "opd seed 0"].set_index("figure")["verdict"]
    assert other["NSS"] == "outside"
    assert set(other.drop("NSS")) <= {"within the spread", "outside"}


def test_end_figures_are_means_over_matrices(records, scale, home):
    _, tables = read_record(reproduction.find_tables("sft", 0, scale, home))
    figures = end_figures(tables)
    assert figures["NSS"] == pytest.approx(tables["matrices"]["nss"].mean())
    assert figures["sampled accuracy"] == tables["evaluations"]["sampled"].iloc[-1]
    assert set(figures) == set(reproduction.FIGURES)


def test_every_model_has_a_job(tmp_path):
    jobs = plan(TINY, Home(tmp_path), (), models=all_models(TINY))
    assert {job.makes for job in jobs} == set(all_models(TINY)) > {"base", "teacher", "anchor"}


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
    assert main(["record", "--arm", "opd", "--seed", "0", *home]) == 0
    assert (tmp_path / "data" / "records" / "smoke" / "opd-seed0" / "record.json").exists()


def test_records_of_small_are_of_what_the_scale_says_now():
    """Whoever changes the scale has to record it again, or the chapters would train it."""
    home = default_home()
    folders = {path.name for path in home.records(SMALL).iterdir() if path.is_dir()}
    whole = recorded_arms(SMALL, home)
    wanted = {f"{arm}-seed{seed}" for arm in whole for seed in SMALL.seeds_of(arm)}
    wanted |= {f"{name}-seed{seed}" for name in recorded_analyses(SMALL, home) for seed in ANALYSES[name].seeds(SMALL)}
    assert "opd" in whole and folders == wanted
    described = json.loads((home.records(SMALL) / "pretrained.json").read_text())["base"]
    of_sft, _ = read_record(home.records(SMALL) / "sft-seed0")
    assert of_sft["config"]["start"] == described["weights"] and described["from"]
    assert of_sft["seconds"] > 0 and of_sft["provenance"]["device"] and of_sft["provenance"]["torch"]


def test_a_repetition_may_keep_the_models(home, scale, tmp_path, monkeypatch):
    own = Home(tmp_path)
    shutil.copytree(home.models(scale), own.models(scale))
    (own.records(scale) / "sft-seed0").mkdir(parents=True)
    planned = []
    monkeypatch.setattr(reproduction, "build", lambda jobs, *rest, **options: planned.extend(jobs))
    monkeypatch.setattr(reproduction, "compare", lambda *rest: pd.DataFrame({"verdict": [], "same machine": []}))
    asked = ["reproduce", "--scale", "smoke", "--home", str(tmp_path), "--arm", "sft", "--seed", "0"]
    assert main(asked) == 0
    assert [job.what for job in planned] == ["base", "sft"]
    planned.clear()
    assert main([*asked, "--keep-models"]) == 0
    assert [job.what for job in planned] == ["sft"]
