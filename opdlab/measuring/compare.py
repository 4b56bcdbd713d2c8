"""Several updates side by side: do they move the same weights, and in the same directions?

Every similarity stands beside that of unrelated updates: random subspaces, masks that are independent given their
densities, and masks of permuted updates, which have in common what rounding alone prefers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from opdlab import geometry as g
from opdlab.errors import OpdlabError
from opdlab.geometry.measure import MATCHED_NORM, generator_of
from opdlab.geometry.summary import largest_k, means_over, of_layers
from opdlab.measuring.shown import Shown, write_table
from opdlab.measuring.sources import check_apart, name_of, place_of
from opdlab.measuring.tensors import resumable_map
from opdlab.measuring.update import Update, load_update
from opdlab.models.files import content_digest, write_json

if TYPE_CHECKING:
    from opdlab.training.trained import Trained

# The means of an update that stand beside those of others.
_KINDS = ["value", "ruler", "null", "noise", "at equal norm", "null at equal norm"]


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Shown):
    """Updates that were compared; shown by itself, it is the means of each pair, beside those of unrelated updates.

    A row of ``pairs`` is one pair of models and matrix: cosine of their updates, Jaccard index of their visible masks
    (at their own size, and at equal norm: _matched) with its value for independent and for permuted ones, and Sim_K
    with K/n.
    """

    models: pd.DataFrame  #: the diagnostics, one row each and one column per model (value, and at equal norm)
    pairs: pd.DataFrame
    updates: list[list[str]]  #: label, base and tuned checkpoint of each model
    notes: list[str]  #: what is compared, and what to keep in mind

    @property
    def means(self) -> pd.DataFrame:
        """One row per pair of models (:func:`pair_means`)."""
        return pair_means(self.pairs)

    def save(self, folder: Path | str) -> None:
        """Write models.csv, pairs.csv, compare.json and compare.html.

        Raises:
            OpdlabError: if the folder cannot be written or has files of the same names from elsewhere.
        """
        from opdlab.measuring.report import write_comparison

        check_apart(folder := Path(folder).expanduser())
        write_table(folder / "pairs.csv", self.pairs)
        flat = self.models.set_axis([f"{label}, {kind}" for label, kind in self.models.columns], axis="columns")
        write_table(folder / "models.csv", flat.rename_axis("diagnostic").reset_index())
        what = {"updates": self.updates, "notes": self.notes, "weighting": "per matrix"}
        write_json(folder / "compare.json", what | {"pairs": self.means.to_dict("records")})
        write_comparison(folder / "compare.html", self)

    def parts(self) -> list[str | pd.DataFrame]:
        """Return the two tables of means, and the notes."""
        return [self.models, self.means.set_index(["a", "b"]).T, *self.notes]


def compare(
    updates: Iterable[Update | Trained | Path | str],
    *,
    out: Path | str | None = None,
    seed: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> Comparison:
    """Compare updates: do they move the same weights, and in the same directions?

    Nothing is written unless ``out`` is given.

    Args:
        updates: what :func:`opdlab.measuring.update.measure` returned, or its summary.json files, or their folders; or
            runs of :func:`opdlab.train`, called by the names of their folders. Their checkpoints are read again:
            subspaces and masks are too large to keep.
        out: folder for the results (:meth:`Comparison.save`); what an earlier call left unfinished there is resumed.
        seed: of the permutations.
        processes: matrices compared at once; weights in memory are always compared in this process.
        progress: show a bar when a second has passed.

    Raises:
        OpdlabError: if there are fewer than two, or one was not measured, has changed since, or has other matrices.
    """
    if isinstance(updates, (str, Path)) or not isinstance(updates, Iterable):
        raise OpdlabError(f"updates is {updates!r}: give a list of two or more")
    asked = [_asked(one) for one in updates]
    if len({id(one) if isinstance(one, Update) else one.resolve() for one in asked}) < 2:
        raise OpdlabError("give two or more results of 'opdlab measure' to compare, each another one")
    measured = _labelled(asked)
    tables = _comparable(measured)
    named = [[label, place_of(update.base), place_of(update.path[-1])] for label, update in measured.items()]
    norms = [table["frobenius"].astype(float).to_dict() for table in tables]
    sizes = tables[0]["parameters"].astype(int).sort_values(ascending=False, kind="stable").to_dict()
    identity = {"updates": named, "norms": norms, "seed": seed}
    check_apart(folder := Path(out).expanduser() if out else None)
    ends = [end for update in measured.values() for end in (update.base, update.path[-1])]
    work = partial(_compare_matrix, updates=measured, seed=seed)
    with resumable_map(work, sizes, identity, ends, out=folder, processes=processes, progress=progress) as found:
        one_base = all(len(set(found[name]["bases"])) == 1 for name in sizes)
        by_pair = zip(*(found[name]["pairs"] for name in tables[0].index), strict=True)
        pairs = pd.DataFrame(list(chain.from_iterable(by_pair)))
        models = {label: update.means.filter(_KINDS) for label, update in measured.items()}
        comparison = Comparison(pd.concat(models, axis="columns"), pairs, named, _notes(measured, one_base))
        if folder:
            comparison.save(folder)
    return comparison


def _asked(one: Any) -> Update | Path:
    """Return the update that was given, the update of a run, or the path of a summary.json."""
    if isinstance(one, (Path, str)):
        path = Path(one).expanduser()
        return path / "summary.json" if path.is_dir() else path
    update = one if isinstance(one, Update) else getattr(one, "trajectory", None)
    if not isinstance(update, Update):
        raise OpdlabError(f"updates has a {type(one).__name__}: give measured updates, or their folders")
    return update


def _labelled(asked: Sequence[Update | Path]) -> dict[str, Update]:
    """Return the updates by the names of their tuned models, or of their folders where those are not unique."""
    updates = [one if isinstance(one, Update) else load_update(one) for one in asked]
    labels = names = [name_of(update.path[-1]) for update in updates]
    if len(set(names)) < len(names):
        names = [one.title if isinstance(one, Update) else one.resolve().parent.name for one in asked]
    if len(set(names)) < len(names):
        names = [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return dict(zip(names, updates, strict=True))


def _comparable(measured: Mapping[str, Update]) -> list[pd.DataFrame]:
    """Return what is compared of each table, by matrix; what is too small for any subspace is left out."""
    tables = [of_layers(one.table).query("rows >= 4 and cols >= 4").set_index("matrix") for one in measured.values()]
    shapes = [table[["rows", "cols"]].sort_index() for table in tables]
    for label, found in zip(measured, shapes, strict=True):
        if found.empty or not found.equals(shapes[0]):
            other = sorted(set(found.itertuples()) ^ set(shapes[0].itertuples()))
            which = f"such as {other[0][0]}, {other[0][1:]}" if other else "having none in a layer"
            than = f"has other matrices than {next(iter(measured))}, {which}"
            raise OpdlabError(f"{label} {than}: compare models of one architecture")
    return tables


def _notes(measured: Mapping[str, Update], one_base: bool) -> list[str]:
    """Return what is compared, and from which bases, if they are several."""
    said = [f"Compared are {means_over(next(iter(measured.values())).table)}; what else was measured is not."]
    if not one_base:
        places, names = ({of(update.base) for update in measured.values()} for of in (place_of, name_of))
        called = name_of if len(names) == len(places) else place_of
        each = "; ".join(f"{label} from {called(update.base)}" for label, update in measured.items())
        said.append(f"They start from different bases: {each}.")
    return said


def _compare_matrix(name: str, updates: Mapping[str, Update], seed: int) -> dict:
    seen = [_see(name, label, update, seed) for label, update in updates.items()]
    return {"pairs": [_row(name, a, b) for a, b in combinations(seen, 2)], "bases": [one.base for one in seen]}


class _Seen(NamedTuple):
    """One update of one matrix, as comparisons see it."""

    label: str
    base: str  # a digest of its weights
    directions: g.Svd
    delta: Tensor
    masks: dict[str, tuple[Tensor, Tensor]]  # by size, the visible update and its permuted null


def _see(name: str, label: str, update: Update, seed: int) -> _Seen:
    base, tuned = update.base, update.path[-1]
    changed = f"{tuned.path} or {base.path} has changed since it was measured: measure it again"
    shapes = [end.pieces[name].shape if name in end.pieces else None for end in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise OpdlabError(changed)
    w0, w1 = base.read(name).double(), tuned.read(name).double()
    delta, norm = w1 - w0, float(update.table.set_index("matrix").at[name, "frobenius"])
    if abs(g.frobenius(delta) - norm) > 1e-6 * norm:
        raise OpdlabError(changed)
    # Each with a permutation of its own: a shared one would make two equal updates equal again.
    shuffled = g.permute(delta, generator_of(seed, f"{label} {name}"))
    # Without an update there is nothing to scale, and both masks stay empty.
    scale = MATCHED_NORM * g.frobenius(w0) / norm if norm else 0.0
    matched, null = (g.update_mask(w0, torch.add(w0, d, alpha=scale)) for d in (delta, shuffled))
    masks = {"": (g.update_mask(w0, w1), g.update_mask(w0, w0 + shuffled)), "_matched": (matched, null)}
    return _Seen(label, content_digest(w0), g.svd(delta, k=max(g.Resolution.of(delta.shape).sim_ks)), delta, masks)


def _row(name: str, a: _Seen, b: _Seen) -> dict[str, Any]:
    m, n = a.delta.shape
    row = {"a": a.label, "b": b.label, "matrix": name, **g.describe(name)._asdict(), "rows": m, "cols": n}
    row |= {"cosine": g.cosine(a.delta, b.delta), "cosine_random": (m * n) ** -0.5}
    for size in a.masks:
        (mask_a, null_a), (mask_b, null_b) = a.masks[size], b.masks[size]
        row[f"jaccard{size}"] = g.jaccard(mask_a, mask_b)
        row[f"jaccard_independent{size}"] = g.independent_jaccard(g.density(mask_a), g.density(mask_b))
        row[f"jaccard_permuted{size}"] = g.jaccard(null_a, null_b)
    for k in g.Resolution.of((m, n)).sim_ks:
        row[f"sim_right_K{k}"] = g.sim_k(g.top_right(a.directions, k), g.top_right(b.directions, k))
        row[f"sim_left_K{k}"] = g.sim_k(g.top_left(a.directions, k), g.top_left(b.directions, k))
        row |= {f"sim_right_random_K{k}": k / n, f"sim_left_random_K{k}": k / m}
    return row


def pair_means(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair of models: the means over matrices, each alike, at the largest K that the pair has."""
    always = [["cosine", "cosine_random"]]
    always += [[f"jaccard{kind}{size}" for kind in ("", "_independent", "_permuted")] for size in ("", "_matched")]
    rows = []
    for (a, b), of_pair in pairs.groupby(["a", "b"], sort=False):
        row, k = {"a": a, "b": b}, largest_k(of_pair)
        for columns in always + [[f"sim_{side}_K{k}", f"sim_{side}_random_K{k}"] for side in ("right", "left")]:
            # A value and its baselines are of the same matrices: those where all are defined.
            known = of_pair.reindex(columns=columns).dropna()
            row |= {f"{columns[0]}_matrices": len(known)} if len(known) < len(of_pair) else {}
            row |= known.mean().to_dict()
        rows.append(row)
    return pd.DataFrame(rows)
