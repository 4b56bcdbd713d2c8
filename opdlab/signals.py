"""Signals: the loss per token that an arm takes from a micro-batch, and which tokens it takes it from.

A signal turns student logits (B, T, V), tokens (B, T), teacher logits (B, T, V) or None, and the advantage of each
row (B,) or None into a loss (B, T). ``mask`` (B, T) is False on padding; only signals that look beyond a token need it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab import objectives
from opdlab.errors import OpdlabError

Signal = Callable[..., Tensor]


def _cross_entropy(student, tokens, teacher, advantages, mask=None):
    return objectives.cross_entropy(student, tokens)


def _opd_sampled(student, tokens, teacher, advantages, mask=None):
    logps = objectives.token_logps(student, tokens)
    return objectives.policy_gradient(logps, objectives.opd_advantages(logps, objectives.token_logps(teacher, tokens)))


def _opd_sequence_mean(student, tokens, teacher, advantages, mask):
    """One credit for all tokens of a completion: the mean of theirs, as sparse as RLVR's."""
    logps = objectives.token_logps(student, tokens)
    credits = objectives.opd_advantages(logps, objectives.token_logps(teacher, tokens)) * mask
    return objectives.policy_gradient(logps, credits.sum(1) / mask.sum(1))


def _opd_sign(student, tokens, teacher, advantages, mask=None):
    logps = objectives.token_logps(student, tokens)
    credits = objectives.opd_advantages(logps, objectives.token_logps(teacher, tokens))
    return objectives.policy_gradient(logps, credits.sign())


def _reverse_kl(student, tokens, teacher, advantages, mask=None):
    return objectives.reverse_kl(student, teacher)


def _forward_kl(student, tokens, teacher, advantages, mask=None):
    return objectives.forward_kl(student, teacher)


def _grpo(student, tokens, teacher, advantages, mask=None):
    logps = objectives.token_logps(student, tokens)
    return objectives.policy_gradient(logps, advantages[:, None].expand_as(logps))


SIGNALS: dict[str, Signal] = {
    "cross_entropy": _cross_entropy,
    "opd_sampled": _opd_sampled,
    "opd_sequence_mean": _opd_sequence_mean,
    "opd_sign": _opd_sign,
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "grpo": _grpo,
}
#: Signals that read the teacher's logits, and those that read rewards.
OF_TEACHER = ("opd_sampled", "opd_sequence_mean", "opd_sign", "reverse_kl", "forward_kl")
OF_REWARDS = ("grpo",)


# --- token sparsification ---------------------------------------------------------------------------------------------

#: What can rank tokens, largest first; the signed log-ratio is the paper's.
RANKINGS = ("log-ratio", "absolute log-ratio", "entropy", "random")


def token_ranking(
    ranking: str, student: Tensor, tokens: Tensor, teacher: Tensor | None, noise: Tensor | None = None
) -> Tensor:
    """Return the key (B, T) by which tokens are ranked, largest first.

    Args:
        ranking: what ranks them.
        student: (B, T, V) its logits.
        tokens: (B, T) of the completions.
        teacher: (B, T, V) its logits, if what ranks reads them.
        noise: (B, T) the key where chance ranks, drawn by who calls, so that it can be used twice.

    Raises:
        OpdlabError: if ``ranking`` is none of :data:`opdlab.signals.RANKINGS`.
    """
    if ranking == "entropy":
        return objectives.entropy(student)
    if ranking == "random":
        return noise
    if ranking not in RANKINGS:
        raise OpdlabError(f"there is no ranking {ranking!r} of tokens; choose one of {', '.join(RANKINGS)}")
    ratio = objectives.token_logps(student, tokens) - objectives.token_logps(teacher, tokens)
    return ratio.abs() if ranking == "absolute log-ratio" else ratio


def token_weights(key: Tensor, mask: Tensor, share: float, per_completion: bool = True) -> Tensor:
    """Return the weight of each token (B, T): T / kept for the share with the largest ``key`` (B, T), 0 for the rest.

    The paper's sparsification (2606.07082, section 5.1): the kept tokens make up for the others, so the weights of a
    completion sum to its number of tokens. At least one token is kept.

    Args:
        key: what ranks the tokens; ties go to the earlier one.
        mask: (B, T) False on the padding.
        share: of the tokens that are kept, more than 0 and 1 at most.
        per_completion: rank within each completion, as the paper does, or else within the whole batch, where shares
            may be smaller than one token of a completion.

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
