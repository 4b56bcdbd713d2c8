"""TRL as an engine: its configuration against the paper's tables, and its updates against those of opdlab's own loop.

Each trainer runs alone in this process, and in two processes (gloo) under FSDP2. On CPUs accelerate 1.15 by itself
offers DDP only: ``tests/training/engine_worker.py`` adds them to the devices that it shards on,
which is all that is missing.
``pytest -rP`` shows the differences.
"""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
pytest.importorskip("trl")

import engine_worker
import transformers
from engine_worker import ANY_END
from opdlab.training.trl_config import accelerate_arguments, configure, trainer_of
from torch import Tensor

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.grid import ARMS
from opdlab.lab.scales import get_scale
from opdlab.lab.tasks import TASKS
from opdlab.measuring.sources import find_trajectory
from opdlab.measuring.update import measure
from opdlab.models.files import load_tensors
from opdlab.models.folders import load_model
from opdlab.training import trl as engine
from opdlab.training import trl_launch as launch
from opdlab.training.store import Home
from opdlab.training.trainer import Learner

TRAINERS = {"sft": "SFT", "opd_full": "Distillation", "opd": "IWOPD", "rlvr": "GRPO"}
# After each of two AdamW steps in float32: the norm of the difference of the two updates, as a share of the norm of
# one. Adam divides a gradient by its own size, so where that is near 0 rounding becomes a part of a step.
UPDATE = 2e-4
# Adam's step is blind to the size of the gradient, so that is compared too: its norm before clipping, relative.
GRADIENT = 2e-6


# --- the configuration ------------------------------------------------------------------------------------------------


def paper(arm: str) -> dict:
    return configure(get_scale("paper"), arm, 0, Home(Path("/nowhere")), processes=8, gpu=True)


def test_the_configurations_are_those_of_the_papers_tables():
    everywhere = {"weight_decay": 0.1, "adam_beta1": 0.9, "bf16": True, "use_cpu": False}
    rollouts = {"temperature": 1.0, "top_p": 1.0, "use_vllm": True, "adam_beta2": 0.98, "lr_scheduler_type": "constant"}
    tables = {
        "sft": {"max_steps": 5375, "learning_rate": 1e-5, "adam_beta2": 0.95, "warmup_steps": 537}
        | {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        "opd_full": {"max_steps": 300, "learning_rate": 1e-6, "beta": 1.0} | rollouts,
        "opd": {"max_steps": 300, "learning_rate": 1e-6, "iw_opd_gamma": 0.0} | rollouts,
        "rlvr": {"max_steps": 1024, "learning_rate": 1e-6, "num_generations": 8, "beta": 0.0, "loss_type": "dapo"}
        | {"epsilon": 0.2, "epsilon_high": 0.28, "adam_epsilon": 1e-15}
        | rollouts,
    }
    for (arm, table), batch in zip(tables.items(), (256, 64, 64, 512), strict=True):
        config = paper(arm)
        arguments = config["arguments"]
        assert config["trainer"] == TRAINERS[arm]
        assert arguments == arguments | everywhere | table
        assert 8 * arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == batch
    models = [(config["start"].rsplit("/", 2)[-2:], config["teacher"]) for config in map(paper, tables)]
    anchor, teacher = ["paper", "anchor"], "Qwen/Qwen3-32B"
    assert models == [(["Qwen", "Qwen3-8B-Base"], None), (anchor, teacher), (anchor, teacher), (anchor, None)]


@pytest.mark.parametrize("arm", TRAINERS)
def test_trl_knows_all_arguments(arm, tmp_path):
    config = paper(arm)
    _, settings = engine._classes(config["trainer"], engine.recipe_of(config))
    # A machine without a GPU refuses the two.
    read = settings(output_dir=str(tmp_path), **config["arguments"] | {"use_cpu": True, "bf16": False})
    assert read.learning_rate == config["recipe"]["learning_rate"]


def test_accelerate_shards_the_paper_and_uses_cpus_without_gpus(scale, home):
    arguments = accelerate_arguments(paper("opd_full"))
    assert (arguments["distributed_type"], arguments["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    assert (arguments["num_processes"], arguments["mixed_precision"], arguments["use_cpu"]) == (8, "bf16", False)
    arguments = accelerate_arguments(configure(scale, "opd_full", 0, home, 2, gpu=False))
    assert (arguments["num_processes"], arguments["mixed_precision"], arguments["use_cpu"]) == (2, "no", True)


def test_what_it_refuses(scale, home):
    for arm, message in (
        ("sft_matched", "sequences of the teacher"),
        ("opd_top25", "ranking, token_share"),
        ("opd_update4", "constraint"),
        ("opd_mix50", "alpha"),
        ("opd_sgd", "optimizer"),
        ("base", "starts from random weights"),
    ):
        with pytest.raises(OpdlabError, match=f"TRL has no trainer for arm '{arm}' .*{message}"):
            trainer_of(ARMS[arm])
    with pytest.raises(OpdlabError, match="paper has no recipe for arm 'opd_short'"):
        paper("opd_short")
    for processes in (3, 32, 0, -2):
        with pytest.raises(OpdlabError, match=f"^{processes} processes cannot share a batch of 16 sequences"):
            configure(scale, "opd", 0, home, processes, gpu=False)
    with pytest.raises(OpdlabError, match="run 'opdlab models --scale smoke' first"):
        launch.check_ready(configure(scale, "opd", 0, Home(home.root / "empty"), 1, gpu=False), scale)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_paper_needs_the_engine_and_gpus(tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main([*arguments, "--scale", "paper", "--home", str(tmp_path)]) == 2
        return capsys.readouterr().err

    for command in (["models"], ["record"], ["train", "--arm", "opd"]):
        assert "is too large for opdlab's own loop: run 'opdlab train --engine trl --scale paper" in said(*command)
    opd = ("train", "--arm", "opd", "--engine", "trl")
    assert "needs 64 CUDA GPUs, and this machine has" in said(*opd, "--processes", "64")
    assert "TRL has no trainer for arm 'sft_matched'" in said("train", "--arm", "sft_matched", "--engine", "trl")
    assert main([*opd, "--scale", "paper", "--home", str(tmp_path), "--processes", "4", "--dry-run"]) == 0
    folder = tmp_path / "runs" / "paper" / "opd-seed0-trl"
    command = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"accelerate launch --config_file {folder}/accelerate.json -m opdlab.training.trl {folder}/config.json"
        in command
    )
    assert json.loads((folder / "config.json").read_text())["processes"] == 4


def test_the_command_line_runs_what_it_prints(home, capsys, monkeypatch):
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda words: commands.append(words) or subprocess.CompletedProcess(words, len(commands) - 1)
    )
    words = ["train", "--arm", "opd_full", "--engine", "trl", "--scale", "smoke", "--home", str(home.root)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        " ".join(commands[0]) in out and f"opdlab measure {home.models(get_scale('smoke'))}/anchor --trajectory" in out
    )
    assert main(words) == 2
    assert "training ended with status 1" in capsys.readouterr().err
    assert main(["train", "--arm", "opd", "--scale", "smoke", "--dry-run"]) == 2
    assert "are of an engine: add --engine trl" in capsys.readouterr().err


# --- the updates ------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Two steps of opdlab's own loop: the weights before and after each, gradient norms, and what was read."""

    weights: list[dict[str, Tensor]]
    norms: list[float]
    sequences: list[list]


@pytest.fixture(scope="module")
def short(scale):
    """The scale with two steps for each arm, in micro-batches of four sequences."""
    recipes = {arm: replace(scale.recipes[arm], steps=2) for arm in TRAINERS}
    return replace(scale, recipes=scale.recipes | recipes, micro_batch=4, snapshots=(0.5, 1.0))


@pytest.fixture(scope="module")
def ours(short, home) -> dict[str, Steps]:
    """What opdlab's own loop does, by arm."""
    return {
        arm: own_steps(Learner(short, ARMS[arm], short.recipe(arm), ANY_END, home.models(short), 0)) for arm in TRAINERS
    }


def own_steps(learner: Learner) -> Steps:
    drawn, draw = [], learner.batch
    learner.batch = lambda step: drawn.append(draw(step)) or drawn[-1]
    done = Steps([learner.origin], [], [])
    for step in range(2):
        done.norms.append(learner.step(step)["grad_norm"])
        done.weights.append({name: weight.detach().clone() for name, weight in learner.student.named_parameters()})
        rollouts, _ = drawn[-1]
        prompts = [prompt for prompt in rollouts.prompts for _ in range(rollouts.samples)]
        done.sequences.append(list(zip(prompts, rollouts.completions, strict=True)))
    return done


def written(arm: str, scale, home: Home, folder, processes: int) -> list[str]:
    """Write the files of a run and return its command."""
    config = configure(scale, arm, 0, home, processes, gpu=False)
    # opdlab's loop has this one for RLVR too.
    config["arguments"] |= {"adam_epsilon": 1e-8, "disable_tqdm": True}
    return launch.write(config, folder)


def assert_same_updates(arm: str, ours: Steps, folder) -> None:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    paths = find_trajectory(folder / "snapshots")
    assert [path.name for path in paths] == [f"step-00000{step}.safetensors" for step in (1, 2)]
    for step, (path, norm) in enumerate(zip(paths, norms, strict=True), 1):
        theirs = load_tensors(path)[0]
        assert theirs.keys() == ours.weights[0].keys()
        far = sum((theirs[name] - weight).double().square().sum() for name, weight in ours.weights[step].items())
        moved = sum(
            (ours.weights[0][name] - weight).double().square().sum() for name, weight in ours.weights[step].items()
        )
        update, gradient = float(far / moved) ** 0.5, abs(norm / ours.norms[step - 1] - 1)
        print(f"{arm}, step {step}: update +- {update:.1e}, gradient norm {norm:.3g} +- {gradient:.1e}")
        assert update <= UPDATE and gradient <= GRADIENT


@pytest.mark.parametrize("arm", TRAINERS)
def test_alone(arm, ours, short, home, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, ANY_END.name, ANY_END)
    if arm != "sft":
        monkeypatch.setattr(transformers.Qwen3ForCausalLM, "generate", engine_worker.feed(ours[arm].sequences))
    written(arm, short, home, tmp_path, processes=1)
    engine.run(tmp_path / "config.json")
    assert_same_updates(arm, ours[arm], tmp_path)


def test_in_two_processes_under_fsdp2(ours, short, home, tmp_path):
    folders = {arm: tmp_path / arm for arm in TRAINERS}
    for arm, folder in folders.items():
        command = written(arm, short, home, folder, processes=2)
        if arm != "sft":
            (folder / "sequences.json").write_text(json.dumps(ours[arm].sequences))
    begun = command[: command.index("-m")]
    files = [str(folder / "config.json") for folder in folders.values()]
    done = subprocess.run([*begun, engine_worker.__file__, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for arm, folder in folders.items():
        assert_same_updates(arm, ours[arm], folder)
    path = find_trajectory(folders["opd"] / "snapshots")
    update = measure(home.models(short) / "anchor", path, nulls=False)
    assert (update.table["frobenius"] > 0).any() and len(update.trajectory)


def test_it_samples_by_itself_and_makes_a_model(short, home, tmp_path):
    """No sequences are fed here; the last weights become the folder that the configuration names."""
    written("opd", short, home, tmp_path, processes=1)
    config = json.loads((tmp_path / "config.json").read_text()) | {"makes": str(tmp_path / "made")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine.run(tmp_path / "config.json")
    last = load_tensors(find_trajectory(tmp_path / "snapshots")[-1])[0]
    made = dict(load_model(tmp_path / "made").named_parameters())
    assert all(made[name].equal(weight) for name, weight in last.items())
