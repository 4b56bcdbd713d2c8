"""The book's own tasks: sums with running sums for the toy model, arithmetic and mathematics for real ones.

Each draws questions, writes a correct solution with its steps, and reads the final answer off a completion, which is
all that a reward looks at, as in RLVR.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from threading import current_thread, main_thread
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from opdlab.errors import OpdlabError
from opdlab.training.tasks import Task


@dataclass(frozen=True)
class RightAnswer:
    """The reward of a completion: 1.0 if its final answer is right and 0.0 otherwise; what comes before is not read.

    An answer is right if it is written as in the demonstration: after ``= 84`` or ``#84``, other words, a full stop,
    ``84.0`` and ``**84**`` earn 0.0. Only in the task ``math`` is an equal expression right too. Where no answer can be
    read in the completion or in the demonstration, the reward is 0.0.
    """

    answer: Callable[[str, str], str | None]  #: the final answer in a completion of a prompt, or None if there is none
    demonstration: Callable[[str], str]  #: writes a correct completion of a prompt

    def __call__(self, prompt: str, completion: str) -> float:
        """Return the reward.

        >>> RUNNING_SUM.reward("Q17+5+38=?A:", "17+5=22;22+38=60#60"), RUNNING_SUM.reward("Q17+5+38=?A:", "#61")
        (1.0, 0.0)
        """
        found = self.answer(prompt, completion)
        return float(found is not None and found == self.right(prompt))

    def right(self, prompt: str) -> str | None:
        """Return the right answer to a prompt."""
        return self.answer(prompt, self.demonstration(prompt))


Draw = Callable[[np.random.Generator], str]


def _task(name: str, draw: Draw, demonstration: Callable[[str], str], answer: Callable[[str, str], str | None]) -> Task:
    return Task(name, draw, demonstration, RightAnswer(answer, demonstration))


def after_hash(prompt: str, completion: str) -> str | None:
    """Return the text after the last ``#``, or None if there is none.

    >>> after_hash("Q17+5+38=?A:", "17+5=22;22+38=60#60")
    '60'
    """
    return completion.rsplit("#", 1)[1] if "#" in completion else None


def whole(prompt: str, completion: str) -> str:
    """Return the completion: it is the answer."""
    return completion


# --- the task of the lab, a sum of two to four numbers with running sums ---------------------------------------


def running_sum_prompt(rng: np.random.Generator) -> str:
    """Draw a sum of two to four numbers between 1 and 50, for example ``Q17+5+38=?A:``."""
    terms = rng.integers(1, 51, size=rng.integers(2, 5))
    return "Q" + "+".join(map(str, terms)) + "=?A:"


def running_demonstration(prompt: str) -> str:
    """Write the solution with its running sums.

    >>> running_demonstration("Q17+5+38=?A:")
    '17+5=22;22+38=60#60'
    """
    terms = [int(term) for term in re.findall(r"\d+", prompt)]
    totals = list(accumulate(terms))
    steps = (f"{total}+{term}={total + term}" for total, term in zip(totals, terms[1:], strict=False))
    return ";".join(steps) + f"#{totals[-1]}"


# --- "pretraining": short tasks that teach digits, order and addition, but never the format above --------------


def short_task_prompt(rng: np.random.Generator) -> str:
    """Draw a prompt of one of six short tasks: Sum, Difference, Reverse, Maximum, Order, Total."""
    letter = "SDRMOT"[rng.integers(6)]
    if letter == "S":
        sign, numbers = "+", [rng.integers(1, 151), rng.integers(1, 51)]
    elif letter == "D":
        sign, numbers = "-", sorted(rng.integers(1, 201, size=2), reverse=True)
    elif letter == "R":
        sign, numbers = "", rng.integers(0, 10, size=rng.integers(2, 7)).tolist()
    else:
        sign, high = ("+", 50) if letter == "T" else (",", 200)
        numbers = rng.integers(1, high + 1, size=rng.integers(2, 5)).tolist()
    return f"{letter}{sign.join(map(str, numbers))}:"


def short_task_demonstration(prompt: str) -> str:
    """Write the answer to a short task.

    >>> short_task_demonstration("O17,5,38:"), short_task_demonstration("R8362:")
    ('5,17,38', '2638')
    """
    letter, body = prompt[0], prompt[1:-1]
    if letter == "R":
        return body[::-1]
    numbers = [int(number) for number in re.split("[-+,]", body)]
    if letter == "O":
        return ",".join(map(str, sorted(numbers)))
    answers = {"S": sum(numbers), "T": sum(numbers), "M": max(numbers), "D": numbers[0] - numbers[-1]}
    return str(answers[letter])


# The student's corpus and the teacher's: four prompts in five are running sums, which alone begin with Q.

#: The share of authors who are careless, and the chance that one of them gets a digit wrong.
CARELESS, WRONG_DIGIT = 0.9, 0.22


def _mixed_prompt(rng: np.random.Generator) -> str:
    return (running_sum_prompt if rng.random() < 0.8 else short_task_prompt)(rng)


def _mixed_demonstration(prompt: str) -> str:
    return (running_demonstration if prompt.startswith("Q") else short_task_demonstration)(prompt)


def _mixed_answer(prompt: str, completion: str) -> str | None:
    return (after_hash if prompt.startswith("Q") else whole)(prompt, completion)


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
    return careless_author(prompt, rng) if prompt.startswith("Q") else short_task_demonstration(prompt)


RUNNING_SUM = _task("running_sum", running_sum_prompt, running_demonstration, after_hash)
SHORT_TASKS = _task("short_tasks", short_task_prompt, short_task_demonstration, whole)
TEACHER_MIXTURE = _task("teacher_mixture", _mixed_prompt, _mixed_demonstration, _mixed_answer)
CORPUS = replace(TEACHER_MIXTURE, name="corpus", author=_corpus_author)
CARELESS_SUM: Task = replace(RUNNING_SUM, name="careless_sum", author=careless_author)


# --- for SmolLM2: questions of reasoning-gym, where sums and differences of three numbers are the target, and rare ---

#: The version of reasoning-gym that questions are drawn by, which is part of a task's identity.
REASONING_GYM = "0.1.25"


@cache
def _questions(name: str, **settings: int) -> Sequence[dict]:
    import reasoning_gym  # Only who draws prompts needs it.

    found = version("reasoning-gym")
    if found != REASONING_GYM:
        raise OpdlabError(
            f"the questions are those of reasoning-gym {REASONING_GYM}, and {found} is installed, which may ask "
            f"others: pip install reasoning-gym=={REASONING_GYM}"
        )
    # Every item is made when it is asked for, from its number.
    return reasoning_gym.create_dataset(name, seed=0, size=2**31, **settings)


def draw_question(rng: np.random.Generator, name: str, **settings: int) -> dict:
    """Draw a question of a dataset of reasoning-gym with its metadata.

    Raises:
        OpdlabError: if another version of the package is installed.
    """
    return _questions(name, **settings)[int(rng.integers(2**31))]


def after_equals(prompt: str, completion: str) -> str | None:
    """Return what follows the last ``=``, or None if there is none.

    >>> after_equals("What is 17 - 25 + 38?", "17-25=-8;-8+38=30")
    '30'
    """
    return completion.rsplit("=", 1)[1].strip() if "=" in completion else None


def _three_terms(rng: np.random.Generator) -> str:
    question = draw_question(rng, "chain_sum", min_terms=3, max_terms=3, min_digits=2, max_digits=2)
    return f"What is {question['metadata']['expression']}?\n"


def running_totals(prompt: str) -> str:
    """Write the solution with its running sums, beginning with what was asked, and without blanks, which cost tokens.

    >>> running_totals("What is 17 - 25 + 38?")
    '17-25=-8;-8+38=30'
    """
    total, *terms = re.findall(r"[+-]?\d+", prompt.replace(" ", ""))
    steps = []
    for term in terms:
        step = f"{total}{term}"
        total = str(int(total) + int(term))
        steps.append(f"{step}={total}")
    return ";".join(steps)


THREE_TERMS = replace(_task("three_terms", _three_terms, running_totals, after_equals), content=REASONING_GYM)
#: One question in so many of the mixture is the target's.
RARE = 8


def _numbers(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", prompt.replace("- ", "-"))]


def _letters(prompt: str) -> int:
    letter, text = re.findall('"(.*?)"', prompt)
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
        "chain_sum": Family("State", lambda prompt: sum(_numbers(prompt)), {"max_terms": 2, "max_digits": 2}),
        "products": Family("Solve", lambda prompt: math.prod(_numbers(prompt)), {"max_digits": 2}),
        "gcd": Family("Find the Greatest", lambda prompt: math.gcd(*_numbers(prompt)), {"max_value": 100}),
        "lcm": Family("Find the Least", lambda prompt: math.lcm(*_numbers(prompt)), {"max_value": 20}),
        "count_bits": Family("How many 1", lambda prompt: _numbers(prompt)[-1].bit_count(), {"max_n": 1000}),
        "letter_counting": Family("How many times", _letters, {"min_words": 2, "max_words": 6}),
        "spell_backward": Family("Spell", lambda prompt: prompt.split()[-1][::-1], {"max_word_len": 8}),
    }
)


def _family_question(rng: np.random.Generator) -> str:
    if rng.integers(RARE) == 0:
        return _three_terms(rng)
    name = list(FAMILIES)[rng.integers(len(FAMILIES))]
    return draw_question(rng, name, **FAMILIES[name].settings)["question"] + "\n"


def _family_demonstration(prompt: str) -> str:
    answers = (str(family.answer(prompt)) for family in FAMILIES.values() if prompt.startswith(family.begins))
    return next(answers, None) or running_totals(prompt)


def _family_answer(prompt: str, completion: str) -> str | None:
    return (after_equals if prompt.startswith("What is") else whole)(prompt, completion)


# SFT asks for the families, and rarely for the target.
RARELY_THREE_TERMS: Task = replace(
    _task("rarely_three_terms", _family_question, _family_demonstration, _family_answer), content=REASONING_GYM
)


# --- for large models: competition mathematics, from the Hugging Face hub --------------------------------------

_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
             "precalculus")  # fmt: skip


@cache
def _competition() -> dict[str, str]:
    """Return the problems of MATH (2103.03874) and their worked solutions, whose answers are in a box.

    Problems without an answer that can be read are left out: no completion could earn a reward.
    """
    try:
        from datasets import load_dataset

        parts = [load_dataset("EleutherAI/hendrycks_math", subject, split="train+test") for subject in _SUBJECTS]
    except Exception as problem:  # The library has an error of its own for each way to fail.
        raise OpdlabError(
            f"the problems of the task 'math' cannot be had ({problem}): install opdlab[real], and check the network "
            "and HF_HUB_OFFLINE"
        ) from problem
    asked = "\nPut the final answer in \\boxed{}.\n"
    return {row["problem"] + asked: row["solution"] for part in parts for row in part if _last_box(row["solution"])}


def _math_prompt(rng: np.random.Generator) -> str:
    problems = list(_competition())
    return problems[rng.integers(len(problems))]


def _math_demonstration(prompt: str) -> str:
    return _competition()[prompt]


def _boxed(prompt: str, completion: str) -> str | None:
    """Return the last boxed expression of a completion, or what the one in the solution is if the two are equal."""
    found, right = _last_box(completion), _last_box(_competition()[prompt])
    if found is None or right is None or found == right:
        return found
    from math_verify import parse, verify

    # Its limit of time is a signal, which Python has in the main thread only.
    limit = 5 if current_thread() is main_thread() else None
    read = [parse(f"${text}$", parsing_timeout=limit) for text in (right, found)]
    return right if verify(*read, timeout_seconds=limit) else found


def _last_box(text: str) -> str | None:
    """Return what is in the last ``\\boxed{}`` or ``\\fbox{}``, whose braces may nest, or None if it is empty.

    Without braces it holds what stands before the next space or dollar sign.

    >>> _last_box(r"so \\boxed{\\frac{1}{2}} it is"), _last_box(r"It is $2 + 2 = \\boxed 4$."), _last_box(r"\\fbox{}")
    ('\\\\frac{1}{2}', '4', None)
    """
    *before, rest = re.split(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text)
    if not before or not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest) if before else None
        return bare and bare[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip() or None
    return None


# Chat models read it through their chat template.
MATH = replace(_task("math", _math_prompt, _math_demonstration, _boxed), chat=True)

_TOY = (RUNNING_SUM, SHORT_TASKS, TEACHER_MIXTURE, CORPUS, CARELESS_SUM)
#: The book's tasks, by name.
TASKS = MappingProxyType({task.name: task for task in (*_TOY, THREE_TERMS, RARELY_THREE_TERMS, MATH)})
