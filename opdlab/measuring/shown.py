"""What a measurement shows by itself: tables with four digits, and sentences that say what was measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd

from opdlab.geometry.summary import means, means_over, of_layers, views
from opdlab.measuring.sources import LeftOut
from opdlab.models.files import write_whole

_FOUR_DIGITS = "{:.4g}".format


class Shown(ABC):
    """What a terminal shows as text and a notebook as HTML, with four digits."""

    @abstractmethod
    def parts(self) -> list[str | pd.DataFrame]:
        """Return the sentences and tables that are shown."""

    def __repr__(self) -> str:
        """Return sentences and tables as text."""
        return "\n\n".join(
            part if isinstance(part, str) else part.to_string(float_format=_FOUR_DIGITS, na_rep="")
            for part in self.parts()
        )

    def _repr_html_(self) -> str:
        return "\n".join(f"<p>{escape(part)}</p>" if isinstance(part, str) else as_html(part) for part in self.parts())


def as_html(table: pd.DataFrame) -> str:
    """Return a table as HTML, with four digits."""
    return table.to_html(float_format=_FOUR_DIGITS, na_rep="", border=0)


def write_table(path: Path, table: pd.DataFrame, digits: str | None = None) -> None:
    """Write a table as CSV, whole or not at all, with all its digits or those of a format such as "%.7g"."""
    write_whole(path, lambda file: table.to_csv(file, index=False, float_format=digits, lineterminator="\n"))


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
    for reason, group in pd.DataFrame(left_out, columns=LeftOut._fields).groupby("reason"):
        first, share = group["name"].iloc[0], group["share"].sum()
        which = first if len(group) == 1 else f"{len(group)} tensors, such as {first}"
        of = "of the layers' parameters" if reason.endswith("in no mean") else "of the parameters"
        said.append(f"Left out: {which} ({_percent(share)} {of}): {reason}.")
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
