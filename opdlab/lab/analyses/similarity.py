"""Do two runs end in the same subspace: another seed, another arm, another teacher, other tokens or another writer?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import pandas as pd

from opdlab.geometry import Svd, cosine, describe, sim_k, svd, top_left, top_right, weight_matrices
from opdlab.lab.analyses.runset import SIM_KS, Analysis, Part, RunSet, Weights, as_variants
from opdlab.lab.laboratory import Laboratory

#: Arms whose runs are compared with each other, with the same seed and with the next, where a scale records them.
WHOLE = ("opd", "opd_full", "rlvr", "sft_matched", "random_signs")
#: Arms whose runs, as long as the variants, are compared with all that are alike.
BASES = ("opd", "rlvr", "sft_matched")
#: The ``other`` that stands for W_0.
WEIGHTS = "weights"


def alike(lab: Laboratory) -> tuple[str, ...]:
    """Return the recorded arms that start where OPD's variants do, are as long, and are free to move."""
    opd, arms = lab.arm(as_variants(lab, "opd")), map(lab.arm, lab.scale.policy.arms)
    found = (of for of in arms if (of.start, of.recipe) == (opd.start, opd.recipe))
    return tuple(of.name for of in found if not of.arm.projection)


def pairs(lab: Laboratory, seed: int) -> list[Part]:
    """Return the pairs of runs that are compared, each a part of its own: a new arm adds pairs and changes none.

    Where each seed has its own anchor, two runs with the same seed share it, and one with the next seed has another.
    """
    later, found = lab.scale.later_seed(seed), []
    whole = SIMILARITY.arms_at(lab)
    for arm, other in product(whole, repeat=2):
        found += [(arm, other, later), *([(arm, other, seed)] if other != arm else [])]
    if seed in lab.scale.policy.variant_seeds:
        bases = [as_variants(lab, base) for base in BASES]
        found += [(base, other, seed) for base, other in product(bases, alike(lab)) if other != base]
    found += [(arm, WEIGHTS, seed) for arm in whole]
    return [
        Part(
            "similarity",
            tuple((name, of_seed) for name, of_seed in ((arm, seed), (other, other_seed)) if name != WEIGHTS),
            {"arm": arm, "other": other, "next_seed": other_seed != seed},
        )
        for arm, other, other_seed in dict.fromkeys(found)
    ]


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per pair of runs and matrix.

    Columns: ``arm`` and ``other``, whether the other run has the ``next_seed``, the cosine of the two updates, and
    Sim_K of their right and left subspaces with K / n and K / m. The ``other`` called "weights" stands for W_0.
    """

    @cache
    def of(arm: str, seed: int) -> tuple[Weights, dict[str, Svd]]:
        chosen = weight_matrices(runs.model("anchor") if arm == WEIGHTS else runs.update(arm, seed=seed))
        return chosen, {name: svd(matrix, name, max(SIM_KS)) for name, matrix in chosen.items()}

    rows = []
    for part in parts:
        arm, other = str(part.entries["arm"]), str(part.entries["other"])
        (a, svd_a), (b, svd_b) = of(arm, runs.seed), of(other, runs.later() if part.entries["next_seed"] else runs.seed)
        for name, matrix in a.items():
            m, n = matrix.shape
            row = {**part.entries, **describe(name)._asdict()}
            row |= {"parameters": m * n, "cosine": cosine(matrix, b[name])}
            for k in SIM_KS:
                row[f"sim_right_K{k}"] = sim_k(top_right(svd_a[name], k), top_right(svd_b[name], k))
                row[f"sim_left_K{k}"] = sim_k(top_left(svd_a[name], k), top_left(svd_b[name], k))
                row |= {f"sim_right_random_K{k}": k / n, f"sim_left_random_K{k}": k / m}
            rows.append(row)
    return pd.DataFrame(rows)


SIMILARITY = Analysis(
    "similarity", "whether two runs end in the same subspace", measure, WHOLE,
    keys=("arm", "other", "next_seed"), pairs=pairs,
)  # fmt: skip
