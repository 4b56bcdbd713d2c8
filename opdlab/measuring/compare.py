"""Several updates side by side: do they move the same weights, and in the same directions?

Every similarity stands beside that of unrelated updates: random subspaces, masks that are independent given their
densities, and masks of permuted updates, which have in common what rounding alone prefers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import (
    Resolution,
    Svd,
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
from opdlab.geometry.summary import largest_k, of_layers
from opdlab.measuring.parallel import resumable_map
from opdlab.measuring.sources import Located, name_of, open_all, place_of, source_of
from opdlab.measuring.update import Update, as_html, as_text, load_update, write_table
from opdlab.models.files import write_json


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """Updates that were compared; shown by itself, it is the means of each pair, beside those of unrelated updates.

    Attributes:
        models: the diagnostics, one row each and one column per model (value, and at equal norm).
        pairs: one row per pair of models and matrix: cosine of their updates, Jaccard index of their visible masks (at
            their own size, and at equal norm: _matched) with its value for independent and for permuted ones, and Sim_K
            with K/n.
        updates: label, base and tuned checkpoint of each model.
    """

    models: pd.DataFrame
    pairs: pd.DataFrame
    updates: list[list[str]]

    @property
    def means(self) -> pd.DataFrame:
        """One row per pair of models (:func:`pair_means`)."""
        return pair_means(self.pairs)

    def save(self, folder: Path | str) -> None:
        """Write models.csv, pairs.csv, compare.json and compare.html.

        Raises:
            OpdlabError: if the folder cannot be written.
        """
        from opdlab.measuring.report import write_comparison

        folder, means = Path(folder), self.means
        write_table(folder / "pairs.csv", self.pairs)
        flat = self.models.set_axis([f"{label}, {kind}" for label, kind in self.models.columns], axis="columns")
        write_table(folder / "models.csv", flat.rename_axis("diagnostic").reset_index())
        what = {"updates": self.updates, "weighting": "per matrix", "pairs": means.to_dict("records")}
        write_json(folder / "compare.json", what)
        write_comparison(folder / "compare.html", self.models, self.pairs, means)

    def _shown(self) -> list[pd.DataFrame]:
        return [self.models, self.means.set_index(["a", "b"]).T]

    def __repr__(self) -> str:
        """Return models and means as text."""
        return "\n\n".join(as_text(table) for table in self._shown())

    def _repr_html_(self) -> str:
        return "\n".join(as_html(table) for table in self._shown())


def compare(
    updates: Sequence[Update | Path | str],
    *,
    out: Path | str | None = None,
    seed: int = 0,
    processes: int = 1,
    progress: bool = False,
) -> Comparison:
    """Compare measured updates. Nothing is written unless ``out`` is given.

    Args:
        updates: what :func:`opdlab.measuring.update.measure` returned, or its summary.json files, or their folders.
            Their checkpoints are read again: subspaces and masks are too large to keep.
        out: folder for the results (:meth:`Comparison.save`); what an earlier call left unfinished there is resumed.
        seed: of the permutations.
        processes: matrices compared at once; weights in memory are always compared in this process.
        progress: show a bar.

    Raises:
        OpdlabError: on bad input, naming the file.
    """
    asked = [one if isinstance(one, Update) else _summary_file(Path(one)) for one in updates]
    if len({id(one) if isinstance(one, Update) else one.resolve() for one in asked}) < 2:
        raise OpdlabError("give two or more results of 'opdlab measure' to compare, each another one")
    loaded = [one if isinstance(one, Update) else load_update(one) for one in asked]
    measured = dict(zip(_labels(asked, loaded), loaded, strict=True))
    tables = [_compared(update.table) for update in loaded]
    _check_alike(asked, tables)
    sizes = dict(sorted(tables[0]["parameters"].astype(int).items(), key=lambda item: -item[1]))
    ends = [(source_of(update.base), source_of(update.path[-1])) for update in loaded]
    job = _Pairs(
        tuple((label, *where) for label, where in zip(measured, ends, strict=True)),
        tuple(table["frobenius"].astype(float).to_dict() for table in tables),
        seed,
    )
    on_disk = all(isinstance(source, Path) for where in ends for source in where)
    named = [[label, place_of(update.base), place_of(update.path[-1])] for label, update in measured.items()]
    identity = {"updates": named, "norms": job.norms, "seed": seed}
    # What is in memory cannot be told apart from other weights in memory, nor be sent to another process cheaply.
    folder = Path(out) if out else None
    log, processes = (folder, processes) if on_disk else (None, 1)
    open_all.cache_clear()  # files may have changed
    with resumable_map(job.compare, sizes, identity, out=log, processes=processes, progress=progress) as found:
        of_pairs = zip(*(found[name]["pairs"] for name in tables[0].index), strict=True)
        pairs = pd.DataFrame([row for pair in of_pairs for row in pair])
        comparison = Comparison(side_by_side(measured), pairs, named)
        if folder:
            comparison.save(folder)
    open_all.cache_clear()  # weights in memory may go
    return comparison


def _summary_file(path: Path) -> Path:
    return path / "summary.json" if path.is_dir() else path


def _labels(asked: Sequence[Update | Path], loaded: Sequence[Update]) -> list[str]:
    """Return a name for each update: that of its tuned model, or of its folder where that is not unique."""
    labels = names = [name_of(update.path[-1]) for update in loaded]
    if len(set(names)) < len(names):
        names = [one.title if isinstance(one, Update) else one.resolve().parent.name for one in asked]
    return names if len(set(names)) == len(names) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    # What is too small for any subspace is left out.
    return of_layers(table)[lambda rows: rows[["rows", "cols"]].min(axis=1) >= 4].set_index("matrix")


def _check_alike(asked: Sequence[Update | Path], tables: Sequence[pd.DataFrame]) -> None:
    shapes = [table[["rows", "cols"]].sort_index() for table in tables]
    for one, found in zip(asked, shapes, strict=True):
        if found.empty or not found.equals(shapes[0]):
            what, than = (update.title if isinstance(update, Update) else update for update in (one, asked[0]))
            raise OpdlabError(f"{what} is about other matrices than {than}: compare models of one architecture")


@dataclass(frozen=True)
class _Pairs:
    """All that a process needs to compare the updates of any matrix."""

    updates: tuple[tuple[str, Located, Located], ...]  # label, base, tuned
    norms: tuple[dict[str, float], ...]  # of each update, by matrix, as measured
    seed: int

    def compare(self, name: str) -> dict:
        """Compare the updates of one matrix, every pair of them."""
        seen = [self._see(i, name) for i in range(len(self.updates))]
        return {"pairs": [a.beside(b, name) for a, b in combinations(seen, 2)]}

    def _see(self, i: int, name: str) -> _Seen:
        (label, base_at, tuned_at), norm = self.updates[i], self.norms[i][name]
        base, tuned = open_all(base_at, (tuned_at,))
        shapes = [opened.pieces[name].shape if name in opened.pieces else () for opened in (base, tuned)]
        changed = f"{tuned.path} or {base.path} has changed since it was measured: measure it again"
        if shapes[0] != shapes[1] or len(shapes[0]) != 2:
            raise OpdlabError(changed)
        w0, w1 = base.read(name).double(), tuned.read(name).double()
        delta = w1 - w0
        if abs(frobenius(delta) - norm) > 1e-6 * norm:
            raise OpdlabError(changed)
        # Each with a permutation of its own: a shared one would make two equal updates equal again.
        shuffled = permute(delta, generator_of(self.seed, f"{label} {name}"))
        masks = {"": (update_mask(w0, w1), update_mask(w0, w0 + shuffled))}
        # Without an update there is nothing to scale, and both masks stay empty.
        scale = MATCHED_NORM * frobenius(w0) / norm if norm else 0.0
        matched, null = (update_mask(w0, torch.add(w0, d, alpha=scale)) for d in (delta, shuffled))
        masks["_matched"] = matched, null
        ks = Resolution.of(shapes[0]).sim_ks
        return _Seen(label, svd(delta, k=max(ks)), delta, masks, ks)


@dataclass(frozen=True, eq=False)
class _Seen:
    """One update of one matrix, as comparisons see it."""

    label: str
    directions: Svd
    delta: Tensor
    masks: dict[str, tuple[Tensor, Tensor]]  # by size, the visible update and its permuted null
    ks: tuple[int, ...]

    def beside(self, other: _Seen, name: str) -> dict:
        """Return the row of a pair."""
        row = {"a": self.label, "b": other.label, "matrix": name, **describe(name)._asdict()}
        row |= {"rows": (m := self.delta.shape[0]), "cols": (n := self.delta.shape[1])}
        row |= {"cosine": cosine(self.delta, other.delta), "cosine_random": (m * n) ** -0.5}
        for size in self.masks:
            (mask_a, null_a), (mask_b, null_b) = self.masks[size], other.masks[size]
            row[f"jaccard{size}"] = jaccard(mask_a, mask_b)
            row[f"jaccard_independent{size}"] = independent_jaccard(density(mask_a), density(mask_b))
            row[f"jaccard_permuted{size}"] = jaccard(null_a, null_b)
        for k in self.ks:
            row[f"sim_right_K{k}"] = sim_k(top_right(self.directions, k), top_right(other.directions, k))
            row[f"sim_left_K{k}"] = sim_k(top_left(self.directions, k), top_left(other.directions, k))
            row |= {f"sim_right_random_K{k}": k / n, f"sim_left_random_K{k}": k / m}
        return row


def side_by_side(measured: Mapping[str, Update]) -> pd.DataFrame:
    """Return the means of several updates: one row per diagnostic, columns (label, value or at equal norm)."""
    columns = {}
    for label, update in measured.items():
        means = update.means
        for kind in ("value", "null", "noise", "at equal norm", "null at equal norm"):
            if kind in means:
                columns[(label, kind)] = means[kind]
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
