"""The instrument: the geometry of an update between checkpoints on disk, whoever trained them.

Matrices are read one at a time and measured in processes side by side; each finished one is written down at once, so
that stopped work goes on where it was. Decompositions of the base are kept in a cache, for the next model that was
tuned from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import inf, nan, prod
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from opdlab.checkpoints import Checkpoint, open_checkpoint
from opdlab.errors import OpdlabError
from opdlab.geometry import (
    GeometrySettings,
    Svd,
    describe,
    measure_course,
    measure_matrix,
    measure_vector,
    svd,
)
from opdlab.processes import workers
from opdlab.report import write_report
from opdlab.runs import load_tensors, provenance, save_tensors, write_json, write_whole


def settings_for(shape: tuple[int, ...]) -> GeometrySettings:
    """Return the resolution for a matrix: the paper's, and an eighth of the smaller side where that is relative.

    >>> settings = settings_for((4096, 4096))
    >>> settings.k, settings.mask_rank
    (512, 64)
    >>> settings_for((64, 48)).mask_rank
    6
    """
    smaller = min(shape)
    eighth = max(1, smaller // 8)
    return GeometrySettings(
        k=eighth,
        sim_ks=tuple(k for k in (4, 8, 16) if k <= smaller),
        mask_rank=64 if smaller >= 128 else eighth,
        alphas=(0.3, 0.5),
        angle_ks=tuple(k for k in (16, 64) if k < smaller),
    )


def default_cache() -> Path:
    """Return the folder for decompositions of bases: ``OPDLAB_CACHE``, or opdlab's among the user's caches."""
    folder = os.environ.get("OPDLAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opdlab")
    return Path(folder).expanduser()


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
        owner = base.path if alone[0] in base.pieces else tuned.path
        raise OpdlabError(
            f"{base.path} and {tuned.path} have different architectures: {len(alone)} tensors are in one of them only, "
            f"such as {alone[0]} in {owner}"
        )
    shapes = {name: piece.shape for name, piece in base.pieces.items() if name in tuned.pieces}
    for name, shape in shapes.items():
        if shape != tuned.pieces[name].shape:
            raise OpdlabError(f"{name} is {shape} in {base.path} and {tuned.pieces[name].shape} in {tuned.path}")
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
    found = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if step_of(path) and (path.suffix == ".safetensors" or any(path.glob("*.safetensors")))
    ]
    if not found:
        raise OpdlabError(
            f"there are no checkpoints in {folder}: it needs checkpoint-<step> or step-<step>.safetensors"
        )
    return sorted(found, key=step_of)


@dataclass(frozen=True)
class Job:
    """What one process needs to measure any tensor on the way from a base to the last of its checkpoints."""

    base: Path
    path: tuple[Path, ...]
    seed: int
    nulls: bool
    cache: Path | None

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
        return json.loads(json.dumps(made_by | {"files": stamps}))

    def steps(self) -> list[int]:
        """Return the step of each checkpoint: those in their names, if they ascend, or else 1, 2, 3 ..."""
        named = [step_of(path) for path in self.path]
        ascending = None not in named and named == sorted(set(named))
        return named if ascending else list(range(1, len(named) + 1))

    def measure(self, name: str) -> dict:
        """Measure one tensor: its row, and the rows of its course where there is more than one checkpoint."""
        base = open_checkpoint(self.base)
        w0 = base.read(name)
        w_ts = [open_checkpoint(path, base).read(name) for path in self.path]
        rows, cols = w0.shape if w0.ndim == 2 else (w0.numel(), 1)
        who = {"matrix": name, **describe(name)._asdict(), "rows": rows, "cols": cols, "parameters": w0.numel()}
        if w0.ndim > 2:
            who["block"] = "stacked"  # experts in one tensor, say: several matrices, and how is not known
        if w0.ndim != 2 or min(w0.shape) < 2:
            return {"row": who | measure_vector(w0, w_ts[-1]), "course": []}
        settings = settings_for(tuple(w0.shape))
        svd0 = base_svd(w0, max(settings.k, settings.mask_rank, *settings.angle_ks), self.cache)
        row = {"k": settings.k, "mask_rank": settings.mask_rank}
        row |= measure_matrix(name, w0, w_ts[-1], settings, self.seed, svd0, self.nulls)
        course = []
        if len(w_ts) > 1:
            columns = measure_course(name, w0, w_ts, settings, self.seed)
            course = [who | dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            course = [{"step": step} | values for step, values in zip(self.steps(), course, strict=True)]
        return {"row": who | row, "course": course}


def base_svd(w0: Tensor, k: int, cache: Path | None) -> Svd:
    """Return the Svd of a base matrix with k vectors, from the cache if its content was decomposed before."""
    if cache is None:
        return svd(w0, k=k)
    content = hashlib.sha256(w0.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:32]
    file = cache / f"svd-{content}-{'x'.join(map(str, w0.shape))}-k{k}.safetensors"
    # The cache only saves time: what cannot be read is computed again, and what cannot be kept is not.
    with suppress(OpdlabError, KeyError):
        tensors, _ = load_tensors(file)
        return Svd(tensors["u"], tensors["s"], tensors["vh"])
    found = svd(w0, k=k)
    with suppress(OpdlabError):
        save_tensors(file, found._asdict())
    return found


def _measure_all(job: Job, names: list[str], processes: int) -> Iterator[dict]:
    """Yield what :meth:`Job.measure` finds, as it is found; with one process, in this one."""
    if processes == 1:
        yield from map(job.measure, names)
        return
    with workers(processes) as pool:
        try:
            for future in as_completed([pool.submit(job.measure, name) for name in names]):
                yield future.result()
        except BrokenProcessPool as problem:
            raise OpdlabError(
                "a measuring process was killed, perhaps for lack of memory: use fewer --processes; the same command "
                "goes on with the tensors that are left"
            ) from problem


def measure_checkpoints(
    base: Path,
    path: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    nulls: bool = True,
    processes: int = 2,
    cache: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Measure every tensor of an update, and write matrices.csv, summary.json and report.html.

    With several checkpoints the update is that of the last, and trajectory.csv has the way there.

    Args:
        base: the checkpoint before (:func:`opdlab.checkpoints.open_checkpoint`).
        path: one or more checkpoints after, in order; each may be an adapter on ``base``.
        out: folder for the results; what an earlier call left unfinished there is gone on with.
        seed: of the permutations.
        nulls: whether to compute the nulls and the norm-matched diagnostics.
        processes: matrices measured side by side, with one thread each; 1 stays in this process.
        cache: folder for decompositions of bases; None keeps none.
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
    opened = open_checkpoint(base)
    comparable = [check_comparable(opened, open_checkpoint(checkpoint, opened)) for checkpoint in path]
    names = [name for name in comparable[-1] if all(name in others for others in comparable)]
    job = Job(Path(base), tuple(path), seed, nulls, cache)
    done = _resume(out, job)
    with (
        tqdm(total=len(names), initial=len(done), unit="tensor", disable=not progress) as bar,
        open(out / "rows.jsonl", "a") as log,
    ):
        for found in _measure_all(job, [name for name in names if name not in done], processes):
            done[found["row"]["matrix"]] = found
            log.write(json.dumps(found) + "\n")
            log.flush()
            bar.set_postfix_str(found["row"]["matrix"][-40:])
            bar.update()
    ordered = [done[name] for name in opened.pieces if name in done]
    table = pd.DataFrame([found["row"] for found in ordered])
    if (table["frobenius"] == 0).all():
        raise OpdlabError(f"{base} and {path[-1]} hold the same weights: there is no update to measure")
    course = pd.DataFrame([row for found in ordered for row in found["course"]])
    _write_table(out / "matrices.csv", table)
    if len(course):
        course = course.sort_values("step", kind="stable", ignore_index=True)
        _write_table(out / "trajectory.csv", course)
    dtypes = {"base": opened.dtypes, "tuned": open_checkpoint(path[-1], opened).dtypes}
    what = {"base": str(base), "path": list(map(str, path)), "dtypes": dtypes}
    write_json(out / "summary.json", what | summarise(table, job))
    title = f"{Path(base).name} ({dtypes['base']}) to {path[-1].name} ({dtypes['tuned']})"
    write_report(out / "report.html", table, course, overall_means(table), title)
    (out / "rows.jsonl").unlink()
    return table


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))


def _resume(out: Path, job: Job) -> dict[str, dict]:
    """Return the rows of an earlier, unfinished call for the same job, and prepare the folder for the others.

    Raises:
        OpdlabError: if the folder cannot be written, or holds another measurement.
    """
    identity, log, lines = job.identity(), out / "rows.jsonl", []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "job.json").is_file() and json.loads((out / "job.json").read_text()) != identity:
            raise OpdlabError(f"the folder {out} holds another measurement: choose another with --out, or delete it")
        if log.is_file():
            # A kill may have cut the last line, so keep whole lines only.
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        rows = {found["row"]["matrix"]: found for found in map(json.loads, lines)}
    except (OSError, ValueError, KeyError) as problem:
        raise OpdlabError(f"the folder {out} cannot be used ({problem}): choose another with --out") from problem
    write_json(out / "job.json", identity)
    write_whole(log, lambda temporary: temporary.write_text("".join(lines)))
    return rows


# What the summary holds: the column, its null, and whether matrices weigh by their parameters (the paper's rule for
# sparsity) or count alike (its rule for the rest).
SUMMARY = (
    ("sparsity", None, "parameter"),
    ("sparsity_absolute", None, "parameter"),
    ("sparsity_relative", None, "parameter"),
    ("relative_norm", None, "matrix"),
    ("nss", None, "matrix"),
    ("angle_left_mean", None, "matrix"),
    ("angle_right_mean", None, "matrix"),
    ("angle_left_max", None, "matrix"),
    ("stable_rank", "stable_rank_null", "matrix"),
    ("effective_rank", "effective_rank_null", "matrix"),
    ("effective_rank_squared", "effective_rank_squared_null", "matrix"),
    ("top_energy", "top_energy_null", "matrix"),
    ("hill", "hill_null", "matrix"),
    ("energy_left", "energy_left_random", "matrix"),
    ("energy_right", "energy_right_random", "matrix"),
    ("energy_both", "energy_both_random", "matrix"),
    *(
        (f"{star}_overlap_a{alpha}", f"{star}_overlap_a{alpha}_null", "matrix")
        for alpha in (30, 50)
        for star in ("principal", "low", "principal_only")
    ),
)


def summarise(table: pd.DataFrame, job: Job) -> dict:
    """Return the means of a table of :func:`measure_checkpoints`: overall, by block and by module.

    Each entry has its value, the null, their ratio, the z-score of their difference over matrices, the value at equal
    norm, and how matrices are weighed. *Overall* is attention and MLP, as in the paper; the rest stands apart.
    """
    layers = table[table["block"].isin(["attention", "mlp"])]
    groups = {"overall": layers}
    groups |= {str(block): rows for block, rows in table.groupby("block", sort=False)}
    groups |= {f"{block}.{module}": rows for (block, module), rows in layers.groupby(["block", "module"], sort=False)}
    return {
        "provenance": provenance(),
        "seed": job.seed,
        "groups": {name: _summary(rows) for name, rows in groups.items() if len(rows)},
    }


def overall_means(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per diagnostic: value, null, ratio, z-score, value at equal norm, weighting."""
    overall = _summary(table[table["block"].isin(["attention", "mlp"])])
    rows = {name: entry for name, entry in overall.items() if isinstance(entry, dict)}
    columns = ["value", "null", "ratio", "z", "at equal norm", "weighting"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)


def _summary(rows: pd.DataFrame) -> dict:
    found: dict = {"tensors": len(rows), "parameters": int(rows["parameters"].sum())}
    for column, null, weighting in SUMMARY:
        columns = [name for name in (column, null, f"{column}_matched") if name in rows and rows[name].notna().any()]
        # Where a diagnostic or its null is undefined or infinite, neither counts.
        known = rows[["parameters", *columns]].replace([inf, -inf], nan).dropna()
        if column not in columns or known.empty:
            continue
        weights = known["parameters"] if weighting == "parameter" else pd.Series(1.0, known.index)
        means = {name: float((known[name] * weights).sum() / weights.sum()) for name in columns}
        entry = {"value": means[column], "weighting": f"per {weighting}", "defined": len(known)}
        if null in columns:
            difference = known[column] - known[null]
            entry["null"] = means[null]
            entry["ratio"] = means[column] / means[null] if means[null] else None
            error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
            entry["z"] = float(difference.mean() / error) if error > 0 else None
        if f"{column}_matched" in columns:
            entry["at equal norm"] = means[f"{column}_matched"]
        found[column] = entry
    return found
