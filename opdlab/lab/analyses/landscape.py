"""How well do weights do that no run visited: between runs, in their plane, and further along an early direction?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pandas as pd
import torch

from opdlab.geometry import permute
from opdlab.lab.analyses.runset import Analysis, Part, RunSet, add, to_norms

_FIFTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ARMS = ("opd", "rlvr", "sft_matched")


def _points() -> Iterator[dict]:
    """List the points: a path's name, and how much of each arm's update is added to the anchor."""
    for opd, rlvr in product((*_FIFTHS, 1.25), repeat=2):
        yield {"path": "plane", "opd": opd, "rlvr": rlvr}
    for arm in _ARMS:
        yield from ({"path": arm, arm: share} for share in (*_FIFTHS, 1.25, 1.5, 2.0))
    yield from ({"path": "sft", "sft": share - 1} for share in (*_FIFTHS, 1.25))
    for first, second in (("opd", "rlvr"), ("opd", "sft_matched"), ("sft_matched", "rlvr")):
        yield from ({"path": f"{first} to {second}", first: 1 - share, second: share} for share in _FIFTHS)
    yield {"path": "opd to opd of the next seed", "opd": 0.5, "opd_next": 0.5}


def measure_landscape(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per point: ``path``, how much of each arm's update was added to the anchor, and the accuracies.

    The paths: each arm's own straight way from the anchor and beyond its end ("sft" is the way from the base to the
    anchor, whose share is counted from the anchor), the straight ways between the ends, and the plane through the
    anchor, which is SFT's end, and the ends of OPD and RLVR; and the point halfway between OPD's end and that of its
    run with the next seed ("opd_next"), which shows what averaging does to two runs of one arm. Where that run started
    from another anchor, its update is added to this one, which shows as well whether an update serves elsewhere.
    """
    anchor, base = runs.model("anchor"), runs.model("base")
    updates = {arm: runs.update(arm) for arm in _ARMS} | {"sft": add(anchor, (-1.0, base))}
    updates["opd_next"] = runs.update("opd", seed=runs.later())
    rows = []
    for point in _points():
        terms = [(point[arm], update) for arm, update in updates.items() if point.get(arm)]
        shares = {arm: point.get(arm, 0.0) for arm in updates}
        rows.append({"path": point["path"], **shares, **runs.evaluate(add(anchor, *terms))})
    return pd.DataFrame(rows)


def measure_extrapolation(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per candidate: ``arm``, ``kind``, ``progress``, ``factor``, accuracies, and what it ``recovered``.

    Kinds: "anchor" and "end"; "stretched", W_0 plus the update at ``progress``, every tensor of it scaled to ``factor``
    times its norm at the end; "permuted", the same with the entries of the final update shuffled; "leap", W_t plus
    ``factor`` times the update since half of ``progress``, the candidates of EffOPD (2605.11739). ``recovered`` is the
    share of the gain in sampled accuracy from the anchor to the end, and ``recovered_kl`` that of the fall of the KL to
    the teacher; neither is there where nothing was gained.
    """
    anchor, random, rows = runs.model("anchor"), torch.Generator().manual_seed(runs.seed), []
    for arm in _ARMS:
        end = runs.update(arm)
        shuffled = {name: permute(update, random) for name, update in end.items()}
        candidates = [("anchor", 0.0, 0.0, anchor), ("end", 1.0, 1.0, add(anchor, (1.0, end)))]
        candidates.append(("permuted", 1.0, 1.0, add(anchor, (1.0, shuffled))))
        for progress in (0.05, 0.1, 0.2):
            stretched = to_norms(runs.update(arm, progress), end)
            candidates += [("stretched", progress, f, add(anchor, (f, stretched))) for f in (0.5, 1.0, 1.5)]
        for progress in (0.1, 0.2):
            before, now = runs.update(arm, progress / 2), runs.update(arm, progress)
            for f in (2.0, 4.0, 6.0, 8.0, 10.0):
                candidates.append(("leap", progress, f, add(anchor, (1.0 + f, now), (-f, before))))
        found = [runs.evaluate(weights) for *_, weights in candidates]
        for (kind, progress, factor, _), scores in zip(candidates, found, strict=True):
            row = {"arm": arm, "kind": kind, "progress": progress, "factor": factor, **scores}
            for column, score, sign in (("recovered", "sampled", 1), ("recovered_kl", "kl_teacher", -1)):
                gained, in_all = (sign * (of[score] - found[0][score]) for of in (scores, found[1]))
                row[column] = gained / in_all if in_all > 0 else None
            rows.append(row)
    return pd.DataFrame(rows)


LANDSCAPE = Analysis(
    "landscape", "how well the weights between the ends of runs do", measure_landscape, _ARMS, later=(("opd", 1),),
    few=True,
)  # fmt: skip
EXTRAPOLATION = Analysis(
    "extrapolation", "how far the early direction of a run carries", measure_extrapolation, _ARMS, few=True
)
