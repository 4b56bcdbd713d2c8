"""Is OPD's update that of its teacher, where RLVR made the teacher of OPD's own anchor?

One paper has such a teacher (2609.39405). There OPD moves less far than RL and changes far fewer weights, its energy is
less concentrated, and it is nearly orthogonal to its teacher's update.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from opdlab.geometry import bf16_sparsity, cosine, frobenius, stable_rank, svd, top_energy, weight_matrices
from opdlab.lab.analyses.runset import Analysis, Part, RunSet, blocks

#: The arm that is taught by a model that RLVR made of the anchor, and that model's folder.
PUPIL, TEACHER = "opd_rlvr_teacher", "teacher_rlvr"
#: So many leading directions' shares of the energy are looked at.
DIRECTIONS = (1, 4, 16)


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per update and block: "all" matrices, and those of attention and of the MLP.

    The updates, in the column ``arm``: the pupil's, the teacher's own ("teacher_rlvr"), and those of RLVR and of OPD
    from the usual teacher, which start from the same anchor and take as many steps as the pupil. Columns: the ``norm``,
    and its ratios ``norm_to_teacher`` and ``norm_to_rlvr``; the ``cosine`` with the teacher's update, its square
    ``inside``, the share of the squared norm on the line of the teacher's update, and the rest, ``outside``; the means
    over matrices of ``stable_rank`` and of ``energy_1``, ``energy_4`` and ``energy_16``, the shares of the squared norm
    in the leading directions; and ``changed``, the share of the weights that differ in bfloat16.
    """
    origin = weight_matrices(runs.weights(PUPIL, 0.0))
    made = runs.model(TEACHER)
    updates = {arm: weight_matrices(runs.update(arm)) for arm in parts[0].arms}
    updates[TEACHER] = {name: made[name] - weight.double() for name, weight in origin.items()}
    svds = {(arm, name): svd(w, name, 1) for arm, update in updates.items() for name, w in update.items()}
    rows = []
    for block, names in blocks(origin).items():
        parameters = sum(origin[name].numel() for name in names)
        whole = {arm: torch.cat([update[name].flatten() for name in names]) for arm, update in updates.items()}
        norms = {arm: frobenius(update) for arm, update in whole.items()}
        for arm, update in updates.items():
            row = {"arm": arm, "block": block, "matrices": len(names), "parameters": parameters, "norm": norms[arm]}
            for column, other in (("norm_to_teacher", TEACHER), ("norm_to_rlvr", "rlvr")):
                row[column] = norms[arm] / norms[other] if norms[other] else None
            along = cosine(whole[arm], whole[TEACHER])
            row |= {"cosine": along, "inside": along**2, "outside": 1 - along**2}
            spectra = [svds[arm, name] for name in names]
            row["stable_rank"] = pd.Series(map(stable_rank, spectra)).mean()
            for k in DIRECTIONS:
                row[f"energy_{k}"] = pd.Series([top_energy(spectrum, k) for spectrum in spectra]).mean()
            same = sum(
                bf16_sparsity(origin[name], origin[name].double() + update[name]) * update[name].numel()
                for name in names
            )
            rows.append(row | {"changed": 1 - same / parameters})
    return pd.DataFrame(rows)


TAUGHT = Analysis("taught", "whether OPD's update is that of its teacher", measure, (PUPIL, "rlvr", "opd"), few=True)
