import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.lab.grid import ARMS, PAPER
from opdlab.lab.records import tensors_digest
from opdlab.lab.scales import SMOKE
from opdlab.lab.tasks import TASKS
from opdlab.models.files import write_json
from opdlab.training import loop as training
from opdlab.training.loop import train
from opdlab.training.losses import LOSSES
from opdlab.training.store import Home, Run
from opdlab.training.trainer import Learner

STEPS = SMOKE.recipe("opd").steps


def last_weights(run):
    return tensors_digest(run.snapshot_path(run.config["recipe"]["steps"]))


def copy_of(home, folder):
    """Return a new home with the same models and no runs."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "models").symlink_to(home.root / "data" / "models")
    return Home(folder)


def learner(scale, arm, home):
    return Learner(scale, ARMS[arm], scale.recipe(arm), TASKS[scale.task], home.models(scale), 0)


@pytest.mark.parametrize("arm", PAPER)
def test_every_arm_trains_and_is_deterministic(arm, scale, home, tmp_path):
    run = train(arm, 0, scale, home=home)
    history, evaluations = run.lines("history"), run.lines("evaluations")
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluations] == [0, STEPS // 2, STEPS]
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


RESUMED = (
    "opd",
    "sft_matched",
    "opd_muon",
    "opd_sgd",
    "opd_bf16",
    "opd_mix50",
    "opd_reset16",
    "opd_of_seed4",
    "opd_top1",
)


@pytest.mark.parametrize(("arm", "seconds"), [*((arm, 0.0) for arm in RESUMED), ("opd", 1e9)])
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
        "import sys; from dataclasses import replace; from pathlib import Path;"
        "from opdlab.lab.scales import SMOKE; from opdlab.training import loop as training;"
        "from opdlab.training.store import Home; training.CHECKPOINT_SECONDS = 0.0;"
        "print('ready', flush=True);"
        "training.train('opd', 0, replace(SMOKE, evaluation_prompts=8), home=Home(Path(sys.argv[1])))"
    )
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


ARM_OF = {"cross_entropy": "sft_matched", "opd_sampled": "opd", "reverse_kl": "opd_full", "grpo": "rlvr"}
ARM_OF |= {"opd_sequence_mean": "opd_sequence_mean", "opd_sign": "opd_sign", "forward_kl": "opd_forward"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_does_not_depend_on_the_split(name, scale, home):
    arm, gradients = ARM_OF[name], []
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

    def poisoned(student, tokens, teacher, advantages, mask):
        nonlocal calls
        calls += 1
        return student.sum(-1) * (float("nan") if calls > 3 else 1e-3)

    monkeypatch.setitem(LOSSES, "reverse_kl", poisoned)
    killed = copy_of(home, tmp_path / "nan")
    with pytest.raises(OpdlabError, match="loss of arm 'opd_full' is nan at step 4: lower its learning rate"):
        train("opd_full", 0, scale, home=killed)
    run = Run.of(scale, "opd_full", 0, killed)
    assert len(run.lines("history")) == 3
    assert (run.folder / "checkpoint.safetensors").exists()


def gradient(subject):
    return torch.cat([weight.grad.flatten() for weight in subject.student.parameters()])


def test_a_mixture_is_the_sum_of_its_gradients(scale, home):
    found = {}
    for arm in ("opd_short", "rlvr_short", "opd_mix25", "opd_balanced25"):
        subject = learner(scale, arm, home)
        rollouts, rewards = subject.batch(0)
        rewards = torch.arange(float(len(rewards))) % 3
        subject.batch = lambda step, rollouts=rollouts, rewards=rewards: (rollouts, rewards)
        subject.recipe = replace(subject.recipe, clip=1e9)
        line = subject.step(0)
        found[arm] = gradient(subject)
    opd, rlvr = found["opd_short"], found["rlvr_short"]
    torch.testing.assert_close(found["opd_mix25"], 0.25 * opd + 0.75 * rlvr, rtol=1e-4, atol=1e-6)
    balanced = 0.25 * opd + 0.75 * rlvr * opd.norm() / rlvr.norm()
    torch.testing.assert_close(found["opd_balanced25"], balanced, rtol=1e-4, atol=1e-6)
    assert line["grad_norm_opd_sampled"] == pytest.approx(float(opd.norm()), rel=1e-4)
    assert line["grad_norm_grpo"] == pytest.approx(float(rlvr.norm()), rel=1e-4)
    assert line["grad_cosine"] == pytest.approx(float(opd @ rlvr / opd.norm() / rlvr.norm()), abs=1e-4)


@pytest.mark.parametrize("arm", ["opd_reset16", "opd_of_seed4", "rlvr_update4"])
def test_a_confined_run_goes_on_from_its_free_run_if_that_is_there(arm, scale, home, tmp_path):
    alone, beside, counts = copy_of(home, tmp_path / "alone"), copy_of(home, tmp_path / "beside"), []
    train(ARMS[arm].like, 0, scale, home=beside)
    begin = train(arm, 0, scale, home=beside, on_steps=counts.append).config["constraint"]["begin"]
    assert counts[0] == begin and sum(counts) == STEPS
    runs = [train(arm, 0, scale, home=at) for at in (alone, beside)]
    assert last_weights(runs[0]) == last_weights(runs[1])
    assert runs[0].lines("evaluations") == runs[1].lines("evaluations")
    history = [[line | {"seconds": 0} for line in run.lines("history")] for run in runs]
    assert history[0] == history[1]
    # Another machine's free run is not the same bit for bit, so it is not taken over.
    elsewhere = copy_of(home, tmp_path / "elsewhere")
    free = train(ARMS[arm].like, 0, scale, home=elsewhere)
    write_json(free.folder / "provenance.json", {"processor": "another"})
    counts.clear()
    train(arm, 0, scale, home=elsewhere, on_steps=counts.append)
    assert counts[0] == 0


@pytest.mark.parametrize("arm", ["opd_update2", "opd_rescaled4", "opd_gradient16", "opd_entries", "opd_attention16"])
def test_a_confined_run_is_like_its_parent_until_it_begins(arm, scale, home):
    run, parent = train(arm, 0, scale, home=home), train("opd_short", 0, scale, home=home)
    begin = run.config["constraint"]["begin"]
    before, theirs = run.snapshot(begin), parent.snapshot(begin)
    assert all(torch.equal(before[name], theirs[name]) for name in before)
    after = run.snapshot(STEPS)
    for name, weight in before.items():
        step = (after[name] - weight).double()
        if "self_attn.q_proj" in name and ARMS[arm].constraint.acts_on == "update":
            values = torch.linalg.svdvals(step)
            if arm == "opd_entries":
                assert 0 < (step != 0).double().mean() <= 1 / 8 + 1e-3
            else:
                assert values[ARMS[arm].constraint.k] < 1e-3 * values[0]


def test_who_writes(scale, home):
    texts = {}
    for arm in ("opd_short", "opd_teacher50", "opd_teacher100", "opd_stale"):
        rollouts, rewards = learner(scale, arm, home).batch(0)
        texts[arm] = rollouts.completions
        assert (rewards is None) == ("teacher" in arm) and len(rollouts.completions) == 16
    assert texts["opd_stale"] == texts["opd_short"], "before the first step the student is the anchor"
    assert texts["opd_teacher50"][:8] == texts["opd_teacher100"][:8] != texts["opd_short"][:8]


def test_weights_can_be_stored_in_bfloat16(scale, home):
    weights = train("opd_bf16", 0, scale, home=home).snapshot(STEPS)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
