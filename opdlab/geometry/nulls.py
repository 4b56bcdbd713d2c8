"""Nulls: what a diagnostic shows when there is nothing to see. The paper does not have them.

Each keeps one trivial property of an update and destroys its geometry: a permutation keeps the sizes of the entries, a
random walk the sizes of the steps; rescaling makes two updates equally large. Generators are those of the CPU.

The ruler is the null of sparsity and overlaps, which follow from the size of an update and from the weights that it
meets, before any learning: what Gaussian noise of a given size would change in bfloat16. These are exact expectations
over the noise, so nothing is drawn and nothing is fitted. What differs from them is left for training to explain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import inf, isnan, nan, pi

import torch
from torch import Generator, Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry.masks import low_magnitude_mask, smallest_entries
from opdlab.geometry.spectrum import frobenius

# The chance that noise of standard deviation 1 lies below x.
_TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x.mul_(-(0.5**0.5)).erfc_().div_(2),
    "laplace": lambda x: torch.exp(2**0.5 * x) / 2,
    "t3": lambda x: 0.5 + (torch.atan(x) + x / (1 + x.square())) / pi,
}
_AT_ONCE = 2**16  # weights that are looked at together, so few that they stay in the cache of the processor
_SAMPLED = 2**13  # weights that stand for a matrix where two digits are enough


def permute(delta: Tensor, generator: Generator) -> Tensor:
    """Return the entries of an update in random places, in float64: the same entries without any geometry.

    >>> permute(torch.arange(4.0), torch.Generator().manual_seed(0)).sort().values
    tensor([0., 1., 2., 3.], dtype=torch.float64)
    """
    delta = _checks.finite(delta, "delta")
    # Where 32 bits suffice, they take half the time and memory of 64.
    dtype = torch.int32 if delta.numel() < 2**31 else torch.int64
    places = torch.randperm(delta.numel(), generator=generator, dtype=dtype).to(delta.device)
    return delta.flatten().index_select(0, places).reshape(delta.shape)


def noise_mask(w0: Tensor, count: int, generator: Generator) -> Tensor:
    """Mark the ``count`` weights that growing Gaussian noise would first carry over to another bfloat16 number.

    This is the visible update of noise that is independent of the weights, at the density of a real update: it shows
    what rounding alone prefers. It needs no unrounded update, so it also serves for models that were saved in bfloat16.
    The permuted update does not: there each entry was rounded to the grid of its own weight.

    >>> noise_mask(torch.tensor([1.0, 1e-3, 1.0, 1e-3]), 2, torch.Generator().manual_seed(0))
    tensor([False,  True, False,  True])
    """
    w0 = _checks.finite(w0, "w0")
    noise = torch.randn(w0.shape, generator=generator).to(w0.device)
    here = w0.float().to(torch.bfloat16)
    there = torch.nextafter(here, torch.full_like(here, inf).copysign(noise.to(here.dtype)))
    # How much the noise must grow: the distance to the midpoint of the two numbers over the noise drawn here. It is
    # computed in place to save memory; a weight that no noise could carry over comes last.
    needed = here.double().add_(there).div_(2).sub_(w0).div_(noise)
    needed.nan_to_num_(nan=0.0, posinf=1e139, neginf=1e139)  # of millions of numbers drawn, one or the other is 0
    del noise, here, there
    return smallest_entries(needed, _checks.whole(count, "count", 0, w0.numel()))


def random_walk(norms: Sequence[float], shape: Sequence[int], generator: Generator) -> Iterator[Tensor]:
    """Yield the T cumulative updates (m, n), in float64, of a walk whose steps are independent and Gaussian.

    Its T ``norms`` are the Frobenius norms of the updates between consecutive snapshots; the first counts from w0.

    >>> first, second = random_walk([3.0, 4.0], (8, 8), torch.Generator().manual_seed(0))
    >>> torch.stack([first, second - first]).norm(dim=(1, 2))
    tensor([3.0000, 4.0000], dtype=torch.float64)
    """
    sizes = _checks.finite(torch.as_tensor(norms, dtype=torch.float64), "norms")
    if sizes.ndim != 1 or len(sizes) == 0 or (sizes < 0).any():
        raise OpdlabError(f"norms is {sizes.tolist()}; expected a list of one norm or more, none below 0")
    m, n = (_checks.whole(side, f"shape[{i}]", 1) for i, side in enumerate(shape))
    steps = (torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in sizes)
    return accumulate(step * (size / torch.linalg.vector_norm(step)) for size, step in zip(sizes, steps, strict=True))


def norm_matched(w0: Tensor, w1: Tensor, norm: float) -> Tensor:
    """Return w0 + c (w1 - w0) in float64, with c >= 0 such that the update has Frobenius norm ``norm``.

    Angles and spectral drift grow with the size of an update; this puts two updates on one scale before comparing. If
    w1 equals w0 there is no direction to scale, which is an error.

    >>> norm_matched(torch.zeros(2), torch.tensor([3.0, 4.0]), 10.0)
    tensor([6., 8.], dtype=torch.float64)
    """
    w0, w1 = _checks.pair(w0, w1)
    _checks.at_least_zero(norm, "norm")
    delta = w1 - w0
    size = frobenius(delta)
    if size == 0:
        raise OpdlabError("w1 equals w0; expected an update, for a zero one has no direction to scale")
    return delta.mul_(norm / size).add_(w0)


def change_probability(w0: Tensor, relative_norm: float, noise: str = "gaussian") -> Tensor:
    """Return the chance that noise carries each weight over to another bfloat16 number, in float64 and w0's shape.

    The noise is the same for all weights, and its expected squared norm is that of an update with the given
    ``relative_norm``, ||dW|| / ||w0||. Its kind is "gaussian", or one with heavier tails, "laplace" or "t3" (Student's
    distribution with three degrees of freedom): updates lie between them. All is NaN if the norm is, as where w0 is 0.

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
