"""Is OPD's update a combination of SFT's and RLVR's?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from opdlab.analyses.study import Analysis, Study, Weights, layers
from opdlab.geometry import cosine

#: Updates that are explained.
TARGETS = ("opd", "opd_full")


def residual(target: Tensor, basis: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Return what is left of ``target`` outside the span of ``basis``, as a share of its norm, and the coefficients.

    Args:
        target: (N,) an update.
        basis: vectors (N,) that span the space, linearly independent.

    >>> residual(torch.tensor([3.0, 4.0]).double(), [torch.tensor([2.0, 0.0]).double()])
    (0.8, [1.5])
    """
    matrix = torch.stack(list(basis), 1)
    coefficients = torch.linalg.lstsq(matrix, target[:, None]).solution
    left = (target[:, None] - matrix @ coefficients).norm() / target.norm()
    return float(left), coefficients.flatten().tolist()


def _random_like(update: Weights, random: torch.Generator) -> Weights:
    return {name: torch.randn(w.shape, generator=random, dtype=w.dtype) for name, w in update.items()}


def measure(study: Study) -> pd.DataFrame:
    """Return one row per update and pair of updates that should explain it.

    Columns: ``arm``, ``basis``, the ``residual`` with one pair of coefficients for the whole model and
    ``residual_by_matrix`` with a pair for each matrix, shares of the norm; the coefficients; and the cosines of the
    update with each of the two, and between these.
    """
    base, anchor = study.model("base"), study.model("anchor")
    sft = layers({name: anchor[name] - base[name] for name in anchor})

    def end(arm: str, later: int = 0) -> Weights:
        return layers(study.update(arm, seed=study.later(later)))

    random = torch.Generator().manual_seed(study.seed)
    rows = []
    for arm in TARGETS:
        target = end(arm)
        bases = {
            "SFT and RLVR": (sft, end("rlvr")),
            "matched SFT and RLVR": (end("sft_matched"), end("rlvr")),
            "matched SFT and RLVR of another seed": (end("sft_matched", 1), end("rlvr", 1)),
            "two other seeds": (end(arm, 1), end(arm, 2)),
            "two random updates": (_random_like(target, random), _random_like(target, random)),
        }
        whole = _flat(target)
        for basis, (first, second) in bases.items():
            left, (c_first, c_second) = residual(whole, (_flat(first), _flat(second)))
            squares = sum(
                (residual(w.flatten(), (first[name].flatten(), second[name].flatten()))[0] * w.norm()) ** 2
                for name, w in target.items()
            )
            rows.append(
                {
                    "arm": arm,
                    "basis": basis,
                    "residual": left,
                    "residual_by_matrix": float(squares.sqrt() / whole.norm()),
                    "coefficient_first": c_first,
                    "coefficient_second": c_second,
                    "cosine_first": cosine(whole, _flat(first)),
                    "cosine_second": cosine(whole, _flat(second)),
                    "cosine_between": cosine(_flat(first), _flat(second)),
                }
            )
    return pd.DataFrame(rows)


def _flat(update: Weights) -> Tensor:
    return torch.cat([w.flatten() for w in update.values()])


SPAN = Analysis(
    "span",
    "what is left of OPD's update outside the span of two others",
    measure,
    (*TARGETS, "rlvr", "sft_matched"),
    (*((arm, later) for arm in TARGETS for later in (1, 2)), ("rlvr", 1), ("sft_matched", 1)),
)
