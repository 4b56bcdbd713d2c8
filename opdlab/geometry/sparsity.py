"""Which weights moved at all, seen in bfloat16, in which models are stored and served, with 8 significant bits.

An update that does not carry a weight over to the next bfloat16 number leaves no trace: it is invisible. Sparsity is
the share of such weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab.geometry import _checks


def bf16_equal(w0: Tensor, w1: Tensor) -> Tensor:
    """Mark the weights, of any shape, that are the same number after rounding to bfloat16.

    The paper's rule is ``|w1 - w0| <= eta max(|w0|, |w1|)`` on the rounded values, with eta = 1e-3. For normal, nonzero
    numbers and any eta < 2^-9 that is the same as equality, because two neighbouring bfloat16 numbers are further
    apart. Zero needs no case of its own: +0 equals -0, and a move from zero to anything else is a change.

    Source: 2606.07082, Appendix C.3 (the rule); 2511.08567, Proposition E.3 (the equivalence).

    >>> bf16_equal(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.003, 1.005, -0.0]))  # 1 and 1 + 2^-7 are neighbours
    tensor([ True, False,  True])
    """
    w0, w1 = _checks.pair(w0, w1)
    # By way of float32, which is what a trainer keeps; the cast rounds to nearest, ties to even.
    return w0.float().to(torch.bfloat16) == w1.float().to(torch.bfloat16)


def update_mask(w0: Tensor, w1: Tensor) -> Tensor:
    """Mark the visible update, M: the weights that differ after rounding to bfloat16.

    Source: 2606.07082, Appendix C.3.

    >>> update_mask(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.003, 1.005, 1e-30]))
    tensor([False,  True,  True])
    """
    return ~bf16_equal(w0, w1)


def bf16_sparsity(w0: Tensor, w1: Tensor) -> float:
    """Return the share of weights that did not visibly change, from 0 to 1; NaN for an empty tensor.

    Source: 2606.07082, Appendix C.3 and Table 1.

    >>> bf16_sparsity(torch.ones(2, 2), torch.tensor([[1.0, 1.001], [1.002, 2.0]]))
    0.75
    """
    return density(bf16_equal(w0, w1))


def absolute_sparsity(w0: Tensor, w1: Tensor, atol: float = 1e-5) -> float:
    """Return the share of weights with ``|w1 - w0| <= atol``, in the units of the weights; NaN for an empty tensor.

    A rule of other tools. It ignores the size of a weight, so it misses changes of small weights that bfloat16 would
    show, and counts changes of large weights that bfloat16 cannot show.

    Source: the default of public analyses of RL updates (2505.11711).

    >>> absolute_sparsity(torch.tensor([1.0, 1e-3]), torch.tensor([1.01, 1.001e-3]))
    0.5
    """
    w0, w1 = _checks.pair(w0, w1)
    return density((w1 - w0).abs_() <= _checks.at_least_zero(atol, "atol"))


def relative_sparsity(w0: Tensor, w1: Tensor, eta: float = 1e-3) -> float:
    """Return the share of weights with ``|w1 - w0| <= eta max(|w0|, |w1|)``; NaN for an empty tensor.

    The paper's rule without its cast: on rounded weights it is :func:`bf16_sparsity` for any eta below 2^-9, on
    unrounded ones it is smoother, and does not depend on where the bfloat16 numbers happen to lie.

    Source: 2606.07082, Appendix C.3 (the rule); 2511.08567.

    >>> relative_sparsity(torch.tensor([1.0, 1e-3]), torch.tensor([1.01, 1.0001e-3]))
    0.5
    """
    w0, w1 = _checks.pair(w0, w1)
    size = w0.abs()
    bound = torch.maximum(size, w1.abs(), out=size).mul_(_checks.at_least_zero(eta, "eta"))
    return density((w1 - w0).abs_() <= bound)


def density(mask: Tensor) -> float:
    """Return the share of True entries of a mask, from 0 to 1; NaN for an empty mask.

    Source: 2606.07082, Figure 3 (update density, 1 - sparsity of one matrix).

    >>> density(torch.tensor([[True, False], [False, False]]))
    0.25
    """
    return _checks.ratio(int(_checks.mask(mask, "mask").count_nonzero()), mask.numel())
