"""Every diagnostic of one matrix, for one update; :func:`opdlab.geometry.summary.means` averages over matrices.

What is not decomposed is measured some rows at a time: norms, biases, and embeddings, the largest matrices of a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import nan, prod, sqrt
from zlib import crc32

import numpy as np
import torch
from torch import Generator, Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry._checks import ratio
from opdlab.geometry.masks import (
    absolute_sparsity,
    density,
    largest_entries,
    low_magnitude_mask,
    overlap,
    principal_mask,
    relative_sparsity,
    update_mask,
)
from opdlab.geometry.nulls import change_probability, noise_mask, noise_overlap, permute
from opdlab.geometry.spectrum import Svd, frobenius, gaussian_stable_rank, spectral_drift, spectrum_stats, svd
from opdlab.geometry.subspaces import rotation, subspace_energy

# The relative norm of updates of equal size. At this one about half of the weights move visibly, as in the paper's
# OPD: masks then have room to differ (see feasible_range).
MATCHED_NORM = 0.002

_BLOCK = 2**19  # entries that are in memory at a time: 4 MB in float64
_BITS = 16  # bits of the sizes that one pass over the weights looks at

#: Returns the rows of a weight from one number to another.
Read = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Resolution:
    """How finely a matrix is measured; no number of directions may exceed its smaller side."""

    k: int  #: singular vectors in the principal angles, and values in the tail; the paper's 512 is an eighth of 4096
    sim_ks: tuple[int, ...]  #: dimensions of the subspaces in Sim_K; the paper has 16
    mask_rank: int  #: rank of the reconstruction behind the principal mask; 64 in the paper
    alphas: tuple[float, ...]  #: shares of the entries in the masks; the paper's figure has 0.3, its appendix 0.5
    angle_ks: tuple[int, ...] = ()  #: further numbers of singular vectors at which the mean angle is reported
    matched_norm: float = MATCHED_NORM  #: relative norm of the norm-matched updates

    def __post_init__(self) -> None:
        """Reject values that no matrix could be measured with."""
        for name, number in self._directions():
            _checks.whole(number, name, 1)
        for i, alpha in enumerate(self.alphas):
            _checks.share(alpha, f"alphas[{i}]")
        _checks.share(self.matched_norm, "matched_norm")

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Resolution:
        """Return the default for a matrix of this shape: the paper's, or an eighth of the smaller side.

        >>> Resolution.of((4096, 4096)).k, Resolution.of((4096, 4096)).mask_rank
        (512, 64)
        >>> Resolution.of((64, 48))
        Resolution(k=6, sim_ks=(4, 8, 16), mask_rank=6, alphas=(0.3, 0.5), angle_ks=(4,), matched_norm=0.002)
        """
        smaller = min(shape)
        eighth = max(1, smaller // 8)
        sim_ks = tuple(k for k in (4, 8, 16) if k <= smaller)
        return cls(eighth, sim_ks, min(64, eighth), (0.3, 0.5), angle_ks=tuple(k for k in (4, 8, 16) if k < eighth))

    def check_size(self, name: str, w0: Tensor, *needed: str) -> None:
        """Raise if one of the needed numbers of directions exceeds the smaller side of a matrix."""
        largest = min(w0.shape)
        for setting, number in self._directions():
            if setting.partition("[")[0] in needed and number > largest:
                raise OpdlabError(f"{setting} is {number}; expected {largest} at most, as {name} is {tuple(w0.shape)}")

    def _directions(self) -> Iterator[tuple[str, int]]:
        yield from (("k", self.k), ("mask_rank", self.mask_rank))
        for name in ("sim_ks", "angle_ks"):
            yield from ((f"{name}[{i}]", k) for i, k in enumerate(getattr(self, name)))

    @property
    def vectors(self) -> int:
        """The number of singular vectors of w0 that the static diagnostics need."""
        return max(self.k, self.mask_rank, *self.angle_ks)


def measure_matrix(
    name: str,
    w0: Tensor,
    w1: Tensor,
    resolution: Resolution | None = None,
    seed: int = 0,
    svd0: Svd | None = None,
    nulls: bool = True,
) -> dict[str, float]:
    """Measure the update of one matrix; what is undefined is NaN.

    Keys:

    - k, mask_rank and, with nulls, matched_norm: the parts of the resolution that no column's name tells;
    - frobenius, relative_norm, and relative_operator_norm, the ratio of the largest singular values of update and w0;
    - stable_rank, effective_rank, effective_rank_squared, top_energy and hill (the last two of k singular values),
      each with _null: of the permuted, unrounded update; and stable_rank_gaussian;
    - energy_left, energy_right, energy_both: of the update in the top-k subspaces of w0, each with _random: k/m, k/n
      and their product;
    - of the update and, as sparsity_matched and so on, of the update scaled to the relative norm matched_norm:
      sparsity, sparsity_absolute, sparsity_relative, density; nss; angle_left_mean, _median, _max and the same on the
      right (in degrees, of k angles), and angle_left_mean_k8 for each of ``resolution.angle_ks``; for each alpha, in
      percent, and for the masks principal, low and principal_only (principal and not low): principal_overlap_a30 (of
      the visible update) and principal_overlap_a30_null (of the permuted update, rounded to bfloat16 anew);
    - principal_overlap_a30_noise, of Gaussian noise at the same density (:func:`~opdlab.geometry.noise_mask`);
    - sparsity_ruler and principal_overlap_a30_ruler, of noise of the same norm (the ruler,
      :func:`~opdlab.geometry.change_probability`);
    - principal_overlap_a30_top, of the tenth of the entries where the unrounded update is largest, and
      principal_share_a30, the share of the entries in the mask, which is its random rate.

    Args:
        name: of the matrix: it seeds the permutation, and stands in errors.
        w0: (m, n) weights before.
        w1: (m, n) weights after.
        resolution: by default :meth:`Resolution.of` the shape.
        seed: of the permutation: a null is one draw, the same whatever else is measured.
        svd0: the Svd of w0, if it is already known, with :attr:`Resolution.vectors` vectors or more.
        nulls: whether to compute what needs a permuted or a norm-matched update, about a third of the time.

    Raises:
        OpdlabError: naming the matrix, if it is not finite, the shapes differ or the resolution asks for more.

    Source: 2606.07082, Appendices C.3 and E; the nulls are additions.

    >>> at = Resolution(k=4, sim_ks=(2,), mask_rank=2, alphas=(0.25,))
    >>> found = measure_matrix("up_proj", torch.eye(4), 1.5 * torch.eye(4), at)
    >>> [round(found[column], 4) for column in ("sparsity", "nss", "stable_rank")]
    [0.75, 0.5, 4.0]
    """
    _checks.same_shape(w0, f"{name} in w0", w1, f"{name} in w1")
    w0 = _checks.matrix(w0, f"{name} in w0")
    at = resolution or Resolution.of(tuple(w0.shape))
    at.check_size(name, w0, "k", "mask_rank", "angle_ks")
    svd0 = svd0 or svd(w0, k=at.vectors)
    # Large tensors are dropped once they have been used: at most six float64 matrices of this shape are alive.
    masks = {
        f"a{100 * alpha:g}": (principal_mask(svd0, at.mask_rank, alpha), low_magnitude_mask(w0, alpha))
        for alpha in at.alphas
    }
    w1 = _checks.matrix(w1, f"{name} in w1")
    of_size, matched = _size_row(w0, w1, svd0, masks, at), {}
    delta = w1 - w0
    del w1
    size, size0 = frobenius(delta), frobenius(w0)
    row: dict[str, float] = {
        "k": at.k,
        "mask_rank": at.mask_rank,
        "frobenius": size,
        "relative_norm": ratio(size, size0),
    }
    row |= spectrum_stats(delta, at.k)
    row["relative_operator_norm"] = ratio(size / row["stable_rank"] ** 0.5, float(svd0.s[0]))
    row |= {f"energy_{side}": share for side, share in subspace_energy(delta, svd0, at.k)._asdict().items()}
    top = largest_entries(delta, round(0.1 * delta.numel()))
    row |= _overlaps(masks, top if size > 0 else torch.zeros_like(top), "_top")
    row |= {key.replace("overlap", "share"): of for key, of in _overlaps(masks, torch.ones_like(top)).items()}
    if nulls:
        row["matched_norm"] = at.matched_norm
        left, right = (at.k / side for side in w0.shape)
        row |= {"energy_left_random": left, "energy_right_random": right, "energy_both_random": left * right}
        row["stable_rank_gaussian"] = gaussian_stable_rank(*w0.shape)
        random = generator_of(seed, name)
        shuffled = permute(delta, random)
        row |= {f"{key}_null": value for key, value in spectrum_stats(shuffled, at.k).items()}
        of_size |= _overlaps(masks, update_mask(w0, w0 + shuffled), "_null")
        scale = at.matched_norm * size0 / size if size > 0 else 0.0
        null = _overlaps(masks, update_mask(w0, torch.add(w0, shuffled, alpha=scale)), "_null")
        del shuffled
        row |= _overlaps(masks, noise_mask(w0, round(of_size["density"] * w0.numel()), random), "_noise")
        chance = change_probability(w0, row["relative_norm"])
        row |= {"sparsity_ruler": 1 - float(chance.mean())} | _overlaps(masks, chance, "_ruler")
        del chance
        matched = dict.fromkeys(of_size, nan)
        if scale > 0:
            w1 = torch.add(w0, delta, alpha=scale)
            del delta
            matched = _size_row(w0, w1, svd0, masks, at) | null
    return row | of_size | {f"{key}_matched": value for key, value in matched.items()}


def visible_shares(w0: Tensor, w1: Tensor, visible: Tensor) -> dict[str, float]:
    """Return how much of an update is visible, by the three rules."""
    return {
        "sparsity": density(~visible),
        "sparsity_absolute": absolute_sparsity(w0, w1),
        "sparsity_relative": relative_sparsity(w0, w1),
        "density": density(visible),
    }


Masks = dict[str, tuple[Tensor, Tensor]]  # by share, as in a30: the principal and the low-magnitude weights


def _overlaps(masks: Masks, update: Tensor, suffix: str = "") -> dict[str, float]:
    """Return the overlaps of an update with the masks, and with the weights that are principal and not small.

    The update marks what moved, or says how probable it is that each weight moves.
    """
    of, row = overlap if update.dtype == torch.bool else noise_overlap, {}
    for percent, (principal, low) in masks.items():
        for star, mask in {"principal": principal, "low": low, "principal_only": principal & ~low}.items():
            row[f"{star}_overlap_{percent}{suffix}"] = of(mask, update)
    return row


def _size_row(w0: Tensor, w1: Tensor, svd0: Svd, masks: Masks, at: Resolution) -> dict[str, float]:
    """Return the diagnostics that depend on the size of the update."""
    svd1, visible = svd(w1, k=max((at.k, *at.angle_ks))), update_mask(w0, w1)
    row = visible_shares(w0, w1, visible) | {"nss": spectral_drift(svd0, svd1)}
    for side, angles in rotation(svd0, svd1, at.k)._asdict().items():
        row[f"angle_{side}_mean"] = float(angles.mean())
        row[f"angle_{side}_median"] = float(angles.quantile(0.5))
        row[f"angle_{side}_max"] = float(angles.max())
    for k in at.angle_ks:
        for side, angles in rotation(svd0, svd1, k)._asdict().items():
            row[f"angle_{side}_mean_k{k}"] = float(angles.mean())
    return row | _overlaps(masks, visible)


def generator_of(seed: int, name: str) -> Generator:
    """Return the random number generator for the nulls of one matrix."""
    # From the name, not from the position: the null of a matrix does not depend on which others are measured.
    return torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))


def measure_rows(
    name: str,
    shape: tuple[int, ...],
    before: Read,
    after: Read,
    alphas: tuple[float, ...] = (),
    seed: int = 0,
    nulls: bool = True,
) -> dict[str, float]:
    """Measure the update of a weight of any shape without any directions, and without holding all of it in memory.

    Args:
        name: of the weight: it seeds the permutation.
        shape: of the weight.
        before: reads rows of it before, from one number to another.
        after: the same after.
        alphas: shares of the entries in the masks of small weights; only for what has rows and columns.
        seed: of the permutation.
        nulls: whether to permute.

    Keys: frobenius, relative_norm, sparsity, sparsity_absolute, sparsity_relative and density; and for each of
    ``alphas`` low_overlap_a30 and low_share_a30, all as :func:`~opdlab.geometry.measure_matrix` has them; and
    low_overlap_a30_null, where the update was permuted within blocks of rows.

    >>> w0, w1 = torch.tensor([[0.1, 2.0], [3.0, 4.0]]), torch.tensor([[0.2, 2.0], [3.0, 5.0]])
    >>> before, after = (lambda start, stop, w=w: w[start:stop] for w in (w0, w1))
    >>> found = measure_rows("wte.weight", (2, 2), before, after, (0.25,))
    >>> found["sparsity"], found["low_overlap_a25"]
    (0.5, 0.5)
    """
    rows, entries = shape[0] if shape else 1, prod(shape)
    step = max(1, _BLOCK // max(1, prod(shape[1:])))
    counts = {f"a{100 * alpha:g}": round(alpha * entries) for alpha in alphas}

    def blocks(read: Read) -> Iterator[Tensor]:
        return (read(start, min(start + step, rows)) for start in range(0, max(1, rows), step))

    limits = {percent: _Limit(partial(blocks, before), count) for percent, count in counts.items()}
    random = generator_of(seed, name)
    squares, totals = np.zeros(2), Counter[str]()
    for w0, w1 in zip(blocks(before), blocks(after), strict=True):
        origin, moved = w0.double(), update_mask(w0, w1)
        delta = w1.double() - origin
        squares += [float(delta.square().sum()), float(origin.square().sum())]
        shares = visible_shares(w0, w1, moved).items()
        found = {key: round(share * w0.numel()) if w0.numel() else 0 for key, share in shares}
        masks = {"": moved}
        if counts and nulls:
            masks["_null"] = update_mask(w0, origin + permute(delta, random))
            found["null"] = int(masks["_null"].count_nonzero())
        for percent, limit in limits.items():
            small = limit.take(w0)
            found |= {f"low_overlap_{percent}{of}": int((small & mask).count_nonzero()) for of, mask in masks.items()}
        totals.update(found)
    size, size0 = (sqrt(square) for square in squares)
    row = {"frobenius": size, "relative_norm": ratio(size, size0)}
    visible, permuted = totals["density"], totals.pop("null", 0)
    for key, count in totals.items():
        row[key] = ratio(count, permuted if key.endswith("_null") else visible if "overlap" in key else entries)
    return row | {f"low_share_{percent}": ratio(count, entries) for percent, count in counts.items()}


class _Limit:
    """The size below which a number of weights lie; of those with exactly this size the first fill up the number."""

    def __init__(self, blocks: Callable[[], Iterator[Tensor]], count: int):
        """Find the size of that rank, some of its bits at a time."""
        self.bits, self.ties, shift = 0, count, None
        while shift != 0:
            tally = np.zeros(2**_BITS, dtype=np.int64)
            for w0 in blocks():
                sizes = _size_bits(w0).flatten()
                left = 8 * sizes.element_size() if shift is None else shift
                inside = sizes if shift is None else sizes[(sizes >> left) == self.bits]
                tally += np.bincount((inside >> (left - _BITS)).cpu().numpy() & (2**_BITS - 1), minlength=2**_BITS)
            shift, below = left - _BITS, np.concatenate([[0], tally.cumsum()])
            here = int(np.searchsorted(below[1:], max(1, self.ties)))
            self.bits, self.ties = (self.bits << _BITS) + here, self.ties - int(below[here])

    def take(self, w0: Tensor) -> Tensor:
        """Mark the small weights of the next block."""
        sizes = _size_bits(w0)
        equal = sizes == self.bits
        first = equal & (equal.flatten().cumsum(0).reshape(equal.shape) <= self.ties)
        self.ties -= int(first.count_nonzero())
        return (sizes < self.bits) | first


def _size_bits(w: Tensor) -> Tensor:
    """Return whole numbers in the order of the sizes of the entries: the bits of their absolute values."""
    wide = w.dtype == torch.float64
    return w.abs().view(torch.int64) if wide else w.float().abs().view(torch.int32)
