"""Where an update stands beside those that were published: its size, what of it shows in bfloat16, and how it grew.

Most of what sparsity, masks and ranks say follows from the size of an update: only updates of one size can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isnan, nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.geometry.summary import means, of_layers
from opdlab.measuring.shown import Shown
from opdlab.stats import Interval, mean_interval

if TYPE_CHECKING:
    from opdlab.training.config import Recipe

# Of the matrices, and then of the run; the order is that of the table.
_MEANS = ("relative_norm", "sparsity", "low_overlap_a30", "relative_operator_norm")
_OF_RUN = ("steps", "coherence", "growth", "step_size", "clipped")
# The first share of a training, which warm-up bends, is left out of the growth.
_FROM = 0.05
_READ = (
    "A range is of several updates or, after ≈, an estimate; brackets hold the 95 % interval over seeds. 2606.13657 "
    "was read at second hand, and calls unchanged what moved by 1e-5 at most.",
)
_COLUMNS = (
    "coherence is the rms of the update over the root of the summed squares of the learning rates: 1 for Adam's walk "
    "on noise, the root of the steps for a straight line. growth is the exponent of the norm in steps, step_size the "
    "learning rate over the rms of the weights, clipped the share of steps with a clipped gradient."
)


@dataclass(frozen=True, repr=False, eq=False)
class Where(Shown):
    """Updates beside those that were published; shown by itself, it is one row per update."""

    #: One row per update and quantity, with value (or mean), low and high; what was published also has source, a key of
    #: the bibliography, arxiv, and place in the paper.
    table: pd.DataFrame
    notes: tuple[str, ...] = _READ  #: how to read it

    @property
    def wide(self) -> pd.DataFrame:
        """One row per update and one column per quantity, as text."""
        table = self.table.assign(text=[_written(row) for row in self.table.itertuples()])
        known = [name for name in (*_MEANS, *_OF_RUN) if name in set(table["quantity"])]
        wide = table.pivot(index="update", columns="quantity", values="text")[known]
        wide["arxiv"] = table.groupby("update")["arxiv"].first()
        return wide.loc[table["update"].unique()].fillna("").rename_axis(index=None, columns=None)

    def parts(self) -> list[str | pd.DataFrame]:
        """Return the table, and how to read it."""
        return [self.wide, *self.notes, _COLUMNS]


def published() -> pd.DataFrame:
    """Return the published values, as the table of :class:`Where`."""
    return pd.read_csv(Path(__file__).with_name("published.csv"), dtype={"arxiv": str})


def published_sizes() -> pd.DataFrame:
    """Return the published updates of known size, numbered from 1: update, and one column per quantity.

    Of a size of which only the range is known, relative_norm is NaN and low and high are its ends.
    """
    table = published().set_index("update")
    ends = table.loc[table["quantity"] == "relative_norm", ["low", "high"]]
    found = ends.join(table.reset_index().pivot(index="update", columns="quantity", values="value")).reset_index()
    return found.set_axis(found.index + 1)


def standing(
    matrices: pd.DataFrame,
    trajectory: pd.DataFrame | None = None,
    history: pd.DataFrame | None = None,
    recipe: Recipe | None = None,
) -> dict[str, float]:
    """Return where one update stands, as far as it is known.

    Keys: relative_norm, sparsity (in bfloat16), low_overlap_a30 and relative_operator_norm, means over the matrices in
    :func:`~opdlab.geometry.summary.of_layers`. Of a run by AdamW also, from its history and recipe,

    - steps, those that changed a weight;
    - coherence, C = rms(dW) / sqrt(sum of lr^2) over these steps, by Adam about 1
      on noise, and sqrt(steps) for a straight line;
    - step_size, lr / rms(W) at the peak of the schedule;
    - clipped, the share of steps whose gradient was clipped;
    - growth, the exponent of the norm in steps: the slope of log norm on log step over snapshots from 5 % on.
    """
    layers = of_layers(matrices)
    known = [name for name in _MEANS if name in layers]
    found = means(layers, [], known)[known].iloc[0].to_dict() if len(layers) else {}
    if history is None or recipe is None or not found:
        return found
    made = history[~history["skipped"].astype(bool)]
    walk = sqrt(sum(recipe.learning_rate_at(step - 1) ** 2 for step in made["step"]))
    moved = layers[layers["relative_norm"] > 0]
    norms = (moved["frobenius"], moved["frobenius"] / moved["relative_norm"])
    update, weights = (sqrt(np.square(norm).sum() / moved["parameters"].sum()) for norm in norms)
    return found | {
        "steps": len(made),
        "coherence": update / walk,
        "growth": nan if trajectory is None or trajectory.empty else _growth(trajectory, recipe),
        "step_size": recipe.learning_rate / weights,
        "clipped": float((made["grad_norm"] > recipe.clip).mean()),
    }


def of_seeds(runs: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> dict[str, list[dict[str, float]]]:
    """Return where each run of each arm stands, from the tables of records, by the names that :func:`standing` has."""
    from opdlab.training.config import Recipe  # imported late: an update alone has no recipe

    found: dict[str, list[dict[str, float]]] = {}
    for run in runs.to_dict("records"):
        own = {name: t[(t["arm"] == run["arm"]) & (t["seed"] == run["seed"])] for name, t in tables.items()}
        numbers = {name: run[f"recipe.{name}"] for name in ("steps", "learning_rate", "schedule", "warmup", "clip")}
        recipe = Recipe(**numbers) if pd.isna(run.get("arm.optimizer")) else None
        found.setdefault(run["arm"], []).append(standing(**own, recipe=recipe))
    return found


def beside_published(updates: Mapping[str, Sequence[Mapping[str, float]]]) -> Where:
    """Return updates below those that were published; of several runs of one, means with 95 % intervals."""
    rows = [
        {"update": name, "quantity": quantity} | mean_interval(values.dropna())._asdict()
        for name, runs in updates.items()
        for quantity, values in pd.DataFrame(list(runs)).dropna(axis="columns", how="all").items()
    ]
    return Where(pd.concat([published(), pd.DataFrame(rows).rename(columns={"mean": "value"})], ignore_index=True))


def _written(row: Any) -> str:
    """Return one value as text: a number, a mean with its interval, or a range."""
    low = nan if isclose(row.low, row.high, rel_tol=1e-6) else row.low  # as steps and rates are alike in every seed
    found = Interval(row.value, low, row.high)
    text = f"{row.low:.3g} to {row.high:.3g}" if isnan(row.value) else f"{found:{'.0f' if row.value > 999 else '.3g'}}"
    return f"≈ {text}" if str(row.place).startswith("estimated") else text


def _growth(trajectory: pd.DataFrame, recipe: Recipe) -> float:
    """Return the exponent with which the norm, a mean over matrices, grows; NaN without two snapshots."""
    norms = means(of_layers(trajectory), ["step"], ["frobenius"])
    late = norms[(norms["step"] >= recipe.steps_at((_FROM,))[0]) & (norms["frobenius"] > 0)]
    if len(late) < 2:
        return nan
    return float(np.polyfit(np.log(late["step"]), np.log(late["frobenius"]), 1)[0])
