"""What every measurement says of itself: what was measured, what is in no mean, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import pandas as pd

from opdlab.geometry.summary import means_over, of_layers
from opdlab.measuring.common import LeftOut

_WHOLE = {
    "fused": "it holds several matrices side by side, and how is not known",
    "stacked": "it has more than two dimensions, as a stack of matrices or a convolution has",
}


def left_out_of_means(table: pd.DataFrame) -> list[LeftOut]:
    """Return the tensors of the layers that are in no mean because no rule splits them, with their share of these."""
    inside = table[table["layer"] >= 0]
    whole = inside[inside["block"].isin(_WHOLE)]
    shares = whole["parameters"] / inside["parameters"].sum()
    return [
        LeftOut(name, f"{_WHOLE[block]}, so it is in no mean", share)
        for name, block, share in zip(whole["matrix"], whole["block"], shares, strict=True)
    ]


def notes(table: pd.DataFrame, left_out: Iterable[LeftOut]) -> list[str]:
    """Return sentences on what was measured, what is in no mean, and what was left out and why, with shares."""
    total, layers = table["parameters"].sum(), of_layers(table)
    said = [f"Measured: {len(table)} tensors of {total:,} parameters. The means are over {means_over(table)}"]
    if len(layers):
        said[0] += f", with {_percent(layers['parameters'].sum() / total)} of the parameters"
        still = int((layers["frobenius"] == 0).sum())
        said[0] += f"; {still} of them did not move, and count in the sparsity alone" if still else ""
    said[0] += "."
    rest = table.drop(layers.index).groupby("block", sort=False)["parameters"].sum() / total
    if len(rest):
        said.append(f"In no mean: {', '.join(f'{block} ({_percent(share)})' for block, share in rest.items())}.")
    by_reason = sorted(left_out, key=lambda one: one.reason)
    for reason, group in groupby(by_reason, key=lambda one: one.reason):
        said.append(_left(reason, list(group)))
    return said


def _left(reason: str, group: Sequence[LeftOut]) -> str:
    share = sum(one.share for one in group)
    names = group[0].name if len(group) == 1 else f"{len(group)} tensors, such as {group[0].name}"
    of = "of the layers' parameters" if reason.endswith("in no mean") else "of the parameters"
    return f"Left out: {names} ({_percent(share)} {of}): {reason}."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
