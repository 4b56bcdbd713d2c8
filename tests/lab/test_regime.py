"""The laboratory in the regime: its authors, its models of each seed, and how each new kind of arm differs."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from opdlab.claims.regime import CLAIMS
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.regime import CARELESS_SUM, CORPUS, REGIME, REGIME_ARMS, REGIME_TASKS
from opdlab.lab.scheduler import plan
from opdlab.lab.tasks import RUNNING_SUM, running_demonstration
from opdlab.training.losses import token_ranking, token_weights
from opdlab.training.trainer import Trainer


@pytest.fixture
def regime(tmp_path):
    return Laboratory(REGIME, tmp_path, dict(REGIME_ARMS), dict(REGIME_TASKS))


def test_authors_are_mostly_careless_and_write_the_same_with_the_same_chance():
    random = np.random.default_rng(0)
    prompts = [RUNNING_SUM.draw(random) for _ in range(2000)]
    texts = CARELESS_SUM.demonstrations(prompts, np.random.default_rng(1))
    assert texts == CARELESS_SUM.demonstrations(prompts, np.random.default_rng(1))
    right = np.mean([text == running_demonstration(prompt) for prompt, text in zip(prompts, texts, strict=True)])
    # One author in ten is careful; the others get all of some ten digits right with probability 0.8 ** 10 or so.
    assert 0.1 < right < 0.35
    rewards = [CARELESS_SUM.reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert right < np.mean(rewards) < 0.85, "a wrong digit need not be one of the answer"
    share = np.mean([CORPUS.draw(random).startswith("Q") for _ in range(2000)])
    assert share == pytest.approx(0.8, abs=0.03)
    assert len({RUNNING_SUM.digest, CARELESS_SUM.digest, CORPUS.digest}) == 3


def test_each_seed_starts_from_its_own_anchor(regime):
    jobs = {job.name: job for job in plan(regime, ("opd", "opd_rlvr_teacher"), (0, 3))}
    assert jobs["opd-seed0"].needs[:1] == ("anchor",) and jobs["opd-seed3"].needs[:1] == ("anchor-3",)
    assert jobs["sft-seed3"].produces == "anchor-3" and jobs["sft-seed0"].produces == "anchor"
    assert jobs["opd_rlvr_teacher-seed3"].needs == ("anchor-3", "teacher_rlvr-3")
    assert regime.maker_of("teacher_rlvr-3")[0].name == "teacher_rlvr"
    teacher, arm = (replace(regime.arm(name)) for name in ("teacher_rlvr", "rlvr"))
    assert teacher.seed_shift and not arm.seed_shift, "never the run of the arm, gone on with"


def test_every_claim_is_about_arms_that_are_recorded():
    recorded = set(REGIME.policy.arms)
    looked_at = [contrast for claim in CLAIMS for contrast in claim.contrasts]
    assert {arm for looked in looked_at if not looked.metric.analysis for arm in looked.weights} <= recorded
    assert {looked.metric.analysis for looked in looked_at} - {""} <= set(REGIME.policy.analyses)
    assert len({claim.name for claim in CLAIMS}) == len({claim.digest for claim in CLAIMS}) == len(CLAIMS)


def test_first_and_last_tokens():
    tokens, mask = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[True] * 5 + [False]])
    first, last = (
        token_weights(token_ranking(ranking, torch.zeros(1, 6, 3), tokens), mask, 0.4) for ranking in ("first", "last")
    )
    assert first.tolist() == [[2.5, 2.5, 0, 0, 0, 0]] and last.tolist() == [[0, 0, 0, 2.5, 2.5, 0]]


def trainer(lab, name, **changes):
    return Trainer(replace(lab.experiment("opd", 0), arm=replace(lab.experiment("opd", 0).arm, **changes), name=name))


def test_random_signs_move_the_model_and_have_no_meaning(lab):
    signs, opd = trainer(lab, "signs", loss="random_signs"), trainer(lab, "opd")
    assert signs.batch(0)[0].completions == opd.batch(0)[0].completions, "the same prompts and rollouts"
    moved = [subject.step(0)["update_norm"] for subject in (signs, opd)]
    assert min(moved) > 0
    assert signs.step(1)["kl_teacher"] is None, "it reads no teacher"
    gradients = [torch.cat([w.grad.flatten() for w in subject.student.parameters()]) for subject in (signs, opd)]
    assert abs(float(torch.nn.functional.cosine_similarity(*gradients, dim=0))) < 0.2


def test_memory_moves_weights_without_a_gradient(lab):
    adam, sgd = trainer(lab, "adam"), trainer(lab, "sgd", optimizer="sgd")
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
