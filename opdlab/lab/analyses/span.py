"""Is OPD's update a combination of SFT's and RLVR's?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from opdlab.geometry import cosine, weight_matrices
from opdlab.lab.analyses.runset import Analysis, Part, RunSet, Weights, add

#: Updates that are explained.
TARGETS = ("opd", "opd_full")


def residual(target: Tensor, basis: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Return what is left of ``target`` (N,) outside the span of ``basis``, and the coefficients.

    The residual is a share of the norm. The vectors (N,) of the basis are linearly independent.

    >>> residual(torch.tensor([3.0, 4.0]).double(), [torch.tensor([2.0, 0.0]).double()])
    (0.8, [1.5])
    """
    matrix = torch.stack(list(basis), 1)
    coefficients = torch.linalg.lstsq(matrix, target[:, None]).solution
    left = (target[:, None] - matrix @ coefficients).norm() / target.norm()
    return float(left), coefficients.flatten().tolist()


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per update and pair of updates that should explain it.

    Columns: ``arm``, ``basis``, the ``residual`` with one pair of coefficients for the whole model and
    ``residual_by_matrix`` with a pair for each matrix, shares of the norm; the coefficients; and the cosines of the
    update with each of the two, and between these. ``outside`` is what is left as a share of the squared norm, and
    ``outside_own`` the same with the other of the two estimators of OPD in the place of the first of the pair: it has
    the same objective and the same anchor, so what is left of it is noise. Where each seed has its own anchor, "another
    seed" and "two other seeds" are runs from other anchors.
    """
    sizes = [weight.numel() for _, weight in sorted(weight_matrices(runs.model("anchor")).items())]
    random = torch.Generator().manual_seed(runs.seed)

    def end(arm: str, later: int = 0) -> Tensor:
        return _flat(runs.update(arm, seed=runs.later(later)))

    def noise() -> Tensor:
        return torch.cat([torch.randn(size, generator=random, dtype=torch.float64) for size in sizes])

    def bases(arm: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Make one pair at a time, as of a real model each update takes a gigabyte."""
        yield "SFT and RLVR", _flat(add(runs.model("anchor"), (-1.0, runs.model("base")))), end("rlvr")
        yield "matched SFT and RLVR", end("sft_matched"), end("rlvr")
        yield "matched SFT and RLVR of another seed", end("sft_matched", 1), end("rlvr", 1)
        yield "two other seeds", end(arm, 1), end(arm, 2)
        yield "two random updates", noise(), noise()

    rows = []
    for arm, estimator in zip(TARGETS, reversed(TARGETS), strict=True):
        whole = end(arm)
        for basis, first, second in bases(arm):
            left, (c_first, c_second) = residual(whole, (first, second))
            matrices = zip(*(update.split(sizes) for update in (whole, first, second)), strict=True)
            squares = sum((residual(w, two)[0] * w.norm()) ** 2 for w, *two in matrices)
            rows.append(
                {
                    "arm": arm,
                    "basis": basis,
                    "residual": left,
                    "residual_by_matrix": float(squares.sqrt() / whole.norm()),
                    "outside": left**2,
                    "outside_own": residual(whole, (end(estimator), second))[0] ** 2,
                    "coefficient_first": c_first,
                    "coefficient_second": c_second,
                    "cosine_first": cosine(whole, first),
                    "cosine_second": cosine(whole, second),
                    "cosine_between": cosine(first, second),
                }
            )
    return pd.DataFrame(rows)


def _flat(update: Weights) -> Tensor:
    """Return all matrices as one vector, by name: a model and a snapshot list them in different orders."""
    return torch.cat([w.flatten() for _, w in sorted(weight_matrices(update).items())])


SPAN = Analysis(
    "span", "what is left of OPD's update outside the span of two others", measure, (*TARGETS, "rlvr", "sft_matched"),
    later=(*((arm, later) for arm in TARGETS for later in (1, 2)), ("rlvr", 1), ("sft_matched", 1)),
)  # fmt: skip
