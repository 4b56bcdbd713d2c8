"""The update between checkpoints, whoever trained them and wherever they are: what ``opdlab measure`` does."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.geometry.summary import overall_means, summarise, trajectory_means
from opdlab.measuring.sources import check_apart, locate, name_of, open_all, place_of, steps_of
from opdlab.measuring.tensors import Job, measured
from opdlab.models.checkpoints import Checkpoint, Source, open_checkpoint
from opdlab.models.files import write_json, write_whole
from opdlab.processes import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(
    base: Source,
    tuned: Source | Sequence[Source],
    *,
    out: Path | str | None = None,
    seed: int = 0,
    nulls: bool = True,
    processes: int | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    progress: bool = False,
) -> Update:
    """Measure every tensor of an update. Nothing is written unless ``out`` or ``cache`` is given.

    A checkpoint is a model folder, a LoRA adapter's folder, a safetensors file, a model of the Hugging Face hub
    (OWNER/NAME, which is fetched), a state dict or a module. Of several after the base, the last ends the update.

    Args:
        base: the checkpoint before.
        tuned: the checkpoint after, or a list of several in order; each may be an adapter on ``base``.
        out: folder for the results (:meth:`Update.save`); what an earlier call left unfinished there is resumed.
        seed: of the nulls.
        nulls: whether to compute the nulls and the norm-matched diagnostics.
        processes: how many tensors are measured at once (see :func:`opdlab.measuring.tensors.measured`).
        device: where to compute, "cuda" for a GPU.
        cache: folder for decompositions of bases.
        progress: show a bar.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.

    >>> import torch
    >>> w0s = {"layers.0.mlp.up_proj.weight": torch.eye(4)}
    >>> update = measure(w0s, {name: 1.5 * w0 for name, w0 in w0s.items()})
    >>> update.table[["matrix", "k", "sparsity", "nss", "stable_rank"]]
                            matrix  k  sparsity  nss  stable_rank
    0  layers.0.mlp.up_proj.weight  1      0.75  0.5          4.0
    """
    several: Sequence[Any] = tuned if isinstance(tuned, (list, tuple)) else [tuned]
    start, ends = locate(base, several)
    job = Job(start, ends, steps_of(ends), seed, nulls, cache=cache, device=device)
    folder = Path(out) if out else None
    check_apart(folder, [job.base, *job.path])
    with measured(job, processes=processes, out=folder, progress=progress) as (table, trajectory):
        origin, *path = open_all(job.base, job.path)
        update = Update(origin, tuple(path), table, trajectory, seed, device)
        if folder and update.moved:
            update.save(folder)
    return update if update.moved else _refuse(update, folder)


def _refuse(update: Update, out: Path | None) -> NoReturn:
    if out:
        (out / "job.json").unlink(missing_ok=True)
    ends = f"{update.base.path} and {update.path[-1].path}"
    raise OpdlabError(f"{ends} hold the same weights: there is no update to measure")


def measure_update(
    base: Source,
    path: Sequence[tuple[int, Source]],
    *,
    seed: int = 0,
    blocks: Collection[str] | None = None,
    trajectory_blocks: Collection[str] | None = None,
    processes: int = 1,
    device: str = "cpu",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure an update at given steps, and return the table of its matrices and that of its trajectory.

    This is what :func:`measure` does, for those who choose the matrices.

    Args:
        base: the checkpoint before.
        path: (step, checkpoint after) in ascending order of steps; the last is the end of the update.
        seed: of the nulls.
        blocks: of the tensors in the table, such as attention and mlp (:func:`opdlab.geometry.describe`); by default
            all.
        trajectory_blocks: of those, the blocks that are followed over the steps; by default all if there are several
            steps, and none otherwise.
        processes: how many matrices are measured at once.
        device: where to compute.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.
    """
    steps, followed = tuple(step for step, _ in path), None if trajectory_blocks is None else tuple(trajectory_blocks)
    if list(steps) != sorted(set(steps)):
        raise OpdlabError(f"path has the steps {list(steps)}; expected them ascending, none twice")
    job = Job(*locate(base, [source for _, source in path]), steps, seed, True, followed, device=device)
    with measured(job, processes=processes, blocks=blocks) as tables:
        return tables


@dataclass(frozen=True, repr=False, eq=False)
class Update:
    """An update that was measured; shown by itself, it is the means over its matrices, each beside its null.

    Attributes:
        base: the checkpoint before.
        path: those after, in order.
        table: one row per tensor in the order of the base, with the columns of :func:`opdlab.geometry.measure_matrix`;
            norms and biases have sparsity and norms only.
        trajectory: one row per step and matrix, with the columns of
            :func:`opdlab.geometry.measure_matrix_trajectory`; empty if there is one checkpoint only.
        seed: of the nulls.
        device: where it was measured.
    """

    base: Checkpoint
    path: tuple[Checkpoint, ...]
    table: pd.DataFrame
    trajectory: pd.DataFrame
    seed: int
    device: str

    @property
    def means(self) -> pd.DataFrame:
        """The means over the matrices of attention and MLP (:func:`opdlab.geometry.summary.overall_means`)."""
        return overall_means(self.table)

    @property
    def moved(self) -> bool:
        """Whether any weight changed."""
        return bool((self.table["frobenius"] != 0).any())

    @property
    def dtypes(self) -> dict[str, str]:
        """The names of the dtypes that base and tuned weights are stored in."""
        return {"base": self.base.dtypes, "tuned": self.path[-1].dtypes}

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        ends = zip((self.base, self.path[-1]), self.dtypes.values(), strict=True)
        return " to ".join(f"{name_of(checkpoint)} ({dtypes})" for checkpoint, dtypes in ends)

    @property
    def notes(self) -> list[str]:
        """What to keep in mind when reading the results, given how the weights are stored."""
        tuned, dtypes = self.path[-1], self.dtypes["tuned"]
        # An adapter is added in float64.
        adapter = (Path(tuned.path) / "adapter_config.json").is_file()
        if adapter or not {"bfloat16", "float16"} & set(dtypes.split(", ")):
            return []
        return [
            f"The tuned weights are stored in {dtypes}, so their rounding is part of the update. It adds directions to "
            "a small one, and permuting it is no null for masks: compare overlaps with the noise."
        ]

    def plot(self, column: str) -> Figure:
        """Draw a column: over the steps of the trajectory if it has it, otherwise matrix by matrix; dashes are nulls.

        A notebook shows the figure where it is the last line of a cell; a script keeps it by ``savefig``.

        Args:
            column: of the trajectory or the table, such as "stable_rank".

        Raises:
            OpdlabError: if there is no such column, or nothing in it to draw.
        """
        # Drawing is imported late, as the processes that measure need none of it.
        from opdlab.measuring.report import draw_column

        for steps, table in ((True, self.trajectory), (False, self.table)):
            if column in table and pd.api.types.is_numeric_dtype(table[column]) and table[column].notna().any():
                return draw_column(table, column, over_steps=steps)
        known = get_close_matches(column, self.table.select_dtypes("number").columns, 4, 0.3)
        raise OpdlabError(f"there are no numbers called {column!r} to draw: choose a column, such as {known}")

    def save(self, folder: Path | str) -> None:
        """Write matrices.csv, summary.json and report.html, and with several checkpoints trajectory.csv.

        Raises:
            OpdlabError: if the folder cannot be written or is one of the checkpoints.
        """
        from opdlab.measuring.report import write_report

        folder = Path(folder)
        check_apart(folder, [self.base.path, *(checkpoint.path for checkpoint in self.path)])
        write_table(folder / "matrices.csv", self.table)
        summary: dict[str, Any] = {
            "base": place_of(self.base),
            "path": [place_of(checkpoint) for checkpoint in self.path],
            "dtypes": self.dtypes,
            "notes": self.notes,
            "seed": self.seed,
            "provenance": provenance() | {"device": self.device},
            "groups": summarise(self.table),
        }
        if len(self.trajectory):
            write_table(folder / "trajectory.csv", self.trajectory)
            summary["trajectory"] = trajectory_means(self.trajectory).reset_index().to_dict("records")
        write_json(folder / "summary.json", summary)
        write_report(folder / "report.html", self)

    def _shown(self) -> list[pd.DataFrame]:
        course = self.trajectory
        return [self.means, *([trajectory_means(course).T] if len(course) and len(self.means) else [])]

    def __repr__(self) -> str:
        """Return the means as text."""
        return "\n\n".join([self.title, *map(as_text, self._shown()), *self.notes])

    def _repr_html_(self) -> str:
        title, *notes = (f"<p>{escape(text)}</p>" for text in (self.title, *self.notes))
        return "\n".join([title, *map(as_html, self._shown()), *notes])


def load_update(summary: Path) -> Update:
    """Read an update that was saved, from its summary.json and the tables beside it.

    Raises:
        OpdlabError: if a file is missing or something else, or the checkpoints are gone.
    """
    try:
        found, table = json.loads(summary.read_text()), pd.read_csv(summary.with_name("matrices.csv"))
        followed = summary.with_name("trajectory.csv")
        trajectory = pd.read_csv(followed) if "trajectory" in found else pd.DataFrame()
        table = table.astype({"frobenius": float, "density": float, "parameters": int, "block": str})
        base, path = Path(found["base"]), tuple(map(Path, found["path"]))
        seed, device = int(found["seed"]), str(found["provenance"]["device"])
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise OpdlabError(
            f"{summary} is no summary.json of 'opdlab measure' with its matrices.csv beside it"
        ) from problem
    opened = open_checkpoint(base)
    return Update(opened, tuple(open_checkpoint(end, opened) for end in path), table, trajectory, seed, device)


def as_text(table: pd.DataFrame) -> str:
    """Return a table as text, with four digits."""
    return table.to_string(float_format=lambda value: f"{value:.4g}", na_rep="")


def as_html(table: pd.DataFrame) -> str:
    """Return a table as HTML, with four digits."""
    return table.to_html(float_format=lambda value: f"{value:.4g}", na_rep="", border=0)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV with all its digits."""
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))
