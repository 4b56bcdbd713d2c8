"""The real model: its tasks, and every arm of its scale for a few steps of a model that stands in for SmolLM2."""

import importlib.metadata
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import reasoning_gym
import torch

from opdlab.errors import OpdlabError
from opdlab.lab import tasks
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import load
from opdlab.lab.scales import SMALL
from opdlab.lab.scheduler import build, plan, provide_given
from opdlab.lab.tasks import FAMILIES, RARE, RARELY_THREE_TERMS, THREE_TERMS
from opdlab.models import fetch as fetching
from opdlab.models.fetch import default_folder
from opdlab.models.folders import load_model, load_tokenizer
from opdlab.processes import processor

# --- the tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_package(name):
    """Ours are computed from the text of the question, the package's from the numbers that it drew."""
    family = FAMILIES[name]
    questions = reasoning_gym.create_dataset(name, seed=5, size=300, **family.settings)
    for item in questions:
        asked = item["question"] + "\n"
        assert RARELY_THREE_TERMS.demonstration(asked) == item["answer"]
        assert RARELY_THREE_TERMS.reward(asked, item["answer"]) == 1
        assert [other.begins for other in FAMILIES.values() if asked.startswith(other.begins)] == [family.begins]
        assert not asked.startswith("What is"), "which only the target's questions do"


def test_the_target_is_worked_out_step_by_step():
    items = reasoning_gym.create_dataset("chain_sum", seed=5, size=200, min_terms=3, max_terms=3)
    for item in items:
        asked = f"What is {item['metadata']['expression']}?\n"
        written = THREE_TERMS.demonstration(asked)
        assert written.count(";") == 1 and written.endswith(f"={item['answer']}") and " " not in written
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in written.split(";")))
        assert THREE_TERMS.reward(asked, written) == RARELY_THREE_TERMS.reward(asked, written) == 1
        assert THREE_TERMS.reward(asked, written + "1") == 0
    terms = THREE_TERMS.draw(np.random.default_rng(0)).split()
    assert len([term for term in terms if term.strip("?").isdigit() and len(term.strip("?")) == 2]) == 3


def test_the_target_is_rare_and_no_sequence_is_long():
    random = np.random.default_rng(0)
    asked = RARELY_THREE_TERMS.prompts(3000, random)
    share = np.mean([question.startswith("What is") for question in asked])
    assert share == pytest.approx(1 / RARE, abs=3 * math.sqrt(1 / RARE / 3000))
    kinds = {
        family.begins: sum(question.startswith(family.begins) for question in asked) for family in FAMILIES.values()
    }
    assert min(kinds.values()) > 0.7 * 3000 / len(FAMILIES)
    if not default_folder("smollm2").is_dir():
        pytest.skip("SmolLM2's tokenizer is not on this machine: opdlab fetch smollm2")
    tokenizer = load_tokenizer(default_folder("smollm2"))
    texts = [a + b for a, b in zip(asked, RARELY_THREE_TERMS.demonstrations(asked, random), strict=True)]
    assert max(len(ids) + 1 for ids in tokenizer(texts).input_ids) <= 64
    solutions = [THREE_TERMS.demonstration(question) for question in THREE_TERMS.prompts(1000, random)]
    lengths = [len(ids) + 1 for ids in tokenizer(solutions).input_ids]
    assert max(lengths) < SMALL.budget.max_new_tokens
    assert np.mean(lengths) == pytest.approx(SMALL.budget.typical_tokens[1], abs=1)


def test_another_version_of_the_package_is_refused(monkeypatch):
    tasks._questions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "version", lambda name: "9.9")
        with pytest.raises(OpdlabError, match=r"reasoning-gym 0\.1\.25, and 9\.9 is installed.*pip install reas"):
            THREE_TERMS.draw(np.random.default_rng(0))
    assert importlib.metadata.version("reasoning-gym") == THREE_TERMS.content, "and so part of the digest"
    assert replace(THREE_TERMS, content="9.9").digest != THREE_TERMS.digest


# --- the scale --------------------------------------------------------------------------------------------------------


def test_the_confined_arms_branch_off_from_a_longer_run(tmp_path, pretrained):
    lab = Laboratory(SMALL, tmp_path)
    for name in ("base", "anchor", "teacher"):
        pretrained(lab.models / name)
    confined = [name for name in lab.scale.policy.arms if lab.arm(name).arm.projection]
    assert len(confined) == 3 and {lab.arm(name).parent for name in confined} == {"opd"}
    for name in confined:
        experiment = lab.experiment(name)
        assert (experiment.begin, experiment.recipe.steps) == (40, 80)
        # What it takes over is there, and so is what it is compared with.
        assert {step for step in experiment.kept if step <= 40} <= set(lab.experiment("opd").kept)
        assert experiment.recipe.steps in lab.experiment("opd").evaluations
    assert lab.branch_steps("opd") == {40} and lab.branch_steps("rlvr") == set()
    assert 40 in lab.kept_steps("opd") & lab.kept_steps("rlvr")
    assert lab.experiment("opd_of_rlvr4").config["projection"]["step"] == 40
    rescaled = {name: lab.arm(name).arm.projection.rescale for name in confined}
    assert rescaled == {"opd_update4": False, "opd_random_rescaled4": True, "opd_of_rlvr4": False}
    free = lab.recipe("opd")
    assert all(free.learning_rate_at(i) == lab.recipe("opd_update4").learning_rate_at(i) for i in range(80))
    assert {lab.recipe(arm).completions for arm in ("opd", "rlvr", "sft_matched", "random_signs")} == {16}


def shorter(lab, steps=6):
    """The laboratory with runs of six steps or so, on passes that any CPU makes."""
    budget, policy = lab.scale.budget, lab.scale.policy
    recipes = {name: replace(recipe, steps=steps, prompts=4, warmup=1) for name, recipe in budget.recipes.items()}
    recipes |= {name: replace(recipe, steps=4) for name, recipe in recipes.items() if name.startswith("opd_")}
    budget = replace(budget, recipes=recipes, evaluation_prompts=8, evaluation_samples=2)
    policy = replace(policy, snapshots=(1 / 6, 2 / 6, 4 / 6, 1.0), other_evaluations={"opd": (4 / 6, 1.0)})
    return replace(lab, scale=replace(lab.scale, budget=budget, policy=policy)).on_this_machine()


@pytest.fixture
def fetched(tmp_path, pretrained, monkeypatch):
    """The stand-in, among opdlab's caches as if it had been fetched."""
    monkeypatch.setenv("OPDLAB_CACHE", str(tmp_path / "cache"))
    pretrained(default_folder("smollm2"), context=256)
    (default_folder("smollm2") / "source.json").write_text('{"model": "smollm2", "source": "pypi"}')
    monkeypatch.setattr(fetching, "_there", lambda *about: {})


def test_the_base_lies_on_the_grid(tmp_path, fetched):
    lab = shorter(Laboratory(SMALL, tmp_path))
    provide_given(lab)
    assert not (lab.models / "base").is_symlink() and (lab.models / "base/source.json").is_file()
    rounded, whole = load_model(lab.models / "base"), load_model(default_folder("smollm2"))
    for one, other in zip(rounded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16().float())
        assert one.dim() == 1 or not torch.equal(one, other), "all but norms lay off the grid"
    shutil.rmtree(default_folder("smollm2"))
    provide_given(lab)  # What is there is not fetched again.


def test_every_arm_is_recorded(tmp_path, fetched):
    lab = shorter(Laboratory(SMALL, tmp_path))
    jobs = {job.name: job for job in plan(lab, lab.scale.policy.arms, (0,))}
    assert jobs["opd-seed0"].needs == ("anchor", "teacher") and jobs["sft-seed0"].produces == "anchor"
    assert set(plan(lab, ("opd",), (2,))[0].needs) == {"base"}, "one anchor serves all seeds"
    build(list(jobs.values()), lab, processes=2)
    records = load(lab, lab.scale.policy.arms, seeds=(0,))
    assert set(records.runs["arm"]) == set(lab.scale.policy.arms) and len(records.runs) == 8
    assert set(records.runs["processor"]) == {processor()}
    assert set(records.trajectory["block"]) == {"attention"}
    assert records.evaluations.groupby("arm")["step"].apply(list).to_dict() == {
        arm: [0, 4] if lab.arm(arm).parent else [0, 4, 6] if arm == "opd" else [0, 6] for arm in lab.scale.policy.arms
    }
    origin = load_model(lab.models / "anchor")
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in origin.parameters())
    # What another run began with is still there; of the rest, the ends.
    left = {
        arm: [step for step in range(7) if lab.run(arm).snapshot_path(step).exists()] for arm in lab.scale.policy.arms
    }
    assert left["opd"] == [0, 1, 2, 6] and left["rlvr"] == [0, 2, 6]
    assert left["opd_update4"] == [0, 4] and left["random_signs"] == [0, 6]
    assert not any(lab.runs.glob("*/states")), "none branches off any more"
    # The first steps were taken over from the free run, seconds and all.
    first = [lab.run(arm).lines("history")[:2] for arm in ("opd", "opd_update4")]
    assert first[0] == first[1]
