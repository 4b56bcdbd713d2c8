"""Is the path of an update a straight line in steps, is it of rank one, and does its first part tell its end?

RLVR's is said to be so (2605.21468). Of rank one is there not the update of a matrix but its path: the updates at all
times are nearly multiples of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from opdlab.geometry import frobenius, random_walk, svd, top_energy, weight_matrices
from opdlab.geometry.measure import generator_of
from opdlab.lab.analyses.runset import Analysis, Part, RunSet, blocks

#: The share of the training that the end is foretold from.
EARLY = 0.15
#: Lines are fitted to what comes from this share of the training on.
FIRST = 0.05


def straightness(products: Tensor, progress: Sequence[float]) -> dict[str, float]:
    """Return how straight the path of an update is, from the inner products (T, T) of the updates at T times.

    They are those of one matrix, or the sum of those of several; ``progress`` has the T shares of the training,
    ascending to its end.

    Keys: ``r2``, the share of their squared norms that is on the best line through the origin, progress times slope,
    fitted to the times from :data:`FIRST` on; ``cosine``, of the update at the time nearest to :data:`EARLY` with the
    last one; and ``error``, by how much that update over its progress misses the last one, as a share of its norm. NaN
    where an update is zero.

    Source: 2605.21468, where lines are fitted to coefficients, and 15 % is the shortest window.

    >>> times = torch.tensor([0.15, 0.5, 1.0]).double()
    >>> {key: round(value, 3) for key, value in straightness(torch.outer(times, times), times.tolist()).items()}
    {'r2': 1.0, 'cosine': 1.0, 'error': 0.0}
    """
    times = torch.tensor(progress, dtype=torch.float64)
    early, fitted = int((times - EARLY).abs().argmin()), times >= FIRST
    at, of_fitted = times[fitted], products[fitted][:, fitted]
    then, end, both = products[early, early], products[-1, -1], products[early, -1]
    missed = then / times[early] ** 2 - 2 * both / times[early] + end
    return {
        "r2": float(at @ of_fitted @ at / (at @ at) / of_fitted.trace()),
        "cosine": float(both / (then * end).sqrt()),
        "error": float((missed.clamp(min=0) / end).sqrt()),
    }


class Path(NamedTuple):
    """What is to be known of the path of one matrix."""

    products: Tensor  #: (T, T) inner products of the updates
    rank1: Tensor  #: (T, T) of the updates truncated to their first singular direction
    first: float  #: the share of the last update's squared norm in that direction
    along: float  #: the share of the squared norms of all updates, from FIRST on, that are multiples of one


def of_matrix(updates: Sequence[Tensor], progress: Sequence[float]) -> Path:
    """Return what is to be known of the updates (m, n) of a matrix at T shares of the training."""
    flat, svds = torch.stack([update.flatten() for update in updates]), [svd(update, k=1) for update in updates]
    sizes, left, right = (
        torch.stack(parts) for parts in zip(*((of.s[0], of.u[:, 0], of.vh[0]) for of in svds), strict=True)
    )
    products, fitted = flat @ flat.T, torch.tensor(progress) >= FIRST
    of_fitted = products[fitted][:, fitted]
    along = float(torch.linalg.eigvalsh(of_fitted)[-1] / of_fitted.trace())
    rank1 = torch.outer(sizes, sizes) * (left @ left.T) * (right @ right.T)
    return Path(products, rank1, top_energy(svds[-1], 1), along)


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per arm and block: "all" matrices, and those of attention and of the MLP.

    Columns: ``r2``, ``cosine`` and ``error`` (:func:`straightness`), and with _rank1 those of the updates truncated to
    their first singular direction, matrix by matrix; and the means over matrices of ``first``, the share of the last
    update's squared norm in that direction, and of ``along``, the share of all squared norms that is along one and the
    same update. All come again with _bf16, between checkpoints rounded to bfloat16, and with _null, of a random walk
    whose intervals have the same norms.
    """
    return pd.DataFrame([row for arm in parts[0].arms for row in _rows(runs, arm)])


def _rows(runs: RunSet, arm: str) -> list[dict]:
    run = runs.run(arm)
    steps = run.experiment.kept
    snapshots, progress = [run.snapshot(step) for step in steps], [step / run.steps for step in steps[1:]]
    found: dict[str, dict[str, Path]] = {"": {}, "_bf16": {}, "_null": {}}
    matrices = weight_matrices(snapshots[0])
    for name, origin in matrices.items():
        weights = [snapshot[name].double() for snapshot in snapshots]
        rounded = [snapshot[name].bfloat16().double() for snapshot in snapshots]
        updates = [weight - weights[0] for weight in weights[1:]]
        lengths = [frobenius(after - before) for before, after in pairwise([torch.zeros_like(updates[0]), *updates])]
        seen = {
            "": updates,
            "_bf16": [weight - rounded[0] for weight in rounded[1:]],
            "_null": list(random_walk(lengths, origin.shape, generator_of(runs.seed, name))),
        }
        for view, path in seen.items():
            found[view][name] = of_matrix(path, progress)
    rows = []
    for block, names in blocks(matrices).items():
        row = {"arm": arm, "block": block, "matrices": len(names)}
        row["parameters"] = sum(matrices[name].numel() for name in names)
        for view, paths in found.items():
            chosen = [paths[name] for name in names]
            for kind in ("", "_rank1"):
                products = sum((path.rank1 if kind else path.products for path in chosen), torch.zeros(()))
                row |= {f"{key}{kind}{view}": value for key, value in straightness(products, progress).items()}
            for key in ("first", "along"):
                row[f"{key}{view}"] = pd.Series([getattr(path, key) for path in chosen]).mean()
        rows.append(row)
    return rows


LINEARITY = Analysis("linearity", "whether the path of an update is a straight line, told by its first part", measure)
