"""Coordinates: which weights moved visibly, and whether these are the principal ones, or the small ones.

Models are stored and served in bfloat16, with 8 significant bits. An update that does not carry a weight over to the
next bfloat16 number leaves no trace: it is invisible. Sparsity is the share of such weights.

A mask M* marks a share alpha of the weights of one matrix by a property of w0 alone. A random update has overlap alpha
with it. So has, within narrow limits (:func:`~opdlab.geometry.feasible_range`), any update that moves nearly every
weight.
"""

from __future__ import annotations

from math import nan

import numpy as np
import torch
from torch import Tensor

from opdlab.geometry import _checks
from opdlab.geometry._checks import ratio
from opdlab.geometry.spectrum import Svd, svd


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
    return ratio(int(_checks.mask(mask, "mask").count_nonzero()), mask.numel())


def largest_entries(values: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` entries of largest magnitude; ties go to the first in row-major order.

    >>> largest_entries(torch.tensor([1.0, -3.0, 2.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    return _smallest(_checks.finite(values, "values").abs().neg_(), count)


def smallest_entries(values: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` entries of smallest magnitude; ties go to the first in row-major order.

    >>> smallest_entries(torch.tensor([1.0, -3.0, 2.0, 2.0]), 2)
    tensor([ True, False,  True, False])
    """
    return _smallest(_checks.finite(values, "values").abs(), count)


def principal_mask(w0: Tensor | Svd, r: int, alpha: float) -> Tensor:
    """Mark the principal weights, M_princ: the round(alpha m n) largest entries of the rank-r reconstruction of w0.

    Source: 2606.07082, Appendix C.3, where r is 64 and alpha 0.5; only the 0.3 of the text can have produced its
    Figure 3 (see :func:`feasible_range`). The mask is that of LIFT, 2506.00772, by way of 2511.08567.

    >>> principal_mask(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1, 0.25)
    tensor([[False, False],
            [False,  True]])
    """
    reconstruction = reconstruct(w0, r)
    return largest_entries(reconstruction, round(_checks.share(alpha, "alpha") * reconstruction.numel()))


def reconstruct(w0: Tensor | Svd, r: int) -> Tensor:
    """Return the matrix (m, n) of rank r that is nearest to w0.

    >>> reconstruct(torch.tensor([[2.0, 2.0], [1.0, -1.0]]), 1).abs().round(decimals=6)
    tensor([[2., 2.],
            [0., 0.]], dtype=torch.float64)
    """
    available = len(w0.vh) if isinstance(w0, Svd) else min(w0.shape)
    u, s, vh = svd(w0, "w0", _checks.whole(r, "r", 1, available))
    return (u[:, :r] * s[:r]) @ vh[:r]


def low_magnitude_mask(w0: Tensor, alpha: float) -> Tensor:
    """Mark the small weights, M_low: the share alpha of the entries of w0, of any shape, that are nearest to zero.

    Source: 2606.07082, Appendix C.3; 2511.08567.

    >>> low_magnitude_mask(torch.tensor([-0.1, 3.0, 0.1, -2.0]), 0.25)
    tensor([ True, False, False, False])
    """
    return smallest_entries(_checks.finite(w0, "w0"), round(_checks.share(alpha, "alpha") * w0.numel()))


def overlap(mask_star: Tensor, update: Tensor) -> float:
    """Return ``|M* ∩ M| / |M|``, the share of the update M that falls inside M*; NaN if M is empty.

    Source: 2606.07082, Appendix C.3 and Figure 3.

    >>> overlap(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True]))
    0.3333333333333333
    """
    _checks.same_shape(mask_star, "mask_star", update, "update")
    mask_star, update = _checks.mask(mask_star, "mask_star"), _checks.mask(update, "update")
    return ratio(int((mask_star & update).count_nonzero()), int(update.count_nonzero()))


def enrichment(overlap: float, alpha: float) -> float:
    """Return overlap / alpha, how many times more of the update lies in the mask than a random one would put there.

    An empty mask, alpha = 0, gives NaN. Source: derived from 2606.07082, Figure 3.

    >>> enrichment(0.5359, 0.3)
    1.786...
    """
    return ratio(overlap, _checks.share(alpha, "alpha"))


def jaccard(a: Tensor, b: Tensor) -> float:
    """Return ``|A ∩ B| / |A ∪ B|``, from 0 (no weight in both masks) to 1 (the same mask); NaN if both are empty.

    Source: 2511.08567, which compares the visible updates of different runs with it.

    >>> jaccard(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
    0.3333333333333333
    """
    _checks.same_shape(a, "a", b, "b")
    a, b = _checks.mask(a, "a"), _checks.mask(b, "b")
    return ratio(int((a & b).count_nonzero()), int((a | b).count_nonzero()))


def independent_jaccard(density_a: float, density_b: float) -> float:
    """Return the Jaccard index of two large, independent masks of these densities; NaN if both are empty.

    Source: 2511.08567, its random baseline.

    >>> independent_jaccard(0.5, 0.5)
    0.3333333333333333
    """
    both = _checks.share(density_a, "density_a") * _checks.share(density_b, "density_b")
    return ratio(both, density_a + density_b - both)


def feasible_range(alpha: float, density: float) -> tuple[float, float]:
    """Return the smallest and largest overlap that an update of this density can have with a mask of share alpha.

    They are (alpha + density - 1) / density and alpha / density, inside [0, 1]: a dense update must cover nearly all of
    M*, and cannot lie in it alone. Both are NaN for an empty update.

    Source: counting. The paper's SFT overlap of 0.3188 at density 0.9273 needs alpha = 0.3; with 0.5 it is impossible:

    >>> [f"{limit:.4f}" for limit in feasible_range(0.3, 0.9273)]
    ['0.2451', '0.3235']
    >>> [f"{limit:.4f}" for limit in feasible_range(0.5, 0.9273)]
    ['0.4608', '0.5392']
    """
    alpha, density = _checks.share(alpha, "alpha"), _checks.share(density, "density")
    if density == 0:
        return nan, nan
    return max(0.0, (alpha + density - 1) / density), min(1.0, alpha / density)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest values: a selection, far faster than a sort."""
    if _checks.whole(count, "count", 0, values.numel()) == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    if flat.device.type != "cpu":
        threshold = flat.kthvalue(count).values
    else:  # in half the memory of kthvalue
        threshold = torch.from_numpy(np.partition(flat.numpy(), count - 1))[count - 1]
    mask = (values < threshold).contiguous()
    ties = (values == threshold).flatten().nonzero().squeeze(1)
    mask.view(-1)[ties[: count - int(mask.count_nonzero())]] = True
    return mask
