"""Several updates side by side: do they move the same weights, and in the same directions?

Every similarity stands beside what unrelated updates would show: random subspaces, masks that are independent given
their densities, and masks of permuted updates, which share what rounding alone prefers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path

import pandas as pd
import torch

from opdlab.errors import OpdlabError
from opdlab.geometry import (
    cosine,
    density,
    describe,
    frobenius,
    independent_jaccard,
    jaccard,
    permute,
    sim_k,
    svd,
    top_left,
    top_right,
    update_mask,
)
from opdlab.geometry.measure import MATCHED_NORM, generator_of
from opdlab.geometry.summary import largest_k, of_layers, overall_means
from opdlab.measuring.parallel import collect, finish
from opdlab.measuring.update import settings_for
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.files import write_json, write_whole


@dataclass(frozen=True)
class Measured:
    """One update that was measured: where its weights are, and what the measurement found."""

    label: str
    base: Path
    tuned: Path
    table: pd.DataFrame


def load_measured(paths: Sequence[Path]) -> list[Measured]:
    """Read the results of ``opdlab measure``.

    Args:
        paths: summary.json files, or the folders that they are in.

    Raises:
        OpdlabError: if there are fewer than two, one is none, or they are not about the same matrices.
    """
    files = [path / "summary.json" if path.is_dir() else path for path in map(Path, paths)]
    if len({file.resolve() for file in files}) < 2:
        raise OpdlabError("give two or more results of 'opdlab measure' to compare, each another one")
    summaries, tables = [], []
    for file in files:
        try:
            summary, table = json.loads(file.read_text()), pd.read_csv(file.with_name("matrices.csv"))
            summaries.append((Path(summary["base"]), Path(summary["path"][-1])))
            # What is too small for any subspace is left out.
            table = of_layers(table)[lambda rows: rows[["rows", "cols"]].min(axis=1) >= 4].set_index("matrix")
            tables.append(table.astype({"frobenius": float, "density": float, "parameters": int}))
        except (OSError, ValueError, LookupError, TypeError) as problem:
            raise OpdlabError(
                f"{file} is no summary.json of 'opdlab measure' with its matrices.csv beside it"
            ) from problem
    for file, table in zip(files, tables, strict=True):
        other = tables[0][["rows", "cols"]]
        if table.empty or not table[["rows", "cols"]].sort_index().equals(other.sort_index()):
            raise OpdlabError(f"{file} is about other matrices than {files[0]}: compare models of one architecture")
    names = [tuned.name.removesuffix(".safetensors") for _, tuned in summaries]
    if len(set(names)) < len(names):
        names = [file.resolve().parent.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file.parent) for file in files]
    return [Measured(name, *where, table) for name, where, table in zip(names, summaries, tables, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """What one process needs to compare the updates of any matrix."""

    updates: tuple[tuple[str, Path, Path], ...]  # label, base, tuned
    norms: tuple[dict[str, float], ...]  # of each update, by matrix, as measured
    seed: int

    def compare(self, name: str) -> dict:
        """Compare the updates of one matrix, every pair of them."""
        seen = []
        for (label, base_path, tuned_path), norms in zip(self.updates, self.norms, strict=True):
            base = open_checkpoint(base_path)
            tuned = open_checkpoint(tuned_path, base)
            shapes = [opened.pieces[name].shape if name in opened.pieces else () for opened in (base, tuned)]
            changed = f"{tuned_path} or {base_path} has changed since it was measured: measure it again"
            if shapes[0] != shapes[1] or len(shapes[0]) != 2:
                raise OpdlabError(changed)
            w0, w1 = base.read(name).double(), tuned.read(name).double()
            delta = w1 - w0
            if abs(frobenius(delta) - norms[name]) > 1e-6 * norms[name]:
                raise OpdlabError(changed)
            ks = settings_for(tuple(w0.shape)).sim_ks
            # Each with a permutation of its own: a shared one would make two equal updates equal again.
            shuffled = permute(delta, generator_of(self.seed, f"{label} {name}"))
            masks = {"": (update_mask(w0, w1), update_mask(w0, w0 + shuffled))}
            # Without an update there is nothing to scale, and both masks stay empty.
            scale = MATCHED_NORM * frobenius(w0) / norms[name] if norms[name] else 0.0
            matched, null = (update_mask(w0, torch.add(w0, d, alpha=scale)) for d in (delta, shuffled))
            masks["_matched"] = matched, null
            seen.append((label, svd(delta, k=max(ks)), delta, masks))
        rows, (m, n) = [], w0.shape
        for (a, svd_a, delta_a, masks_a), (b, svd_b, delta_b, masks_b) in combinations(seen, 2):
            row = {"a": a, "b": b, "matrix": name, **describe(name)._asdict(), "rows": m, "cols": n}
            row |= {"cosine": cosine(delta_a, delta_b), "cosine_random": (m * n) ** -0.5}
            for size in masks_a:
                (mask_a, null_a), (mask_b, null_b) = masks_a[size], masks_b[size]
                row[f"jaccard{size}"] = jaccard(mask_a, mask_b)
                row[f"jaccard_independent{size}"] = independent_jaccard(density(mask_a), density(mask_b))
                row[f"jaccard_permuted{size}"] = jaccard(null_a, null_b)
            for k in ks:
                row[f"sim_right_K{k}"] = sim_k(top_right(svd_a, k), top_right(svd_b, k))
                row[f"sim_left_K{k}"] = sim_k(top_left(svd_a, k), top_left(svd_b, k))
                row |= {f"sim_right_random_K{k}": k / n, f"sim_left_random_K{k}": k / m}
            rows.append(row)
        return {"pairs": rows}


def compare_measurements(
    paths: Sequence[Path], out: Path, *, seed: int = 0, processes: int = 2, progress: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare measured updates, and write models.csv, pairs.csv, compare.json and compare.html.

    Args:
        paths: summary.json files of ``opdlab measure``, or their folders. The checkpoints that they name are read
            again: subspaces and masks are too large to keep.
        out: folder for the results; what an earlier call left unfinished there is gone on with.
        seed: of the permutations.
        processes: matrices compared side by side.
        progress: show a bar.

    Returns:
        The diagnostics, one row each and one column per model (value, and at equal norm); and one row per pair of
        models and matrix: cosine of their updates, Jaccard index of their visible masks (at their own size, and at
        equal norm: _matched) with its value for independent and for permuted ones, and Sim_K with K/n.

    Raises:
        OpdlabError: on bad input, naming the file.
    """
    measured, out = load_measured(paths), Path(out)
    sizes = {name: prod(shape) for name, *shape in measured[0].table[["rows", "cols"]].itertuples()}
    sizes = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    updates = tuple((update.label, update.base, update.tuned) for update in measured)
    job = Comparison(updates, tuple(update.table["frobenius"].to_dict() for update in measured), seed)
    identity = {"updates": [[str(part) for part in update] for update in updates], "norms": job.norms, "seed": seed}
    done = collect(out, identity, job.compare, sizes, processes, progress)
    found = [done[name]["pairs"] for name in measured[0].table.index]
    pairs = pd.DataFrame([row for pair in zip(*found, strict=True) for row in pair])
    models = side_by_side(measured)
    write_whole(out / "pairs.csv", lambda file: pairs.to_csv(file, index=False, lineterminator="\n"))
    flat = models.set_axis([f"{label}, {kind}" for label, kind in models.columns], axis="columns")
    write_whole(out / "models.csv", lambda file: flat.to_csv(file, index_label="diagnostic", lineterminator="\n"))
    means = pair_means(pairs)
    what = {"updates": identity["updates"], "weighting": "per matrix", "pairs": means.to_dict("records")}
    write_json(out / "compare.json", what)
    from opdlab.measuring.report import write_comparison

    write_comparison(out / "compare.html", models, pairs, means)
    finish(out)
    return models, pairs


def side_by_side(measured: Sequence[Measured]) -> pd.DataFrame:
    """Return the overall means of several updates: one row per diagnostic, columns (model, value or at equal norm)."""
    columns = {}
    for update in measured:
        means = overall_means(update.table)
        for kind in ("value", "null", "noise", "at equal norm", "null at equal norm"):
            if kind in means:
                columns[(update.label, kind)] = means[kind]
    return pd.concat(columns, axis=1)


def pair_means(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair of models: the means over matrices, each alike, at the largest K."""
    k = largest_k(pairs)
    groups = [["cosine", "cosine_random"]]
    groups += [[f"jaccard{kind}{size}" for kind in ("", "_independent", "_permuted")] for size in ("", "_matched")]
    groups += [[f"sim_{side}_K{k}", f"sim_{side}_random_K{k}"] for side in ("right", "left")]
    rows = []
    for (a, b), rows_of_pair in pairs.groupby(["a", "b"], sort=False):
        row = {"a": a, "b": b}
        for columns in groups:
            # A value and its baselines are of the same matrices: those where all are defined.
            known = rows_of_pair.reindex(columns=columns).dropna()
            row |= {f"{columns[0]}_matrices": len(known)} if len(known) < len(rows_of_pair) else {}
            row |= known.mean().to_dict() if len(known) else dict.fromkeys(columns, float("nan"))
        rows.append(row)
    return pd.DataFrame(rows)
