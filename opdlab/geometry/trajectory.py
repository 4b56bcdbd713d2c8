"""Trajectories: rank, size and subspaces of the update so far at every snapshot of a training run, with their nulls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import nan

import torch
from torch import Tensor

from opdlab.geometry import _checks
from opdlab.geometry.masks import bf16_sparsity
from opdlab.geometry.measure import Resolution, generator_of
from opdlab.geometry.nulls import permute, random_walk
from opdlab.geometry.spectrum import frobenius, relative_norm, spectrum_stats, stable_rank, svd
from opdlab.geometry.subspaces import shared, similarity_to_end, top_left, top_right


def measure_matrix_trajectory(
    name: str, w0: Tensor, w_ts: Sequence[Tensor], resolution: Resolution | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """Measure the trajectory of one matrix over T snapshots; each key has T values, and what is undefined is NaN.

    Keys: k and mask_rank, the resolution; frobenius, relative_norm; interval_norm and interval_stable_rank, of the
    update since the snapshot before; sparsity; stable_rank, effective_rank, effective_rank_squared, top_energy and hill
    (the last two of k singular values), each with _null (of the permuted update). For each K of ``resolution.sim_ks``,
    on the right and on the left:

    - sim_right_K16, the similarity to the last snapshot;
    - sim_right_K16_null, that of a random walk with the same interval norms;
    - sim_right_K16_rest, the similarity of the update so far to the rest of it, from this snapshot to the last;
    - sim_right_K16_interval, the similarity of the update in this interval to that in the one before;
    - sim_random_K16, which is K / n, the value of two unrelated subspaces on the right (on the left it is K / m).

    All but the resolution, relative_norm and what is random come twice more: with _bf16 between checkpoints that were
    rounded to bfloat16, as the paper's are, and with _locked of the locked null, the update of the last snapshot scaled
    to the norm at each snapshot, added to w0 and rounded. It shows what size and rounding make of fixed directions.

    Args:
        name: of the matrix: it seeds the nulls, and stands in errors.
        w0: (m, n) weights at the origin.
        w_ts: T snapshots (m, n), in order; the last is t_end. The sequence may read them from disk.
        resolution: by default :meth:`Resolution.of` the shape.
        seed: of the permutations and walks.

    Raises:
        OpdlabError: naming the matrix, if a tensor is not finite, the shapes differ or the resolution asks for more.

    Source: 2606.07082, Appendix E, Figures 4 and 5; the nulls are additions.

    >>> path = [step * torch.diag(torch.tensor([3.0, 2.0, 1.0])) for step in (1, 2)]
    >>> at = Resolution(k=1, sim_ks=(1,), mask_rank=1, alphas=())
    >>> found = measure_matrix_trajectory("up_proj", torch.zeros(3, 3), path, at)
    >>> [[round(value, 4) for value in found[column]] for column in ("stable_rank", "sim_right_K1")]
    [[1.5556, 1.5556], [1.0, 1.0]]
    """
    w0 = _checks.matrix(w0, f"{name} in w0")
    on = resolution or Resolution.of(tuple(w0.shape))
    on.check_size(name, w0, "k", "sim_ks")
    generator, count = generator_of(seed, name), len(w_ts)

    def at(t: int) -> Tensor:
        w_t, called = w_ts[t].to(w0.device), f"{name} in w_ts[{t}]"
        _checks.same_shape(w0, f"{name} in w0", w_t, called)
        return _checks.matrix(w_t, called)

    # Snapshots are read again where they are needed, so that few of them are in memory at once.
    interval_norms = [frobenius(after - before) for before, after in pairwise((w0, *map(at, range(count))))]
    walk_svds = [
        svd(delta.to(w0.device), k=max(on.sim_ks, default=1))
        for delta in random_walk(interval_norms, w0.shape, generator)
    ]
    columns: dict[str, list[float]] = {"k": [on.k] * count, "mask_rank": [on.mask_rank] * count}
    columns["relative_norm"] = [relative_norm(w0, at(t)) for t in range(count)]
    columns |= _view(w0, at, count, on)
    nulls = [spectrum_stats(permute(at(t) - w0, generator), on.k) for t in range(count)]
    columns |= {f"{key}_null": [null[key] for null in nulls] for key in nulls[0]}
    for k in on.sim_ks:
        walk = similarity_to_end(walk_svds, k)
        columns |= {f"sim_right_K{k}_null": walk.right, f"sim_left_K{k}_null": walk.left}
        columns[f"sim_random_K{k}"] = [k / w0.shape[1]] * count
    origin, update = _rounded(w0), at(count - 1) - w0
    sizes = [norm / columns["frobenius"][-1] if norm else 0.0 for norm in columns["frobenius"]]
    # Where the files hold bfloat16 numbers, the two views are one.
    stored = torch.equal(origin, w0) and all(torch.equal(_rounded(at(t)), at(t)) for t in range(count))
    seen = columns if stored else _view(origin, lambda t: _rounded(at(t)), count, on)
    locked = _view(origin, lambda t: _rounded(torch.add(w0, update, alpha=sizes[t])), count, on)
    return columns | {
        f"{key}_{view}": values[key]
        for view, values in (("bf16", seen), ("locked", locked))
        for key in locked
        if (key, view) != ("sparsity", "bf16")  # which is sparsity itself
    }


def _view(origin: Tensor, at: Callable[[int], Tensor], count: int, on: Resolution) -> dict[str, list[float]]:
    """Return sizes, ranks and similarities of the updates from ``origin`` to ``at(t)``."""
    before, end, vectors = origin, at(count - 1), max(on.sim_ks, default=1)
    svds, rests, intervals, rows = [], [], [], []
    for t in range(count):
        w_t = at(t)
        rests.append(svd(end - w_t, k=vectors))
        delta = w_t - origin
        svds.append(svd(delta, k=vectors))
        # The first interval is the first update, and the last is what the one before had left.
        last = rests[t - 1] if t == count - 1 else None
        intervals.append((last or svd(w_t - before, k=vectors)) if t else svds[0])
        row = {"frobenius": frobenius(delta), "interval_norm": frobenius(w_t - before)}
        row |= {"interval_stable_rank": stable_rank(intervals[t]), "sparsity": bf16_sparsity(origin, w_t)}
        rows.append(row | spectrum_stats(svds[t], on.k))
        before = w_t
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    of_all = (svds, rests, intervals)
    bases = {
        side: [[top(found, vectors) for found in part] for part in of_all]
        for side, top in (("right", top_right), ("left", top_left))
    }
    for k in on.sim_ks:
        for side, parts in bases.items():
            past, rest, interval = ([basis[:, :k] for basis in part] for part in parts)
            columns[f"sim_{side}_K{k}"] = [shared(basis, past[-1]) for basis in past]
            columns[f"sim_{side}_K{k}_rest"] = [shared(*pair) for pair in zip(past, rest, strict=True)]
            columns[f"sim_{side}_K{k}_interval"] = [nan, *(shared(*pair) for pair in pairwise(interval))]
    return columns


def _rounded(weights: Tensor) -> Tensor:
    return weights.float().to(torch.bfloat16).double()
