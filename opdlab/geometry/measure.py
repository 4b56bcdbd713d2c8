"""Every diagnostic of one matrix, for one update; :func:`opdlab.geometry.summary.means` averages over matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from zlib import crc32

import torch
from torch import Generator, Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry._checks import ratio
from opdlab.geometry.masks import largest_entries, low_magnitude_mask, overlap, principal_mask
from opdlab.geometry.nulls import change_probability, noise_mask, noise_overlap, permute
from opdlab.geometry.sparsity import absolute_sparsity, density, relative_sparsity, update_mask
from opdlab.geometry.spectrum import Svd, frobenius, gaussian_stable_rank, spectral_drift, spectrum_stats, svd
from opdlab.geometry.subspaces import rotation, subspace_energy

# The relative norm of updates of equal size. At this one about half of the weights move visibly, as in the paper's
# OPD: masks then have room to differ (see feasible_range).
MATCHED_NORM = 0.002


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
