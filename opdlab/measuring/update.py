"""The update between checkpoints: one program that measures it, whoever trained them and wherever they are.

Tensors are read one at a time, from files or from memory, and measured in parallel; with a folder for the results each
finished one is written down at once, so that stopped work can be resumed. Decompositions of the base can be kept in a
cache, for the next model that was tuned from it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from html import escape
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import Resolution, Svd, measure_matrix, measure_matrix_trajectory, measure_vector, svd
from opdlab.geometry.matrices import identity
from opdlab.geometry.summary import overall_means, summarise, trajectory_means
from opdlab.measuring.parallel import resumable_map
from opdlab.measuring.sources import (
    Located,
    check_apart,
    check_comparable,
    locate,
    name_of,
    open_all,
    place_of,
    steps_of,
)
from opdlab.models.checkpoints import Checkpoint, Source
from opdlab.models.files import load_tensors, save_tensors, write_json, write_whole
from opdlab.processes import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Entries times smaller side, summed over the matrices, below which starting processes takes longer than measuring.
SMALL = 1e9


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

    A checkpoint is a model folder, a LoRA adapter's folder, a safetensors file, the name of a model on the Hugging Face
    hub (OWNER/NAME, which is fetched), a state dict or a module. With several checkpoints after the base, the update is
    that of the last, and the trajectory has the way there.

    Args:
        base: the checkpoint before.
        tuned: the checkpoint after, or a list of several in order; each may be an adapter on ``base``.
        out: folder for the results (:meth:`Update.save`); what an earlier call left unfinished there is resumed.
        seed: of the nulls.
        nulls: whether to compute the nulls and the norm-matched diagnostics.
        processes: how many matrices are measured at once, with one thread each; 1 stays in this process. By default one
            for each processor where the model is large enough; weights in memory are always measured in this process.
        device: where to compute, "cuda" for a GPU (then with one process).
        cache: folder for decompositions of bases.
        progress: show a bar.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.

    >>> w0s = {"layers.0.mlp.up_proj.weight": torch.eye(4)}
    >>> update = measure(w0s, {name: 1.5 * w0 for name, w0 in w0s.items()})
    >>> update.table[["matrix", "k", "sparsity", "nss", "stable_rank"]]
                            matrix  k  sparsity  nss  stable_rank
    0  layers.0.mlp.up_proj.weight  1      0.75  0.5          4.0
    """
    several: Sequence[Any] = tuned if isinstance(tuned, (list, tuple)) else [tuned]
    located = locate(base, several)
    job = Job(*located, steps_of(located[1]), seed, nulls, cache=cache, device=device)
    folder = Path(out) if out else None
    if folder:
        check_apart(folder, [job.base, *job.path])
    with _measured(job, processes, out=folder, progress=progress) as (table, trajectory):
        opened = open_all(job.base, job.path)
        update = Update(opened[0], opened[1:], table, trajectory, seed, device)
        moved = bool((table["frobenius"] != 0).any())
        if moved and folder:
            update.save(folder)
    if not moved:
        if folder and (folder / "job.json").is_file():
            (folder / "job.json").unlink()
        raise OpdlabError(f"{job.base} and {job.path[-1]} hold the same weights: there is no update to measure")
    return update


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
    with _measured(job, processes, blocks) as tables:
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


def as_text(table: pd.DataFrame) -> str:
    """Return a table as text, with four digits."""
    return table.to_string(float_format=lambda value: f"{value:.4g}", na_rep="")


def as_html(table: pd.DataFrame) -> str:
    """Return a table as HTML, with four digits."""
    return table.to_html(float_format=lambda value: f"{value:.4g}", na_rep="", border=0)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV with all its digits."""
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))


# --- one tensor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a process needs to measure any tensor on the way from a base to the last of its checkpoints."""

    base: Located  # a checkpoint, if it is in memory
    path: tuple[Located, ...]
    steps: tuple[int, ...]
    seed: int = 0
    nulls: bool = True
    trajectory_blocks: tuple[str, ...] | None = None
    cache: Path | None = None
    device: str = "cpu"

    def identity(self) -> dict:
        """Return what stopped work must share with this to be resumed: files and options."""
        beside = ("*.safetensors", "*.json")
        files = [
            file
            for path in (self.base, *self.path)
            if isinstance(path, Path)
            for file in sorted([path, *(file for pattern in beside for file in path.glob(pattern))])
        ]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        made_by = {"opdlab": version("opdlab"), "seed": self.seed, "nulls": self.nulls}
        return made_by | {"files": stamps}

    def measure(self, name: str) -> dict:
        """Measure one tensor: its row, and the rows of its trajectory where it is followed."""
        base, *path = open_all(self.base, self.path)
        shape, origin, snapshots = base.pieces[name].shape, _Way([base], name, self), _Way(path, name, self)
        who = identity(name, shape)
        if len(shape) != 2 or min(shape) < 2:
            return {"row": who | measure_vector(origin[0], snapshots[-1]), "trajectory": []}
        at = Resolution.of(shape)
        svd0 = base_svd(origin[0], at.vectors, self.cache)
        # Tensors are read where they are used, so that nothing here keeps them longer than that.
        row = who | measure_matrix(name, origin[0], snapshots[-1], at, self.seed, svd0, self.nulls)
        del svd0
        followed = len(path) > 1 if self.trajectory_blocks is None else who["block"] in self.trajectory_blocks
        if not followed:
            return {"row": row, "trajectory": []}
        columns = measure_matrix_trajectory(name, origin[0], snapshots, at, self.seed)
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {
            "row": row,
            "trajectory": [{"step": step} | who | line for step, line in zip(self.steps, lines, strict=True)],
        }


class _Way(Sequence[Tensor]):
    """One tensor in several checkpoints, read when it is asked for."""

    def __init__(self, checkpoints: list[Checkpoint], name: str, job: Job):
        self.checkpoints, self.name, self.device = checkpoints, name, job.device

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody asks for a slice
        return self.checkpoints[index].read(self.name).to(self.device)


def base_svd(w0: Tensor, k: int, cache: Path | None) -> Svd:
    """Return the Svd of a base matrix with k vectors, from the cache if its content was decomposed before."""
    if cache is None:
        return svd(w0, k=k)
    content = hashlib.sha256(w0.cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()[:32]
    kind = f"{str(w0.dtype).removeprefix('torch.')}-{'x'.join(map(str, w0.shape))}-k{k}-v{version('opdlab')}"
    file = cache / f"svd-{content}-{kind}.safetensors"
    # The cache only saves time: what cannot be read is computed again, and what cannot be kept is not.
    with suppress(OpdlabError, KeyError):
        tensors, _ = load_tensors(file)
        u, s, vh = (tensors[part].to(w0.device) for part in Svd._fields)
        if (u.shape, s.shape, vh.shape) == ((len(w0), k), (min(w0.shape),), (k, w0.shape[1])):
            return Svd(u, s, vh)
    found = svd(w0, k=k)
    with suppress(OpdlabError):
        save_tensors(file, found._asdict())
    return found


# --- all tensors ------------------------------------------------------------------------------------------------------


@contextmanager
def _measured(
    job: Job,
    processes: int | None,
    blocks: Collection[str] | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Measure a job's tensors; what is left undone can be resumed until the block that uses the tables has ended."""
    if not job.path or (processes is not None and processes < 1):
        raise OpdlabError(
            f"there are {len(job.path)} checkpoints and {processes} processes; expected one or more of both"
        )
    try:
        on_cpu = torch.device(job.device).type == "cpu"
        usable = on_cpu or torch.device(job.device).type == "cuda"
        torch.empty(0, dtype=torch.float64, device=job.device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise OpdlabError(f"device {job.device!r} cannot be used here: give cpu, or cuda where there is a GPU")
    open_all.cache_clear()  # files may have changed
    base, *path = open_all(job.base, job.path)
    comparable = [check_comparable(base, checkpoint) for checkpoint in path]
    shapes = {name: base.pieces[name].shape for name in comparable[-1] if all(name in others for others in comparable)}
    if blocks is not None:
        shapes = {name: shape for name, shape in shapes.items() if identity(name, shape)["block"] in blocks}
    on_disk = all(isinstance(source, Path) for source in (job.base, *job.path))
    if not (on_disk and on_cpu):
        processes = 1  # weights in memory would be copied into each, and a device has room for one
    elif processes is None:
        work = sum(prod(shape) * min(shape) for shape in shapes.values() if len(shape) == 2)
        processes = 1 if work < SMALL else os.cpu_count() or 1
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    log = out if on_disk else None
    with resumable_map(job.measure, sizes, job.identity(), out=log, processes=processes, progress=progress) as found:
        in_order = [found[name] for name in base.pieces if name in found]
        table = pd.DataFrame([tensor["row"] for tensor in in_order])
        trajectory = pd.DataFrame([line for tensor in in_order for line in tensor["trajectory"]])
        if len(trajectory):
            trajectory = trajectory.sort_values("step", kind="stable", ignore_index=True)
        yield table, trajectory
    open_all.cache_clear()  # weights in memory may go
