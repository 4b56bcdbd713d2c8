"""The ruler: what Gaussian noise of a given size would change in bfloat16, and the size that a sparsity stands for.

Sparsity and mask overlaps follow from the size of an update and from the weights that it meets, before any learning.
Here both are exact expectations over the noise, so nothing is drawn and nothing is fitted. They tell how much of a
sparsity, or of an overlap, is left for training to explain. The paper does not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isnan, nan, pi

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry.masks import low_magnitude_mask
from opdlab.geometry.spectrum import frobenius

# The chance that noise of standard deviation 1 lies below x.
_TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x.mul_(-(0.5**0.5)).erfc_().div_(2),
    "laplace": lambda x: torch.exp(2**0.5 * x) / 2,
    "t3": lambda x: 0.5 + (torch.atan(x) + x / (1 + x.square())) / pi,
}
# Weights that are looked at together, so few that they stay in the cache of the processor.
_AT_ONCE = 2**16
# Weights that stand for a matrix where two digits are enough.
_SAMPLED = 2**13


def change_probability(w0: Tensor, relative_norm: float, noise: str = "gaussian") -> Tensor:
    """Return the chance that noise carries each weight over to another bfloat16 number, in float64 and w0's shape.

    The noise is the same for all weights, and its expected squared norm is that of an update with the given
    ``relative_norm``, ||dW|| / ||w0||. Its kind is "gaussian", or one with heavier tails, "laplace" or "t3" (Student's
    distribution with three degrees of freedom): updates lie between them. All is NaN if the norm is, as where w0 is 0.

    Raises:
        OpdlabError: if the norm is negative or infinite, an entry of w0 is not finite, or there is no such noise.

    >>> change_probability(torch.tensor([1.0, 0.01]), 0.003).round(decimals=2)
    tensor([0.2100, 0.9900], dtype=torch.float64)
    """
    if noise not in _TAILS:
        raise OpdlabError(f"there is no noise {noise!r}; choose one of {', '.join(_TAILS)}")
    w0 = _checks.finite(w0, "w0")
    if isnan(relative_norm):
        return torch.full_like(w0, nan)
    deviation = _checks.at_least_zero(relative_norm, "relative_norm") * frobenius(w0) / max(w0.numel(), 1) ** 0.5
    if deviation == 0:
        return torch.zeros_like(w0)
    changed = torch.zeros(w0.shape, dtype=torch.float64, device=w0.device)
    for weights, chance in zip(w0.flatten().split(_AT_ONCE), changed.view(-1).split(_AT_ONCE), strict=True):
        here = weights.float().to(torch.bfloat16)
        for side in (inf, -inf):
            # The midpoint to the neighbour on this side, in standard deviations of the noise.
            edge = here.double().add_(torch.nextafter(here, here.new_tensor(side))).div_(2)
            chance += _TAILS[noise](edge.sub_(weights).div_(deviation).abs_().neg_())
    return changed


def noise_sparsity(w0: Tensor, relative_norm: float, noise: str = "gaussian") -> float:
    """Return the expected bfloat16 sparsity of noise of this size on these weights, from 0 to 1; NaN without weights.

    It raises as :func:`change_probability` does.

    >>> round(noise_sparsity(torch.tensor([1.0, 0.01]), 0.003), 2)
    0.4
    """
    chance = change_probability(w0, relative_norm, noise)
    return 1 - float(chance.mean()) if chance.numel() else nan


def noise_overlap(mask: Tensor, chance: Tensor) -> float:
    """Return which share of what noise changes lies in a mask, given :func:`change_probability`; NaN if none changes.

    >>> round(noise_overlap(torch.tensor([False, True]), torch.tensor([0.1, 0.9])), 2)
    0.9
    """
    _checks.same_shape(mask, "mask", chance, "chance")
    total = float(chance.sum())
    return float(chance[_checks.mask(mask, "mask")].sum()) / total if total > 0 else nan


def noise_curve(w0: Tensor, norms: Sequence[float], alpha: float = 0.3) -> dict[str, list[float]]:
    """Return what noise of several sizes does to a matrix: sparsity and low_overlap_a30, beside relative_norm.

    The overlap is with the share ``alpha`` of the smallest weights. Of a large matrix, 8192 entries that are drawn at
    random are looked at, which tell both within 0.01.

    >>> curve = noise_curve(torch.randn(100, 80, generator=torch.Generator().manual_seed(0)), [0.001, 0.01, 0.1])
    >>> [round(share, 1) for share in curve["sparsity"]]
    [0.7, 0.2, 0.0]
    """
    if w0.numel() > _SAMPLED:
        drawn = torch.randint(w0.numel(), (_SAMPLED,), generator=torch.Generator().manual_seed(0))
        w0 = w0.flatten()[drawn.to(w0.device)]
    low, chances = low_magnitude_mask(w0, alpha), [change_probability(w0, size) for size in norms]
    return {
        "relative_norm": list(norms),
        "sparsity": [1 - float(chance.mean()) for chance in chances],
        f"low_overlap_a{100 * alpha:g}": [noise_overlap(low, chance) for chance in chances],
    }


def noise_norm(w0: Tensor, sparsity: float, noise: str = "gaussian") -> float:
    """Return the relative norm at which noise on these weights leaves the share ``sparsity`` unchanged: the ruler.

    It is found by bisection to a relative 1e-6 between 1e-9 and 1e3, and is NaN where no size in between gives it.

    Raises:
        OpdlabError: if ``sparsity`` is no share from 0 to 1.

    >>> w0 = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    >>> round(noise_norm(w0, noise_sparsity(w0, 0.004)), 6)
    0.004
    """
    _checks.at_least_zero(sparsity, "sparsity")
    low, high = 1e-9, 1e3
    if not noise_sparsity(w0, low, noise) >= sparsity >= noise_sparsity(w0, high, noise):
        return nan
    while high > low * (1 + 1e-6):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if noise_sparsity(w0, middle, noise) > sparsity else (low, middle)
    return (low * high) ** 0.5
