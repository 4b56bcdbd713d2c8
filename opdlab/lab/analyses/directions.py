"""How the directions of an update come to be: each snapshot's, one by one, against those at the end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
from torch import Tensor

from opdlab.geometry import describe, frobenius, random_walk, svd, top_right, weight_matrices
from opdlab.geometry.measure import generator_of
from opdlab.lab.analyses.runset import Analysis, Part, RunSet

#: Directions at each time, few enough to see them one by one.
COUNT = 8
#: What stands in the column ``arm`` for the random walk whose steps are as large as those of the first arm.
WALK = "random walk"


def cosines(updates: Sequence[Tensor], count: int = COUNT) -> list[Tensor]:
    """Return, for each of T updates (m, n), how its K leading input directions lie to those of the last: (K, K).

    An entry is the absolute cosine of right singular vector i at that time and j at the end, NaN for directions that an
    update does not have. The squares of a column add up to the share of that final direction in the early subspace, and
    the mean of these sums is Sim_K.

    >>> import torch
    >>> early, late = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([4.0, 3.0]))
    >>> cosines([early, late], 2)[0]
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    bases = [top_right(svd(update, k=count), count) for update in updates]
    return [(basis.T @ bases[-1]).abs() for basis in bases]


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per arm, snapshot and pair of directions.

    The matrix is the value projection of the middle layer, chosen before any was seen. Columns: ``arm`` (:data:`WALK`
    is the null), ``step`` and ``progress``, the number of the ``direction`` then and of the ``final`` one, both from 1,
    and the absolute ``cosine`` between them.
    """
    rows = []
    for arm in parts[0].arms:
        run = runs.run(arm)
        origin = weight_matrices(run.snapshot(0))
        values = [name for name in origin if describe(name).module == "v_proj"]
        matrix = values[len(values) // 2]
        w0, steps = origin[matrix].double(), run.experiment.kept[1:]
        updates = [run.snapshot(step)[matrix].double() - w0 for step in steps]
        paths = {arm: updates}
        if arm == parts[0].arms[0]:
            lengths = map(frobenius, (updates[0], *(after - before for before, after in pairwise(updates))))
            paths[WALK] = list(random_walk(list(lengths), w0.shape, generator_of(runs.seed, matrix)))
        for name, path in paths.items():
            for step, table in zip(steps, cosines(path), strict=True):
                when = {"arm": name, "step": step, "progress": step / steps[-1]}
                rows += [
                    when | {"direction": i, "final": j, "cosine": round(cosine, 3)}
                    for i, row in enumerate(table.tolist(), 1)
                    for j, cosine in enumerate(row, 1)
                ]
    return pd.DataFrame(rows)


DIRECTIONS = Analysis(
    "directions", "how the directions of an update come to be", measure, ("opd", "rlvr", "sft_matched"),
    ("opd_full", "random_signs"), how_many="one",
)  # fmt: skip
