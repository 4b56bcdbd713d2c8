"""The instrument: the geometry of an update between checkpoints on disk, whoever trained them.

Matrices are read one at a time and measured in processes side by side; each finished one is written down at once, so
that stopped work goes on where it was. Decompositions of the base are kept in a cache, for the next model that was
tuned from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as remember
from importlib.metadata import version
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import (
    Resolution,
    Svd,
    describe,
    measure_course,
    measure_matrix,
    measure_vector,
    svd,
)
from opdlab.geometry.summary import course_means, summarise
from opdlab.measuring.parallel import collect, finish
from opdlab.models.checkpoints import Checkpoint, open_checkpoint
from opdlab.models.files import load_tensors, save_tensors, write_json, write_whole
from opdlab.processes import provenance


def settings_for(shape: tuple[int, ...]) -> Resolution:
    """Return the resolution for a matrix: the paper's, and an eighth of the smaller side where that is relative.

    >>> settings = settings_for((4096, 4096))
    >>> settings.k, settings.mask_rank
    (512, 64)
    >>> settings_for((64, 48)).mask_rank
    6
    """
    smaller = min(shape)
    eighth = max(1, smaller // 8)
    return Resolution(
        k=eighth,
        sim_ks=tuple(k for k in (4, 8, 16) if k <= smaller),
        mask_rank=64 if smaller >= 128 else eighth,
        alphas=(0.3, 0.5),
        angle_ks=tuple(k for k in (4, 16) if k < eighth),
    )


def check_comparable(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Return the names that both checkpoints have, largest tensor first.

    An output head that only one of them stores, equal to its embedding, is a copy of it and left out.

    Raises:
        OpdlabError: if they are one folder, or differ in names or shapes, naming the first tensors that do.
    """
    if base.path.resolve() == tuned.path.resolve():
        raise OpdlabError(f"base and tuned are the same checkpoint, {base.path}: give two")
    alone = sorted(base.pieces.keys() ^ tuned.pieces.keys())
    if alone == ["lm_head.weight"]:
        owner = base if alone[0] in base.pieces else tuned
        embedding = next((name for name in owner.pieces if describe(name).block == "embedding"), alone[0])
        if embedding != alone[0] and torch.equal(owner.read(embedding), owner.read(alone[0])):
            alone = []
    if alone:
        holder = base.path if alone[0] in base.pieces else tuned.path
        why = "one has a head of its own, and the other's is its embedding" if alone == ["lm_head.weight"] else ""
        raise OpdlabError(
            f"{base.path} and {tuned.path} have different architectures: {len(alone)} tensors are in one of them only, "
            f"such as {alone[0]} in {holder}{why and f' ({why})'}"
        )
    shapes = {name: piece.shape for name, piece in base.pieces.items() if name in tuned.pieces}
    for name, shape in shapes.items():
        if shape != tuned.pieces[name].shape:
            raise OpdlabError(
                f"{name} is {shape} in {base.path} and {tuned.pieces[name].shape} in {tuned.path}: give a model and "
                "what was tuned from it"
            )
    return sorted(shapes, key=lambda name: -prod(shapes[name]))


def step_of(path: Path) -> int | None:
    """Return the last number in a checkpoint's name, its step.

    >>> step_of(Path("run/checkpoint-500")), step_of(Path("snapshots/step-000040.safetensors")), step_of(Path("final"))
    (500, 40, None)
    """
    numbers = re.findall(r"\d+", path.name.removesuffix(".safetensors"))
    return int(numbers[-1]) if numbers else None


def find_trajectory(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, by step; step 0, the origin itself, is left out.

    Raises:
        OpdlabError: if there is none.
    """
    kinds = ("*.safetensors", "*.bin", "*config.json")
    found = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        # One without weights, or with pickled ones, is listed too, and refused by name when it is opened.
        if step_of(path) and (path.suffix == ".safetensors" or any(any(path.glob(kind)) for kind in kinds))
    ]
    if not found:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) if folder.is_dir() else ""
        held = held or "nothing"
        raise OpdlabError(
            f"there are no checkpoints in {folder}, which holds {held}: give the folder with checkpoint-<step> folders "
            "of safetensors, or step-<step>.safetensors files"
        )
    found = sorted(found, key=lambda path: (step_of(path), path.name))
    for before, after in pairwise(found):
        if step_of(before) == step_of(after):
            raise OpdlabError(f"{before} and {after} are of one step: leave one, or give the checkpoints in order")
    return found


def default_out(measured: Path) -> Path:
    """Return the folder for the results of a checkpoint or a run; what is only numbered gets its run's name too.

    >>> default_out(Path("/runs/sft/final")), default_out(Path("/runs/sft/checkpoint-500"))
    (PosixPath('geometry-final'), PosixPath('geometry-sft-checkpoint-500'))
    """
    measured = measured.resolve()
    name = measured.name.removesuffix(".safetensors")
    return Path(f"geometry-{name}" if step_of(measured) is None else f"geometry-{measured.parent.name}-{name}")


@dataclass(frozen=True)
class Job:
    """What one process needs to measure any tensor on the way from a base to the last of its checkpoints."""

    base: Path
    path: tuple[Path, ...]
    seed: int
    nulls: bool
    cache: Path | None
    device: str = "cpu"

    def identity(self) -> dict:
        """Return what stopped work must share with this to be gone on with: paths, files and options."""
        beside = ("*.safetensors", "*.json")
        files = [
            file
            for path in (self.base, *self.path)
            for file in sorted([path, *(file for pattern in beside for file in path.glob(pattern))])
        ]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        made_by = {"opdlab": version("opdlab"), "seed": self.seed, "nulls": self.nulls}
        return made_by | {"files": stamps}

    def steps(self) -> list[int]:
        """Return the step of each checkpoint: those in their names, if they ascend, or else 1, 2, 3 ..."""
        named = [step for step in map(step_of, self.path) if step is not None]
        ascending = len(named) == len(self.path) and named == sorted(set(named))
        return named if ascending else list(range(1, len(self.path) + 1))

    def measure(self, name: str) -> dict:
        """Measure one tensor: its row, and the rows of its course where there is more than one checkpoint."""
        base, *path = _opened(self)
        shape, origin, snapshots = (
            base.pieces[name].shape,
            _Way([base], name, self.device),
            _Way(path, name, self.device),
        )
        rows, cols = shape if len(shape) == 2 else (prod(shape), 1)
        who = {"matrix": name, **describe(name)._asdict(), "rows": rows, "cols": cols, "parameters": rows * cols}
        if len(shape) > 2:
            who["block"] = "stacked"  # several matrices in one tensor, and how is not known
        elif len(shape) < 2 and who["block"] in ("attention", "mlp"):
            who["block"] = "other"  # those are of matrices
        if len(shape) != 2 or min(shape) < 2:
            return {"row": who | measure_vector(origin[0], snapshots[-1]), "course": []}
        settings = settings_for(shape)
        svd0 = base_svd(origin[0], max(settings.k, settings.mask_rank, *settings.angle_ks), self.cache)
        row: dict[str, float] = {"k": settings.k, "mask_rank": settings.mask_rank}
        # Tensors are read where they are used, so that nothing here keeps them longer than that.
        row |= measure_matrix(name, origin[0], snapshots[-1], settings, self.seed, svd0, self.nulls)
        course = []
        if len(snapshots) > 1:
            columns = measure_course(name, origin[0], snapshots, settings, self.seed)
            course = [who | dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            course = [{"step": step} | values for step, values in zip(self.steps(), course, strict=True)]
        return {"row": who | row, "course": course}


@remember
def _opened(job: Job) -> list[Checkpoint]:
    """Return a job's checkpoints, base first; each process reads their headers once."""
    base = open_checkpoint(job.base)
    return [base, *(open_checkpoint(path, base) for path in job.path)]


class _Way(Sequence[Tensor]):
    """One tensor in several checkpoints, read when it is asked for."""

    def __init__(self, checkpoints: list[Checkpoint], name: str, device: str):
        self.checkpoints, self.name, self.device = checkpoints, name, device

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


def measure_checkpoints(
    base: Path,
    path: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    nulls: bool = True,
    processes: int = 2,
    cache: Path | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> pd.DataFrame:
    """Measure every tensor of an update, and write matrices.csv, summary.json and report.html.

    With several checkpoints the update is that of the last, and trajectory.csv has the way there.

    Args:
        base: the checkpoint before (:func:`opdlab.models.checkpoints.open_checkpoint`).
        path: one or more checkpoints after, in order; each may be an adapter on ``base``.
        out: folder for the results; what an earlier call left unfinished there is gone on with.
        seed: of the permutations.
        nulls: whether to compute the nulls and the norm-matched diagnostics.
        processes: matrices measured side by side, with one thread each; 1 stays in this process.
        cache: folder for decompositions of bases; None keeps none.
        device: where to compute, "cuda" for a GPU (then with one process).
        progress: show a bar.

    Returns:
        One row per tensor in the order of the base, with the columns of :func:`opdlab.geometry.measure_matrix`; k and
        mask_rank name the resolution. Norms and biases have sparsity and norms only.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.
    """
    path, out = [Path(checkpoint) for checkpoint in path], Path(out)
    if not path or processes < 1:
        raise OpdlabError(f"there are {len(path)} checkpoints and {processes} processes; expected one or more of both")
    try:
        usable = torch.device(device).type in ("cpu", "cuda")
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise OpdlabError(f"device {device!r} cannot be used here: give cpu, or cuda where there is a GPU")
    if any(out.resolve() == folder.resolve() for folder in (Path(base), *path)):
        raise OpdlabError(f"the results would be written into the checkpoint {out}: choose another folder with --out")
    _opened.cache_clear()
    opened = open_checkpoint(base)
    comparable = [check_comparable(opened, open_checkpoint(checkpoint, opened)) for checkpoint in path]
    names = [name for name in comparable[-1] if all(name in others for others in comparable)]
    sizes = {name: prod(opened.pieces[name].shape) for name in names}
    job = Job(Path(base), tuple(path), seed, nulls, cache, device)
    done = collect(out, job.identity(), job.measure, sizes, processes, progress)
    ordered = [done[name] for name in opened.pieces if name in done]
    table = pd.DataFrame([found["row"] for found in ordered])
    if (table["frobenius"] == 0).all():
        finish(out)
        (out / "job.json").unlink()
        raise OpdlabError(f"{base} and {path[-1]} hold the same weights: there is no update to measure")
    course = pd.DataFrame([row for found in ordered for row in found["course"]])
    _write_table(out / "matrices.csv", table)
    dtypes = {"base": opened.dtypes, "tuned": open_checkpoint(path[-1], opened).dtypes}
    summary: dict[str, Any] = {
        "base": str(Path(base).resolve()),
        "path": [str(checkpoint.resolve()) for checkpoint in path],
        "dtypes": dtypes,
        "notes": notes(path[-1], dtypes),
        "seed": seed,
        "provenance": provenance() | {"device": device},
        "groups": summarise(table),
    }
    if len(course):
        course = course.sort_values("step", kind="stable", ignore_index=True)
        _write_table(out / "trajectory.csv", course)
        summary["trajectory"] = course_means(course).reset_index().to_dict("records")
    write_json(out / "summary.json", summary)
    # Drawing is imported late, as the processes that measure need none of it.
    from opdlab.measuring.report import write_report

    title = f"{Path(base).name} ({dtypes['base']}) to {path[-1].name} ({dtypes['tuned']})"
    write_report(out / "report.html", table, course, title, summary["notes"])
    finish(out)
    return table


def notes(tuned: Path, dtypes: dict[str, str]) -> list[str]:
    """Return what to keep in mind when reading the results, given how the weights are stored."""
    # An adapter is added in float64.
    if (tuned / "adapter_config.json").is_file() or not {"bfloat16", "float16"} & set(dtypes["tuned"].split(", ")):
        return []
    return [
        f"The tuned weights are stored in {dtypes['tuned']}, so their rounding is part of the update. It adds "
        "directions to a small one, and permuting it is no null for masks: compare overlaps with the noise."
    ]


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))
