"""Nulls: what a diagnostic shows when there is nothing to see.

Each keeps one trivial property of an update and destroys its geometry: a permutation keeps the sizes of the entries, a
random walk the sizes of the steps; rescaling makes two updates equally large. They are controls that the paper does not
have. Generators are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf

import torch
from torch import Generator, Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry.masks import smallest_entries


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
    needed = here.double().add_(there).div_(2).sub_(w0).div_(noise).nan_to_num_(nan=0.0)
    del noise, here, there
    return smallest_entries(needed, _checks.whole(count, "count", 0, w0.numel()))


def random_walk(norms: Sequence[float], shape: Sequence[int], generator: Generator) -> Iterator[Tensor]:
    """Yield the T cumulative updates (m, n), in float64, of a walk whose steps are independent and Gaussian.

    Its T ``norms`` are the Frobenius norms of the updates between consecutive snapshots; the first counts from w0.

    Raises:
        OpdlabError: if there is no norm, one is negative or not finite, or a dimension is below 1.

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

    Angles and spectral drift grow with the size of an update; this puts two updates on one scale before comparing.

    Raises:
        OpdlabError: if w1 equals w0, which leaves no direction to scale.

    >>> norm_matched(torch.zeros(2), torch.tensor([3.0, 4.0]), 10.0)
    tensor([6., 8.], dtype=torch.float64)
    """
    w0, w1 = _checks.pair(w0, w1)
    _checks.at_least_zero(norm, "norm")
    delta = w1 - w0
    size = float(torch.linalg.vector_norm(delta))
    if size == 0:
        raise OpdlabError("w1 equals w0; expected an update, for a zero one has no direction to scale")
    return delta.mul_(norm / size).add_(w0)
