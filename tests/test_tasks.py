import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.errors import OpdlabError
from opdlab.models import character_tokenizer
from opdlab.scales import TINY
from opdlab.tasks import ALPHABET, RUNNING_DIFFERENCE, RUNNING_SUM, SHORT_TASKS, TASKS, is_evaluation


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@given(seed=st.integers(0, 2**32))
def test_a_demonstration_earns_the_reward_and_fits(task, seed):
    prompt = task.prompts(1, np.random.default_rng(seed))[0]
    solution = task.demonstration(prompt)
    assert task.reward(prompt, solution) == 1.0
    assert task.reward(prompt, solution[:-1]) == 0.0, "an answer that does not end is not an answer"
    assert set(prompt + solution) <= set(ALPHABET)
    assert len(solution) <= TINY.max_new_tokens


@given(terms=st.lists(st.integers(1, 50), min_size=2, max_size=4), wrong=st.integers(0, 300))
def test_running_sum_rewards_the_sum_and_nothing_else(terms, wrong):
    prompt = "Q" + "+".join(map(str, terms)) + "=?A:"
    assert RUNNING_SUM.reward(prompt, f"#{wrong}$") == float(wrong == sum(terms))


@given(
    start=st.integers(150, 200), terms=st.lists(st.integers(1, 50), min_size=1, max_size=3), wrong=st.integers(0, 200)
)
def test_running_difference_rewards_the_difference_and_nothing_else(start, terms, wrong):
    prompt = f"Q{start}-{'-'.join(map(str, terms))}=?A:"
    assert RUNNING_DIFFERENCE.reward(prompt, f"#{wrong}$") == float(wrong == start - sum(terms))


def test_training_and_evaluation_prompts_never_overlap():
    rng = np.random.default_rng(0)
    training = set(RUNNING_SUM.prompts(20_000, rng)) | set(TASKS["teacher_mixture"].prompts(20_000, rng))
    evaluation = RUNNING_SUM.prompts(TINY.evaluation_prompts, rng, evaluation=True)
    assert len(set(evaluation)) == len(evaluation) >= 1000
    assert not training & set(evaluation)
    assert all(map(is_evaluation, evaluation))


def test_the_base_never_sees_the_format_of_the_task():
    prompts = SHORT_TASKS.prompts(2000, np.random.default_rng(0))
    assert {prompt[0] for prompt in prompts} == set("SDRMOT")


def test_too_many_evaluation_prompts():
    few = type(RUNNING_SUM)("few", lambda rng: f"Q{rng.integers(1, 20)}+1=?A:", str, lambda prompt, text: 0.0)
    with pytest.raises(OpdlabError, match="fewer than 1000 evaluation prompts"):
        few.prompts(1000, np.random.default_rng(0), evaluation=True)


def test_the_tokenizer_is_one_to_one(tmp_path):
    from opdlab.models import load_tokenizer

    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer(ALPHABET).input_ids
    assert ids == list(range(len(ALPHABET)))
    assert tokenizer.decode(ids) == ALPHABET
    assert tokenizer.padding_side == "left"
