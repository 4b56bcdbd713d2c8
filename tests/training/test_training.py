import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers

from opdlab.errors import OpdlabError
from opdlab.lab.grid import PAPER
from opdlab.lab.scales import SMOKE
from opdlab.models.files import tensors_digest, write_json
from opdlab.training import loop
from opdlab.training.config import Compute, Recipe
from opdlab.training.losses import LOSSES
from opdlab.training.optimizers import make_optimizers
from opdlab.training.store import Run
from opdlab.training.trainer import Trainer

STEPS = SMOKE.budget.recipes["arm"].steps


def last_weights(run):
    return tensors_digest(run.snapshot(run.steps))


def trainer(lab, arm, **recipe):
    experiment = lab.experiment(arm)
    return Trainer(replace(experiment, recipe=replace(experiment.recipe, **recipe)))


@pytest.mark.parametrize("arm", PAPER)
def test_every_arm_trains_and_is_deterministic(arm, lab, copy_of, tmp_path):
    run = lab.train(arm)
    history, evaluations = run.lines("history"), run.lines("evaluations")
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluations] == [0, STEPS // 2, STEPS]
    assert all(torch.isfinite(torch.tensor(line["grad_norm"])) for line in history)
    norms = [line["update_norm"] for line in history]
    assert norms[-1] > 0 or all(line["skipped"] for line in history)
    assert (history[0]["accuracy"] is None) == (arm in ("sft", "sft_matched"))
    again = copy_of(lab, tmp_path / "again").train(arm)
    assert last_weights(run) == last_weights(again)
    other = lab.train(arm, 1)
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
    "opd_gradient16",
    "opd_of_seed4",
    "opd_top1",
)


@pytest.mark.parametrize(("arm", "seconds"), [*((arm, 0.0) for arm in RESUMED), ("opd", 1e9)])
def test_a_killed_run_resumes_bit_for_bit(arm, seconds, lab, copy_of, tmp_path, monkeypatch):
    """With a checkpoint after every step, and with none at all: then it starts anew."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", seconds)
    whole = lab.train(arm)
    killed = copy_of(lab, tmp_path / "killed")

    for after in (3, 4):
        count = 0

        def kill(steps, after=after):
            nonlocal count
            count += steps > 0
            if count == after:
                raise Killed

        with pytest.raises(Killed):
            killed.train(arm, on_steps=kill)
    run = killed.train(arm)
    assert last_weights(run) == last_weights(whole)
    clean = [{k: v for k, v in line.items() if k != "seconds"} for line in run.lines("history")]
    assert clean == [{k: v for k, v in line.items() if k != "seconds"} for line in whole.lines("history")]
    assert run.lines("evaluations") == whole.lines("evaluations")
    assert not run.checkpoint.exists()


def test_a_process_killed_at_any_moment_resumes_bit_for_bit(lab, copy_of, tmp_path):
    """Kill -9 a real process at moments that it does not choose, until the run is done."""
    script = (
        "import pickle, sys; from opdlab.training import loop; loop.CHECKPOINT_SECONDS = 0.0;"
        "lab = pickle.load(open(sys.argv[1], 'rb')); print('ready', flush=True); lab.train('opd')"
    )
    killed = copy_of(lab, tmp_path / "killed")
    (tmp_path / "lab.pickle").write_bytes(pickle.dumps(killed))
    run, kills = killed.run("opd"), 0
    for pause in (0.3, 0.6, 0.9, 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "lab.pickle")], stdout=subprocess.PIPE, env=os.environ
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
    assert last_weights(run) == last_weights(lab.train("opd"))


def test_seeds_are_paired_across_arms(lab):
    on_policy, off_policy = trainer(lab, "opd"), trainer(lab, "rlvr")
    batches = [arm.batch(3)[0] for arm in (on_policy, off_policy)]
    assert batches[0] == batches[1], "same seed and start: the same prompts and the same rollouts"


ARM_OF = {"cross_entropy": "sft_matched", "opd_sampled": "opd", "reverse_kl": "opd_full", "grpo": "rlvr"}
ARM_OF |= {"opd_sequence_mean": "opd_sequence_mean", "opd_sign": "opd_sign", "forward_kl": "opd_forward"}


@pytest.mark.parametrize("name", sorted(ARM_OF))  # random signs are drawn part by part
def test_the_gradient_does_not_depend_on_the_split(name, lab):
    arm, gradients = ARM_OF[name], []
    for rows in (1, 5, 64):
        split = replace(lab, scale=replace(lab.scale, compute=Compute(micro_batch=rows)))
        subject = trainer(split, arm, clip=1e9)
        rollouts, rewards = subject.batch(0)
        if rewards is not None:
            rewards = torch.arange(float(len(rewards))) % 3
            subject.batch = lambda step, rollouts=rollouts, rewards=rewards: (rollouts, rewards)
        subject.step(0)
        gradients.append(torch.cat([weight.grad.flatten() for weight in subject.student.parameters()]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_rlvr_skips_a_batch_without_reward_variance(lab):
    subject = trainer(lab, "rlvr")
    before = subject.state()["weight.model.norm.weight"].clone()
    rollouts, rewards = subject.batch(0)
    subject.batch = lambda step: (rollouts, torch.ones_like(rewards))
    assert subject.step(0)["skipped"]
    assert torch.equal(before, subject.state()["weight.model.norm.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_it(lab, copy_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    calls = 0

    def poisoned(student, tokens, teacher, advantages, mask):
        nonlocal calls
        calls += 1
        return student.sum(-1) * (float("nan") if calls > 3 else 1e-3)

    monkeypatch.setitem(LOSSES, "reverse_kl", poisoned)
    killed = copy_of(lab, tmp_path / "nan")
    with pytest.raises(OpdlabError, match="loss of 'opd_full' is nan at step 4: lower its learning rate"):
        killed.train("opd_full")
    run = killed.run("opd_full")
    assert len(run.lines("history")) == 3
    assert run.checkpoint.exists()


@pytest.mark.parametrize(
    ("part", "said"),
    [("student", "entropy of the student's logits"), ("teacher", "divergence from the teacher's logits")],
)
def test_logits_that_are_not_finite_are_named(part, said, lab):
    subject = trainer(lab, "opd")
    batch = subject.batch(0)
    subject.batch = lambda step: batch
    getattr(subject, part).get_output_embeddings().register_forward_hook(lambda layer, given, out: out - torch.inf)
    with pytest.raises(OpdlabError, match=f"^the {said} of 'opd' is nan at step 1"):
        subject.step(0)


def test_a_run_whose_last_weights_are_not_finite_is_not_finished(lab, copy_of, tmp_path, monkeypatch):
    own = copy_of(lab, tmp_path / "own")
    monkeypatch.setattr(Trainer, "_update", lambda self, step: next(self.student.parameters()).data.fill_(torch.nan))
    once = lambda experiment: replace(experiment, recipe=replace(experiment.recipe, steps=1), snapshots=(1,))  # noqa: E731
    with pytest.raises(
        OpdlabError, match=r"^the norm of the update of 'opd' is nan at step 1: lower its learning rate"
    ):
        own.train("opd", change=once)
    run = Run(once(own.experiment("opd")), own.runs)
    assert not run.finished and not run.snapshot_path(1).exists() and not run.lines("history")


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan"), float("inf"), 1e38, "fast"])
def test_a_learning_rate_that_is_none(rate):
    with pytest.raises(OpdlabError, match=r"^learning_rate is .*: give a number above 0 and up to 1e\+30$"):
        Recipe(10, learning_rate=rate)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(temperature, lab):
    with pytest.raises(OpdlabError, match=r"^temperature is .*: give a number above 0$"):
        replace(lab.experiment("opd"), temperature=temperature)


@pytest.mark.parametrize("arm", ["opd", "opd_full", "rlvr", "sft_matched", "sft"])
def test_losses_are_at_the_temperature_of_the_rollouts(arm, lab):
    """As if the logits of both had been scaled; demonstrations were sampled at none."""
    gradients = []
    for temperature, scale in ((0.7, 1.0), (1.0, 1 / 0.7)):
        experiment = lab.experiment(arm)
        subject = Trainer(replace(experiment, temperature=temperature, recipe=replace(experiment.recipe, clip=1e9)))
        for model in (subject.student, subject.teacher):
            if model is not None and (subject.writer is not None or temperature == 1):
                factor = scale if subject.writer is not None else 1.0
                model.get_output_embeddings().register_forward_hook(lambda layer, given, out, by=factor: out * by)
        rollouts, rewards = subject.batch(0)
        rewards = None if rewards is None else torch.arange(float(len(rewards))) % 3
        subject.batch = lambda step, batch=(rollouts, rewards): batch
        subject.step(0)
        gradients.append((rollouts, gradient(subject)))
    assert gradients[0][0] == gradients[1][0], "the same rollouts"
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-7)


def test_dropout_has_no_part_in_any_pass(lab, tmp_path):
    """A model recomputes in training mode only, where its configuration may ask for dropout."""
    gradients = []
    for name, share, recompute in (("none", 0.0, False), ("off", 0.5, False), ("recomputed", 0.5, True)):
        shutil.copytree(lab.models / "anchor", tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": share}))
        experiment = lab.experiment("opd_full")
        arm = replace(experiment.arm, student=replace(experiment.arm.student, folder=str(tmp_path / name)))
        subject = Trainer(replace(experiment, arm=arm, compute=replace(experiment.compute, recompute=recompute)))
        subject.step(0)
        gradients.append(gradient(subject))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_what_decays_is_what_transformers_decays(optimizer, lab):
    subject = trainer(lab, "opd", weight_decay=0.1)
    made = make_optimizers(subject.student, subject.recipe, optimizer)
    decays = {w: group["weight_decay"] for one in made for group in one.param_groups for w in group["params"]}
    args = transformers.TrainingArguments(report_to=[], use_cpu=True, weight_decay=0.1)
    theirs = transformers.Trainer(subject.student, args=args).create_optimizer()
    expected = {w: group["weight_decay"] for group in theirs.param_groups for w in group["params"]}
    assert decays == expected and {0.0, 0.1} == set(decays.values())


def gradient(subject):
    return torch.cat([weight.grad.flatten() for weight in subject.student.parameters()])


def test_a_mixture_is_the_sum_of_its_gradients(lab):
    found = {}
    for arm in ("opd", "rlvr", "opd_mix25"):
        subject = trainer(lab, arm, clip=1e9)
        rollouts, rewards = subject.batch(0)
        rewards = torch.arange(float(len(rewards))) % 3
        subject.batch = lambda step, rollouts=rollouts, rewards=rewards: (rollouts, rewards)
        line = subject.step(0)
        found[arm] = gradient(subject)
    opd, rlvr = found["opd"], found["rlvr"]
    torch.testing.assert_close(found["opd_mix25"], 0.25 * opd + 0.75 * rlvr, rtol=1e-4, atol=1e-6)
    assert line["grad_norm_opd_sampled"] == pytest.approx(float(opd.norm()), rel=1e-4)
    assert line["grad_norm_grpo"] == pytest.approx(float(rlvr.norm()), rel=1e-4)
    assert line["grad_cosine"] == pytest.approx(float(opd @ rlvr / opd.norm() / rlvr.norm()), abs=1e-4)


@pytest.mark.parametrize("arm", ["opd_gradient16", "opd_of_seed4", "rlvr_update4"])
def test_a_projected_run_branches_off_from_its_free_run_if_that_is_there(arm, lab, copy_of, tmp_path):
    alone, beside, counts = copy_of(lab, tmp_path / "alone"), copy_of(lab, tmp_path / "beside"), []
    beside.train(lab.arm(arm).parent)
    begin = beside.train(arm, on_steps=counts.append).experiment.begin
    assert counts[0] == begin and sum(counts) == STEPS
    runs = [at.train(arm) for at in (alone, beside)]
    assert last_weights(runs[0]) == last_weights(runs[1])
    assert runs[0].lines("evaluations") == runs[1].lines("evaluations")
    history = [[line | {"seconds": 0} for line in run.lines("history")] for run in runs]
    assert history[0] == history[1]
    # Another machine's free run is not the same bit for bit, so it is not taken over.
    elsewhere = copy_of(lab, tmp_path / "elsewhere")
    free = elsewhere.train(lab.arm(arm).parent)
    write_json(free.folder / "provenance.json", {"processor": "another"})
    counts.clear()
    elsewhere.train(arm, on_steps=counts.append)
    assert counts[0] == 0


@pytest.mark.parametrize("arm", ["opd_update2", "opd_rescaled4", "opd_gradient16"])
def test_a_projected_run_is_like_its_parent_until_it_begins(arm, lab):
    run, parent = lab.train(arm), lab.train("opd")
    begin = run.experiment.begin
    before, theirs = run.snapshot(begin), parent.snapshot(begin)
    assert all(torch.equal(before[name], theirs[name]) for name in before)
    after = run.snapshot(STEPS)
    for name, weight in before.items():
        step = (after[name] - weight).double()
        if "self_attn.q_proj" in name and lab.arm(arm).arm.projection.acts_on == "update":
            values = torch.linalg.svdvals(step)
            assert values[lab.arm(arm).arm.projection.k] < 1e-3 * values[0]


def test_who_writes(lab):
    texts = {}
    for arm in ("opd", "opd_teacher100", "opd_stale"):
        rollouts, rewards = trainer(lab, arm).batch(0)
        texts[arm] = rollouts.completions
        assert (rewards is None) == ("teacher" in arm) and len(rollouts.completions) == 16
    assert texts["opd_stale"] == texts["opd"], "before the first step the student is the anchor"
    assert texts["opd_teacher100"] != texts["opd"]


def test_weights_can_be_stored_in_bfloat16(lab):
    weights = lab.train("opd_bf16").snapshot(STEPS)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


def test_random_signs_move_the_model_and_have_no_meaning(lab):
    signs, opd = trainer(lab, "random_signs"), trainer(lab, "opd")
    assert signs.batch(0)[0].completions == opd.batch(0)[0].completions, "the same prompts and rollouts"
    moved = [subject.step(0)["update_norm"] for subject in (signs, opd)]
    assert min(moved) > 0
    assert signs.step(1)["kl_teacher"] is None, "it reads no teacher"
    gradients = [gradient(subject) for subject in (signs, opd)]
    assert abs(float(torch.nn.functional.cosine_similarity(*gradients, dim=0))) < 0.2


def test_memory_moves_weights_without_a_gradient(lab):
    adam, sgd = trainer(lab, "opd"), trainer(lab, "opd_sgd")
    for subject in (adam, sgd):
        subject.step(0)
        before = copy.deepcopy(subject.state())
        change = subject.memory_change()
        assert all(torch.equal(tensor, before[name]) for name, tensor in subject.state().items()), "nothing is touched"
        assert (change > 0) == (subject is adam), "SGD without momentum has no memory"


def test_accuracy_over_several_samples(lab):
    one, several = (Trainer(replace(lab.experiment("opd", 0), evaluation_samples=count)) for count in (1, 3))
    assert one.experiment.key != several.experiment.key
    assert one.experiment.key == lab.experiment("opd", 0).key, "one sample is as usual: older records stay valid"
    prompts = several.held_out(4)
    assert len(several.answer(several.student, prompts, 1.0, 3).completions) == 12
    assert {**several.evaluate(1)}.keys() == {**one.evaluate(1)}.keys()
