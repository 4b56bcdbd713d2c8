"""The instrument: the geometry of an update between checkpoints on disk, whoever trained them.

Matrices are read one at a time and measured in processes side by side; each finished one is written down at once, so
that stopped work goes on where it was. Decompositions of the base are kept in a cache, for the next model that was
tuned from it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
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
    measure_matrix,
    measure_vector,
    svd,
)
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
    folder = os.environ.get("OPDLAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "opdlab")
    return Path(folder).expanduser()


def check_comparable(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Return the names that both checkpoints have, largest tensor first.

    Raises:
        OpdlabError: if they are one folder, or differ in names or shapes, naming the first tensors that do.
    """
    if base.path.resolve() == tuned.path.resolve():
        raise OpdlabError(f"base and tuned are the same checkpoint, {base.path}: give two")
    alone = sorted(base.pieces.keys() ^ tuned.pieces.keys())
    if alone:
        owner = base.path if alone[0] in base.pieces else tuned.path
        raise OpdlabError(
            f"{base.path} and {tuned.path} have different architectures: {len(alone)} tensors are in one of them only, "
            f"such as {alone[0]} in {owner}"
        )
    for name, piece in base.pieces.items():
        if piece.shape != tuned.pieces[name].shape:
            raise OpdlabError(f"{name} is {piece.shape} in {base.path} and {tuned.pieces[name].shape} in {tuned.path}")
    sizes = {name: torch.Size(piece.shape).numel() for name, piece in base.pieces.items()}
    return sorted(sizes, key=lambda name: -sizes[name])


@dataclass(frozen=True)
class Job:
    """What one process needs to measure any tensor of a pair."""

    base: Path
    tuned: Path
    seed: int
    nulls: bool
    cache: Path | None

    def identity(self) -> dict:
        """Return what stopped work must share with this to be gone on with: paths, files and options."""
        files = [file for path in (self.base, self.tuned) for file in sorted([path, *path.glob("*.safetensors")])]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return json.loads(json.dumps({"seed": self.seed, "nulls": self.nulls, "files": stamps}))

    def measure(self, name: str) -> dict:
        """Measure one tensor and return its row."""
        base = open_checkpoint(self.base)
        w0, w1 = base.read(name), open_checkpoint(self.tuned, base).read(name)
        rows, cols = w0.shape if w0.ndim == 2 else (w0.numel(), 1)
        row = {"matrix": name, **describe(name)._asdict(), "rows": rows, "cols": cols, "parameters": w0.numel()}
        if w0.ndim != 2 or min(w0.shape) < 2:
            return row | measure_vector(w0, w1)
        settings = settings_for(tuple(w0.shape))
        vectors = max(settings.k, settings.mask_rank, *settings.angle_ks)
        svd0 = base_svd(w0, vectors, self.cache)
        row |= {"k": settings.k, "mask_rank": settings.mask_rank}
        return row | measure_matrix(name, w0, w1, settings, self.seed, svd0, self.nulls)


def base_svd(w0: Tensor, k: int, cache: Path | None) -> Svd:
    """Return the Svd of a base matrix with k vectors, from the cache if its content was decomposed before."""
    if cache is None:
        return svd(w0, k=k)
    content = hashlib.sha256(w0.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:32]
    file = cache / f"svd-{content}-{'x'.join(map(str, w0.shape))}-k{k}.safetensors"
    if file.is_file():
        tensors, _ = load_tensors(file)
        return Svd(tensors["u"], tensors["s"], tensors["vh"])
    found = svd(w0, k=k)
    save_tensors(file, found._asdict())
    return found


def _start() -> None:
    torch.set_num_threads(1)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def measure_checkpoints(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    seed: int = 0,
    nulls: bool = True,
    processes: int = 2,
    cache: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Measure every tensor of an update, and write matrices.csv, summary.json and report.html.

    Args:
        base: the checkpoint before (:func:`opdlab.checkpoints.open_checkpoint`).
        tuned: the checkpoint after, or an adapter on ``base``.
        out: folder for the results; what an earlier call left unfinished there is gone on with.
        seed: of the permutations.
        nulls: whether to compute the nulls and the norm-matched diagnostics.
        processes: matrices measured side by side, with one thread each.
        cache: folder for decompositions of bases; None keeps none.
        progress: show a bar.

    Returns:
        One row per tensor in the order of the base, with the columns of :func:`opdlab.geometry.measure_matrix`; k and
        mask_rank name the resolution. Norms and biases have sparsity and norms only.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.
    """
    opened = open_checkpoint(base)
    names = check_comparable(opened, open_checkpoint(tuned, opened))
    job = Job(Path(base), Path(tuned), seed, nulls, cache)
    done = _resume(out, job)
    with (
        tqdm(total=len(names), initial=len(done), unit="tensor", disable=not progress) as bar,
        open(out / "rows.jsonl", "a") as log,
        _pool(processes) as pool,
    ):
        futures = [pool.submit(job.measure, name) for name in names if name not in done]
        for future in as_completed(futures):
            row = future.result()
            done[row["matrix"]] = row
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix_str(row["matrix"][-40:])
            bar.update()
    table = pd.DataFrame([done[name] for name in opened.pieces])
    if (table["frobenius"] == 0).all():
        raise OpdlabError(f"{base} and {tuned} hold the same weights: there is no update to measure")
    write_whole(out / "matrices.csv", lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))
    write_json(out / "summary.json", {"base": str(base), "tuned": str(tuned)} | summarise(table, job))
    write_report(out / "report.html", table, overall_means(table), f"From {Path(base).name} to {Path(tuned).name}")
    (out / "rows.jsonl").unlink()
    return table


def _resume(out: Path, job: Job) -> dict[str, dict]:
    """Return the rows of an earlier, unfinished call for the same job, and prepare the folder for the others."""
    identity, log = job.identity(), out / "rows.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        same = log.is_file() and json.loads((out / "job.json").read_text()) == identity
        # A kill may have cut the last line, so keep whole lines only.
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if same else []
    except (OSError, ValueError) as problem:
        raise OpdlabError(f"the folder {out} cannot be used ({problem}): choose another with --out") from problem
    write_json(out / "job.json", identity)
    write_whole(log, lambda temporary: temporary.write_text("".join(lines)))
    return {row["matrix"]: row for row in map(json.loads, lines)}


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
        (f"{star}_overlap_a{alpha}", f"{star}_overlap_a{alpha}_null", "matrices")
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
        if column not in rows or rows[column].isna().all():
            continue
        weights = rows["parameters"] if weighting == "parameter" else pd.Series(1.0, rows.index)
        entry = {"value": _mean(rows[column], weights), "weighting": f"per {weighting}"}
        if null in rows and rows[null].notna().any():
            difference = rows[column] - rows[null]
            entry["null"] = _mean(rows[null], weights)
            entry["ratio"] = entry["value"] / entry["null"] if entry["null"] else None
            error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
            entry["z"] = float(difference.mean() / error) if error > 0 else None
        if f"{column}_matched" in rows and rows[f"{column}_matched"].notna().any():
            entry["at equal norm"] = _mean(rows[f"{column}_matched"], weights)
        found[column] = entry
    return found


def _mean(values: pd.Series, weights: pd.Series) -> float:
    known = values.notna()
    return float((values[known] * weights[known]).sum() / weights[known].sum())
