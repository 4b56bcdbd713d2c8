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
from torch import Tensor

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.laboratory import Laboratory
from opdlab.measuring.callback import callback_for
from opdlab.measuring.sources import find_trajectory
from opdlab.measuring.update import measure
from opdlab.models.files import load_tensors
from opdlab.models.folders import load_model
from opdlab.training import trl as engine
from opdlab.training import trl_process as process
from opdlab.training.config import Compute, Experiment
from opdlab.training.tasks import Task
from opdlab.training.trainer import Trainer
from opdlab.training.trl import accelerate_arguments, configure, trainer_of

TRAINERS = {"sft": "SFT", "opd_full": "Distillation", "opd": "IWOPD", "rlvr": "GRPO"}
# After each of two AdamW steps in float32: the norm of the difference of the two updates, as a share of the norm of
# one. Adam divides a gradient by its own size, so where that is near 0 rounding becomes a part of a step.
UPDATE = 2e-4
# Adam's step is blind to the size of the gradient, so that is compared too: its norm before clipping, relative.
GRADIENT = 2e-6


# --- the configuration ------------------------------------------------------------------------------------------------


def paper(arm: str) -> Experiment:
    return Laboratory.at("paper", Path("/nowhere")).experiment(arm)


def of_paper(arm: str) -> dict:
    return configure(paper(arm), processes=8, gpu=True, vllm=True)


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
        config = of_paper(arm)
        arguments = config["arguments"]
        assert config["trainer"] == TRAINERS[arm]
        assert arguments == arguments | everywhere | table
        assert 8 * arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == batch
    models = [(config["start"].rsplit("/", 2)[-2:], config["teacher"]) for config in map(of_paper, tables)]
    anchor, teacher = ["paper", "anchor"], "Qwen/Qwen3-32B"
    assert models == [(["Qwen", "Qwen3-8B-Base"], None), (anchor, teacher), (anchor, teacher), (anchor, None)]


@pytest.mark.parametrize("arm", TRAINERS)
def test_trl_knows_all_arguments(arm, tmp_path):
    config = of_paper(arm)
    settings = getattr(process.library_of(config["trainer"]), f"{config['trainer']}Config")
    # A machine without a GPU refuses the two.
    read = settings(output_dir=str(tmp_path), **config["arguments"] | {"use_cpu": True, "bf16": False})
    assert read.learning_rate == config["recipe"]["learning_rate"]


def test_accelerate_shards_the_paper_and_uses_cpus_without_gpus(lab):
    arguments = accelerate_arguments(of_paper("opd_full"))
    assert (arguments["distributed_type"], arguments["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    assert (arguments["num_processes"], arguments["mixed_precision"], arguments["use_cpu"]) == (8, "bf16", False)
    arguments = accelerate_arguments(configure(lab.experiment("opd_full"), 2, gpu=False, vllm=False))
    assert (arguments["num_processes"], arguments["mixed_precision"], arguments["use_cpu"]) == (2, "no", True)


def test_what_it_refuses(lab):
    for arm, message in (
        ("sft_matched", "rollouts by the teacher and the loss cross_entropy"),
        ("opd_sign", "rollouts by the student and the loss opd_sign"),
        ("opd_top25", "tokens"),
        ("opd_teacher25", "teacher_share"),
        ("opd_update4", "projection"),
        ("opd_mix50", "alpha"),
        ("opd_balanced50", "alpha, balanced"),
        ("opd_sgd", "optimizer"),
        ("opd_bf16", "weight_dtype"),
        ("base", "it starts from random weights"),
    ):
        with pytest.raises(OpdlabError, match=rf"TRL has no trainer for '{arm}' \({message}\): choose sft, opd"):
            trainer_of(lab.experiment(arm))
    opd = lab.experiment("opd")
    with pytest.raises(OpdlabError, match="paper has no recipe for arm 'opd_short'"):
        paper("opd_short")
    for processes in (3, 32, 0, -2):
        with pytest.raises(OpdlabError, match=f"^{processes} processes cannot share a batch of 16 completions"):
            configure(opd, processes, gpu=False, vllm=False)
    empty = replace(lab, root=lab.root / "empty").experiment("opd")
    with pytest.raises(OpdlabError, match=r"there is no model in .*empty/data/models/tiny/anchor: make it first"):
        engine.check_ready(configure(empty, 1, gpu=False, vllm=False))


def test_a_reward_that_no_other_process_can_have_is_refused(lab, tmp_path):
    rows = [{"prompt": f"Q{n}+1=?A:", "answer": str(n + 1)} for n in range(40)]
    own = Task.from_dataset(rows, reward=lambda prompt, completion, answer: 0.0, name="mine", chat=False)
    rlvr = replace(lab.experiment("rlvr"), task=own)
    config = configure(rlvr, 1, gpu=False, vllm=False)
    with pytest.raises(OpdlabError, match=r"task 'mine' cannot be handed .*put its reward in a module"):
        engine.write(config, rlvr, callback_for, tmp_path)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_paper_needs_the_engine_and_gpus(tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main([*arguments, "--scale", "paper", "--home", str(tmp_path)]) == 2
        return capsys.readouterr().err

    for command in (["models"], ["record"], ["train", "--arm", "opd"]):
        assert "is too large for opdlab's own loop: run 'opdlab train --engine trl --scale paper" in said(*command)
    opd = ("train", "--arm", "opd", "--engine", "trl")
    assert "needs 64 CUDA GPUs, and this machine has" in said(*opd, "--processes", "64")
    assert "TRL has no trainer for 'sft_matched'" in said("train", "--arm", "sft_matched", "--engine", "trl")
    assert main([*opd, "--scale", "paper", "--home", str(tmp_path), "--processes", "4", "--dry-run"]) == 0
    folder = tmp_path / "runs" / "paper" / "opd-seed0-trl"
    command = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"accelerate launch --config_file {folder}/accelerate.json -m opdlab.training.trl {folder}/run.pickle"
        in command
    )
    assert json.loads((folder / "config.json").read_text())["processes"] == 4


def test_the_command_line_runs_what_it_prints(lab, tmp_path, copy_of, capsys, monkeypatch):
    commands, own = [], copy_of(lab, tmp_path / "own")
    monkeypatch.setattr(
        subprocess, "run", lambda words: commands.append(words) or subprocess.CompletedProcess(words, len(commands) - 1)
    )
    words = ["train", "--arm", "opd_full", "--engine", "trl", "--scale", "smoke", "--home", str(own.root)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert " ".join(commands[0]) in out and f"opdlab measure {own.models}/anchor --trajectory" in out
    assert main(words) == 2
    assert "training ended with status 1" in capsys.readouterr().err
    (own.runs / "opd_full-seed0-trl" / "trainer_state.json").write_text("{}")
    assert main(words) == 0 and len(commands) == 2
    assert "finished before; delete the folder to train it again" in capsys.readouterr().out
    assert main(["train", "--arm", "opd", "--scale", "smoke", "--dry-run"]) == 2
    assert "are of an engine: add --engine trl" in capsys.readouterr().err


# --- the updates ------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Two steps of opdlab's own loop: the weights before and after each, gradient norms, and what was written."""

    weights: list[dict[str, Tensor]]
    norms: list[float]
    completions: list[list]


@pytest.fixture(scope="module")
def short(lab) -> dict[str, Experiment]:
    """Two steps of each arm, in micro-batches of four completions."""
    return {
        arm: replace(
            lab.experiment(arm),
            task=ANY_END,
            recipe=replace(lab.recipe(arm), steps=2),
            snapshots=(1, 2),
            compute=Compute(micro_batch=4),
        )
        for arm in TRAINERS
    }


@pytest.fixture(scope="module")
def ours(short) -> dict[str, Steps]:
    """What opdlab's own loop does, by arm."""
    return {arm: own_steps(Trainer(experiment)) for arm, experiment in short.items()}


def own_steps(trainer: Trainer) -> Steps:
    drawn, draw = [], trainer.batch
    trainer.batch = lambda step: drawn.append(draw(step)) or drawn[-1]
    done = Steps([trainer.origin], [], [])
    for step in range(2):
        done.norms.append(trainer.step(step)["grad_norm"])
        done.weights.append({name: weight.detach().clone() for name, weight in trainer.student.named_parameters()})
        rollouts, _ = drawn[-1]
        prompts = [prompt for prompt in rollouts.prompts for _ in range(rollouts.samples)]
        done.completions.append(list(zip(prompts, rollouts.completions, strict=True)))
    return done


def written(experiment: Experiment, folder: Path, processes: int, produces: Path | None = None) -> list[str]:
    """Write the files of a run and return its command."""
    config = configure(experiment, processes, gpu=False, vllm=False) | {"produces": produces and str(produces)}
    # opdlab's loop has this one for RLVR too.
    config["arguments"] |= {"adam_epsilon": 1e-8, "disable_tqdm": True}
    return engine.write(config, experiment, callback_for, folder)


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
def test_alone(arm, ours, short, tmp_path, monkeypatch):
    if arm != "sft":
        monkeypatch.setattr(transformers.Qwen3ForCausalLM, "generate", engine_worker.feed(ours[arm].completions))
    written(short[arm], tmp_path, processes=1)
    process.run(tmp_path / "run.pickle")
    assert_same_updates(arm, ours[arm], tmp_path)


def test_in_two_processes_under_fsdp2(ours, short, lab, tmp_path):
    folders = {arm: tmp_path / arm for arm in TRAINERS}
    for arm, folder in folders.items():
        command = written(short[arm], folder, processes=2)
        if arm != "sft":
            (folder / "completions.json").write_text(json.dumps(ours[arm].completions))
    begun = command[: command.index("-m")]
    files = [str(folder / "run.pickle") for folder in folders.values()]
    done = subprocess.run([*begun, engine_worker.__file__, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for arm, folder in folders.items():
        assert_same_updates(arm, ours[arm], folder)
    path = find_trajectory(folders["opd"] / "snapshots")
    update = measure(lab.models / "anchor", path, nulls=False)
    assert (update.table["frobenius"] > 0).any() and len(update.trajectory)


def test_it_samples_by_itself_and_makes_a_model(short, tmp_path):
    """No completions are fed here; the last weights become the folder of the model that the run makes."""
    written(short["opd"], tmp_path, processes=1, produces=tmp_path / "made")
    process.run(tmp_path / "run.pickle")
    last = load_tensors(find_trajectory(tmp_path / "snapshots")[-1])[0]
    made = dict(load_model(tmp_path / "made").named_parameters())
    assert all(made[name].equal(weight) for name, weight in last.items())
