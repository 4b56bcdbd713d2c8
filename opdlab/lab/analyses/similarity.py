"""Do two runs end in the same subspace: another seed, another arm, another teacher, other tokens or another writer?"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from opdlab.geometry import Svd, cosine, describe, sim_k, svd, top_left, top_right
from opdlab.lab.analyses.study import Analysis, Study, Weights, layers
from opdlab.lab.grid import ARMS

#: Arms whose runs are compared with each other, with the same seed and with the next.
WHOLE = ("opd", "opd_full", "rlvr", "sft_matched")
#: Short arms whose runs are compared with all of ``SHORT``.
BASES = ("opd_short", "rlvr_short", "sft_matched_short")
#: The short arms, all that start where short OPD does, are as long, and are free to move.
SHORT = tuple(
    arm.name
    for arm in ARMS.values()
    if (arm.start, arm.budget) == (ARMS["opd_short"].start, ARMS["opd_short"].budget) and not arm.constraint
)


def _pairs(study: Study) -> Iterator[tuple[str, str, int]]:
    for arm in WHOLE:
        for other in WHOLE:
            yield arm, other, study.later()
            if other != arm:
                yield arm, other, study.seed
    if study.seed in study.scale.variant_seeds:
        yield from ((base, other, study.seed) for base in BASES for other in SHORT if other != base)


def measure(study: Study) -> pd.DataFrame:
    """Return one row per pair of runs and matrix.

    Columns: ``arm`` and ``other``, whether the other run has the ``next_seed``, the cosine of the two updates, and
    Sim_K of their right and left subspaces with K / n and K / m. The ``other`` called "weights" stands for W_0.
    """
    largest = max(study.scale.geometry.sim_ks)
    known: dict[tuple[str, int], tuple[Weights, dict[str, Svd]]] = {}

    def of(arm: str, seed: int) -> tuple[Weights, dict[str, Svd]]:
        if (arm, seed) not in known:
            chosen = layers(study.model("anchor") if arm == "weights" else study.update(arm, seed=seed))
            known[arm, seed] = chosen, {name: svd(matrix, name, largest) for name, matrix in chosen.items()}
        return known[arm, seed]

    rows = []
    pairs = [*_pairs(study), *((arm, "weights", study.seed) for arm in WHOLE)]
    for arm, other, seed in study.follow(pairs, "similarity"):
        (a, svd_a), (b, svd_b) = of(arm, study.seed), of(other, seed)
        for name, matrix in a.items():
            m, n = matrix.shape
            row = {"arm": arm, "other": other, "next_seed": seed != study.seed, **describe(name)._asdict()}
            row |= {"parameters": m * n, "cosine": cosine(matrix, b[name])}
            for k in study.scale.geometry.sim_ks:
                row[f"sim_right_K{k}"] = sim_k(top_right(svd_a[name], k), top_right(svd_b[name], k))
                row[f"sim_left_K{k}"] = sim_k(top_left(svd_a[name], k), top_left(svd_b[name], k))
                row |= {f"sim_right_random_K{k}": k / n, f"sim_left_random_K{k}": k / m}
            rows.append(row)
    return pd.DataFrame(rows)


SIMILARITY = Analysis(
    "similarity",
    "whether two runs end in the same subspace",
    measure,
    (*WHOLE, *SHORT),
    tuple((arm, 1) for arm in WHOLE),
    keys=("arm", "other", "next_seed"),
)
