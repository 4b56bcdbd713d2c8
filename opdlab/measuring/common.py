"""What checkpoints have in common, which is what is measured; what was left out and why; and what is said of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, groupby
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.geometry.matrices import OUTSIDE, describe, tower_of
from opdlab.geometry.summary import means, means_over, of_layers, views
from opdlab.measuring.sources import name_of, place_of
from opdlab.models.names import HEAD, embedding_of
from opdlab.models.pieces import Checkpoint, Piece

_GIVE = "give a model and what was tuned from it"
# Of models that use their embedding as a head, if they store none.
_WITH_A_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WHOLE = {
    "fused": "it holds several matrices side by side, and how is not known",
    "stacked": "it has more than two dimensions, as a stack of matrices or a convolution has",
}


class LeftOut(NamedTuple):
    """A tensor that was left out, or of which some rows were."""

    name: str
    reason: str
    share: float  #: of the parameters of its checkpoint


def in_common(base: Checkpoint, path: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Return the checkpoints with what all of them have, the base first, and what was left out.

    They have the layers of one language model. Of embeddings and output heads, the rows that all have are kept; a model
    that ties them has its embedding for a head. Towers and heads of other kinds that not all have are left out.

    Raises:
        OpdlabError: if two are one checkpoint, or differ in more than that, naming the first difference.
    """
    ends = [base, *path]
    for end in path:
        if base is end or (isinstance(base.path, Path) and place_of(base) == place_of(end)):
            raise OpdlabError(f"base and tuned are the same checkpoint, {base.path}: give two")
        _check_layers(base, end)
    left = {name: LeftOut(name, reason, 0.0) for end in ends for name, reason in end.left_out.items()}
    kept = _with_heads(ends)
    for name in dict.fromkeys(chain.from_iterable(kept)):
        shapes = [pieces[name].shape if name in pieces else None for pieces in kept]
        if len(set(shapes)) > 1:
            rows, left[name] = _difference(name, shapes, ends)
            for pieces in kept:
                piece = pieces.pop(name, None)
                if piece and rows:
                    pieces[name] = piece.rows(0, rows)
    if path and not kept[0]:
        raise OpdlabError(f"{base.path} and {path[0].path} have no tensor in common: {_GIVE}")
    return [replace(end, pieces=pieces) for end, pieces in zip(ends, kept, strict=True)], list(left.values())


def _difference(name: str, shapes: list[tuple[int, ...] | None], ends: list[Checkpoint]) -> tuple[int, LeftOut]:
    """Return how many rows of a tensor all checkpoints have, and what is left out of it."""
    held = [(shape, end) for shape, end in zip(shapes, ends, strict=True) if shape is not None]
    shape, end = max(held, key=lambda one: one[0])
    rows, described = 0, describe(name)
    if len(held) < len(ends):
        lacking = ends[shapes.index(None)]
        reason = f"{name_of(end)} has it and {name_of(lacking)} does not"
    elif described.layer < 0 and described.block in OUTSIDE[:2] and len({shape[1:] for shape, _ in held}) == 1:
        rows = min(shape[0] for shape, _ in held)
        reason = f"{name_of(end)} has {shape[0]} rows, and {rows} are in common"
    elif tower_of(name):
        reason = f"its shapes are {' and '.join(map(str, dict.fromkeys(shapes)))}"
    else:
        base, (shape, end) = ends[0], next(one for one in held if one[0] != shapes[0])
        raise OpdlabError(f"{name} is {shapes[0]} in {base.path} and {shape} in {end.path}: {_GIVE}")
    entries = prod(shape) - rows * prod(shape[1:])
    return rows, LeftOut(name, reason, entries / sum(prod(piece.shape) for piece in end.pieces.values()))


def _check_layers(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise unless two checkpoints have matrices of the same names in the layers of the language model."""
    ours, theirs = _layers(base), _layers(tuned)
    depths = [len(set(layers.values())) for layers in (ours, theirs)]
    if depths[0] != depths[1]:
        raise OpdlabError(f"{base.path} has {depths[0]} layers and {tuned.path} has {depths[1]}: {_GIVE}")
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise OpdlabError(
            f"{base.path} and {tuned.path} have different architectures: {len(alone)} matrices of the layers are in "
            f"one of them only, such as {alone[0]} in {(base if alone[0] in ours else tuned).path}"
        )


def _layers(end: Checkpoint) -> dict[str, int]:
    """Return the layer of each matrix in the layers of the language model."""
    matrices = [name for name, piece in end.pieces.items() if len(piece.shape) > 1 and not tower_of(name)]
    described = {name: describe(name) for name in matrices}
    return {name: layer for name, (layer, _, block) in described.items() if layer >= 0 and block not in OUTSIDE}


def _with_heads(ends: list[Checkpoint]) -> list[dict[str, Piece]]:
    """Return the tensors of each checkpoint; if any has a head, one that ties it has its embedding for a head."""
    kept = [dict(end.pieces) for end in ends]
    headed = any(HEAD in pieces for pieces in kept)
    for end, pieces in zip(ends, kept, strict=True):
        embedding = embedding_of(pieces)
        if headed and HEAD not in pieces and embedding and _ties(end):
            pieces[HEAD] = pieces[embedding]
    return kept


def _ties(end: Checkpoint) -> bool:
    architectures = " ".join(end.config.get("architectures") or [])
    text = end.config.get("text_config") or {}
    said = end.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return bool(any(kind in architectures for kind in _WITH_A_HEAD) if said is None else said)


def left_out_of_means(table: pd.DataFrame) -> list[LeftOut]:
    """Return the tensors of the layers that are in no mean because no rule splits them, with their share of these."""
    inside = table[table["layer"] >= 0]
    whole = inside[inside["block"].isin(_WHOLE)]
    shares = whole["parameters"] / inside["parameters"].sum()
    return [
        LeftOut(name, f"{_WHOLE[block]}, so it is in no mean", share)
        for name, block, share in zip(whole["matrix"], whole["block"], shares, strict=True)
    ]


def beside_noise(table: pd.DataFrame) -> list[str]:
    """Return sentences on how much of an update's sparsity, and of its preference for small weights, is its size."""
    layers = of_layers(table)
    if "sparsity_ruler" not in layers or layers["sparsity_ruler"].isna().all():
        return []
    columns = [f"{column}{of}" for column in ("sparsity", "low_overlap_a30") for of in ("_ruler", "")]
    found = means(layers, [], columns)[columns].iloc[0]
    noise, update, low_noise, low_update = map(_percent, found)
    said = [f"Noise of this size leaves {noise} of the weights unchanged in bfloat16. This update leaves {update}."]
    if found.notna().all():
        said += [
            f"Of the weights that such noise changes, {low_noise} are among the smallest 30 %. Of those that this "
            f"update changes, {low_update} are."
        ]
    return said


def on_views(trajectory: pd.DataFrame) -> list[str]:
    """Return a sentence on how a trajectory is seen, if there is one."""
    if trajectory.empty:
        return []
    said = "Rank and similarity are seen as stored, and between bfloat16 checkpoints (_bf16)"
    if "_bf16" not in views(trajectory):
        said = "The checkpoints hold bfloat16 numbers, so there is this one view of rank and similarity"
    return [f"{said}, beside the locked null (_locked): what size and rounding make of directions that never change."]


def notes(table: pd.DataFrame, left_out: Iterable[LeftOut]) -> list[str]:
    """Return sentences on what was measured, what is in no mean, and what was left out and why, with shares."""
    total, layers = table["parameters"].sum(), of_layers(table)
    said = [f"Measured: {len(table)} tensors of {total:,} parameters. The means are over {means_over(table)}"]
    if len(layers):
        said[0] += f", with {_percent(layers['parameters'].sum() / total)} of the parameters"
        still = int((layers["frobenius"] == 0).sum())
        said[0] += f"; {still} of them did not move, and count in the sparsity alone" if still else ""
    said[0] += "."
    rest = table.drop(layers.index).groupby("block", sort=False)["parameters"].sum() / total
    if len(rest):
        said.append(f"In no mean: {', '.join(f'{block} ({_percent(share)})' for block, share in rest.items())}.")
    for reason, group in groupby(sorted(left_out, key=attrgetter("reason")), key=attrgetter("reason")):
        names, shares = zip(*((one.name, one.share) for one in group), strict=True)
        which = names[0] if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}"
        of = "of the layers' parameters" if reason.endswith("in no mean") else "of the parameters"
        said.append(f"Left out: {which} ({_percent(sum(shares))} {of}): {reason}.")
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
