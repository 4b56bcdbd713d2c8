"""The objectives against identities with exact answers: float64, seven tokens, expectations by enumeration."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.training import objectives as obj

V = 7


def logits(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(1.5).requires_grad_(grad)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def grad(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)[0]


class OneState:
    """One state, whose V possible tokens fill the T axis: the sum of a (1, V) loss, weighted by p, is its mean."""

    def __init__(self) -> None:
        self.student, self.teacher = logits(1, 1, V, seed=1, grad=True), logits(1, 1, V, seed=2)
        self.tokens = torch.arange(V)[None]
        self.student_logps = obj.token_logps(self.student.expand(1, V, V), self.tokens)
        self.teacher_logps = obj.token_logps(self.teacher.expand(1, V, V), self.tokens)
        self.reverse = grad(obj.reverse_kl(self.student, self.teacher), self.student)
        self.forward = grad(obj.forward_kl(self.student, self.teacher), self.student)

    def expected_gradient(self, per_token: Tensor, under: Tensor | None = None) -> Tensor:
        """The mean over sampled tokens of the gradient of their losses: the sampling itself is not differentiated."""
        weights = (self.student_logps if under is None else under).detach().exp()
        return grad(weights * per_token, self.student)


@pytest.fixture
def one() -> OneState:
    return OneState()


# --- which objective is it really? (peers.md, A.3) --------------------------------------------------------------------


def test_the_two_kls_have_different_gradients(one):
    assert (one.reverse - one.forward).abs().max() > 0.1


def test_k1_as_a_reward_is_reverse_kl(one):
    """The paper's OPD loss; and its value is an estimate of the KL."""
    loss = obj.policy_gradient(one.student_logps, obj.opd_advantages(one.student_logps, one.teacher_logps))
    close(one.expected_gradient(loss), one.reverse)
    close((one.student_logps.exp() * loss).sum(), obj.reverse_kl(one.student, one.teacher).squeeze())


def test_opd_is_a_plain_policy_gradient(one):
    """-A log p and -A p / p.detach() are two ways to write one gradient."""
    advantages = obj.opd_advantages(one.student_logps, one.teacher_logps)
    plain = one.expected_gradient(-advantages * one.student_logps)
    close(one.expected_gradient(obj.policy_gradient(one.student_logps, advantages)), plain)


def test_a_penalty_that_ignores_the_token_teaches_nothing(one):
    """For example a full-vocabulary KL used as an advantage (radixark/miles issue 2362)."""
    penalty = -obj.reverse_kl(one.student, one.teacher).detach().expand(1, V)
    actual = one.expected_gradient(obj.policy_gradient(one.student_logps, penalty))
    close(actual, torch.zeros_like(actual))


def test_sft_on_the_teachers_tokens_is_forward_kl(one):
    loss = obj.cross_entropy(one.student.expand(1, V, V), one.tokens)
    close(one.expected_gradient(loss, under=one.teacher_logps), one.forward)


def test_opd_on_the_teachers_tokens_is_neither_kl(one):
    loss = obj.policy_gradient(one.student_logps, obj.opd_advantages(one.student_logps, one.teacher_logps))
    actual = one.expected_gradient(loss, under=one.teacher_logps)
    assert (actual - one.reverse).abs().max() > 0.1 and (actual - one.forward).abs().max() > 0.1


def test_gradients_to_the_logits_in_closed_form(one):
    p, q = one.student.softmax(-1).detach(), one.teacher.softmax(-1)
    close(one.forward, p - q)
    close(one.reverse, p * ((p / q).log() - (p * (p / q).log()).sum()))


class TwoSteps:
    """All V² sequences of length two from a model whose steps share their weights, (V², 2, V) logits."""

    def __init__(self) -> None:
        self.weights = logits(3, V, seed=3, grad=True)
        embeddings, teacher_weights = logits(V + 1, 3, seed=4), logits(3, V, seed=5)
        self.tokens = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (V², 2)
        previous = torch.stack([torch.full((V * V,), V), self.tokens[:, 0]], dim=1)  # the start is token V
        self.student, self.teacher = embeddings[previous] @ self.weights, embeddings[previous] @ teacher_weights
        self.logps = obj.token_logps(self.student, self.tokens)
        self.advantages = obj.opd_advantages(self.logps, obj.token_logps(self.teacher, self.tokens))
        self.sequence_probability = self.logps.sum(1).exp()  # (V²,)

    def expected_gradient(self, per_token: Tensor) -> Tensor:
        return grad(self.sequence_probability.detach()[:, None] * per_token, self.weights)


def test_discount_0_is_reverse_kl_at_sampled_states():
    two = TwoSteps()
    actual = two.expected_gradient(obj.policy_gradient(two.logps, two.advantages))
    close(actual, two.expected_gradient(obj.reverse_kl(two.student, two.teacher)))


def test_discount_1_is_the_kl_of_whole_sequences():
    two = TwoSteps()
    to_go = two.advantages.flip(1).cumsum(1).flip(1)
    actual = two.expected_gradient(obj.policy_gradient(two.logps, to_go))
    sequence_kl = two.sequence_probability * obj.reverse_kl(two.student, two.teacher).sum(1)
    close(actual, grad(sequence_kl, two.weights))
    discount_0 = two.expected_gradient(obj.policy_gradient(two.logps, two.advantages))
    assert (actual - discount_0).abs().max() > 0.1


# --- distillation over the vocabulary ---------------------------------------------------------------------------------


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(2, 3, V, grad=True), logits(2, 3, V, seed=1, grad=True)
    for divergence in (obj.reverse_kl, obj.forward_kl, partial(obj.topk_reverse_kl, k=2)):
        divergence(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_equal_models_have_no_divergence():
    student = logits(2, 3, V, grad=True)
    for loss in (
        obj.reverse_kl(student, student.detach()),
        obj.forward_kl(student, student.detach()),
        obj.topk_reverse_kl(student, student.detach(), 2),
    ):
        close(loss, torch.zeros_like(loss), atol=1e-15)
        close(grad(loss, student), torch.zeros_like(student), atol=1e-15)


def test_topk_at_the_whole_vocabulary_is_reverse_kl():
    student, teacher = logits(2, 3, V, grad=True), logits(2, 3, V, seed=1)
    full, topk = obj.reverse_kl(student, teacher), obj.topk_reverse_kl(student, teacher, V)
    assert torch.equal(full, topk)
    assert torch.equal(grad(full, student), grad(topk, student))
    # V - 1 tokens and a bucket of one are the whole vocabulary too.
    bucket_of_one = obj.topk_reverse_kl(student, teacher, V - 1)
    close(bucket_of_one, full)
    close(grad(bucket_of_one, student), grad(obj.reverse_kl(student, teacher), student))


def test_topk_by_hand():
    """The tokens are the student's: the teacher would have chosen the last one first."""
    student, teacher = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log(), torch.tensor([[[0.3, 0.1, 0.1, 0.5]]]).log()
    first, second = 0.4 * np.log(0.4 / 0.3), 0.3 * np.log(0.3 / 0.1)
    truth = first + 0.6 * np.log(0.6 / 0.7), first + second + 0.3 * np.log(0.3 / 0.6)
    for k in (1, 2):
        assert obj.topk_reverse_kl(student, teacher, k).item() == pytest.approx(truth[k - 1], abs=1e-6)


def test_topk_with_almost_no_tail():
    """A tail of 1e-30 is not lost to rounding, nor its logarithm to minus infinity."""
    student = torch.tensor([[[0.0, -70.0, -70.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, -60.0, -60.0]]])
    loss = obj.topk_reverse_kl(student, teacher, 1)
    assert torch.isfinite(loss).all() and torch.isfinite(grad(loss, student)).all()


pairs = arrays(np.float64, (2, 1, 2, V), elements=st.floats(-30, 30, width=32)).map(torch.from_numpy)
property_test = settings(deadline=None, max_examples=60)


@property_test
@given(pairs)
def test_divergences_are_not_negative(pair):
    for loss in (obj.reverse_kl(*pair), obj.forward_kl(*pair)):
        assert torch.isfinite(loss).all() and (loss >= -1e-13).all()


@property_test
@given(pairs)
def test_topk_only_grows_with_k_up_to_the_whole(pair):
    """Data processing: each further token splits the bucket."""
    losses = torch.stack([obj.topk_reverse_kl(*pair, k) for k in range(1, V + 1)])
    assert (losses >= -1e-12).all()
    assert (losses.diff(dim=0) >= -1e-12).all()


@property_test
@given(pairs, st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_nothing(pair, shift):
    student, teacher = pair
    close(obj.reverse_kl(student + shift, teacher), obj.reverse_kl(student, teacher), atol=1e-11)
    close(obj.entropy(student + shift), obj.entropy(student), atol=1e-11)


def test_entropy_between_its_bounds():
    close(obj.entropy(torch.zeros(1, 1, V, dtype=torch.float64)), torch.full((1, 1), np.log(V), dtype=torch.float64))
    certain = torch.tensor([[[200.0, 0.0, 0.0]]])
    close(obj.entropy(certain), torch.zeros(1, 1))
    uniform = torch.zeros(2, 3, V, dtype=torch.float64)
    close(obj.entropy(logits(2, 3, V)), np.log(V) - obj.reverse_kl(logits(2, 3, V), uniform))


def test_pieces_give_the_same_bits(monkeypatch):
    student, teacher = logits(7, 3, V), logits(7, 3, V, seed=1)
    whole = obj.entropy(student), obj.reverse_kl(student, teacher)
    for piece in (1, 6 * V, 2**20):
        monkeypatch.setattr(obj, "PIECE", piece)
        assert torch.equal(obj.in_pieces(obj.entropy, student), whole[0])
        assert torch.equal(obj.in_pieces(obj.reverse_kl, student, teacher), whole[1])


def test_bf16_logits_are_worked_on_in_float32():
    student, teacher = logits(2, 3, V).bfloat16(), logits(2, 3, V, seed=1).bfloat16()
    loss = obj.reverse_kl(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, obj.reverse_kl(student.float(), teacher.float()))


# --- advantages and the policy gradient -------------------------------------------------------------------------------


def test_grpo_advantages_have_mean_zero_in_each_group():
    rewards = logits(12)
    advantages = obj.grpo_advantages(rewards, 4).view(3, 4)
    close(advantages.mean(1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(advantages.std(1), torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_grpo_advantages_by_hand():
    """Two right of three: mean 2/3, sample standard deviation sqrt(1/3)."""
    rewards = torch.tensor([True, True, False])
    truth = torch.tensor([1 / 3, 1 / 3, -2 / 3]) / (3**-0.5 + 1e-4)
    close(obj.grpo_advantages(rewards, 3), truth, atol=1e-6)


@pytest.mark.parametrize("size", [3, 6, 8])
def test_equal_rewards_are_no_signal(size):
    """Exactly. In float32 the mean of eight times 0.9 is not 0.9, which alone would make an advantage of 0.0006."""
    equal = torch.arange(1, 10).div(10).repeat_interleave(size)
    rewards = torch.cat([equal, torch.arange(size)])
    assert not obj.grpo_advantages(torch.full((size,), 0.9), size).any()  # torch rounds a lone group differently
    advantages = obj.grpo_advantages(rewards, size)
    assert not advantages[:-size].any() and advantages[-size:].any()


def test_the_value_of_the_grpo_loss_is_zero_and_its_gradient_is_not():
    student, tokens = logits(4, 3, V, grad=True), torch.arange(12).view(4, 3) % V
    advantages = obj.grpo_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4)
    loss = obj.token_mean(
        obj.policy_gradient(obj.token_logps(student, tokens), advantages), torch.ones(4, 3, dtype=torch.bool)
    )
    assert abs(loss.item()) < 1e-7
    assert grad(loss, student).abs().max() > 0.01


def test_one_advantage_per_row_also_when_rows_and_tokens_are_equally_many():
    logps, advantages = logits(3, 3, grad=True), torch.tensor([1.0, 2.0, 3.0])
    close(grad(obj.policy_gradient(logps, advantages), logps), -advantages[:, None].expand(3, 3).double())


def test_advantages_are_held_fixed():
    student, teacher = logits(2, 3, grad=True), logits(2, 3, seed=1, grad=True)
    assert not obj.opd_advantages(student, teacher).requires_grad


# --- reductions -------------------------------------------------------------------------------------------------------

RAGGED = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()  # 6 tokens; the third row is empty


def test_gradients_of_micro_batches_add_up():
    student, tokens = logits(4, 3, V, grad=True), torch.arange(12).view(4, 3) % V
    whole = grad(obj.token_mean(obj.cross_entropy(student, tokens), RAGGED), student)
    for part in (slice(0, 1), slice(1, 4)):
        obj.token_mean(obj.cross_entropy(student[part], tokens[part]), RAGGED[part], normalizer=6).backward()
    close(student.grad, whole)


def test_a_batch_without_tokens_is_zero():
    losses = torch.ones(4, 3, requires_grad=True)
    loss = obj.token_mean(losses, torch.zeros_like(RAGGED))
    assert loss.item() == 0 and not grad(loss, losses).any()


# --- gradients by finite differences, and bad input -------------------------------------------------------------------

TOKENS = torch.tensor([[0, 3, 6], [1, 1, 5]])


@pytest.mark.parametrize(
    "function",
    [
        obj.entropy,
        lambda s: obj.token_logps(s, TOKENS),
        lambda s: obj.cross_entropy(s, TOKENS),
        lambda s: obj.reverse_kl(s, logits(2, 3, V, seed=1)),
        lambda s: obj.forward_kl(s, logits(2, 3, V, seed=1)),
        lambda s: obj.topk_reverse_kl(s, logits(2, 3, V, seed=1), 3),
    ],
)
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, logits(2, 3, V, grad=True))


A, B = torch.zeros(2, 3, V), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: obj.token_logps(A, TOKENS[:, :2]), r"tokens \(2, 2\) need logits \(2, 2, V\), not \(2, 3, 7\)"),
        (lambda: obj.reverse_kl(A, A[..., :1]), r"must have one shape have \(2, 3, 7\) and \(2, 3, 1\)"),
        (lambda: obj.forward_kl(A, A[:1]), "one shape"),
        (lambda: obj.topk_reverse_kl(A, A, V + 1), "k must lie between 1 and the vocabulary's size 7, not 8"),
        (lambda: obj.topk_reverse_kl(A, A, 0), "k must lie"),
        (lambda: obj.opd_advantages(B, B[0]), "one shape"),
        (lambda: obj.grpo_advantages(torch.zeros(6), 4), r"rewards \(6\) are not made of groups of 4"),
        (lambda: obj.grpo_advantages(torch.zeros(6), 1), "at least 2"),
        (lambda: obj.grpo_advantages(torch.zeros(0), 2), "groups"),
        (lambda: obj.grpo_advantages(torch.zeros(2, 3), 3), "groups"),
        (lambda: obj.policy_gradient(B, torch.zeros(3)), "one shape"),
        (lambda: obj.token_mean(B, B[:, :1]), "one shape"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(OpdlabError, match=sentence):
        call()


# --- numbers at the end of what floats hold ---------------------------------------------------------------------------


def test_what_is_masked_may_be_anything():
    mask = torch.tensor([[True, False]])
    for wrong in (torch.nan, torch.inf):
        per_token = torch.tensor([[2.0, wrong]], requires_grad=True)
        loss = obj.token_mean(per_token, mask)
        (gradient,) = torch.autograd.grad(loss, per_token)
        assert loss == 2 and gradient.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite(wrong):
    with pytest.raises(OpdlabError, match=r"^rewards \(4\) hold NaN or infinity"):
        obj.grpo_advantages(torch.tensor([1.0, 0.0, wrong, 1.0]), 2)
