"""Passes in bfloat16 on a CPU: how near they are to float32, and what else of a run depends on them."""

import warnings
from dataclasses import replace

import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.lab import laboratory, scheduler
from opdlab.lab.records import add_run, find_tables, read_index
from opdlab.lab.scheduler import build
from opdlab.models.files import read_json, tensors_digest, write_json
from opdlab.processes import processor
from opdlab.training import config, loop
from opdlab.training.config import Compute
from opdlab.training.rollouts import Sampling, micro_batches
from opdlab.training.trainer import Trainer

EPS = torch.finfo(torch.bfloat16).eps
STEPS = 6


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    """What a CPU without bfloat16 computes is slow, and the same."""
    monkeypatch.setattr(config, "computes_in_bfloat16", lambda: True)


@pytest.fixture
def half(lab, copy_of, tmp_path):
    """A laboratory whose passes are in bfloat16."""
    return copy_of(replace(lab, scale=replace(lab.scale, compute=Compute(cpu_dtype="bfloat16"))), tmp_path / "half")


def gradient(subject):
    return torch.cat([weight.grad.flatten() for weight in subject.student.parameters()])


@pytest.mark.parametrize("arm", ["opd", "opd_full", "rlvr", "sft_matched", "sft"])
def test_loss_and_gradient_are_those_of_float32_but_for_rounding(arm, lab, half):
    subjects = [Trainer(each.experiment(arm)) for each in (lab, half)]
    rollouts, rewards = subjects[0].batch(0)
    rewards = None if rewards is None else torch.arange(float(len(rewards))) % 3
    losses, norms, gradients = [], [], []
    for subject in subjects:
        subject.recipe = replace(subject.recipe, clip=1e9)
        subject.batch = lambda step: (rollouts, rewards)
        line = subject.step(0)
        losses.append(line["entropy"] if arm in ("opd", "rlvr") else line["loss"])  # their losses are 0 by chance
        norms.append(line["grad_norm"])
        gradients.append(gradient(subject))
    assert losses[0] != losses[1], "one of them was in bfloat16"
    assert losses[1] == pytest.approx(losses[0], rel=4 * EPS)
    # An entry's error is some roundings of what is added up in it, and these partly cancel.
    assert (gradients[1] - gradients[0]).norm() < 16 * EPS * gradients[0].norm()
    assert gradients[1].dtype == torch.float32


def test_weights_and_moments_are_float32(half):
    subject = Trainer(half.experiment("opd"))
    subject.step(0)
    kept = subject.state()
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    weights = torch.cat([tensor.flatten() for name, tensor in kept.items() if name.startswith("weight")])
    assert (weights != weights.bfloat16()).double().mean() > 0.5, "off the grid, after a step that it could not hold"
    assert subject.teacher.dtype == torch.bfloat16


def test_who_writes_and_who_learns_mean_the_same_probabilities(half):
    """The log-probabilities of the tokens: while they are sampled, in training, in evaluations, and in float32."""
    subject = Trainer(half.experiment("opd"))
    for step in range(2):
        subject.step(step)
    rollouts, _ = subject.batch(2)
    [part] = micro_batches(rollouts, len(rollouts.completions), subject.device, torch.arange(16.0))
    order = part.advantages.long().tolist()

    def of_tokens(logits):
        return logits.float().log_softmax(-1).gather(-1, part.tokens[..., None])[..., 0].detach()

    with subject.precision():
        trained = of_tokens(part.logits(subject.student))
    exact = of_tokens(part.logits(subject.student))
    sampled = torch.zeros_like(trained)
    lengths = torch.tensor([len(completion) for completion in rollouts.completions])
    with torch.inference_mode():
        writing = Sampling(subject.in_dtype(subject.student), rollouts.prompts, rollouts.samples, int(lengths.max()))
        for t in range(int(lengths.max())):
            tokens = torch.tensor([rollouts.completions[i][t] for i in writing.alive.tolist()])
            found = writing.logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            for i, value in zip(writing.alive.tolist(), found.tolist(), strict=True):
                sampled[order.index(i), t] = value
            going = lengths[writing.alive] > t + 1
            if going.any():
                writing.read(tokens, going, t)

    def apart(one, other):
        return float((one - other)[part.mask].square().mean().sqrt())

    assert 0 < apart(trained, exact) < 4 * EPS
    assert apart(sampled, trained) < 2 * apart(trained, exact), "no further than rounding"
    # What an evaluation says of rollouts is what training says of them.
    found, (_, sums) = subject.distance_to_teacher(rollouts), subject.read(part, rollouts.tokens, torch.Generator())
    assert found["kl_teacher"] == pytest.approx(float(sums["kl"]) / rollouts.tokens, rel=1e-3)
    assert found["entropy"] == pytest.approx(float(sums["entropy"]) / rollouts.tokens, rel=1e-3)


class Killed(Exception):
    """Stands for a kill: nothing in opdlab catches it."""


def kill_after(count):
    left = [count]

    def kill(steps):
        left[0] -= steps > 0
        if not left[0]:
            raise Killed

    return kill


@pytest.mark.parametrize("arm", ["opd", "opd_update4"])
def test_a_killed_run_resumes_bit_for_bit(arm, half, copy_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole, killed = half.train(arm), copy_of(half, tmp_path / "killed")
    with pytest.raises(Killed):
        killed.train(arm, on_steps=kill_after(4))
    counts = []
    run = killed.train(arm, on_steps=counts.append)
    assert counts[0] > 0
    assert tensors_digest(run.snapshot(STEPS)) == tensors_digest(whole.snapshot(STEPS))
    assert run.lines("evaluations") == whole.lines("evaluations")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_passes_in_bfloat16_begin_anew_on_another_processor(dtype, lab, half, copy_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    moved = half if dtype == "bfloat16" else copy_of(lab, tmp_path / "moved")
    with pytest.raises(Killed):
        moved.train("opd", on_steps=kill_after(4))
    run, counts = moved.run("opd"), []
    machine = run.folder / "provenance.json"
    write_json(machine, read_json(machine) | {"processor": "another"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        moved.train("opd", on_steps=counts.append)
    sentences = [str(warning.message) for warning in said if "begins anew" in str(warning.message)]
    if dtype == "float32":
        assert counts[0] > 0 and not sentences
        return
    assert counts[0] == 0 and sum(counts) == STEPS
    assert sentences == [
        f"{run.folder.name} was begun on another, and passes in bfloat16 give other numbers on {processor()}: it "
        "begins anew"
    ]
    assert read_json(machine)["processor"] == processor()
    assert [line["step"] for line in run.lines("history")] == list(range(1, STEPS + 1))


def test_a_record_is_of_one_processor(half, monkeypatch):
    add_run(find_tables("opd", 0, half), half)
    assert read_index(half.records)["processor"].item() == processor()
    build([], half, processes=1)
    monkeypatch.setattr(scheduler, "processor", lambda: "another")
    refused = r"smoke was made on .* and passes in bfloat16 give other numbers on another"
    with pytest.raises(OpdlabError, match=refused):
        build([], half, processes=1)
    # Nor does a CPU without bfloat16, which trains in float32, add to it.
    monkeypatch.setattr(laboratory, "computes_in_bfloat16", lambda: False)
    there = half.on_this_machine()
    assert there.experiment("opd").compute.cpu_dtype == "float32"
    with pytest.raises(OpdlabError, match=refused):
        build([], there, processes=1)
    monkeypatch.setattr(laboratory, "computes_in_bfloat16", lambda: True)
    assert half.on_this_machine() is half


def test_a_cpu_without_bfloat16_is_told_so(half, monkeypatch):
    monkeypatch.setattr(config, "computes_in_bfloat16", lambda: False)
    with pytest.raises(OpdlabError, match=r"this CPU has no avx512_bf16: give float32, or another scale$"):
        half.train("opd")
    assert not half.run("opd").folder.exists()
    with pytest.raises(OpdlabError, match="avx512_bf16"):
        build([], half, processes=1)


def test_what_no_pass_computes_in_is_refused(lab):
    with pytest.raises(OpdlabError, match=r"^cpu_dtype is 'bf16': give float32 or bfloat16$"):
        config.with_fields(lab.experiment("opd"), {"cpu_dtype": "bf16"})


def test_the_passes_dtype_is_part_of_the_key_only_where_it_is_not_as_usual(lab, half):
    usual, other = lab.experiment("opd").config, half.experiment("opd").config
    assert other == usual | {"cpu_compute": "bfloat16"}
