"""The real model in the regime, in the making: SmolLM2-135M on the grid of bfloat16, which no chapter reads yet.

Its SFT is on a mixture of families of reasoning-gym in which the target task is rare, so that the anchor shows the
skill seldom. Passes are in bfloat16 on CPUs that have it, and the optimizer works on float32. One anchor serves all
seeds. All of it is meant to be made in a night by any two cores. For that, a step has 16 completions, random signs have
one seed, the confined arms go on for forty steps, 128 prompts are held out, and solutions are without blanks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from opdlab.lab.grid import ARMS, NamedArm
from opdlab.lab.scales import SMALL, Budget, RecordPolicy, Scale
from opdlab.lab.tasks import RightAnswer, after_equals, draw_question, expression_prompt, restated_demonstration, whole
from opdlab.training.config import Compute, Recipe
from opdlab.training.tasks import Task

#: The version of reasoning-gym that the tasks are drawn by, which is part of their identity.
REASONING_GYM = "0.1.25"


def running_sums(asked: str) -> str:
    """Write the solution of the target with its running sums, and without blanks, which cost a quarter of the tokens.

    >>> running_sums("What is 17 - 25 + 38?")
    '17-25=-8;-8+38=30'
    """
    return restated_demonstration(asked).replace(" ", "")


#: The target task, three numbers of two digits that are added and taken away.
THREE_TERMS = Task(
    "three_terms",
    partial(
        expression_prompt, name="chain_sum", pinned=REASONING_GYM, min_terms=3, max_terms=3, min_digits=2, max_digits=2
    ),
    running_sums,
    RightAnswer(after_equals, running_sums),
    content=REASONING_GYM,
)
#: One question in so many of the mixture is the target's.
RARE = 8


def _numbers(asked: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", asked.replace("- ", "-"))]


def _letters(asked: str) -> int:
    letter, text = re.findall('"(.*?)"', asked)
    return text.lower().count(letter)


class Family(NamedTuple):
    """A family of questions, answered without a word beside the answer."""

    begins: str  #: how its questions, and no others, begin
    answer: Callable[[str], Any]  #: to a question
    settings: dict[str, int]  #: of the dataset of reasoning-gym


#: The families of the mixture beside the target, by their names in reasoning-gym.
#:
#: :meta hide-value:
FAMILIES = MappingProxyType(
    {
        "chain_sum": Family("State", lambda asked: sum(_numbers(asked)), {"max_terms": 2, "max_digits": 2}),
        "products": Family("Solve", lambda asked: math.prod(_numbers(asked)), {"max_digits": 2}),
        "gcd": Family("Find the Greatest", lambda asked: math.gcd(*_numbers(asked)), {"max_value": 100}),
        "lcm": Family("Find the Least", lambda asked: math.lcm(*_numbers(asked)), {"max_value": 20}),
        "count_bits": Family("How many 1", lambda asked: _numbers(asked)[-1].bit_count(), {"max_n": 1000}),
        "letter_counting": Family("How many times", _letters, {"min_words": 2, "max_words": 6}),
        "spell_backward": Family("Spell", lambda asked: asked.split()[-1][::-1], {"max_word_len": 8}),
    }
)


def _mixed_question(rng: np.random.Generator) -> str:
    assert THREE_TERMS.draw, "it draws its questions"
    if rng.integers(RARE) == 0:
        return THREE_TERMS.draw(rng)
    name = list(FAMILIES)[rng.integers(len(FAMILIES))]
    return draw_question(rng, name, REASONING_GYM, **FAMILIES[name].settings)["question"] + "\n"


def _mixed_demonstration(asked: str) -> str:
    answers = (str(family.answer(asked)) for family in FAMILIES.values() if asked.startswith(family.begins))
    return next(answers, None) or running_sums(asked)


def _mixed_answer(asked: str, completion: str) -> str | None:
    return (after_equals if asked.startswith("What is") else whole)(asked, completion)


#: The task of SFT, which asks for the families, and rarely for the target.
RARELY_THREE_TERMS = Task(
    "rarely_three_terms", _mixed_question, _mixed_demonstration, RightAnswer(_mixed_answer, _mixed_demonstration),
    content=REASONING_GYM,
)  # fmt: skip
SMALL_REGIME_TASKS = MappingProxyType({task.name: task for task in (THREE_TERMS, RARELY_THREE_TERMS)})


def _confined(name: str) -> NamedArm:
    """Return an arm of the other laboratory that is confined, here in the second half of a shorter training."""
    named = ARMS[name]
    assert named.arm.projection, "it is confined"
    return replace(
        named, recipe="confined", arm=replace(named.arm, projection=replace(named.arm.projection, start=0.5))
    )


_FREE = ("opd", "rlvr", "sft_matched", "random_signs")
_arms = {
    "sft": ARMS["sft"],
    # SFT on nothing but the target.
    "teacher": replace(ARMS["sft"], name="teacher", label="teacher", recipe="teacher", produces="teacher",
                       recorded=False),
    **{name: ARMS[name] for name in _FREE},
    **{name: _confined(name) for name in ("opd_update4", "opd_random_rescaled4", "opd_of_rlvr4")},
}  # fmt: skip
SMALL_REGIME_ARMS = MappingProxyType(_arms)

#: As in the other laboratory, rate and steps are chosen by OPD's size on pilots, and no gradient is clipped. Frozen
#: before the first recorded run. Pilots of 40 steps with 16 completions each began at a KL to the teacher of 0.64 nats
#: a token. At 3e-5 it was 0.79 in the end if four questions were asked four times each, and 0.69 if sixteen were asked
#: once, for credits of single tokens are mostly noise. (With the full vocabulary it was 0.52.) At 2e-5 it was 0.59,
#: with a norm of 0.062 % and 84 % of the weights unchanged. A walk like this passes 0.15 % after 200 steps.
_FROM_ANCHOR = Recipe(200, prompts=16, samples=1, learning_rate=2e-5, clip=1e6)

SMALL_REGIME = Scale(
    name="small-regime",
    summary="SmolLM2-135M-Instruct, updates near the paper's sizes; one to two hours per run on a CPU core",
    task=THREE_TERMS.name,
    tasks={"sft": RARELY_THREE_TERMS.name},
    models=replace(SMALL.models, folder="small-regime", makers=("sft", "teacher"), dtype="bfloat16"),
    budget=Budget(
        {
            "sft": Recipe(1000, 8, 1, 1e-4, "cosine", 100, (0.9, 0.95)),
            "teacher": Recipe(1000, 8, 1, 3e-4, "cosine", 100, (0.9, 0.95)),
            "arm": _FROM_ANCHOR,
            "rlvr": replace(_FROM_ANCHOR, prompts=4, samples=4),  # which it compares with each other
            "confined": replace(_FROM_ANCHOR, steps=80),
        },
        max_new_tokens=24,
        typical_tokens=(15, 19),
        evaluation_prompts=128,
        evaluation_samples=4,
    ),
    policy=RecordPolicy(
        arms=tuple(name for name, arm in _arms.items() if arm.recorded),
        seeds=(0, 1, 2),
        other_seeds={"sft": (0,), "random_signs": (0,)},
        snapshots=(0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
        evaluations=(1.0,),
        # After two fifths it is compared with the arms that were confined halfway there.
        other_evaluations={"opd": (0.4, 1.0)},
        variant_snapshots=(0.5, 0.75, 1.0),
        variant_evaluations=(1.0,),
        trajectory_block="attention",
        keep_snapshots=False,
    ),
    # Logits of the tokens of completions only, which are few beside those of the mixture's questions.
    compute=Compute(dtype="bfloat16", cpu_dtype="bfloat16", tokens_at_once=4096),
)
