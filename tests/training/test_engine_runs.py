"""Runs by TRL on the disk: their folders and keys, and how they are stopped, go on, and are refused.

They are killed in ``tests/project/test_kill.py``.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
pytest.importorskip("trl")

from engine_worker import ANY_END, shortened, snapshots_of, stopping_once, written

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import SCALES, SMOKE
from opdlab.models import fetch
from opdlab.models.files import only_process
from opdlab.models.folders import load_model
from opdlab.training import trl as process
from opdlab.training.config import Recipe, with_fields

ARMS = ("sft", "opd_full", "opd", "rlvr")


# --- folders and keys -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(lab, tmp_path, copy_of, monkeypatch):
    """A laboratory without runs, in which the engine runs in this process; and what its commands were."""
    home, commands = copy_of(lab, tmp_path / "here"), []

    def run(words):
        commands.append(words)
        process.run(Path(words[-1]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return home, commands


def engine(home, arm: str, *more: str) -> int:
    return main(["train", "--arm", arm, "--engine", "trl", "--scale", "smoke", "--home", str(home.root), *more])


def test_a_run_is_another_with_other_steps_or_another_rate(here, capsys):
    home, commands = here
    short = ("--set", "steps=1")
    assert engine(home, "opd_full", *short) == 0
    out = capsys.readouterr().out
    assert " ".join(commands[0]) in out and f"opdlab measure {home.models}/anchor --trajectory" in out
    for changes in (short, ("--set", "steps=2"), ("--set", "steps=1", "--set", "learning_rate=1e-5")):
        assert engine(home, "opd_full", *changes) == 0
        assert ("finished before; delete the folder to train it again" in capsys.readouterr().out) == (changes == short)
    assert len(commands) == 3
    folders = [Path(words[-1]).parent for words in commands]
    for folder, steps in zip(folders, ([1], [1, 2], [1]), strict=True):
        assert [int(path.stem[5:]) for path in sorted((folder / "snapshots").glob("*.safetensors"))] == steps
    config = json.loads((folders[1] / "config.json").read_text())
    experiment = with_fields(Laboratory.at("smoke", home.root).experiment("opd_full"), {"steps": 2})
    assert folders[1].name == f"{experiment.folder}-trl1" and config == experiment.config


def test_what_cannot_train_says_so(here, capsys, monkeypatch):
    home, _ = here
    monkeypatch.setattr(subprocess, "run", lambda words: subprocess.CompletedProcess(words, 1))
    assert engine(home, "opd_full") == 2
    assert "training ended with status 1" in capsys.readouterr().err
    assert main(["train", "--arm", "opd", "--scale", "smoke", "--dry-run"]) == 2
    assert "are of an engine: add --engine trl" in capsys.readouterr().err


def test_it_makes_the_model_that_other_arms_start_from(here):
    home, commands = here
    models = home.models.resolve()
    home.models.parent.unlink()
    shutil.copytree(models / "base", home.models / "base")
    assert engine(home, "sft", "--set", "steps=2") == 0
    last = snapshots_of(Path(commands[0][-1]).parent)[-1]
    made = load_model(home.models / "anchor")
    assert all(made.get_parameter(name).equal(weight) for name, weight in last.items())
    assert [path.name for path in sorted(home.models.iterdir())] == ["anchor", "base"]


def test_pretrained_models_are_fetched_first(here, monkeypatch, capsys):
    """But not on a machine that could not train them, and not for a dry run."""
    home, commands = here
    models, asked = home.models.resolve(), []
    home.models.parent.unlink()
    shutil.copytree(models / "anchor", home.models / "anchor")
    given = replace(SMOKE.models, pretrained={"teacher": "it"}, dtype="float32")
    monkeypatch.setitem(SCALES, "smoke", replace(SMOKE, models=given))
    monkeypatch.setattr(fetch, "default_folder", lambda name: models / "teacher")
    monkeypatch.setattr(fetch, "fetch", lambda name, *_, **__: asked.append(name))
    assert engine(home, "opd", "--processes", "3") == 2 and engine(home, "opd", "--dry-run") == 0
    assert "3 processes cannot share" in capsys.readouterr().err and not asked and not commands
    assert engine(home, "opd", "--set", "steps=1") == 0
    assert asked == ["it"] and (home.models / "teacher").resolve() == models / "teacher"


# --- stopping and going on --------------------------------------------------------------------------------------------


def same(one: Path, other: Path) -> bool:
    pairs = list(zip(snapshots_of(one), snapshots_of(other), strict=True))
    return bool(pairs) and all(a[name].equal(b[name]) for a, b in pairs for name in a)


def through(experiment, folder: Path) -> Path:
    """Train without a stop."""
    written(experiment, folder, processes=1)
    process.run(folder / "run.pickle")
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_a_stopped_run_goes_on_bit_for_bit(arm, lab, tmp_path):
    experiment, folder = shortened(lab.experiment(arm), steps=4, weight_decay=0.1), tmp_path / "stopped"
    written(experiment, folder, processes=1, callback=stopping_once)
    with pytest.raises(KeyboardInterrupt):
        process.run(folder / "run.pickle")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    # What a kill leaves of the next one is neither read nor kept.
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{")
    process.run(folder / "run.pickle")
    assert not list(folder.glob("checkpoint*"))
    assert same(folder, through(experiment, tmp_path / "through"))
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("stopped", "through")]
    losses = [[line["loss"] for line in log["log_history"] if "loss" in line] for log in logs]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_only_one_process_trains_a_run(lab, tmp_path):
    written(shortened(lab.experiment("sft")), tmp_path, processes=1)
    with only_process(tmp_path, "trains"), pytest.raises(OpdlabError, match="another process trains in"):
        process.run(tmp_path / "run.pickle")


# --- what is no number ------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_kept(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "learning_rate_at", lambda self, step: 1e-4 if step < 1 else float("inf"))
    written(shortened(lab.experiment("sft")), tmp_path, processes=1)
    with pytest.raises(OpdlabError, match=r"sum of the weights of 'sft' is (nan|-?inf) at step 2: lower its learning"):
        process.run(tmp_path / "run.pickle")
    assert len(snapshots_of(tmp_path)) == 1 and not (tmp_path / process.FINISHED).exists()


def not_a_number(prompt: str, completion: str) -> float:
    return float("nan")


def test_a_reward_that_is_no_number_names_the_prompt(lab, tmp_path):
    rlvr = shortened(lab.experiment("rlvr"), replace(ANY_END, score=not_a_number))
    written(rlvr, tmp_path, processes=1)
    with pytest.raises(OpdlabError, match=r"the reward of task 'running_sum' is nan on the prompt 'Q.*=\?A:'"):
        process.run(tmp_path / "run.pickle")
