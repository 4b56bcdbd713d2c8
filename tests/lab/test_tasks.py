from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlab.errors import OpdlabError
from opdlab.lab.scales import TINY
from opdlab.lab.tasks import (
    CARELESS_SUM,
    CORPUS,
    MATH,
    RUNNING_SUM,
    SHORT_TASKS,
    TASKS,
    TEACHER_MIXTURE,
    THREE_TERMS,
    RightAnswer,
    _competition,
    running_demonstration,
)
from opdlab.models.folders import ALPHABET, EOS, PAD, character_tokenizer
from opdlab.training.rollouts import Rollouts
from opdlab.training.tasks import is_evaluation
from opdlab.training.trainer import score

OF_THE_LAB = (RUNNING_SUM, SHORT_TASKS, TEACHER_MIXTURE, CORPUS, CARELESS_SUM)


@pytest.mark.parametrize("task", OF_THE_LAB, ids=lambda task: task.name)
@given(seed=st.integers(0, 2**32))
def test_a_demonstration_earns_the_reward_and_fits(task, seed):
    prompt = task.prompts(1, np.random.default_rng(seed))[0]
    solution = task.demonstration(prompt)
    assert task.reward(prompt, solution) == 1.0
    assert task.reward(prompt, "#") == 0.0
    assert set(prompt + solution) <= set(ALPHABET) - {EOS, PAD}
    assert len(solution) < TINY.budget.max_new_tokens


def test_a_completion_that_does_not_end_earns_nothing():
    tokenizer, prompt = character_tokenizer(), "Q17+5=?A:"
    whole = tokenizer("17+5=22#22$").input_ids
    rewards = score(tokenizer, RUNNING_SUM, [prompt], Rollouts([tokenizer(prompt).input_ids], [whole, whole[:-1]]))
    assert rewards.tolist() == [1.0, 0.0]


@settings(deadline=None, max_examples=30)  # Its import takes seconds.
@given(seed=st.integers(0, 2**32), wrong=st.integers(-200, 10_000))
def test_arithmetic_is_that_of_reasoning_gym(seed, wrong):
    """Its own scorer gives 1.0 to our solution's answer, and to another number exactly if our reward does."""
    import reasoning_gym

    task, dataset = THREE_TERMS, reasoning_gym.create_dataset("chain_sum", size=1)
    prompt = task.prompts(1, np.random.default_rng(seed))[0]
    expression = prompt.removeprefix("What is ").removesuffix("?\n")
    solution = task.demonstration(prompt)
    assert task.reward(prompt, solution) == 1.0
    entry = {"answer": str(eval(expression)), "metadata": {}}
    assert dataset.score_answer(task.score.answer(prompt, solution), entry) == 1.0
    theirs = dataset.score_answer(str(wrong), entry) == 1.0
    assert task.reward(prompt, f"{expression}={wrong}") == float(theirs)
    assert task.reward(prompt, "twelve") == 0.0


def test_competition_mathematics(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"problem": f"What is {n}/2?", "solution": rf"Half of it: \boxed{{\frac{{{n}}}{{2}}}}."}
        for n in range(1, 60, 2)
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subject, split: rows if subject == "algebra" else [])
    prompt = MATH.prompts(1, np.random.default_rng(0))[0]
    number = prompt.split()[2].split("/")[0]
    assert MATH.reward(prompt, MATH.demonstration(prompt)) == 1.0
    assert MATH.reward(prompt, rf"so \boxed{{{int(number) / 2}}}") == 1.0, "equal, written otherwise"
    assert MATH.reward(prompt, r"so \boxed{1000}") == MATH.reward(prompt, "no box") == 0.0
    assert len(MATH.prompts(2, np.random.default_rng(0), evaluation=True)) == 2


SOLUTIONS = {
    r"So $3 \cdot 5 = \boxed 15$.": "15",
    r"It is \fbox{15}.": "15",
    r"First \boxed{1}, then \boxed{ \frac{1}{2} }": r"\frac{1}{2}",
    "No box at all.": None,
    r"An empty \boxed{}.": None,
    r"A box \boxed{15 that stays open.": None,
    r"A \boxedword{15}.": None,
}


@pytest.fixture
def competition(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": f"{n}: {text}", "solution": text} for n in range(40) for text in SOLUTIONS]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subject, split: rows if subject == "algebra" else [])
    _competition.cache_clear()
    yield
    _competition.cache_clear()


def test_an_answer_that_cannot_be_read_earns_nothing(competition):
    drawn = MATH.prompts(200, np.random.default_rng(0))
    assert {prompt.split(": ")[1].split("\n")[0] for prompt in drawn} == {t for t, a in SOLUTIONS.items() if a}
    for prompt in drawn[:30]:
        right = SOLUTIONS[prompt.split(": ")[1].split("\n")[0]]
        for text, answer in SOLUTIONS.items():
            assert MATH.reward(prompt, text) == float(answer == right), (prompt, text)
        assert MATH.reward(prompt, "I do not know") == 0.0
    # Of any task: silence is not right where the demonstration is silent too.
    silent = RightAnswer(lambda prompt, text: None, lambda prompt: "no number")
    assert silent("?", "no number") == 0.0


def test_competition_mathematics_off_the_main_thread(competition):
    """As in a server of rewards: math-verify limits its time by a signal, which only the main thread gets."""
    prompt = next(p for p in MATH.prompts(50, np.random.default_rng(0)) if "frac" in p)
    with ThreadPoolExecutor() as pool:
        found = pool.map(MATH.reward, [prompt] * 3, [r"\boxed{0.5}", r"\boxed{1/2}", r"\boxed{0.25}"])
        assert list(found) == [1.0, 1.0, 0.0]


@given(terms=st.lists(st.integers(1, 50), min_size=2, max_size=4), wrong=st.integers(0, 300))
def test_running_sum_rewards_the_sum_and_nothing_else(terms, wrong):
    prompt = "Q" + "+".join(map(str, terms)) + "=?A:"
    assert RUNNING_SUM.reward(prompt, f"#{wrong}") == float(wrong == sum(terms))


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


def test_training_and_evaluation_prompts_never_overlap():
    rng = np.random.default_rng(0)
    training = set(RUNNING_SUM.prompts(20_000, rng)) | set(TASKS["teacher_mixture"].prompts(20_000, rng))
    evaluation = RUNNING_SUM.prompts(TINY.budget.evaluation_prompts, rng, evaluation=True)
    assert len(set(evaluation)) == len(evaluation) >= 500
    assert not training & set(evaluation)
    assert all(map(is_evaluation, evaluation))


def test_the_short_tasks_never_have_the_format_of_the_task():
    prompts = SHORT_TASKS.prompts(2000, np.random.default_rng(0))
    assert {prompt[0] for prompt in prompts} == set("SDRMOT")


def test_too_many_evaluation_prompts():
    few = type(RUNNING_SUM)("few", lambda rng: f"Q{rng.integers(1, 20)}+1=?A:", str, lambda prompt, text: None)
    with pytest.raises(OpdlabError, match="fewer than 1000 evaluation prompts"):
        few.prompts(1000, np.random.default_rng(0), evaluation=True)


def test_the_tokenizer_is_one_to_one(tmp_path):
    from opdlab.models.folders import load_tokenizer

    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer(ALPHABET).input_ids
    assert ids == list(range(len(ALPHABET)))
    assert tokenizer.decode(ids) == ALPHABET
    assert tokenizer.padding_side == "left"
