"""What makes a task, and so a run, another one: its data and what its reward gives, never its name alone."""

import pickle
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.processes import workers
from opdlab.training.config import Experiment, Recipe, with_fields
from opdlab.training.loop import train
from opdlab.training.tasks import Task, last_word

ROWS = [{"prompt": f"Q{n}+1=?A:", "answer": f"{n}+1={n + 1}#{n + 1}"} for n in range(40)]
OTHER_ROWS = [*ROWS[:-1], ROWS[-1] | {"answer": "39+1=40#41"}]


def reward(prompt, completion, answer):
    return float(completion == answer)


def make(rewards=reward, rows=ROWS, **options):
    return Task.from_dataset(rows, reward=rewards, name="sums", chat=False, **options)


def defined(code):
    """The reward that some code defines, as if it stood in this file."""
    names = {"__name__": __name__}
    exec(code, names)
    return names["reward"]


# --- the digest of a task ---------------------------------------------------------------------------------------------


def test_the_same_data_and_reward_are_the_same_task():
    assert make().digest == make().digest == pickle.loads(pickle.dumps(make())).digest
    assert make().digest == make(rows=[row | {"note": "not read"} for row in ROWS]).digest


@pytest.mark.parametrize(
    "other",
    [
        make(rows=OTHER_ROWS),
        make(rows=ROWS[:-1]),
        make(rows=ROWS[::-1]),
        make(rows=[row | {"shown": row["answer"] + " "} for row in ROWS], demonstration="shown"),
        make(last_word),
        replace(make(), chat=True),
    ],
    ids=["an answer", "a row less", "another order", "demonstrations", "reward", "chat template"],
)
def test_what_makes_another_task(other):
    assert other.digest != make().digest


def test_every_row_counts_and_not_only_the_first():
    many = [{"prompt": f"Q{n}=?A:", "answer": str(n)} for n in range(300)]
    assert make(rows=many).digest != make(rows=[*many[:-1], many[-1] | {"answer": "0"}]).digest


def test_a_comment_in_the_reward_changes_nothing_and_another_value_does():
    plain = "def reward(prompt, completion, answer):\n    return float(completion == answer)"
    told = "def reward(prompt, completion, answer):\n  # Right?\n\n    return float(completion == answer)"
    half = plain.replace("float(", "0.5 * float(")
    wrong = plain.replace("return", "return 0.1 +")
    assert make(defined(plain)).digest == make(defined(told)).digest
    assert len({make(defined(code)).digest for code in (plain, half, wrong)}) == 3


@pytest.mark.parametrize(
    ("kept", "changed"),
    [
        (np.array([1.0]), np.array([2.0])),
        (np.array(["a", None]), np.array(["b", None])),
        (np.float32(1), np.float32(2)),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]).bfloat16()),
        (Decimal("1"), Decimal("2")),
        (SimpleNamespace(a=[1]), SimpleNamespace(a=[2])),
        (date(2026, 1, 1), date(2026, 1, 2)),
        (range(3), range(4)),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_other_modules_count(kept, changed):
    def reading(value):
        return lambda prompt, completion, answer: float(completion == answer) if value is not None else 0.0

    assert make(reading(kept)).digest == make(reading(pickle.loads(pickle.dumps(kept)))).digest
    assert make(reading(kept)).digest != make(reading(changed)).digest


@pytest.mark.parametrize(
    "change", ["bonus = 2", "@property\n    def p(self): return 2", "@classmethod\n    def m(cls): return 2"]
)
def test_all_that_a_class_has_counts(change):
    """In it and in its bases: constants and properties as well as functions."""
    code = (
        "class Base:\n    CHANGE\nclass Graded(Base):\n    __slots__ = ('w',)\n    def __init__(self, w): self.w = w\n"
    )
    code += "    def __call__(self, prompt, completion, answer): return 1.0\nreward = Graded(W)"
    made = [
        make(defined(code.replace("CHANGE", told).replace("W)", f"{weight})"))).digest
        for told, weight in ((change, 1), (change, 1), (change.replace("2", "3"), 1), (change, 2))
    ]
    assert made[0] == made[1] and len({*made}) == 3


def test_closures_and_lambdas_are_told_apart_by_what_they_give():
    def scaled(size):
        return lambda prompt, completion, answer: size * (completion == answer)

    assert make(scaled(1)).digest == make(scaled(1)).digest != make(scaled(2)).digest
    one, same, two = (
        lambda prompt, completion, answer: float(completion == answer),
        lambda prompt, completion, answer: float(completion == answer),
        lambda prompt, completion, answer: float(completion != answer),
    )
    assert make(one).digest == make(same).digest != make(two).digest
    # They give the same for every demonstration, and not for everything that a student may write.
    short, long = (make(lambda prompt, completion, answer, most=most: min(len(completion), most)) for most in (99, 100))
    assert short.digest != long.digest


def test_a_variable_that_is_called_like_a_method_is_none_that_the_reward_reads():
    code = "def reward(prompt, completion, answer):\n    return float(completion.count(LETTER))"
    read = ("LETTER = 'a'", "LETTER, count = 'a', 3", "LETTER = 'b'")
    first, same, other = (make(defined(f"{variables}\n{code}")).digest for variables in read)
    assert first == same != other


def test_a_reward_that_fails_has_a_digest_and_says_so_when_it_is_asked():
    def picky(prompt, completion, answer):
        if completion != answer:
            raise ValueError("no such answer")
        return 1.0

    task = make(picky)
    assert task.digest != make().digest and task.reward(*ROWS[0].values()) == 1.0
    with pytest.raises(OpdlabError, match=r"reward of task 'sums' raised ValueError \(no such answer\) on the prompt"):
        task.reward(ROWS[0]["prompt"], "?")


def test_a_version_stands_for_the_reward_and_not_for_the_rows():
    counted = iter(range(10**6))
    random = [make(lambda prompt, completion, answer: next(counted), version=version) for version in "112"]
    assert random[0].digest == random[1].digest == make(version="1").digest != random[2].digest
    assert next(counted) == 0, "it is not asked"
    assert make(rows=OTHER_ROWS, version="1").digest != make(version="1").digest != make().digest


# --- runs of two tasks with one name ----------------------------------------------------------------------------------


def experiment(lab, task):
    recipe = Recipe(2, prompts=4, samples=1, learning_rate=1e-3, warmup=0)
    options = {"snapshots": (1, 2), "evaluation_prompts": 2, "name": "sft", "max_new_tokens": 16}
    return Experiment(lab.experiment("sft").arm, task, recipe, **options)


def _train(of: Experiment, root: Path) -> tuple[str, str]:
    return train(of, root).folder.name, of.key


def test_two_tasks_of_one_name_are_two_runs(lab, tmp_path):
    """In this process and in a spawned one, which is given the tasks and has never heard of them."""
    first, second = (experiment(lab, make(rows=rows)) for rows in (ROWS, OTHER_ROWS))
    assert first.task.name == second.task.name and first.config["data"] != second.config["data"]
    here = [_train(of, tmp_path / "here") for of in (first, second)]
    with workers(1) as pool:
        there = [pool.submit(_train, of, tmp_path / "there").result() for of in (first, second)]
    assert here == there and len({*here}) == 2
    assert sorted(path.name for path in (tmp_path / "here").glob("sft-*")) == sorted(name for name, _ in here)
    weights = [
        [path.read_bytes() for path in sorted((tmp_path / at).glob("sft-*/snapshots/step-000002.safetensors"))]
        for at in ("here", "there")
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_a_folder_of_another_task_is_refused(lab, tmp_path):
    train(experiment(lab, make()), tmp_path, folder=tmp_path / "mine")
    with pytest.raises(OpdlabError, match=r"out is .*mine, which holds another experiment \(data or reward differ\)"):
        train(experiment(lab, make(rows=OTHER_ROWS)), tmp_path, folder=tmp_path / "mine")


def test_any_field_can_be_set_and_an_unknown_one_is_refused(lab):
    changed = with_fields(experiment(lab, make()), {"clip": 0.5, "optimizer": "sgd", "threads": 2, "seed": 3})
    assert (changed.recipe.clip, changed.arm.optimizer, changed.compute.threads, changed.seed) == (0.5, "sgd", 2, 3)
    with pytest.raises(OpdlabError, match=r"an experiment has no field 'rate': choose .* such as .*learning_rate"):
        with_fields(changed, {"rate": 1})
