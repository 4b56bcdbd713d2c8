"""What every measurement says of itself: what was measured, what is in no mean, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import pandas as pd

from opdlab.geometry.summary import means, means_over, of_layers, views
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


def beside_noise(table: pd.DataFrame) -> list[str]:
    """Return sentences on how much of an update's sparsity, and of its preference for small weights, is its size."""
    layers = of_layers(table)
    if "sparsity_ruler" not in layers or layers["sparsity_ruler"].isna().all():
        return []
    columns = [f"{column}{of}" for column in ("sparsity", "low_overlap_a30") for of in ("_ruler", "")]
    found = means(layers, [], columns)[columns].iloc[0]
    noise, update, low_noise, low_update = map(_percent, found)
    said = [f"Noise of this size leaves {noise} of the weights unchanged in bfloat16. This update leaves {update}."]
    if found.notna().all():
        said += [
            f"Of the weights that such noise changes, {low_noise} are among the smallest 30 %. Of those that this "
            f"update changes, {low_update} are."
        ]
    return said


def on_views(trajectory: pd.DataFrame) -> list[str]:
    """Return a sentence on how a trajectory is seen, if there is one."""
    if trajectory.empty:
        return []
    said = "Rank and similarity are seen as stored, and between bfloat16 checkpoints (_bf16)"
    if "_bf16" not in views(trajectory):
        said = "The checkpoints hold bfloat16 numbers, so there is this one view of rank and similarity"
    return [f"{said}, beside the locked null (_locked): what size and rounding make of directions that never change."]


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
