"""Objectives: what SFT, OPD and RLVR ask of the student, as pure functions on tensors.

``logits[b, t]`` (V,) is the distribution that ``tokens[b, t]`` was drawn from, and must be finite; ``mask`` (B, T)
marks the completion tokens that count. S is the student, T the teacher, p their softmax at temperature 1; all is in
nats. A loss is per token, (B, T); a reduction to a scalar comes last and knows the size of the whole batch, so that
splitting it into micro-batches changes nothing. OPD, RLVR and their mixtures differ in their advantages only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.errors import OpdlabError

# --- what the models say about the tokens -----------------------------------------------------------------------------


def _log_softmax(logits: Tensor) -> Tensor:
    # At least float32: bf16 keeps three digits, and what we are after is a small difference of two log-probabilities.
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p(token) (B, T) of ``tokens`` (B, T) under ``logits`` (B, T, V).

    The gradient to the logits is onehot(token) - p, the score function. Masked tokens must be valid ids too.

    Raises:
        OpdlabError: if ``tokens`` has not one entry for each distribution in ``logits``.

    >>> token_logps(torch.tensor([[[0.25, 0.75]]]).log(), torch.tensor([[1]])).exp()
    tensor([[0.7500]])
    """
    if tokens.shape != logits.shape[:-1]:
        raise OpdlabError(f"tokens {_shape(tokens)} need logits {_shape(tokens, 'V')}, not {_shape(logits)}")
    return _log_softmax(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy -∑ p log p (B, T) of ``logits`` (B, T, V); between 0 and log V.

    >>> entropy(torch.zeros(1, 1, 2)) / torch.tensor(2.0).log()  # one fair coin, in bits
    tensor([[1.]])
    """
    logps = _log_softmax(logits)
    return -(logps.exp() * logps).sum(-1)


# --- SFT: imitate given tokens ----------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the SFT loss -log p_S(token) (B, T): next-token cross-entropy (2606.07082, Appendix D).

    The gradient to the logits is p_S - onehot(token), in expectation over the teacher's tokens that of
    :func:`forward_kl`. Raises what :func:`token_logps` raises.

    >>> cross_entropy(torch.tensor([[[0.25, 0.75]]]).log(), torch.tensor([[0]]))  # log 4
    tensor([[1.3863]])
    """
    return -token_logps(logits, tokens)


# --- distillation over the whole vocabulary ---------------------------------------------------------------------------


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(S || T) = ∑ p_S (log p_S - log p_T) (B, T) over the vocabulary; logits (B, T, V).

    The OPD objective with the expectation over the token taken exactly (2606.07082, Appendix D). The gradient to the
    student's logit i is p_S(i) (log p_S(i) / p_T(i) - KL), weighed by what the *student* would say. None reaches the
    teacher, or goes through the choice of the states, which are sampled.

    Raises:
        OpdlabError: if the two logits differ in shape.

    >>> reverse_kl(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log())  # (log 4/3) / 2
    tensor([[0.1438]])
    """
    return _kl(*_both_logps(student_logits, teacher_logits))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(T || S) = ∑ p_T (log p_T - log p_S) (B, T) over the vocabulary; logits (B, T, V).

    The gradient to the student's logits is p_S - p_T: soft-label cross-entropy, since the teacher's entropy is
    constant. None reaches the teacher. Raises what :func:`reverse_kl` raises.

    >>> forward_kl(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log())  # (log 27/16) / 4
    tensor([[0.1308]])
    """
    student, teacher = _both_logps(student_logits, teacher_logits)
    return _kl(teacher, student)


def generalised_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Return β KL(T || m) + (1 - β) KL(S || m), with m = (1 - β) p_S + β p_T (B, T); logits (B, T, V).

    GKD's divergence (2306.13649, Eq. 1) in TRL's convention: at β = 0 it is KL(T || S) and at β = 1 it is KL(S || T).
    It jumps at both ends: just inside, it is β KL(T || S) near 0 and (1 - β) KL(S || T) near 1, to first order. So
    a sweep over β sweeps the size of the gradient too, and digits cancel: at β = 0.001 four can be left in float32.

    Raises:
        OpdlabError: if β is outside [0, 1], or the two logits differ in shape.

    >>> student, teacher = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    >>> [round(float(generalised_jsd(student, teacher, beta)), 4) for beta in (0, 0.001, 0.5, 0.999, 1)]
    [0.1308, 0.0001, 0.0338, 0.0001, 0.1438]
    """
    if not 0 <= beta <= 1:
        raise OpdlabError(f"beta must lie between 0 and 1, not {beta}")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    student, teacher = _both_logps(student_logits, teacher_logits)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def topk_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Return KL(S || T) (B, T) on k + 1 outcomes: the student's k likeliest tokens, and all others as one.

    The *student's* tokens, because KL(S || T) weighs by p_S: they hold most of the sum, and among them are those that
    the teacher would never say. Merging outcomes can only lower a divergence, so 0 <= topk <= :func:`reverse_kl`, with
    equality at k = V (the sum cut off at k may be negative). Within the tail the gradient fits the total mass, not its
    shape; the choice of the k tokens is not differentiated.

    Raises:
        OpdlabError: if k is not between 1 and V, or the two logits differ in shape.

    >>> student, teacher = torch.tensor([[[0.5, 0.25, 0.25]]]).log(), torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    >>> [round(float(topk_reverse_kl(student, teacher, k)), 4) for k in (1, 3)]
    [0.1438, 0.1733]
    """
    vocabulary = student_logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise OpdlabError(f"k must lie between 1 and the vocabulary's size {vocabulary}, not {k}")
    student, teacher = _both_logps(student_logits, teacher_logits)
    if k == vocabulary:
        return _kl(student, teacher)
    top = student.detach().topk(k, dim=-1).indices

    def coarsen(logps: Tensor) -> Tensor:  # (B, T, V) -> (B, T, k + 1)
        # The tail by summing its own terms; 1 - (mass of the top) would lose all digits when the top has nearly all.
        tail = logps.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([logps.gather(-1, top), tail], dim=-1)

    return _kl(coarsen(student), coarsen(teacher))


# What a log-ratio counts as at most where it is an exponent, as in verl, slime and prime-rl.
LARGEST = 20.0


def kl_estimators(logratio: Tensor) -> dict[str, Tensor]:
    """Return the estimators k1 = r, k2 = r²/2 and k3 = exp(-r) - 1 + r of KL(S || T), each of ``logratio``'s shape.

    r = log p_S(a) - log p_T(a) for a drawn from S (J. Schulman, "Approximating KL divergence", 2020). As *values*, k1
    and k3 are unbiased and k3 is never negative. As *losses*, in expectation over a, k1 gives the gradient 0, k2 that
    of KL(S || T) and k3 that of KL(T || S); k1 held fixed gives that of KL(S || T), see :func:`opd_advantages`. In the
    exponent, -r ends at 20, as in other libraries: no float overflows.

    >>> kl_estimators(torch.tensor(0.5).log())  # log 1/2, (log 2)² / 2, and 2 - 1 - log 2
    {'k1': tensor(-0.6931), 'k2': tensor(0.2402), 'k3': tensor(0.3069)}
    """
    return {"k1": logratio, "k2": logratio.square() / 2, "k3": torch.expm1(-logratio.clamp(min=-LARGEST)) + logratio}


# --- advantages: OPD, RLVR and mixtures -------------------------------------------------------------------------------


def opd_advantages(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return A_OPD = -(log p_S(a) - log p_T(a)) (B, T), detached, from the log-probabilities of the sampled tokens.

    The paper's OPD (2606.07082, section 5 and Appendix G; the same in slime and at Thinking Machines): each token is
    credited with its own log-ratio and no later one (discount 0). By :func:`policy_gradient`, in expectation over
    tokens drawn from the student, the gradient is that of :func:`reverse_kl` at the sampled states, and the *value* the
    estimator k1. On tokens drawn from someone else it is the gradient of neither KL.

    Raises:
        OpdlabError: if the two differ in shape.

    >>> opd_advantages(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log())  # the teacher doubts: < 0
    tensor([[-0.6931,  0.0000]])
    """
    _check_same_shape(student_logps, teacher_logps)
    return (teacher_logps - student_logps).detach()


def grpo_advantages(rewards: Tensor, group_size: int, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """Return A_RLVR (B,) of ``rewards`` (B,), where each ``group_size`` successive rewards answer one prompt.

    A = (reward - group mean) / (group standard deviation + eps), of GRPO (2402.03300, section 4.1.2), with the sample
    standard deviation (n - 1) as in TRL; ``scale="none"`` leaves the division out, as Dr. GRPO does (2503.20783). The
    mean of each group is 0; a group without variance gets exactly 0.

    Raises:
        OpdlabError: if groups of ``group_size`` >= 2 do not fill ``rewards``, one is not finite, or ``scale`` is
            neither of the two.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2, scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    if scale not in ("std", "none"):
        raise OpdlabError(f"scale must be 'std' or 'none', not {scale!r}")
    groups = _groups(rewards, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "std":
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    # Rounding in the mean must not make a signal out of equal rewards.
    return advantages.where(has_reward_variance(rewards, group_size)[:, None], 0.0).flatten()


def has_reward_variance(rewards: Tensor, group_size: int) -> Tensor:
    """Return whether the ``rewards`` (B,) of each group differ at all (B / group_size,).

    Where none do, the paper skips the batch (2606.07082, Table 5). Raises what :func:`grpo_advantages` raises.

    >>> has_reward_variance(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ True, False])
    """
    groups = _groups(rewards, group_size)
    return groups.amax(1) != groups.amin(1)


def mix_advantages(opd: Tensor, rlvr: Tensor, alpha: float) -> Tensor:
    """Return α A_OPD + (1 - α) A_RLVR (B, T), of ``opd`` (B, T) and ``rlvr`` (B,), broadcast over its tokens.

    Raw, without normalisation (2606.07082, section 5.3). The gradient is the same mixture, being linear in advantages;
    but the two differ in size and density, so α is no share of the step.

    Raises:
        OpdlabError: if α is outside [0, 1], or ``rlvr`` has not one entry for each row of ``opd``.

    >>> mix_advantages(torch.tensor([[-1.0, 0.0]]), torch.tensor([1.0]), alpha=0.75)
    tensor([[-0.5000,  0.2500]])
    """
    if not 0 <= alpha <= 1:
        raise OpdlabError(f"alpha must lie between 0 and 1, not {alpha}")
    return alpha * opd + (1 - alpha) * _per_token(rlvr, opd)


# The paper's clipping (2606.07082, Table 5): eps = 0.2, eps_high = 0.28.
CLIP = (0.2, 0.28)


def policy_gradient(
    logps: Tensor, advantages: Tensor, old_logps: Tensor | None = None, clip: tuple[float, float] | None = CLIP
) -> Tensor:
    """Return -min(ρ A, clip(ρ) A) (B, T), with ρ = exp(logps - old_logps) clipped to [1 - low, 1 + high].

    PPO (1707.06347, Eq. 7) with the two bounds of DAPO (2503.14476); without ``clip`` it is -ρ A. ``logps`` (B, T) are
    the student's of the sampled tokens, ``advantages`` are (B, T), or (B,) for one in each row, and ``old_logps``
    (B, T) are of the student that sampled, by default the same one, without a gradient. ρ is taken with a log-ratio of
    at most 20 either way, so that none overflows. The gradient is -ρ A ∇ log p_S, and zero for a
    token whose ρ has left the interval in the direction that A pushes. One update per rollout has ρ = 1: the plain
    policy gradient, for which clipping is idle. The *value* is then -A, so after averaging zero for GRPO, whatever the
    gradient: do not plot this loss.

    Raises:
        OpdlabError: if shapes do not fit, or a bound is negative.

    >>> logps = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    >>> policy_gradient(logps, torch.tensor([[1.0, -1.0]])).sum().backward()
    >>> logps.grad
    tensor([[-1.,  1.]])
    """
    advantages = _per_token(advantages, logps)
    old_logps = (logps if old_logps is None else old_logps).detach()
    _check_same_shape(logps, old_logps)
    ratio = (logps - old_logps).clamp(-LARGEST, LARGEST).exp()
    if clip is None:
        return -ratio * advantages
    low, high = clip
    if low < 0 or high < 0:
        raise OpdlabError(f"both bounds of clip must be at least 0, not {clip}")
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


# --- reductions: from a loss per token to the scalar that is differentiated -------------------------------------------


def token_mean(per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Return the sum of ``per_token`` (B, T) over ``mask`` (B, T), divided by ``normalizer``, a scalar.

    What ``mask`` leaves out may be NaN. ``normalizer`` is the number of tokens in the *whole* batch: then the losses
    and the gradients of its micro-batches add up to those of the batch. By default it is the number of tokens in
    ``mask``, and never less than 1.

    Raises:
        OpdlabError: if the two differ in shape.

    >>> token_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    """
    _check_same_shape(per_token, mask)
    total = per_token.where(mask.bool(), 0.0).sum()
    return total / torch.as_tensor(mask.sum() if normalizer is None else normalizer).clamp(min=1)


def sequence_mean(per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Return the sum over sequences of their means of ``per_token`` (B, T) over ``mask``, divided by ``normalizer``.

    ``normalizer`` is the number of sequences in the whole batch, by default B; an empty sequence adds 0 and counts.
    Raises what :func:`token_mean` raises.

    >>> sequence_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.7500)
    """
    _check_same_shape(per_token, mask)
    means = per_token.where(mask.bool(), 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return means.sum() / torch.as_tensor(mask.shape[0] if normalizer is None else normalizer).clamp(min=1)


# The reductions in use for GRPO, by TRL's names: (loss per token, mask, rows, tokens, length) -> scalar, with the rows
# and tokens of the whole batch, and the longest completion allowed. The losses of the micro-batches are to be added up.
# Only bnpo depends on the split: a micro-batch is averaged over its *own* tokens and weighs by its rows.
REDUCTIONS: dict[str, Callable[[Tensor, Tensor, int, int, int], Tensor]] = {
    # Each sequence weighs the same: DeepSeekMath, 2402.03300, Eq. 3.
    "grpo": lambda loss, mask, rows, tokens, length: sequence_mean(loss, mask, rows),
    # Each token of a micro-batch weighs the same.
    "bnpo": lambda loss, mask, rows, tokens, length: token_mean(loss, mask) * len(mask) / rows,
    # Each token weighs the same, whatever the batch: Dr. GRPO, 2503.20783.
    "dr_grpo": lambda loss, mask, rows, tokens, length: token_mean(loss, mask, rows * length),
    # Each token of the batch weighs the same: DAPO, 2503.14476, Eq. 12; and what opdlab trains with.
    "dapo": lambda loss, mask, rows, tokens, length: token_mean(loss, mask, tokens),
}


#: In pieces of so many logits, or of one sequence, what is computed of them stays in the caches of a CPU.
PIECE = 2**20


def in_pieces(measure: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """Return ``measure`` (B, T) of one or two ``logits`` (B, T, V), some sequences at a time: the same bits, sooner.

    For numbers that no gradient is taken of. With a vocabulary of 49,152 it takes a quarter of the time on a CPU.

    >>> in_pieces(entropy, torch.zeros(2, 1, 2)) / torch.tensor(2.0).log()
    tensor([[1.], [1.]])
    """
    size = max(1, PIECE // logits[0][0].numel())
    return torch.cat([measure(*parts) for parts in zip(*(whole.split(size) for whole in logits), strict=True)])


# --- small helpers ----------------------------------------------------------------------------------------------------


def _kl(p_logps: Tensor, q_logps: Tensor) -> Tensor:
    return (p_logps.exp() * (p_logps - q_logps)).sum(-1)


def _both_logps(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    _check_same_shape(student_logits, teacher_logits)
    return _log_softmax(student_logits), _log_softmax(teacher_logits.detach())


def _per_token(advantages: Tensor, like: Tensor) -> Tensor:
    # (B,) -> (B, 1). Left to broadcasting, (B,) would spread over rows instead whenever B = T.
    if advantages.dim() == 1 and len(advantages) == len(like):
        return advantages.unsqueeze(1)
    _check_same_shape(advantages, like)
    return advantages


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if not rewards.isfinite().all():
        raise OpdlabError(f"rewards {_shape(rewards)} hold NaN or infinity: give finite numbers")
    if group_size < 2 or rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise OpdlabError(f"rewards {_shape(rewards)} are not made of groups of {group_size}, with at least 2 in each")
    return rewards.reshape(-1, group_size).to(torch.promote_types(rewards.dtype, torch.float32))


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise OpdlabError(f"two tensors that must have one shape have {_shape(first)} and {_shape(second)}")


def _shape(tensor: Tensor, *more: object) -> str:
    return f"({', '.join(map(str, (*tensor.shape, *more)))})"
