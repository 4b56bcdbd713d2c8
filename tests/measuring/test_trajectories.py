"""Which checkpoints a folder has, the steps of each, and what is said of the rest."""

import json

import pandas as pd
import pytest

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.measuring.sources import default_out, find_trajectory, in_order, step_of
from opdlab.measuring.update import measure
from opdlab.models.files import load_tensors, save_tensors


def place(folder, *names):
    """Make the folder of a run: files, folders with a model, and links, of which nothing can be read."""
    for name in names:
        name, _, target = name.partition(" -> ")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif path.suffix in (".safetensors", ".pt", ".bin", ".json"):
            path.touch()
        else:
            path.mkdir()
            (path / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("global_step_50", 50),
        ("globalstep50", 50),
        ("Global Step=50", 50),
        ("iter_0000063", 63),
        ("iteration.7", 7),
        ("CKPT_100", 100),
        ("step1000-tokens4B", 1000),
        ("stage2-ingredient1-step3000-tokens7B", 3000),
        ("checkpoint-100-r16", 100),
        ("step100_loss0.25", 100),
        ("step100-epoch3", 100),
        ("epoch_3_step_100", 100),
        ("epoch-3-loss0.7", 3),
        ("checkpoint-1e3", 1000),
        ("Qwen3-0.6B-step100", 100),
        ("timestep-model-12", 12),
        ("step-000040.safetensors", 40),
        ("10k", 10_000),
        ("step-1k", 1000),
        ("step-1.5k-r16", 1500),
        ("step1M", 1_000_000),
        ("step_1_000", 1000),
        ("checkpoint-12,500", 12_500),
        ("step_1000_256", 1000),
        ("checkpoint-5b3f", 5),
        ("checkpoint-1.5", 1.5),
        ("epoch-0.5", 0.5),
        ("global_step20_hf", 20),
        ("global_step_50/actor/huggingface", 50),
        ("500/actor", 500),
        ("final", None),
        ("best/huggingface", None),
    ],
)
def test_the_step_is_the_number_that_a_word_calls_so(name, step):
    assert step_of(f"runs/7/{name}") == step


@pytest.mark.parametrize(
    ("names", "found", "steps", "said"),
    [
        (["checkpoint-1000", "checkpoint-50"], ["checkpoint-50", "checkpoint-1000"], (50, 1000), ""),
        (["0", "500", "1000"], ["500", "1000"], (500, 1000), "0 (the origin)"),
        (["checkpoint-5", "final", "best"], ["checkpoint-5"], (5,), "best, final (no step in its name)"),
        (["checkpoint-5", "tmp-checkpoint-10"], ["checkpoint-5"], (5,), "tmp-checkpoint-10 (not written to its end)"),
        (["checkpoint-5", "best-9 -> checkpoint-5"], ["checkpoint-5"], (5,), "best-9 (a link to another)"),
        (["checkpoint-5", "best-7 -> ../elsewhere"], ["checkpoint-5", "best-7"], (5, 7), ""),
        (["checkpoint-5", "logs-2024/run_config.json"], ["checkpoint-5"], (5,), "logs-2024 (no checkpoint)"),
        (["checkpoint-5", "wandb/run-2026/x.json", "events-12.bin", "notes-3.json"], ["checkpoint-5"], (5,), ""),
        (["checkpoint-5", "model.safetensors"], ["checkpoint-5"], (5,), "model.safetensors (no step in its name)"),
        (
            ["checkpoint-5", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["checkpoint-5"],
            (5,),
            "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors (a shard of one model)",
        ),
        (["checkpoint-5", "model-00001-of-00001.safetensors"], ["checkpoint-5"], (5,), "(a shard of one model)"),
        (
            ["checkpoint-5", *(f"model-0000{i}-of-00009.safetensors" for i in range(1, 10))],
            ["checkpoint-5"],
            (5,),
            "model-00004-of-00009.safetensors and 5 more (a shard of one model)",
        ),
        (
            ["stage2-step10-tokens3B", "stage1-step90-tokens294B"],
            ["stage1-step90-tokens294B", "stage2-step10-tokens3B"],
            (1, 2),
            "Each stage counts its steps anew",
        ),
        (["global_step_9/actor/huggingface", "global_step_9/critic"], ["global_step_9"], (9,), ""),
        (["global_step_9/actor/model_world_size_2_rank_0.pt", "latest.json"], ["global_step_9"], (9,), ""),
        (["20/actor/huggingface", "3/actor/huggingface"], ["3", "20"], (3, 20), ""),
        (["_actor/global_step20_hf", "_actor/global_step5_hf"], ["global_step5_hf", "global_step20_hf"], (5, 20), ""),
        (
            ["_actor/global_step20/mp_rank_00_model_states.pt", "_actor/global_step20_hf"],
            ["global_step20_hf"],
            (20,),
            "global_step20 (without safetensors, unlike global_step20_hf)",
        ),
        (["weights/step_10", "weights/step_2", "checkpoints/step_10/trainer.pt"], ["step_2", "step_10"], (2, 10), ""),
        (["iter_0000063/release.pt", "iter_0000127/.metadata/x.pt"], ["iter_0000063", "iter_0000127"], (63, 127), ""),
    ],
)
def test_what_a_folder_holds(names, found, steps, said, tmp_path):
    place(tmp_path / "elsewhere")
    place(tmp_path, "elsewhere/model.safetensors")
    trajectory = find_trajectory(place(tmp_path / "run", *names))
    assert [path.name for path in trajectory] == found and trajectory.steps == steps
    assert said in " ".join(trajectory.said) and bool(said) == bool(trajectory.said)


def test_two_of_one_step_and_none(tmp_path):
    with pytest.raises(OpdlabError, match="are of one step"):
        find_trajectory(place(tmp_path / "twice", "checkpoint-5", "epoch-5"))
    with pytest.raises(OpdlabError, match=r"no checkpoints in .*none, which holds final: give the folder with"):
        find_trajectory(place(tmp_path / "none", "final"))
    with pytest.raises(OpdlabError, match=r"there is no folder .*nowhere: give the one with the checkpoints"):
        find_trajectory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "order", "steps", "said"),
    [
        (["run/checkpoint-1000", "run/checkpoint-200"], [1, 0], (200, 1000), "were sorted"),
        (["run/step-500", "run/step-1k", "run/step-2k"], [0, 1, 2], (500, 1000, 2000), ""),
        (["run/step-2M", "run/step-500k"], [1, 0], (500_000, 2_000_000), "were sorted"),
        (["run/epoch-0.5", "run/epoch-1", "run/epoch-1.5"], [0, 1, 2], (0.5, 1, 1.5), ""),
        (["run/500", "run/50"], [1, 0], (50, 500), "were sorted"),
        (["run/global_step_9/actor", "run/global_step_5/actor"], [1, 0], (5, 9), "were sorted"),
        (["OWNER/MODEL@step900", "OWNER/MODEL@step100"], [1, 0], (100, 900), "were sorted"),
        # Another folder is another training, so the order given is that of the trainings.
        (["sft/checkpoint-1000", "rl/checkpoint-200"], [0, 1], (1, 2), "in the order given"),
        (["run/qwen-8", "run/qwen-4"], [0, 1], (1, 2), "in the order given"),
        (["run/checkpoint-200", "run/checkpoint-1000"], [0, 1], (200, 1000), ""),
        (["early", "late"], [0, 1], (1, 2), ""),
        (["run/checkpoint-200"], [0], (200,), ""),
    ],
)
def test_checkpoints_in_the_order_of_a_shell(given, order, steps, said):
    trajectory = in_order(given)
    assert trajectory == [given[i] for i in order] and trajectory.steps == steps
    assert said in " ".join(trajectory.said) and bool(said) == bool(trajectory.said)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("rl/global_step_50/actor/huggingface", "rl-global_step_50"),
        ("rl/global_step_50", "rl-global_step_50"),
        ("rl/weights/step_7", "rl-step_7"),
        ("rl/_actor/global_step20_hf", "rl-global_step20_hf"),
        ("sft/snapshots/step-000040.safetensors", "sft-step-000040"),
        ("sft/snapshots", "sft"),
        ("sft/final", "final"),
    ],
)
def test_results_are_named_by_run_and_step(path, name, tmp_path):
    assert default_out(tmp_path / path).name == f"geometry-{name}"


@pytest.fixture
def run(pair, tmp_path):
    """A run of verl, of two steps, with what lies beside the models."""
    for step, which in ((50, 0), (100, 1)):
        folder = tmp_path / "run" / f"global_step_{step}" / "actor"
        (folder / "huggingface").parent.mkdir(parents=True)
        (folder / "huggingface").symlink_to(pair[1])
        (folder / "optim_world_size_1_rank_0.pt").touch()
        if which == 0:
            (folder / "huggingface").unlink()
            weights = {}
            for file in sorted(pair[1].glob("*.safetensors")):
                weights |= load_tensors(file)[0]
            save_tensors(folder / "huggingface" / "model.safetensors", {n: w * 1.001 for n, w in weights.items()})
    return place(tmp_path / "run", "final")


def test_a_run_of_verl_is_measured_and_what_was_left_out_is_said(run, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", f"{pair[0]}", "--trajectory", "run", "--no-nulls"]) == 0
    said = "Left out of the trajectory in run: final (no step in its name)."
    assert said in capsys.readouterr().out
    assert said in json.loads((tmp_path / "geometry-run" / "summary.json").read_text())["notes"]
    assert pd.read_csv("geometry-run/trajectory.csv")["step"].unique().tolist() == [50, 100]
    # The folder of a step, its actor, and the model itself are one checkpoint.
    expected = pd.read_csv("geometry-run/matrices.csv")
    for below in ("", "actor", "actor/huggingface"):
        update = measure(pair[0], run / "global_step_100" / below, nulls=False)
        pd.testing.assert_frame_equal(update.table, expected)
        assert "global_step_100" in update.title


def test_a_folder_without_weights_is_looked_for_in_its_step(run, pair):
    """As verl's huggingface, which has no more than a configuration before the parts beside it are merged."""
    empty = run / "global_step_100" / "actor" / "huggingface"
    empty.unlink()
    empty.mkdir()
    place(empty, "config.json")
    place(empty.parent, "model_world_size_2_rank_0.pt")
    with pytest.raises(OpdlabError, match=r"model_world_size_2_rank_0.pt is .*verl.model_merger"):
        measure(pair[0], empty)


def test_checkpoints_that_were_sorted_are_measured_to_the_last(run, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", f"{pair[0]}", "run/global_step_50", "run/global_step_100", "--no-nulls"]) == 0
    expected = pd.read_csv("geometry-run-global_step_100/matrices.csv")
    assert "sorted" not in capsys.readouterr().out
    command = ["measure", f"{pair[0]}", "run/global_step_100", "run/global_step_50", "--no-nulls"]
    assert main([*command, "--out", "other"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv("other/matrices.csv"), expected)
    assert "were not given in the order of their steps, and were sorted" in capsys.readouterr().out
