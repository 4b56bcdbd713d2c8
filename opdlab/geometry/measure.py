"""Tables: every diagnostic of every matrix, for one update and for the course of a training.

One row is one matrix (at one snapshot). To summarise as the paper does, take the unweighted mean over matrices of any
column but sparsity, whose overall value weighs each matrix by its number of parameters:
:func:`~opdlab.geometry.overall_sparsity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import nan, prod
from zlib import crc32

import torch
from pandas import DataFrame, concat
from torch import Generator, Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry.masks import largest_entries, low_magnitude_mask, overlap, principal_mask
from opdlab.geometry.matrices import describe, float64_matrices
from opdlab.geometry.nulls import norm_matched, permute, random_walk
from opdlab.geometry.sparsity import absolute_sparsity, bf16_sparsity, density, relative_sparsity, update_mask
from opdlab.geometry.spectrum import (
    Svd,
    effective_rank,
    frobenius,
    gaussian_stable_rank,
    hill,
    relative_norm,
    singular_values,
    spectral_drift,
    stable_rank,
    svd,
    top_energy,
)
from opdlab.geometry.subspaces import rotation, sim_k, similarity_to_end, subspace_energy, top_left, top_right

# Share of the entries in the overlaps that look at the largest changes, before any rounding.
LARGEST = 0.1


@dataclass(frozen=True)
class GeometrySettings:
    """The resolution of the measurements; none may exceed the smaller side of a measured matrix."""

    # Singular vectors in the principal angles. The paper's 512 is an eighth of its matrices' 4096.
    k: int
    # Dimensions of the subspaces in Sim_K; the paper has 16.
    sim_ks: tuple[int, ...]
    # Rank of the reconstruction behind the principal mask; 64 in the paper.
    mask_rank: int
    # Shares of the entries in the masks; the paper's figure has 0.3, its appendix 0.5.
    alphas: tuple[float, ...]
    # Further numbers of singular vectors at which the mean angle is reported.
    angle_ks: tuple[int, ...] = ()
    # Relative norm to which updates are scaled before they are compared at equal size. At this one about half of the
    # weights move visibly, as in the paper's OPD: masks then have room to differ (see feasible_range).
    matched_norm: float = 0.002

    def __post_init__(self) -> None:
        """Refuse what no matrix could be measured with."""
        _checks.whole(self.k, "k", 1)
        _checks.whole(self.mask_rank, "mask_rank", 1)
        for i, k in enumerate(self.sim_ks):
            _checks.whole(k, f"sim_ks[{i}]", 1)
        for i, k in enumerate(self.angle_ks):
            _checks.whole(k, f"angle_ks[{i}]", 1)
        for i, alpha in enumerate(self.alphas):
            _checks.share(alpha, f"alphas[{i}]")
        _checks.share(self.matched_norm, "matched_norm")


def measure_pair(
    w0s: Mapping[str, Tensor],
    w1s: Mapping[str, Tensor],
    settings: GeometrySettings,
    seed: int = 0,
    base_svds: Mapping[str, Svd] | None = None,
) -> DataFrame:
    """Measure one update: every static diagnostic, with its nulls, one row per matrix.

    Columns: matrix, layer, module, block, rows, cols, parameters, and those of :func:`measure_matrix`.

    Args:
        w0s: state dict before; :func:`~opdlab.geometry.weight_matrices` chooses from it.
        w1s: state dict after, with the same matrices.
        settings: the resolution.
        seed: of the permutations. A null is one draw, the same whatever else is measured.
        base_svds: :func:`~opdlab.geometry.decompose` of ``w0s``, if it is at hand.

    Raises:
        OpdlabError: naming the matrix, if one is missing, has another shape, is not finite or is smaller than a setting
            allows, or if ``base_svds`` belongs to other weights.

    Source: 2606.07082, Appendices C.3 and E; the nulls are additions.

    >>> w0s = {"layers.0.mlp.up_proj.weight": torch.eye(4)}
    >>> w1s = {"layers.0.mlp.up_proj.weight": 1.5 * torch.eye(4)}
    >>> table = measure_pair(w0s, w1s, GeometrySettings(k=4, sim_ks=(2,), mask_rank=2, alphas=(0.25,)))
    >>> table[["layer", "module", "sparsity", "nss", "stable_rank"]]
       layer   module  sparsity  nss  stable_rank
    0      0  up_proj      0.75  0.5          4.0
    """
    w0s = float64_matrices(w0s, "w0s")
    w1s = float64_matrices(w1s, "w1s", like=w0s)
    rows = []
    for name, w0 in w0s.items():
        svd0 = None if base_svds is None else _base_svd(name, w0, base_svds)
        rows.append(_identity(name, w0) | measure_matrix(name, w0, w1s[name], settings, seed, svd0))
    return DataFrame(rows)


def measure_matrix(
    name: str,
    w0: Tensor,
    w1: Tensor,
    settings: GeometrySettings,
    seed: int = 0,
    svd0: Svd | None = None,
    nulls: bool = True,
) -> dict[str, float]:
    """Measure the update of one matrix; what is undefined is NaN.

    Keys:

    - frobenius, relative_norm;
    - stable_rank, effective_rank, effective_rank_squared, top_energy and hill (both of ``settings.k`` singular values),
      each with _null: of the permuted, unrounded update; and stable_rank_gaussian;
    - energy_left, energy_right, energy_both: of the update in the top-k subspaces of w0, each with _random: k/m, k/n
      and their product;
    - of the update and, as sparsity_matched and so on, of the norm-matched update with relative norm
      ``settings.matched_norm``: sparsity, sparsity_absolute, sparsity_relative, density; nss; angle_left_mean, _median,
      _max and angle_right_mean, _median, _max (degrees, of ``settings.k`` angles), and angle_left_mean_k8 for each k of
      ``settings.angle_ks``; for each alpha, written in percent, and for the masks principal, low and principal_only
      (principal and not low): principal_overlap_a30 (of the visible update) and principal_overlap_a30_null (of the
      permuted update, rounded to bfloat16 anew);
    - principal_overlap_a30_top, of the tenth of the entries where the unrounded update is largest, and
      principal_share_a30, the share of the entries in the mask, which is its random rate.

    Args:
        name: of the matrix: it seeds the permutation, and stands in errors.
        w0: (m, n) weights before.
        w1: (m, n) weights after.
        settings: the resolution.
        seed: of the permutation.
        svd0: the Svd of w0, if it is at hand, with ``max(settings.k, settings.mask_rank)`` vectors at least.
        nulls: whether to compute what needs a permuted or a norm-matched update, about two thirds of the work.

    Raises:
        OpdlabError: naming the matrix, if it is not finite or smaller than a setting allows, or the shapes differ.
    """
    w0, w1 = _checks.matrix(w0, f"{name} in w0s"), _checks.matrix(w1, f"{name} in w1s")
    _checks.same_shape(w0, f"{name} in w0s", w1, f"{name} in w1s")
    ks = {f"angle_ks[{i}]": k for i, k in enumerate(settings.angle_ks)}
    _check_size(name, w0, k=settings.k, mask_rank=settings.mask_rank, **ks)
    svd0 = svd0 or svd(w0, k=max(settings.k, settings.mask_rank, *settings.angle_ks))
    delta = w1 - w0
    masks = {}
    for alpha in settings.alphas:
        principal, low = principal_mask(svd0, settings.mask_rank, alpha), low_magnitude_mask(w0, alpha)
        stars = {"principal": principal, "low": low, "principal_only": principal & ~low}
        masks |= {(star, f"a{100 * alpha:g}"): mask for star, mask in stars.items()}
    row = {"frobenius": frobenius(delta), "relative_norm": relative_norm(w0, w1)}
    summaries = _summaries(delta, settings.k)
    random = {"left": settings.k / len(w0), "right": settings.k / w0.shape[1]}
    energy = subspace_energy(delta, svd0, settings.k)._asdict()
    sized = _size_row(w0, w1, svd0, masks, settings)
    if nulls:
        shuffled = permute(delta, _generator(seed, name))
        row |= summaries | {f"{key}_null": value for key, value in _summaries(shuffled, settings.k).items()}
        row["stable_rank_gaussian"] = gaussian_stable_rank(*w0.shape)
        for side, value in energy.items():
            row |= {f"energy_{side}": value, f"energy_{side}_random": random.get(side, prod(random.values()))}
        sized |= _null_row(w0, w0 + shuffled, masks)
        matched = dict.fromkeys(sized, nan)
        if delta.any():
            norm = settings.matched_norm * frobenius(w0)
            matched = _size_row(w0, norm_matched(w0, w1, norm), svd0, masks, settings)
            matched |= _null_row(w0, norm_matched(w0, w0 + shuffled, norm), masks)
        row |= sized | {f"{key}_matched": value for key, value in matched.items()}
    else:
        row |= summaries | {f"energy_{side}": value for side, value in energy.items()} | sized
    largest = largest_entries(delta, round(LARGEST * delta.numel()))
    for (star, percent), mask in masks.items():
        row[f"{star}_overlap_{percent}_top"] = overlap(mask, largest) if delta.any() else nan
        row[f"{star}_share_{percent}"] = density(mask)
    return row


def measure_trajectory(
    w0s: Mapping[str, Tensor],
    snapshots: Sequence[tuple[int, Mapping[str, Tensor]]],
    settings: GeometrySettings,
    seed: int = 0,
) -> DataFrame:
    """Measure the course of a training: the cumulative update at every snapshot, one row per step and matrix.

    Columns: step, matrix, layer, module, block, rows, cols, parameters, and those of :func:`measure_course`.

    Args:
        w0s: state dict at the origin; :func:`~opdlab.geometry.weight_matrices` chooses from it.
        snapshots: (step, state dict) in ascending order of steps; the last is t_end.
        settings: the resolution.
        seed: of the permutations and walks. A null is one draw, the same whatever else is measured.

    Raises:
        OpdlabError: if there is no snapshot or the steps do not ascend; otherwise as for
            :func:`~opdlab.geometry.measure_pair`.

    Source: 2606.07082, Appendix E, Figures 4 and 5; the nulls are additions.

    >>> name = "layers.0.mlp.up_proj.weight"
    >>> path = [(step, {name: step * torch.diag(torch.tensor([3.0, 2.0, 1.0]))}) for step in (1, 2)]
    >>> settings = GeometrySettings(k=1, sim_ks=(1,), mask_rank=1, alphas=())
    >>> measure_trajectory({name: torch.zeros(3, 3)}, path, settings)[["step", "stable_rank", "sim_right_K1"]].round(4)
       step  stable_rank  sim_right_K1
    0     1       1.5556           1.0
    1     2       1.5556           1.0
    """
    steps = [step for step, _ in snapshots]
    if not steps or steps != sorted(set(steps)):
        raise OpdlabError(f"snapshots has the steps {steps}; expected one or more, ascending, none twice")
    w0s = float64_matrices(w0s, "w0s")
    w_ts = [float64_matrices(weights, f"the snapshot of step {step}", like=w0s) for step, weights in snapshots]
    parts = []
    for name, w0 in w0s.items():
        columns = measure_course(name, w0, [w_t[name] for w_t in w_ts], settings, seed)
        parts.append(DataFrame({"step": steps} | _identity(name, w0) | columns))
    # The sort is stable: within a step, matrices stay in the order of the model.
    return concat(parts).sort_values("step", kind="stable", ignore_index=True)


def overall_sparsity(table: DataFrame) -> float:
    """Return the sparsity of all measured weights together: the mean over matrices, weighted by their parameters.

    Args:
        table: of :func:`measure_pair`, or the rows of one step of :func:`measure_trajectory`.

    Raises:
        OpdlabError: if a matrix occurs twice: then the rows are of several updates.

    Source: 2606.07082, Appendix C.3 and Table 1. All other columns are averaged without weights.

    >>> overall_sparsity(DataFrame({"matrix": ["a", "b"], "sparsity": [1.0, 0.5], "parameters": [100, 300]}))
    0.625
    """
    if table["matrix"].duplicated().any():
        raise OpdlabError(
            "table has a matrix in several rows; expected the rows of one update, for example of one step"
        )
    return float((table["sparsity"] * table["parameters"]).sum() / table["parameters"].sum())


def _identity(name: str, w0: Tensor) -> dict:
    rows, cols = w0.shape
    return {"matrix": name, **describe(name)._asdict(), "rows": rows, "cols": cols, "parameters": rows * cols}


def measure_course(
    name: str, w0: Tensor, w_ts: Sequence[Tensor], settings: GeometrySettings, seed: int = 0
) -> dict[str, list[float]]:
    """Measure the course of one matrix over T snapshots; each key has T values, and what is undefined is NaN.

    Keys: frobenius, relative_norm, interval_norm (the Frobenius norm of the update since the snapshot before);
    sparsity; stable_rank, effective_rank, effective_rank_squared, top_energy and hill (both of ``settings.k`` singular
    values), each with _null (of the permuted update). For each K of ``settings.sim_ks`` and for right and left:
    sim_right_K16, the similarity to the last snapshot, sim_right_K16_null, that of a random walk with the same interval
    norms, and sim_right_K16_rest, the similarity of the update so far to the rest of it, from this snapshot to the
    last; sim_random_K16 is K / n, the value of two unrelated subspaces on the right side (on the left it is K / m).

    Args:
        name: of the matrix: it seeds the nulls, and stands in errors.
        w0: (m, n) weights at the origin.
        w_ts: T snapshots (m, n), in order; the last is t_end.
        settings: the resolution.
        seed: of the permutations and walks.

    Raises:
        OpdlabError: naming the matrix, if a tensor is not finite or the matrix is smaller than a setting allows.
    """
    w0 = _checks.matrix(w0, f"{name} in w0s")
    w_ts = [_checks.matrix(w_t, f"{name} in the snapshot {t}") for t, w_t in enumerate(w_ts)]
    _check_size(name, w0, k=settings.k, **{f"sim_ks[{i}]": k for i, k in enumerate(settings.sim_ks)})
    generator = _generator(seed, name)
    deltas = [w_t - w0 for w_t in w_ts]
    interval_norms = [frobenius(after - before) for before, after in pairwise([w0, *w_ts])]
    vectors = max(settings.sim_ks, default=1)
    svds = [svd(delta, k=vectors) for delta in deltas]
    rests = [svd(w_ts[-1] - w_t, k=vectors) for w_t in w_ts]
    walk_svds = [svd(delta, k=vectors) for delta in random_walk(interval_norms, w0.shape, generator)]
    columns = {
        "frobenius": [frobenius(delta) for delta in deltas],
        "relative_norm": [relative_norm(w0, w_t) for w_t in w_ts],
        "interval_norm": interval_norms,
        "sparsity": [bf16_sparsity(w0, w_t) for w_t in w_ts],
    }
    seen = [_summaries(delta, settings.k) for delta in svds]
    nulls = [_summaries(permute(delta, generator), settings.k) for delta in deltas]
    for key in nulls[0]:
        columns[key] = [summary[key] for summary in seen]
        columns[f"{key}_null"] = [summary[key] for summary in nulls]
    for k in settings.sim_ks:
        seen, null = similarity_to_end(svds, k), similarity_to_end(walk_svds, k)
        for side, top in (("right", top_right), ("left", top_left)):
            columns[f"sim_{side}_K{k}"] = getattr(seen, side)
            columns[f"sim_{side}_K{k}_null"] = getattr(null, side)
            columns[f"sim_{side}_K{k}_rest"] = [
                sim_k(top(past, k), top(rest, k)) for past, rest in zip(svds, rests, strict=True)
            ]
        columns[f"sim_random_K{k}"] = [k / w0.shape[1]] * len(w_ts)
    return columns


def measure_vector(w0: Tensor, w1: Tensor) -> dict[str, float]:
    """Measure the update of a weight that is no matrix, such as a norm's: what needs no directions.

    Keys: frobenius, relative_norm, sparsity, sparsity_absolute, sparsity_relative, density, as in
    :func:`measure_matrix`.

    Raises:
        OpdlabError: if the shapes differ or an entry is not finite.

    >>> measure_vector(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 3.0]))["sparsity"]
    0.75
    """
    return {"frobenius": frobenius(w1.double() - w0.double()), "relative_norm": relative_norm(w0, w1)} | _visible(
        w0, w1
    )


def _visible(w0: Tensor, w1: Tensor) -> dict[str, float]:
    """Return how much of an update can be seen, by the three rules."""
    return {
        "sparsity": bf16_sparsity(w0, w1),
        "sparsity_absolute": absolute_sparsity(w0, w1),
        "sparsity_relative": relative_sparsity(w0, w1),
        "density": density(update_mask(w0, w1)),
    }


def _summaries(delta: Tensor | Svd, k: int) -> dict[str, float]:
    """Return what the singular values of an update tell."""
    if not isinstance(delta, Svd):
        m, n = delta.shape
        delta = Svd(delta.new_empty(m, 0), singular_values(delta), delta.new_empty(0, n))
    return {
        "stable_rank": stable_rank(delta),
        "effective_rank": effective_rank(delta),
        "effective_rank_squared": effective_rank(delta, squared=True),
        "top_energy": top_energy(delta, k),
        "hill": hill(delta, k) if k > 1 else nan,
    }


def _size_row(
    w0: Tensor, w1: Tensor, svd0: Svd, masks: dict[tuple[str, str], Tensor], settings: GeometrySettings
) -> dict[str, float]:
    """Return the diagnostics that depend on the size of the update."""
    svd1, visible = svd(w1, k=max((settings.k, *settings.angle_ks))), update_mask(w0, w1)
    row = _visible(w0, w1) | {"nss": spectral_drift(svd0, svd1)}
    for side, angles in rotation(svd0, svd1, settings.k)._asdict().items():
        row[f"angle_{side}_mean"] = float(angles.mean())
        row[f"angle_{side}_median"] = float(angles.quantile(0.5))
        row[f"angle_{side}_max"] = float(angles.max())
    for k in settings.angle_ks:
        for side, angles in rotation(svd0, svd1, k)._asdict().items():
            row[f"angle_{side}_mean_k{k}"] = float(angles.mean())
    return row | {f"{star}_overlap_{percent}": overlap(mask, visible) for (star, percent), mask in masks.items()}


def _null_row(w0: Tensor, shuffled: Tensor, masks: dict[tuple[str, str], Tensor]) -> dict[str, float]:
    """Return the overlaps of w0 plus the permuted update, seen in bfloat16."""
    null = update_mask(w0, shuffled)
    return {f"{star}_overlap_{percent}_null": overlap(mask, null) for (star, percent), mask in masks.items()}


def _check_size(name: str, w0: Tensor, **settings: int) -> None:
    largest = min(w0.shape)
    for setting, value in settings.items():
        if value > largest:
            raise OpdlabError(f"{setting} is {value}; expected {largest} at most, as {name} is {tuple(w0.shape)}")


def _base_svd(name: str, w0: Tensor, base_svds: Mapping[str, Svd]) -> Svd:
    found = base_svds.get(name)
    # The norms tell an Svd of other weights apart at no cost; equal weights agree to rounding.
    if found is None or abs(frobenius(found.s) - frobenius(w0)) > 1e-9 * frobenius(w0):
        raise OpdlabError(f"base_svds does not hold the Svd of {name} in w0s; expected decompose(w0s)")
    return found


def _generator(seed: int, name: str) -> Generator:
    # From the name, not from the position: the null of a matrix does not depend on which others are measured.
    return torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
