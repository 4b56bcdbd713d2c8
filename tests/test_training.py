import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from opdlab import training
from opdlab.arms import RECORDED, SIGNALS
from opdlab.errors import OpdlabError
from opdlab.records import tensors_digest
from opdlab.runs import Home, Run
from opdlab.training import Learner, train


def last_weights(run):
    return tensors_digest(run.snapshot_path(run.config["recipe"]["steps"]))


def copy_of(home, folder):
    """Return a new home with the same models and no runs."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "models").symlink_to(home.root / "data" / "models")
    return Home(folder)


def learner(scale, arm, home):
    from opdlab.arms import ARMS
    from opdlab.tasks import TASKS

    return Learner(scale, ARMS[arm], scale.recipes[arm], TASKS[scale.task], home.models(scale), 0)


@pytest.mark.parametrize("arm", RECORDED)
def test_every_arm_trains_and_is_deterministic(arm, scale, home, tmp_path):
    run = train(arm, 0, scale, home=home)
    history, evaluations = run.lines("history"), run.lines("evaluations")
    assert [line["step"] for line in history] == list(range(1, 13))
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    assert all(torch.isfinite(torch.tensor(line["grad_norm"])) for line in history)
    norms = [line["update_norm"] for line in history]
    assert norms[-1] > 0 or all(line["skipped"] for line in history)
    assert (history[0]["accuracy"] is None) == (arm in ("sft", "sft_matched"))
    again = train(arm, 0, scale, home=copy_of(home, tmp_path / "again"))
    assert last_weights(run) == last_weights(again)
    other = train(arm, 1, scale, home=home)
    assert last_weights(run) != last_weights(other) or arm == "rlvr"


class Killed(Exception):
    """Stands for a kill: nothing in opdlab catches it."""


@pytest.mark.parametrize(("arm", "seconds"), [("opd", 0.0), ("sft_matched", 0.0), ("opd", 1e9)])
def test_a_killed_run_resumes_bit_for_bit(arm, seconds, scale, home, tmp_path, monkeypatch):
    """With a checkpoint after every step, and with none at all: then it starts anew."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)
    whole = train(arm, 0, scale, home=home)
    killed = copy_of(home, tmp_path / "killed")

    for after in (3, 4):
        count = 0

        def kill(steps, after=after):
            nonlocal count
            count += steps > 0
            if count == after:
                raise Killed

        with pytest.raises(Killed):
            train(arm, 0, scale, home=killed, on_steps=kill)
    run = train(arm, 0, scale, home=killed)
    assert last_weights(run) == last_weights(whole)
    clean = [{k: v for k, v in line.items() if k != "seconds"} for line in run.lines("history")]
    assert clean == [{k: v for k, v in line.items() if k != "seconds"} for line in whole.lines("history")]
    assert run.lines("evaluations") == whole.lines("evaluations")
    assert not (run.folder / "checkpoint.safetensors").exists()


def test_a_process_killed_at_any_moment_resumes_bit_for_bit(home, tmp_path):
    """Kill -9 a real process at moments that it does not choose, until the run is done."""
    script = (
        "import sys; from dataclasses import replace; from pathlib import Path; from opdlab import training;"
        "from opdlab.runs import Home; from opdlab.scales import SMOKE; training.CHECKPOINT_SECONDS = 0.0;"
        "print('ready', flush=True);"
        "training.train('opd', 0, replace(SMOKE, evaluation_prompts=8), home=Home(Path(sys.argv[1])))"
    )
    from opdlab.scales import SMOKE

    scale = replace(SMOKE, evaluation_prompts=8)
    killed = copy_of(home, tmp_path / "killed")
    run, kills = Run.of(scale, "opd", 0, killed), 0
    for pause in (0.3, 0.6, 0.9, 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(killed.root)], stdout=subprocess.PIPE, env=os.environ
        )
        process.stdout.readline()
        deadline = time.monotonic() + pause
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1 and run.finished
    assert last_weights(run) == last_weights(train("opd", 0, scale, home=home))


def test_seeds_are_paired_across_arms(scale, home):
    on_policy, off_policy = learner(scale, "opd", home), learner(scale, "rlvr", home)
    batches = [arm.batch(3)[0] for arm in (on_policy, off_policy)]
    assert batches[0] == batches[1], "same seed and start: the same prompts and the same rollouts"


@pytest.mark.parametrize("name", SIGNALS)
def test_the_gradient_does_not_depend_on_the_split(name, scale, home):
    arm = {"cross_entropy": "sft_matched", "opd_sampled": "opd", "reverse_kl": "opd_full", "grpo": "rlvr"}[name]
    gradients = []
    for rows in (1, 5, 64):
        subject = learner(replace(scale, micro_batch=rows), arm, home)
        rollouts, rewards = subject.batch(0)
        if rewards is not None:
            rewards = torch.arange(float(len(rewards))) % 3
            subject.batch = lambda step, rollouts=rollouts, rewards=rewards: (rollouts, rewards)
        subject.recipe = replace(subject.recipe, clip=1e9)
        subject.step(0)
        gradients.append(torch.cat([weight.grad.flatten() for weight in subject.student.parameters()]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_rlvr_skips_a_batch_without_reward_variance(scale, home):
    subject = learner(scale, "rlvr", home)
    before = subject.state()["weight.model.norm.weight"].clone()
    rollouts, rewards = subject.batch(0)
    subject.batch = lambda step: (rollouts, torch.ones_like(rewards))
    assert subject.step(0)["skipped"]
    assert torch.equal(before, subject.state()["weight.model.norm.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_it(scale, home, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    calls = 0

    def poisoned(student, tokens, teacher, advantages):
        nonlocal calls
        calls += 1
        return student.sum(-1) * (float("nan") if calls > 3 else 1e-3)

    monkeypatch.setitem(SIGNALS, "reverse_kl", poisoned)
    killed = copy_of(home, tmp_path / "nan")
    with pytest.raises(OpdlabError, match="loss of arm 'opd_full' is nan at step 4: lower its learning rate"):
        train("opd_full", 0, scale, home=killed)
    run = Run.of(scale, "opd_full", 0, killed)
    assert len(run.lines("history")) == 3
    assert (run.folder / "checkpoint.safetensors").exists()
