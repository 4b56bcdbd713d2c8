"""Objectives: what SFT, OPD and RLVR ask of the student, as pure functions on tensors.

``logits[b, t]`` (V,) is the distribution that ``tokens[b, t]`` was drawn from, and must be finite; ``mask`` (B, T)
marks the completion tokens that count. S is the student, T the teacher, p their softmax at temperature 1; all is in
nats. A loss is per token, (B, T); a reduction to a scalar comes last and knows the size of the whole batch, so that
splitting it into micro-batches changes nothing. OPD, RLVR and their mixtures differ in their advantages only. Shapes
that do not fit raise :class:`opdlab.errors.OpdlabError`; a function says so only where there is more to it.
"""

from __future__ import annotations

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


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the SFT loss -log p_S(token) (B, T): next-token cross-entropy (2606.07082, Appendix D).

    Its gradient to the logits is p_S - onehot(token), over the teacher's tokens on average that of :func:`forward_kl`.

    >>> cross_entropy(torch.tensor([[[0.25, 0.75]]]).log(), torch.tensor([[0]]))  # log 4
    tensor([[1.3863]])
    """
    return -token_logps(logits, tokens)


# --- distillation over the whole vocabulary ---------------------------------------------------------------------------


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(S || T) = ∑ p_S (log p_S - log p_T) (B, T) over the vocabulary; logits (B, T, V).

    The OPD objective with the expectation over the token taken exactly (2606.07082, Appendix D). The gradient to the
    student's logit i is p_S(i) (log p_S(i) / p_T(i) - KL). None reaches the teacher, or the choice of the states.

    >>> reverse_kl(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log())  # (log 4/3) / 2
    tensor([[0.1438]])
    """
    return _kl(*_both_logps(student_logits, teacher_logits))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(T || S) = ∑ p_T (log p_T - log p_S) (B, T) over the vocabulary; logits (B, T, V).

    The gradient to the student's logits is p_S - p_T: soft-label cross-entropy, since the teacher's entropy is
    constant. None reaches the teacher.

    >>> forward_kl(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log())  # (log 27/16) / 4
    tensor([[0.1308]])
    """
    student, teacher = _both_logps(student_logits, teacher_logits)
    return _kl(teacher, student)


def topk_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Return KL(S || T) (B, T) on k + 1 outcomes: the student's k likeliest tokens, and all others as one.

    The *student's* tokens, because KL(S || T) weighs by p_S. Merging outcomes can only lower a divergence, so
    0 <= topk <= :func:`reverse_kl`, with equality at k = V (the sum cut off at k may be negative). Within the tail the
    gradient fits the total mass, not its shape; the choice of the k tokens is not differentiated.

    Raises:
        OpdlabError: if k is not between 1 and V.

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


# --- advantages: OPD, RLVR and mixtures -------------------------------------------------------------------------------


def opd_advantages(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return A_OPD = -(log p_S(a) - log p_T(a)) (B, T), detached, from the log-probabilities of the sampled tokens.

    The paper's OPD (2606.07082, section 5 and Appendix G; the same in slime and at Thinking Machines): each token is
    credited with its own log-ratio and no later one (discount 0). By :func:`policy_gradient`, in expectation over the
    student's tokens, the gradient is that of :func:`reverse_kl` at the sampled states, and the *value* the estimator
    k1. On tokens drawn from someone else it is the gradient of neither KL.

    >>> opd_advantages(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log())  # the teacher doubts: < 0
    tensor([[-0.6931,  0.0000]])
    """
    _check_same_shape(student_logps, teacher_logps)
    return (teacher_logps - student_logps).detach()


def grpo_advantages(rewards: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """Return A_RLVR (B,) of ``rewards`` (B,), where each ``group_size`` successive rewards answer one prompt.

    A = (reward - group mean) / (group standard deviation + eps), of GRPO (2402.03300, section 4.1.2), with the sample
    standard deviation (n - 1) as in TRL. The mean of each group is 0; a group without variance gets exactly 0.

    Raises:
        OpdlabError: if groups of ``group_size`` >= 2 do not fill ``rewards``, or one is not finite.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    if not rewards.isfinite().all():
        raise OpdlabError(f"rewards {_shape(rewards)} hold NaN or infinity: give finite numbers")
    if group_size < 2 or rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise OpdlabError(f"rewards {_shape(rewards)} are not made of groups of {group_size}, with at least 2 in each")
    groups = rewards.reshape(-1, group_size).to(torch.promote_types(rewards.dtype, torch.float32))
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)
    # Rounding in the mean must not make a signal out of equal rewards.
    return advantages.where(groups.amax(1, keepdim=True) != groups.amin(1, keepdim=True), 0.0).flatten()


def policy_gradient(logps: Tensor, advantages: Tensor) -> Tensor:
    """Return -ρ A (B, T), with ρ = p_S / p_S.detach(): its gradient is -A ∇ log p_S, and its *value* -A.

    The objective of PPO (1707.06347, Eq. 7) with one update per rollout, in which its clipping is idle. ``logps``
    (B, T) are the student's of the sampled tokens, ``advantages`` are (B, T), or (B,) for one in each row. For GRPO the
    value is zero after averaging, whatever the gradient: do not plot this loss.

    >>> logps = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    >>> policy_gradient(logps, torch.tensor([[1.0, -1.0]])).sum().backward()
    >>> logps.grad
    tensor([[-1.,  1.]])
    """
    if advantages.dim() == 1 and len(advantages) == len(logps):
        advantages = advantages[:, None]  # Left to broadcasting, (B,) would spread over rows instead whenever B = T.
    else:
        _check_same_shape(advantages, logps)
    ratio = (logps - logps.detach()).exp()
    return -ratio * advantages


# --- reductions: from a loss per token to the scalar that is differentiated -------------------------------------------


def token_mean(per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Return the sum of ``per_token`` (B, T) over ``mask`` (B, T), divided by ``normalizer``, a scalar.

    What ``mask`` leaves out may be NaN. With the number of tokens in the *whole* batch as ``normalizer``, the losses
    and the gradients of its micro-batches add up to its own. By default it is that in ``mask``, and never less than 1.

    >>> token_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    """
    _check_same_shape(per_token, mask)
    total = per_token.where(mask.bool(), 0.0).sum()
    return total / torch.as_tensor(mask.sum() if normalizer is None else normalizer).clamp(min=1)


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


def _kl(p_logps: Tensor, q_logps: Tensor) -> Tensor:
    return (p_logps.exp() * (p_logps - q_logps)).sum(-1)


def _both_logps(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    _check_same_shape(student_logits, teacher_logits)
    return _log_softmax(student_logits), _log_softmax(teacher_logits.detach())


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise OpdlabError(f"two tensors that must have one shape have {_shape(first)} and {_shape(second)}")


def _shape(tensor: Tensor, *more: object) -> str:
    return f"({', '.join(map(str, (*tensor.shape, *more)))})"
