"""Losses by name, each from what the models say of a micro-batch, and which of its tokens count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.training import objectives
from opdlab.training.objectives import opd_advantages, policy_gradient, token_logps

#: A loss per token, (student logits (B, T, V), tokens (B, T), teacher logits (B, T, V) or None, advantages (B,) or
#: None, mask (B, T)) -> (B, T). Only those that look beyond a token need the mask, which is False on the padding.
Loss = Callable[..., Tensor]


def _sampled_credits(student: Tensor, tokens: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logps = token_logps(student, tokens)
    return logps, opd_advantages(logps, token_logps(teacher, tokens))


def _cross_entropy(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    return objectives.cross_entropy(student, tokens)


def _reverse_kl(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    return objectives.reverse_kl(student, teacher)


def _forward_kl(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    return objectives.forward_kl(student, teacher)


def _opd_sampled(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    logps = token_logps(student, tokens)
    return policy_gradient(logps, opd_advantages(logps, token_logps(teacher, tokens)))


def _opd_sequence_mean(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    """One credit for all tokens of a completion: the mean of theirs, as sparse as RLVR's."""
    logps, credits = _sampled_credits(student, tokens, teacher)
    return policy_gradient(logps, (credits * mask).sum(1) / mask.sum(1))


def _opd_sign(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    logps, credits = _sampled_credits(student, tokens, teacher)
    return policy_gradient(logps, credits.sign())


def _grpo(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    logps = token_logps(student, tokens)
    return policy_gradient(logps, advantages[:, None].expand_as(logps))


def _random_signs(student: Tensor, tokens: Tensor, teacher: Any, advantages: Any, mask: Any = None) -> Tensor:
    """The null of training noise: credits without any meaning, as large for each token as any other."""
    return policy_gradient(token_logps(student, tokens), advantages)


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "opd_sampled": _opd_sampled,
    "opd_sequence_mean": _opd_sequence_mean,
    "opd_sign": _opd_sign,
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "grpo": _grpo,
    "random_signs": _random_signs,
}
#: Losses that read the teacher's logits, and those that read rewards.
READ_TEACHER = {"opd_sampled", "opd_sequence_mean", "opd_sign", "reverse_kl", "forward_kl"}
READ_REWARDS = {"grpo"}


# --- which tokens count ---------------------------------------------------------------------------------------------

#: What can rank tokens, largest first; the signed log-ratio is the paper's, and first and last are places.
RANKINGS = ("log-ratio", "absolute log-ratio", "entropy", "random", "first", "last")


def token_ranking(ranking: str, student: Tensor, tokens: Tensor, teacher: Any = None, noise: Any = None) -> Tensor:
    """Return the key (B, T) by which tokens are ranked, largest first.

    Args:
        ranking: one of :data:`RANKINGS`.
        student: (B, T, V) logits.
        tokens: (B, T) of the completions.
        teacher: (B, T, V) logits, if the ranking reads them.
        noise: (B, T) the key if chance ranks, drawn by the caller, so that it can be used twice.

    Raises:
        OpdlabError: if ``ranking`` is none of :data:`RANKINGS`.
    """
    if ranking == "entropy":
        return objectives.entropy(student)
    if ranking == "random":
        return noise
    if ranking in ("first", "last"):
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).double()
        return places if ranking == "last" else -places
    if ranking not in RANKINGS:
        raise OpdlabError(f"there is no ranking {ranking!r} of tokens; choose one of {', '.join(RANKINGS)}")
    ratio = token_logps(student, tokens) - token_logps(teacher, tokens)
    return ratio.abs() if ranking == "absolute log-ratio" else ratio


def token_weights(key: Tensor, mask: Tensor, share: float, per_completion: bool = True) -> Tensor:
    """Return the weight of each token (B, T): T / kept for the share with the largest ``key`` (B, T), 0 for the rest.

    The paper's sparsification (2606.07082, section 5.1): the kept tokens make up for the others, so the weights of a
    completion sum to its number of tokens. At least one token is kept, and ties go to the earlier one. Ranked within
    the whole batch instead of each completion, the share may be smaller than one token of a completion.

    Raises:
        OpdlabError: if the share is outside (0, 1].

    >>> key, mask = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    >>> token_weights(key, mask, share=0.3)
    tensor([[3., 0., 0., 0.]])
    """
    if not 0 < share <= 1:
        raise OpdlabError(f"the share of tokens must lie above 0 and not above 1, not {share}")
    shape = key.shape
    if not per_completion:
        key, mask = key.reshape(1, -1), mask.reshape(1, -1)
    counts = mask.sum(1, keepdim=True)
    kept = (share * counts).round().clamp(min=1)
    order = key.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=key.device).expand_as(order))
    return ((rank < kept) & mask).mul(counts / kept).reshape(shape)
