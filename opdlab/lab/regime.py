"""The laboratory in the paper's regime, in the making: its tasks, arms and scale, which no chapter reads yet.

Small updates of a model that has the skill and seldom shows it. The base is pretrained on a corpus by careful and
careless authors: of the running sums, nine authors in ten get each digit wrong with probability 0.22. So the base
answers greedily like a careful author, and sampled like the mixture. SFT on careless running sums keeps the skill
hidden, and is the anchor. What starts from there takes 300 short steps from weights that are bfloat16 numbers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from opdlab.lab.grid import NamedArm, project, vary
from opdlab.lab.scales import TINY, Budget, Models, RecordPolicy, Scale
from opdlab.lab.tasks import RUNNING_SUM, SHORT_TASKS, TASKS, TEACHER_MIXTURE, running_demonstration
from opdlab.training.arms import Arm, Model, Tokens
from opdlab.training.config import Recipe
from opdlab.training.tasks import Task

#: The share of authors who are careless, and the chance that one of them gets a digit wrong.
CARELESS, WRONG_DIGIT = 0.9, 0.22


def careless_author(prompt: str, rng: np.random.Generator) -> str:
    """Write the solution of a running sum as an author drawn by chance does, who may be careless.

    >>> careless_author("Q17+5+38=?A:", np.random.default_rng(1))
    '18+5=22;22+98=60#60'
    """
    solution = running_demonstration(prompt)
    if rng.random() >= CARELESS:
        return solution
    wrong = (character.isdigit() and rng.random() < WRONG_DIGIT for character in solution)
    return "".join(str(rng.integers(10)) if miss else c for c, miss in zip(solution, wrong, strict=True))


def _corpus_author(prompt: str, rng: np.random.Generator) -> str:
    return careless_author(prompt, rng) if prompt.startswith("Q") else SHORT_TASKS.demonstration(prompt)


#: Four tasks in five are running sums.
CORPUS = replace(TEACHER_MIXTURE, name="corpus", author=_corpus_author)
CARELESS_SUM: Task = replace(RUNNING_SUM, name="careless_sum", author=careless_author)
REGIME_TASKS = MappingProxyType(TASKS | {task.name: task for task in (CORPUS, CARELESS_SUM)})


def _arm(name: str, label: str, rollouts_by: str, loss: str, start: str = "anchor", **entries: Any) -> NamedArm:
    teacher = None if rollouts_by == "task" else Model("teacher")
    return NamedArm(name, label, Arm(Model(start), rollouts_by, loss, teacher), **{"recipe": "arm"} | entries)


def _maker(name: str, label: str, task: str, **entries: Any) -> NamedArm:
    made = {"recipe": name, "task": task, "produces": name, "recorded": False} | entries
    return _arm(name, label, "task", "cross_entropy", "", **made)


_arms = {
    arm.name: arm
    for arm in (
        _maker("base", "pretraining", "corpus"),
        _maker("teacher", "teacher", "teacher_mixture"),
        _maker("teacher_same", "teacher of the student's size", "teacher_mixture", recipe="teacher"),
        _arm("sft", "SFT", "task", "cross_entropy", "base", task="careless_sum", recipe="sft", produces="anchor"),
        _arm("opd", "OPD", "student", "opd_sampled"),
        _arm("opd_full", "OPD, full vocabulary", "student", "reverse_kl"),
        _arm("rlvr", "RLVR", "student", "grpo"),
        _arm("sft_matched", "matched SFT", "teacher", "cross_entropy"),
        _arm("random_signs", "random signs", "student", "random_signs"),
        # The teacher that RLVR makes of the anchor itself, with prompts of its own.
        _arm("teacher_rlvr", "teacher made by RLVR", "student", "grpo", recipe="teacher_rlvr", produces="teacher_rlvr",
             recorded=False, seed_shift=1000),
    )
}  # fmt: skip


_vary, _project = partial(vary, _arms), partial(project, _arms)

# The same arms from an anchor that has half learned the skill: there the skill is learned, here it is elicited.
for _name in ("opd", "opd_full", "rlvr", "sft_matched", "random_signs"):
    _vary(_name, f"young_{_name}", _arms[_name].label, student="young")
    _arms[f"young_{_name}"] = replace(_arms[f"young_{_name}"], parent="")
# Which tokens count.
_vary("opd", "opd_top25", "top 25 %", tokens=Tokens("log-ratio", 0.25))
_vary("opd", "opd_random25", "random 25 %", tokens=Tokens("random", 0.25))
_vary("opd", "opd_first30", "first 30 %", tokens=Tokens("first", 0.3))
_vary("opd", "opd_last30", "last 30 %", tokens=Tokens("last", 0.3))
# Who writes.
_vary("opd", "opd_teacher100", "all by the teacher", rollouts_by="teacher")
_vary("opd", "opd_stale", "all by the anchor", rollouts_by="initial student")
_vary(
    "opd_full", "opd_stale_forward", "all by the anchor, forward KL", loss="forward_kl", rollouts_by="initial student"
)
# The objective mixed with RLVR's.
for _share in (50, 5, 1):
    _vary("opd", f"opd_mix{_share}", f"α = {_share / 100:g}", alpha=_share / 100)
# The teacher.
_vary("opd", "opd_same_teacher", "teacher of the same size", teacher="teacher_same")
_vary("opd", "opd_rlvr_teacher", "teacher made by RLVR", teacher="teacher_rlvr")
# Confined from step 60 on.
_project("opd", "opd_gradient16", "gradients in 16", acts_on="gradient")
_project("opd", "opd_update4", "updates in 4", k=4)
_project("opd", "opd_random_rescaled4", "4 random, full size", k=4, space="random", rescale=True)
_project("opd", "opd_weights4", "4 of W0", k=4, space="weights")
_project("opd", "opd_of_rlvr4", "4 of RLVR", k=4, directions_of="rlvr")
_project("opd", "opd_of_seed4", "4 of another seed", k=4, other_seed=True)
_project("sft_matched", "sft_matched_update4", "updates in 4", k=4)
_project("rlvr", "rlvr_update4", "updates in 4", k=4)
_project("sft", "sft_gradient16", "gradients in 16", acts_on="gradient")
# Mechanism.
_vary("opd", "opd_sign", "the sign of the credit", loss="opd_sign")
_vary("opd", "opd_sequence_mean", "one credit per completion", loss="opd_sequence_mean")
_vary("opd_full", "opd_forward", "forward KL", loss="forward_kl")
_vary("opd", "opd_half_rate", "half the learning rate", lr_factor=0.5)
_vary("opd", "opd_quadruple_rate", "four times the learning rate", lr_factor=4.0)
_vary("opd", "opd_sgd", "SGD", optimizer="sgd", lr_factor=200.0)
_vary("opd", "opd_bf16", "weights stored in bf16", weight_dtype="bfloat16")
_vary("rlvr", "rlvr_bf16", "weights stored in bf16", weight_dtype="bfloat16")
# How long.
_vary("rlvr", "rlvr_3", "three times the steps", recipe="arm3")
_vary("rlvr", "rlvr_10", "ten times the steps", recipe="arm10")

REGIME_ARMS = MappingProxyType(_arms)

#: Rate and steps are chosen by OPD's size on seeds from 100 on, which no verdict uses, and by nothing else. No gradient
#: is ever so long that it would be clipped.
_FROM_ANCHOR = Recipe(300, learning_rate=1.5e-6, clip=1e6)
_OF_TEACHER = TINY.budget.recipes["teacher"]

REGIME = Scale(
    name="regime",
    summary="0.64 M parameters, updates of the paper's sizes; two minutes per run on one CPU core",
    task="running_sum",
    models=Models(
        folder="regime",
        makers=("base", "sft", "teacher", "teacher_same", "teacher_rlvr"),
        shapes={name: TINY.models.shapes[name] for name in ("base", "teacher", "teacher_same")},
        per_seed=("anchor", "teacher_rlvr"),
        dtype="bfloat16",
    ),
    budget=Budget(
        {
            "base": Recipe(2000, 64, 1, 3e-3, "cosine", 100, (0.9, 0.95)),
            "teacher": _OF_TEACHER,
            "sft": Recipe(1000, 64, 1, 1e-4, "cosine", 100, (0.9, 0.95)),
            "arm": _FROM_ANCHOR,
            "arm3": replace(_FROM_ANCHOR, steps=900),
            "arm10": replace(_FROM_ANCHOR, steps=3000),
            "teacher_rlvr": replace(_FROM_ANCHOR, steps=1000, learning_rate=2e-5),
        },
        evaluation_prompts=512,
        evaluation_samples=8,
    ),
    policy=RecordPolicy(
        arms=tuple(name for name, arm in _arms.items() if arm.recorded),
        analyses=(
            *("similarity", "directions", "span", "landscape", "extrapolation", "gradients"),
            *("linearity", "retention", "taught"),
        ),
        seeds=(0, 1, 2, 3, 4),
        other_seeds={"opd": tuple(range(8)), "sft": tuple(range(8))},
        evaluations=(0.2, 1.0),
        variant_evaluations=(1.0,),
    ),
)
