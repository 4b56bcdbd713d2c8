"""Do two runs end in the same subspace: another seed, another arm, another teacher, other tokens or another writer?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from opdlab.geometry import Svd, cosine, describe, sim_k, svd, top_left, top_right
from opdlab.lab.analyses.runset import SIM_KS, Analysis, Part, RunSet, Weights, layers
from opdlab.lab.laboratory import Laboratory

#: Arms whose runs are compared with each other, with the same seed and with the next.
WHOLE = ("opd", "opd_full", "rlvr", "sft_matched")
#: Short arms whose runs are compared with all other short ones.
BASES = ("opd_short", "rlvr_short", "sft_matched_short")
#: The ``other`` that stands for W_0.
WEIGHTS = "weights"


def short_arms(lab: Laboratory) -> tuple[str, ...]:
    """Return the recorded arms that start where short OPD does, are as long, and are free to move."""
    short = lab.arm("opd_short")
    return tuple(
        name
        for name in lab.scale.policy.arms
        if (lab.arm(name).start, lab.arm(name).recipe) == (short.start, short.recipe)
        and not lab.arm(name).arm.projection
    )


def pairs(lab: Laboratory, seed: int) -> list[Part]:
    """Return the pairs of runs that are compared, each a part of its own: a new arm adds pairs and changes none."""
    return [
        Part("similarity", runs, {"arm": arm, "other": other, "next_seed": other_seed != seed})
        for arm, other, other_seed in _pairs(lab, seed)
        for runs in [((arm, seed), *([] if other == WEIGHTS else [(other, other_seed)]))]
    ]


def _pairs(lab: Laboratory, seed: int) -> Iterator[tuple[str, str, int]]:
    later = lab.scale.later_seed(seed)
    for arm in WHOLE:
        for other in WHOLE:
            yield arm, other, later
            if other != arm:
                yield arm, other, seed
    if seed in lab.scale.policy.variant_seeds:
        yield from ((base, other, seed) for base in BASES for other in short_arms(lab) if other != base)
    yield from ((arm, WEIGHTS, seed) for arm in WHOLE)


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per pair of runs and matrix.

    Columns: ``arm`` and ``other``, whether the other run has the ``next_seed``, the cosine of the two updates, and
    Sim_K of their right and left subspaces with K / n and K / m. The ``other`` called "weights" stands for W_0.
    """
    known: dict[tuple[str, int], tuple[Weights, dict[str, Svd]]] = {}

    def of(arm: str, seed: int) -> tuple[Weights, dict[str, Svd]]:
        if (arm, seed) not in known:
            chosen = layers(runs.model("anchor") if arm == WEIGHTS else runs.update(arm, seed=seed))
            known[arm, seed] = chosen, {name: svd(matrix, name, max(SIM_KS)) for name, matrix in chosen.items()}
        return known[arm, seed]

    rows = []
    for part in runs.follow(parts, "similarity"):
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
    "similarity",
    "whether two runs end in the same subspace",
    measure,
    (*WHOLE, *BASES),
    keys=("arm", "other", "next_seed"),
    pairs=pairs,
)
