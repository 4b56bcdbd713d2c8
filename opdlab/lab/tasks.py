"""Tasks with a verifiable answer: where prompts come from, how a solution is written, what earns a reward.

A task is three functions on strings. ``prompt`` draws one question, ``demonstration`` writes a correct solution with
its intermediate steps, and ``answer`` reads the final answer off a completion, which is all that a reward looks at, as
in RLVR. No text holds the end of the sequence: that is a token, which differs from model to model
(:func:`opdlab.training.trainer.score`).
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from opdlab.errors import OpdlabError

# One prompt in eight is kept for evaluation, by a hash of its text: the two sets cannot overlap, whatever the seed.
EVALUATION_SHARE = 8


def is_evaluation(prompt: str) -> bool:
    """Tell whether ``prompt`` belongs to the evaluation set; the rest is for training.

    >>> [is_evaluation(f"Q1+{n}=?A:") for n in (1, 2, 3)]
    [False, False, False]
    """
    return hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % EVALUATION_SHARE == 0


@dataclass(frozen=True)
class Task:
    """A named task; :data:`RUNNING_SUM` is the one of the lab, and a running difference its second.

    Attributes:
        name: the name in code and records.
        prompt: draws a prompt.
        demonstration: writes a correct completion of a prompt.
        answer: returns the final answer in a completion of a prompt, or None if there is none.
    """

    name: str
    prompt: Callable[[np.random.Generator], str]
    demonstration: Callable[[str], str]
    answer: Callable[[str, str], str | None]

    def reward(self, prompt: str, completion: str) -> float:
        """Return 1.0 if the final answer is right and 0.0 otherwise; what comes before it is not looked at.

        >>> RUNNING_SUM.reward("Q17+5+38=?A:", "17+5=22;22+38=60#60"), RUNNING_SUM.reward("Q17+5+38=?A:", "#61")
        (1.0, 0.0)
        """
        return float(self.answer(prompt, completion) == self.answer(prompt, self.demonstration(prompt)))

    def constant_accuracy(self, prompts: Sequence[str]) -> float:
        """Return the accuracy of the one answer that is right most often, whatever the prompt: what a gain must beat.

        >>> RUNNING_SUM.constant_accuracy(["Q1+2=?A:", "Q2+1=?A:", "Q2+2=?A:", "Q3+4=?A:"])
        0.5
        """
        answers = Counter(self.answer(prompt, self.demonstration(prompt)) for prompt in prompts)
        return max(answers.values()) / len(prompts)

    def prompts(self, count: int, rng: np.random.Generator, evaluation: bool = False) -> list[str]:
        """Draw ``count`` prompts of the training set, or ``count`` different ones of the evaluation set.

        Raises:
            OpdlabError: if the evaluation set is too small for ``count`` different prompts.
        """
        drawn: list[str] = []
        seen: set[str] = set()
        for _ in range(1000 * count):
            prompt = self.prompt(rng)
            if is_evaluation(prompt) != evaluation or (evaluation and prompt in seen):
                continue
            drawn.append(prompt)
            seen.add(prompt)
            if len(drawn) == count:
                return drawn
        raise OpdlabError(f"task {self.name!r} has fewer than {count} evaluation prompts; ask for fewer")


def after_hash(prompt: str, completion: str) -> str | None:
    """Return the text after the last ``#``, or None if there is none.

    >>> after_hash("Q17+5+38=?A:", "17+5=22;22+38=60#60")
    '60'
    """
    return completion.rsplit("#", 1)[1] if "#" in completion else None


def whole(prompt: str, completion: str) -> str:
    """Return the completion: it is the answer."""
    return completion


# --- the task of the lab, a sum of two to four numbers with running sums, and its second, which takes away ----


def running_sum_prompt(rng: np.random.Generator) -> str:
    """Draw a sum of two to four numbers between 1 and 50, for example ``Q17+5+38=?A:``."""
    terms = rng.integers(1, 51, size=rng.integers(2, 5))
    return "Q" + "+".join(map(str, terms)) + "=?A:"


def running_difference_prompt(rng: np.random.Generator) -> str:
    """Draw a number up to 200 and one to three numbers, between 1 and 50, to take away: ``Q187-17-5=?A:``."""
    terms = rng.integers(1, 51, size=rng.integers(1, 4))
    return f"Q{rng.integers(terms.sum(), 201)}-{'-'.join(map(str, terms))}=?A:"


def _signed_terms(prompt: str) -> list[int]:
    return [int(term) for term in re.findall(r"[+-]?\d+", prompt)]


def running_demonstration(prompt: str) -> str:
    """Write the solution with its running sums, or differences.

    >>> running_demonstration("Q17+5+38=?A:"), running_demonstration("Q187-17-5=?A:")
    ('17+5=22;22+38=60#60', '187-17=170;170-5=165#165')
    """
    total, *rest = _signed_terms(prompt)
    steps = []
    for term in rest:
        steps.append(f"{total}{term:+d}={total + term}")
        total += term
    return ";".join(steps) + f"#{total}"


# --- "pretraining": short tasks that teach digits, order and addition, but never the format above --------------


def _numbers(rng: np.random.Generator, high: int) -> list[int]:
    return rng.integers(1, high + 1, size=rng.integers(2, 5)).tolist()


def _join(numbers: list[int], sign: str) -> str:
    return sign.join(map(str, numbers))


_SHORT_PROMPTS = {
    "S": lambda rng: f"{rng.integers(1, 151)}+{rng.integers(1, 51)}",
    "D": lambda rng: _join(sorted(rng.integers(1, 201, size=2).tolist(), reverse=True), "-"),
    "R": lambda rng: _join(rng.integers(0, 10, size=rng.integers(2, 7)).tolist(), ""),
    "M": lambda rng: _join(_numbers(rng, 200), ","),
    "O": lambda rng: _join(_numbers(rng, 200), ","),
    "T": lambda rng: _join(_numbers(rng, 50), "+"),
}


def short_task_prompt(rng: np.random.Generator) -> str:
    """Draw a prompt of one of six short tasks: Sum, Difference, Reverse, Maximum, Order, Total."""
    letter = "SDRMOT"[rng.integers(6)]
    return f"{letter}{_SHORT_PROMPTS[letter](rng)}:"


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
        return _join(sorted(numbers), ",")
    answers: dict[str, Callable[[list[int]], int]] = {"S": sum, "T": sum, "M": max, "D": lambda pair: pair[0] - pair[1]}
    return str(answers[letter](numbers))


RUNNING_SUM = Task("running_sum", running_sum_prompt, running_demonstration, after_hash)
RUNNING_DIFFERENCE = Task("running_difference", running_difference_prompt, running_demonstration, after_hash)
SHORT_TASKS = Task("short_tasks", short_task_prompt, short_task_demonstration, whole)


def _mixture(name: str, main: Task) -> Task:
    """Return what a teacher is pretrained on: the main task four times out of five, the short tasks otherwise."""

    def of(prompt: str) -> Task:
        return main if prompt.startswith("Q") else SHORT_TASKS

    return Task(
        name,
        lambda rng: (main if rng.random() < 0.8 else SHORT_TASKS).prompt(rng),
        lambda prompt: of(prompt).demonstration(prompt),
        lambda prompt, completion: of(prompt).answer(prompt, completion),
    )


TEACHER_MIXTURE = _mixture("teacher_mixture", RUNNING_SUM)
DIFFERENCE_MIXTURE = _mixture("difference_mixture", RUNNING_DIFFERENCE)


# --- for pretrained models: arithmetic of reasoning-gym, answered by restating the question --------------------


def _restated(name: str, **settings: int) -> Task:
    """Return the task of a dataset of reasoning-gym whose question is one expression."""

    @cache
    def dataset() -> Sequence[dict]:
        import reasoning_gym  # Only who draws prompts needs it.

        # Every item is made when it is asked for, from its number.
        return reasoning_gym.create_dataset(name, seed=0, size=2**31, **settings)

    def prompt(rng: np.random.Generator) -> str:
        return f"What is {dataset()[int(rng.integers(2**31))]['metadata']['expression']}?\n"

    def demonstration(prompt: str) -> str:
        first, sign, second = prompt.removeprefix("What is ").removesuffix("?\n").split(" ")
        value = _OPERATIONS[sign](int(first), int(second))
        # Small models answer better when they say what they were asked.
        return f"{first} {sign} {second} = {value}"

    return Task(name, prompt, demonstration, after_equals)


_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def after_equals(prompt: str, completion: str) -> str | None:
    """Return what follows the last ``=``, or None if there is none.

    >>> after_equals("What is 58 + 26?", "58 + 26 = 84")
    '84'
    """
    return completion.rsplit("=", 1)[1].strip() if "=" in completion else None


CHAIN_SUM = _restated("chain_sum", min_terms=2, max_terms=2, min_digits=2, max_digits=2)
PRODUCTS = _restated("products", min_terms=2, max_terms=2, min_digits=1, max_digits=2)


# --- for large models: competition mathematics, from the Hugging Face hub --------------------------------------

_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
             "precalculus")  # fmt: skip


@cache
def _competition() -> dict[str, str]:
    """Return the problems of MATH (2103.03874) and their worked solutions, whose answers are in a box."""
    try:
        from datasets import load_dataset

        parts = [load_dataset("EleutherAI/hendrycks_math", subject, split="train+test") for subject in _SUBJECTS]
    except Exception as problem:  # The library has an error of its own for each way to fail.
        raise OpdlabError(
            f"the problems of the task 'math' cannot be had ({problem}): install opdlab[real], and check the network "
            "and HF_HUB_OFFLINE"
        ) from problem
    return {
        f"{row['problem']}\nPut the final answer in \\boxed{{}}.\n": row["solution"] for part in parts for row in part
    }


def _math_prompt(rng: np.random.Generator) -> str:
    problems = list(_competition())
    return problems[int(rng.integers(len(problems)))]


def _boxed(prompt: str, completion: str) -> str | None:
    """Return the last boxed expression of a completion, or what the one in the solution is if the two are equal."""
    found = _last_box(completion)
    right = _last_box(_competition()[prompt])
    if found is None or found == right:
        return found
    from math_verify import parse, verify

    return right if verify(parse(f"${right}$"), parse(f"${found}$")) else found


def _last_box(text: str) -> str | None:
    """Return what is in the last ``\\boxed{}``, whose braces may nest, or None.

    >>> _last_box(r"so \\boxed{\\frac{1}{2}} it is")
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    depth = 0
    for i, character in enumerate(text[start:], start):
        depth += (character == "{") - (character == "}")
        if start >= 0 and character == "}" and depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


MATH = Task("math", _math_prompt, lambda prompt: _competition()[prompt], _boxed)

TASKS = {
    task.name: task
    for task in (
        RUNNING_SUM,
        RUNNING_DIFFERENCE,
        SHORT_TASKS,
        TEACHER_MIXTURE,
        DIFFERENCE_MIXTURE,
        CHAIN_SUM,
        PRODUCTS,
        MATH,
    )
}
