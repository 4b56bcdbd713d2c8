"""The update between checkpoints, whoever trained them and wherever they are: what ``opdlab measure`` does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.geometry import noise_curve
from opdlab.geometry.summary import apart, means, of_layers, overall_means, summarise, trajectory_means
from opdlab.measuring.shown import Shown, beside_noise, notes, on_views, write_table
from opdlab.measuring.sources import LeftOut, check_apart, in_order, name_of, open_all, place_of, same_weights
from opdlab.measuring.tensors import Job, measured
from opdlab.measuring.where import Where, beside_published, standing
from opdlab.models.checkpoints import Source
from opdlab.models.files import write_json
from opdlab.models.pieces import Checkpoint
from opdlab.processes import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from opdlab.training.config import Recipe


def measure(
    base: Source,
    tuned: Source | Iterable[Source],
    *,
    out: Path | str | None = None,
    seed: int = 0,
    nulls: bool = True,
    processes: int | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    embeddings: bool = False,
    progress: bool = True,
) -> Update:
    """Measure what base and tuned have in common. Nothing is written unless ``out`` or ``cache`` is given.

    Args:
        base: the checkpoint before: a folder, a safetensors file, OWNER/NAME on the hub, a state dict or a module.
        tuned: the same after, or a LoRA adapter's folder, or several in order, in a list; the last ends the update.
        out: folder for the results (:meth:`Update.save`); what an earlier call left unfinished there is resumed.
        seed: of the nulls.
        nulls: whether to compute the nulls and the norm-matched diagnostics.
        processes: how many tensors are measured at once (see :func:`opdlab.measuring.tensors.measured`).
        device: where to compute, "cuda" for a GPU.
        cache: folder for decompositions of bases.
        embeddings: whether to decompose embeddings and heads too: the largest matrices, which are in no mean.
        progress: show a bar when a second has passed.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.

    >>> import torch
    >>> w0s = {"model.layers.0.mlp.up_proj.weight": torch.eye(4)}
    >>> update = measure(w0s, {name: 1.5 * w0 for name, w0 in w0s.items()})
    >>> update.table[["matrix", "k", "sparsity", "nss", "stable_rank"]]
                                  matrix  k  sparsity  nss  stable_rank
    0  model.layers.0.mlp.up_proj.weight  1      0.75  0.5          4.0
    """
    out, cache = (Path(place).expanduser() if place else None for place in (out, cache))
    origin, path = open_all(base, way := in_order(tuned))
    check_apart(out, (origin, *path))
    job = Job(origin, path, way.steps, seed, nulls, cache=cache, device=device, embeddings=embeddings)
    with measured(job, processes=processes, out=out, progress=progress) as (table, followed):
        update = Update(job.base, job.path, table, followed, seed, device, job.left_out, way.said)
        if (table["frobenius"] != 0).any():
            if out:
                update.save(out)
            return update
    if out:
        (out / "job.json").unlink(missing_ok=True)
    raise OpdlabError(f"{same_weights(origin, path[-1])}: there is no update to measure")


@dataclass(frozen=True, repr=False, eq=False)
class Update(Shown):
    """An update that was measured; shown by itself, it is the means over its matrices, each beside its null.

    Its table has matrix, layer, module, block, rows, cols and parameters, and the columns of
    :func:`opdlab.geometry.measure_matrix`, where norms, biases and embeddings have those of
    :func:`opdlab.geometry.measure_rows` only; its trajectory has step and those of
    :func:`opdlab.geometry.measure_matrix_trajectory` instead.
    """

    base: Checkpoint  #: the checkpoint before
    path: tuple[Checkpoint, ...]  #: those after, in order
    table: pd.DataFrame  #: one row per tensor, in the order of the base
    trajectory: pd.DataFrame  #: one row per step and matrix; empty if there is one checkpoint only
    seed: int  #: of the nulls
    device: str  #: where it was measured
    left_out: tuple[LeftOut, ...] = ()  #: what was not measured, or is in no mean, with the reason and its share
    said: tuple[str, ...] = ()  #: of how the checkpoints were chosen and ordered

    @property
    def means(self) -> pd.DataFrame:
        """The means over the matrices of the layers (:func:`opdlab.geometry.summary.overall_means`)."""
        return overall_means(self.table)

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        return " to ".join(f"{name_of(end)} ({end.dtypes})" for end in (self.base, self.path[-1]))

    @property
    def notes(self) -> list[str]:
        """What was measured, what was left out and why, and what to keep in mind when reading the results."""
        tuned = self.path[-1]
        said = [*self.said, *notes(self.table, self.left_out), *beside_noise(self.table), *on_views(self.trajectory)]
        if {"bfloat16", "float16"} & set(tuned.dtypes.split(", ")):
            said.append(
                f"The tuned weights are stored in {tuned.dtypes}, so their rounding is part of the update and of all "
                "that is seen of it. It adds directions to a small one, and permuting it is no null for masks: compare "
                "overlaps with the noise."
            )
        return said

    @cached_property
    def ruler(self) -> pd.DataFrame:
        """What noise on the base's weights gives (:func:`~opdlab.geometry.noise_curve`), one row per relative norm.

        The noise has this norm in each matrix of the layers; its columns are means, as in :attr:`means`.
        """
        layers = of_layers(self.table)
        if layers.empty:
            raise OpdlabError(f"{self.title}: no matrix is in a layer, so there is nothing to lay the ruler on")
        # Minimum and maximum leave out a size that is zero or undefined.
        size = layers["relative_norm"].mean() or nan
        sizes = np.geomspace(min(2e-4, size / 2), max(0.3, size * 2), 24).tolist()
        curves = [
            pd.DataFrame(noise_curve(self.base.read(row.matrix), sizes) | {"parameters": row.parameters})
            for row in layers.itertuples()
        ]
        return means(pd.concat(curves), ["relative_norm"])

    def where(self, history: pd.DataFrame | None = None, recipe: Recipe | None = None) -> Where:
        """Return where the update is, beside those that were published (:func:`opdlab.measuring.where.standing`).

        ``history`` and ``recipe`` are of the run that made it: :meth:`opdlab.training.trained.Trained.where` has them.
        """
        return beside_published({name_of(self.path[-1]): [standing(self.table, self.trajectory, history, recipe)]})

    def plot(self, column: str) -> Figure:
        """Draw a column: over the steps of the trajectory if it has it, otherwise matrix by matrix; dashes are nulls.

        A notebook shows the figure where it is the last line of a cell; a script keeps it by ``savefig``.

        Raises:
            OpdlabError: if there is no such column, or it has no numbers for the matrices of the means.
        """
        # Drawing is imported late, as the processes that measure need none of it.
        from opdlab.measuring.report import draw_column

        for table in (self.trajectory, self.table):
            if column in table.select_dtypes("number") and np.isfinite(of_layers(table)[column]).any():
                return draw_column(of_layers(table), column)
        drawn = of_layers(self.table).select_dtypes("number").dropna(axis="columns", how="all")
        near = get_close_matches(column, drawn.columns, 4, 0.3)
        raise OpdlabError(f"there are no numbers called {column!r} to draw: choose a column, such as {near}")

    def save(self, folder: Path | str) -> None:
        """Write matrices.csv, summary.json and report.html, and with several checkpoints trajectory.csv.

        Raises:
            OpdlabError: if the folder cannot be written, is one of the checkpoints, or has files of the same names from
                elsewhere.
        """
        from opdlab.measuring.report import write_report

        folder = Path(folder).expanduser()
        check_apart(folder, (self.base, *self.path))
        write_table(folder / "matrices.csv", self.table)
        summary: dict[str, Any] = {
            "base": place_of(self.base),
            "path": [place_of(checkpoint) for checkpoint in self.path],
            "dtypes": {"base": self.base.dtypes, "tuned": self.path[-1].dtypes},
            "notes": self.notes,
            "left_out": [one._asdict() for one in self.left_out],
            "seed": self.seed,
            "provenance": provenance() | {"device": self.device},
            "groups": summarise(self.table),
        }
        if len(self.trajectory):
            write_table(folder / "trajectory.csv", self.trajectory)
            summary["trajectory"] = trajectory_means(self.trajectory).reset_index().to_dict("records")
        write_json(folder / "summary.json", summary)
        write_report(folder / "report.html", self)

    def parts(self) -> list[str | pd.DataFrame]:
        """Return the title, the tables of means that have any rows, and the notes."""
        over_steps = trajectory_means(self.trajectory).T if len(self.trajectory) else self.trajectory
        tables = [table for table in (self.means, apart(self.table), over_steps) if len(table)]
        return [self.title, *tables, *self.notes]


def load_update(summary: Path) -> Update:
    """Read an update that was saved, from its summary.json and the tables beside it.

    Raises:
        OpdlabError: if a file is missing or something else, or the checkpoints are gone.
    """
    try:
        found, table = json.loads(summary.read_text()), pd.read_csv(summary.with_name("matrices.csv"))
        trajectory = pd.read_csv(summary.with_name("trajectory.csv")) if "trajectory" in found else pd.DataFrame()
        table = table.astype({"frobenius": float, "density": float, "parameters": int, "block": str})
        base, path = Path(found["base"]), tuple(map(Path, found["path"]))
        seed, device = int(found["seed"]), str(found["provenance"]["device"])
        left_out = tuple(LeftOut(**one) for one in found.get("left_out", []))
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise OpdlabError(
            f"{summary} is no summary.json of 'opdlab measure' with matrices.csv beside it: measure the update first"
        ) from problem
    return Update(*open_all(base, path), table, trajectory, seed, device, left_out)
