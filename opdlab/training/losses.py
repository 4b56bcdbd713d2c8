"""Losses by name, each from what the models say of a micro-batch, and which of its tokens count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab.training import objectives
from opdlab.training.objectives import opd_advantages, policy_gradient, token_logps

#: A loss per token, (student logits (B, T, V), tokens (B, T), teacher logits (B, T, V) or None, advantages (B,) or
#: (B, T) or None, mask (B, T)) -> (B, T). Only those that look beyond a token need the mask, False on the padding.
Loss = Callable[..., Tensor]


def _opd(credit: Callable[..., Tensor]) -> Loss:
    """Return the policy gradient of what ``credit`` makes of the paper's advantages (B, T) and the mask."""

    def loss(student: Tensor, tokens: Tensor, teacher: Tensor, advantages: Any = None, mask: Any = None) -> Tensor:
        logps = token_logps(student, tokens)
        return policy_gradient(logps, credit(opd_advantages(logps, token_logps(teacher, tokens)), mask))

    return loss


def _rewarded(student: Tensor, tokens: Tensor, teacher: Any, advantages: Tensor, mask: Any = None) -> Tensor:
    return policy_gradient(token_logps(student, tokens), advantages)


LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda student, tokens, *_: objectives.cross_entropy(student, tokens),
    "opd_sampled": _opd(lambda credits, mask: credits),
    # One credit for all tokens of a completion: the mean of theirs, as sparse as RLVR's.
    "opd_sequence_mean": _opd(lambda credits, mask: (credits * mask).sum(1) / mask.sum(1)),
    "opd_sign": _opd(lambda credits, mask: credits.sign()),
    "reverse_kl": lambda student, tokens, teacher, *_: objectives.reverse_kl(student, teacher),
    "forward_kl": lambda student, tokens, teacher, *_: objectives.forward_kl(student, teacher),
    "grpo": _rewarded,
    # The null of training noise: credits without any meaning, as large for each token as any other.
    "random_signs": _rewarded,
}
#: Losses that read the teacher's logits, and those that read rewards.
READ_TEACHER = {"opd_sampled", "opd_sequence_mean", "opd_sign", "reverse_kl", "forward_kl"}
READ_REWARDS = {"grpo"}


# --- which tokens count ---------------------------------------------------------------------------------------------


def _place(student: Tensor, tokens: Tensor, teacher: Any = None, noise: Any = None) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).double()


#: What can rank tokens, largest first, (student logits (B, T, V), tokens (B, T), teacher logits (B, T, V) or None,
#: noise (B, T) or None) -> (B, T). The log-ratio is the paper's; chance is the noise, which its caller draws.
RANKINGS: dict[str, Callable[..., Tensor]] = {
    "log-ratio": lambda student, tokens, teacher, *_: token_logps(student, tokens) - token_logps(teacher, tokens),
    "entropy": lambda student, *_: objectives.entropy(student),
    "random": lambda student, tokens, teacher, noise: noise,
    "first": lambda *of: -_place(*of),
    "last": _place,
}


def token_weights(key: Tensor, mask: Tensor, share: float, per_completion: bool = True) -> Tensor:
    """Return the weight of each token (B, T): T / kept for the share with the largest ``key`` (B, T), 0 for the rest.

    The paper's sparsification (2606.07082, section 5.1): the kept tokens make up for the others, so the weights of a
    completion sum to its number of tokens. At least one token is kept, and ties go to the earlier one. Ranked within
    the whole batch instead of each completion, the share may be smaller than one token of a completion.

    >>> key, mask = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    >>> token_weights(key, mask, share=0.3)
    tensor([[3., 0., 0., 0.]])
    """
    shape = key.shape
    if not per_completion:
        key, mask = key.reshape(1, -1), mask.reshape(1, -1)
    counts = mask.sum(1, keepdim=True)
    kept = (share * counts).round().clamp(min=1)
    order = key.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return ((rank < kept) & mask).mul(counts / kept).reshape(shape)
