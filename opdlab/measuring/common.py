"""What checkpoints have in common, which is what is measured, and what was left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

from opdlab.errors import OpdlabError
from opdlab.geometry.matrices import OUTSIDE, describe, tower_of
from opdlab.measuring.sources import name_of, place_of
from opdlab.models.names import HEAD, embedding_of
from opdlab.models.pieces import Checkpoint, Piece

_GIVE = "give a model and what was tuned from it"
# Of models that use their embedding as a head, if they store none.
_WITH_A_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


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
        raise OpdlabError(_shapes_differ(name, ends[0], next(end for other, end in held if other != shapes[0])))
    entries = prod(shape) - rows * prod(shape[1:])
    return rows, LeftOut(name, reason, entries / sum(prod(piece.shape) for piece in end.pieces.values()))


def _shapes_differ(name: str, base: Checkpoint, tuned: Checkpoint) -> str:
    return f"{name} is {base.pieces[name].shape} in {base.path} and {tuned.pieces[name].shape} in {tuned.path}: {_GIVE}"


def _check_layers(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise unless two checkpoints have the same matrices in the layers of the language model."""
    ours, theirs = _matrices(base), _matrices(tuned)
    depths = [len({describe(name).layer for name in names}) for names in (ours, theirs)]
    if depths[0] != depths[1]:
        raise OpdlabError(f"{base.path} has {depths[0]} layers and {tuned.path} has {depths[1]}: {_GIVE}")
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise OpdlabError(
            f"{base.path} and {tuned.path} have different architectures: {len(alone)} matrices of the layers are in "
            f"one of them only, such as {alone[0]} in {(base if alone[0] in ours else tuned).path}"
        )
    for name, shape in ours.items():
        if shape != theirs[name]:
            raise OpdlabError(_shapes_differ(name, base, tuned))


def _matrices(end: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of the layers of the language model, by name."""
    shapes = {name: piece.shape for name, piece in end.pieces.items() if len(piece.shape) > 1 and not tower_of(name)}
    described = {name: describe(name) for name in shapes}
    return {name: shapes[name] for name, (layer, _, block) in described.items() if layer >= 0 and block not in OUTSIDE}


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
