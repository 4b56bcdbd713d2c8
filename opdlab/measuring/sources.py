"""The checkpoints of an update: where they are, their steps, and what they have in common, which alone is measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from opdlab.errors import OpdlabError
from opdlab.geometry.matrices import OUTSIDE, describe, identity, tower_of
from opdlab.models.checkpoints import Source, as_saved, model_in, open_checkpoint
from opdlab.models.files import local_folder
from opdlab.models.names import HEAD, canonical_name, embedding_of, plain_name
from opdlab.models.pieces import Checkpoint, Piece

# Where trainers put the model of a step, below the folder that bears the step: verl's actor, merged or as an adapter.
_INSIDE = ("actor/lora_adapter", "actor/huggingface", "lora_adapter", "huggingface", "hf_ckpt", "actor")
_BELOW = {name for path in _INSIDE for name in path.split("/")}
# Where they put the folders of the steps, below that of the run: prime-rl, OpenRLHF, this library, others.
_ABOVE = ("weights", "_actor", "snapshots", "checkpoints")
# What results are called, and a key that each of the JSON files among them has.
_JSON = ("job.json", "summary.json", "compare.json")
_OWN = re.compile('^ "(?:opdlab|norms|provenance|weighting)": ', re.MULTILINE)
_RESULTS = (*_JSON, "matrices.csv", "trajectory.csv", "models.csv", "pairs.csv", "report.html", "compare.html")
# A number, and what may multiply it.
_NUMBER, _UNIT = r"\d+(?:\.\d+)?(?:e\d+)?", r"(?:([kKmMbB])(?![a-zA-Z\d]))?"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NO_CHECKPOINT = "no checkpoint"

_GIVE = "give a model and what was tuned from it"
# Of models that use their embedding as a head, if they store none.
_WITH_A_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WHOLE = {
    "fused": "it holds several matrices side by side, and how is not known",
    "stacked": "it has more than two dimensions, as a stack of matrices or a convolution has",
}


def open_all(base: Source, path: Iterable[Source]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """Open a base and the checkpoints after it; models of the hub are fetched first.

    Raises as :func:`~opdlab.models.files.local_folder` and :func:`~opdlab.models.checkpoints.open_checkpoint` do.
    """
    path = tuple(path)
    for name, source in (("base", base), *(("tuned", source) for source in path)):
        if not isinstance(source, (Path, str, Mapping, nn.Module, Checkpoint)):
            what = "a model folder, a .safetensors file, OWNER/NAME on the hub, a state dict or a module"
            raise OpdlabError(f"{name} is a {type(source).__name__}: give {what}{', or a list' * (name == 'tuned')}")
    modules = [source for source in (base, *path) if isinstance(source, nn.Module)]
    first, *rest = [_called_as(modules[0], source) if modules else source for source in (base, *path)]
    opened = _open(first)
    return opened, tuple(_open(source, opened) for source in rest)


def _called_as(module: nn.Module, source: Source) -> Source:
    """Return a source; weights in memory that are called as in a module are of that model, and named as it is saved."""
    if isinstance(source, Mapping):
        plain = {plain_name(name): weight for name, weight in source.items()}
        for weights, one in ((plain, model_in(module)[1]), (source, module)):
            if weights.keys() <= one.state_dict().keys():
                return open_checkpoint(as_saved(weights, one), open_checkpoint(module))
    return source


def _open(source: Source, base: Checkpoint | None = None) -> Checkpoint:
    return open_checkpoint(weights_folder(local_folder(source)) if isinstance(source, (str, Path)) else source, base)


def name_of(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint, for titles."""
    path = _of_step(checkpoint.path) if isinstance(checkpoint.path, Path) else checkpoint.path
    if isinstance(path, Path) and path.parent.name == "snapshots":  # of a run, or in the hub's cache
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name.removesuffix(".safetensors") if isinstance(path, Path) else path


def place_of(checkpoint: Checkpoint) -> str:
    """Return where a checkpoint is, as results name it."""
    return str(checkpoint.path.resolve()) if isinstance(checkpoint.path, Path) else checkpoint.path


def same_weights(one: Checkpoint, other: Checkpoint) -> str:
    """Return what to say of two checkpoints without a difference: in memory, changing one may change the other."""
    pairs = [(piece, other.pieces[name]) for name, piece in one.pieces.items() if name in other.pieces]
    held = [[piece.file[piece.stored] for piece in pair if isinstance(piece.file, Mapping)] for pair in pairs]
    shared = any(len({tensor.untyped_storage().data_ptr() for tensor in both}) < len(both) for both in held)
    copy = "before training copy the first, as by {k: v.clone() for k, v in model.state_dict().items()}"
    return f"{one.path} and {other.path} hold the same weights{f', being the same memory ({copy})' if shared else ''}"


def check_apart(out: Path | None, checkpoints: Iterable[Checkpoint] = ()) -> None:
    """Raise if results would be written into one of the checkpoints, or over files of somebody else."""
    if out and str(out.resolve()) in map(place_of, checkpoints):
        raise OpdlabError(f"the results would be written into the checkpoint {out}: choose another folder with --out")
    there = [out / name for name in _RESULTS if (out / name).exists()] if out else []
    if there and not any(_OWN.search(file.read_text("utf-8", "ignore")) for file in there if file.name in _JSON):
        raise OpdlabError(f"{there[0]} is no result of opdlab: choose another folder with --out, or move it away")


class Trajectory(list[Source]):
    """Checkpoints in the order in which training made them."""

    def __init__(self, places: Iterable[Source], steps: Iterable[float], said: Iterable[str] = ()):
        """Keep the checkpoints, the step of each, and what a reader must know of how they were chosen."""
        super().__init__(places)
        self.steps, self.said = tuple(steps), tuple(said)


def step_of(path: Path | str) -> float | None:
    """Return the step in a checkpoint's name: the number after step, checkpoint, iter or epoch, or else the last one.

    >>> [step_of(name) for name in ("checkpoint-100-r16", "step1000-tokens4B", "iter_0000063", "sft-3", "final")]
    [100, 1000, 63, 3, None]
    >>> [step_of(name) for name in ("step-2k", "step_1_000", "epoch-0.5")]
    [2000, 1000, 0.5]
    """
    name = _of_step(Path(path)).name.removesuffix(".safetensors")
    found = _number_after_a_word(name) or [match.groups() for match in re.finditer(rf"({_NUMBER}){_UNIT}", name)][-1:]
    if not found:
        return None
    number, unit = found[0]
    step = float(re.sub("[_,]", "", number)) * _UNITS[(unit or "").lower()]
    return int(step) if step.is_integer() else step


def _number_after_a_word(name: str) -> list[tuple[str, ...]]:
    """Return the number that a word calls a step, and its unit, in a list; "globalstep" is a step, "timestep" none."""
    words = (r"(?:global[\W_]*)?steps?", "checkpoint|ckpt", "iter(?:ation)?", "epoch")
    number = rf"(\d{{1,3}}(?:[_,]\d{{3}})+(?!\d)|{_NUMBER}){_UNIT}"
    found = (re.search(rf"(?<![a-z])(?:{word})[\W_]*{number}", name, re.IGNORECASE) for word in words)
    return next(([match.groups()] for match in found if match), [])


def _of_step(path: Path) -> Path:
    """Return the folder or file that bears the step, of which ``path`` may be a known subfolder."""
    above = next(place for place in (path, *path.parents) if place.name not in _BELOW)
    return above if re.search(r"\d", above.name) else path


def _order(path: Path | str) -> tuple[int, float]:
    """Return the stage of pretraining (as OLMo counts them) and the step."""
    stage = re.search(r"(?<![a-z])stage[\W_]*(\d+)", _of_step(Path(path)).name, re.IGNORECASE)
    return int(stage[1]) if stage else 0, step_of(path) or 0


def in_order(sources: Source | Iterable[Source]) -> Trajectory:
    """Return checkpoints with their steps: those in their names, if they ascend, or else 1, 2, 3 ...

    Checkpoints of one folder whose names call a number their step are sorted by it; others keep the order given.

    >>> in_order(["run/checkpoint-50", "run/checkpoint-100"]).steps, in_order(["early", "late"]).steps
    ((50, 100), (1, 2))
    >>> in_order(["run/checkpoint-100", "run/checkpoint-50"])
    ['run/checkpoint-50', 'run/checkpoint-100']
    """
    if isinstance(sources, Trajectory):
        return sources
    several: list[Any] = list(sources) if isinstance(sources, (list, tuple, Iterator)) else [sources]
    if not several:
        raise OpdlabError("tuned is empty: give one checkpoint or more, in order")
    places = [_of_step(Path(source)) for source in several if isinstance(source, (str, Path))]
    steps = [step for place in places if (step := step_of(place)) is not None]
    if len(several) == len(steps) > 1 and steps != sorted(set(steps)):
        known = all(place.name.isdigit() or _number_after_a_word(place.name) for place in places)
        if known and len({place.parent for place in places}) == 1:
            return _by_step(several, ["The checkpoints were not given in the order of their steps, and were sorted."])
        said = "The steps in the checkpoints' names do not ascend: they are taken in the order given, as 1, 2, 3 ..."
        return Trajectory(several, range(1, len(several) + 1), [said])
    return Trajectory(several, steps if len(several) == len(steps) else range(1, len(several) + 1))


def _by_step(places: Iterable[Any], said: list[str]) -> Trajectory:
    """Sort checkpoints whose names all have a step."""
    ordered = sorted(places, key=_order)
    for before, after in pairwise(ordered):
        if _order(before) == _order(after):
            raise OpdlabError(f"{before} and {after} are of one step: leave one, or give the checkpoints in order")
    steps: list[float] = [_order(place)[1] for place in ordered]
    if steps != sorted(set(steps)):
        said = [*said, "Each stage counts its steps anew: the checkpoints are numbered 1, 2, 3 ... instead."]
        steps = [*range(1, len(ordered) + 1)]
    return Trajectory(ordered, steps, said)


def find_trajectory(folder: Path) -> Trajectory:
    """Return the checkpoints in a folder, by step; what is left out, such as the origin at step 0, is said.

    Raises:
        OpdlabError: if there is none, or two are of one step.
    """
    if not folder.is_dir():
        raise OpdlabError(f"there is no folder {folder}: give the one with the checkpoints of a training")
    inside = sorted(place for place in folder.iterdir() if place.name[0] != ".")
    found: list[Path] = []
    left: dict[str, list[str]] = {}
    own = {place.resolve() for place in inside if not place.is_symlink()}
    for place in inside:
        why = _why_not(place) or ("a link to another" if place.is_symlink() and place.resolve() in own else "")
        if not why:
            found.append(place)
        elif why != _NO_CHECKPOINT or (place.is_dir() and step_of(place)):
            left.setdefault(why, []).append(place.name)
    whole = [place for place in found if place.is_file() or any(weights_folder(place).glob("*.safetensors"))]
    for place in [place for place in found if place not in whole]:
        # Some trainers write the parts that training goes on from beside the model of the same step.
        if same := [other.name for other in whole if _order(other) == _order(place)]:
            found.remove(place)
            left.setdefault(f"without safetensors, unlike {same[0]}", []).append(place.name)
    below = [folder / name for name in _ABOVE if (folder / name).is_dir()]
    if not found and below:
        return find_trajectory(below[0])
    if not found:
        held = ", ".join(place.name for place in inside[:4]) or "nothing"
        raise OpdlabError(
            f"there are no checkpoints in {folder}, which holds {held}: give the folder with checkpoint-<step> folders "
            "of safetensors, or step-<step>.safetensors files"
        )
    more = {why: f" and {len(names) - 4} more" if len(names) > 4 else "" for why, names in left.items()}
    reasons = "; ".join(f"{', '.join(names[:4])}{more[why]} ({why})" for why, names in left.items())
    return _by_step(found, [f"Left out of the trajectory in {folder}: {reasons}."] if reasons else [])


def _why_not(place: Path) -> str:
    """Return why what lies beside checkpoints is none of the trajectory, or "" if it is."""
    if place.is_file() and place.suffix != ".safetensors":
        return _NO_CHECKPOINT
    # A checkpoint without weights, or with pickled ones, is one too, and is refused by name when it is opened.
    kinds = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
    held = [weights_folder(place), place] if place.is_dir() else []
    known = _number_after_a_word(place.name) and any(place.iterdir()) if held else place.is_file()
    if not known and not any(any(one.glob(kind)) for one in held for kind in kinds):
        return _NO_CHECKPOINT
    if re.search(r"-\d+-of-\d+\.safetensors$", place.name):
        return "a shard of one model"
    if re.match(r"te?mp[\W_]", place.name, re.IGNORECASE):
        return "not written to its end"
    if step_of(place) is None:
        return "no step in its name"
    return "" if step_of(place) else "the origin"


def weights_folder(place: Path) -> Path:
    """Return where in a step's folder its model is: the folder itself, unless only a known subfolder has weights."""
    for kinds in (("*.safetensors",), ("*.pt", "*.bin")):
        for inside in (place, *(place / name for name in _INSIDE)):
            if any(any(inside.glob(kind)) for kind in kinds):
                return inside
    return place if (step := _of_step(place)) == place else weights_folder(step)


def default_out(measured: Path | str) -> Path:
    """Return the default folder for results; a checkpoint that has only a number gets its run's name too.

    >>> default_out("/runs/sft/final"), default_out("/runs/sft/checkpoint-500")
    (PosixPath('geometry-final'), PosixPath('geometry-sft-checkpoint-500'))
    >>> default_out("/runs/rl/global_step_50/actor/huggingface"), default_out("/runs/sft/snapshots")
    (PosixPath('geometry-rl-global_step_50'), PosixPath('geometry-sft'))
    """
    place = _of_step(Path(measured).resolve())
    run, name = place.parent, place.name.removesuffix(".safetensors")
    while run.name in _ABOVE:
        run = run.parent
    if name in _ABOVE and run.name:
        return Path(f"geometry-{run.name}")
    return Path(f"geometry-{name}" if step_of(place) is None else f"geometry-{run.name}-{name}")


class LeftOut(NamedTuple):
    """A tensor that was left out, or of which some rows were, or that is in no mean."""

    name: str
    reason: str
    share: float  #: of the parameters of its checkpoint


def in_common(base: Checkpoint, path: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Return the checkpoints with what all of them have, the base first, and what was left out or is in no mean.

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
    kept = _with_heads(ends)
    absent = [one for end in ends for one in end.left_out.items() if canonical_name(one[0]) not in kept[0]]
    left = {name: LeftOut(name, reason, 0.0) for name, reason in absent}
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
    common = [replace(end, pieces=pieces) for end, pieces in zip(ends, kept, strict=True)]
    return common, [*left.values(), *_in_no_mean(common[0])]


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
    if HEAD in map(canonical_name, end.left_out):  # as a copy of the embedding, which says more than a config
        return True
    architectures = " ".join(end.config.get("architectures") or [])
    text = end.config.get("text_config") or {}
    said = end.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return bool(any(kind in architectures for kind in _WITH_A_HEAD) if said is None else said)


def _in_no_mean(end: Checkpoint) -> list[LeftOut]:
    """Return the tensors of the layers that no rule splits, with their share of the parameters of the layers."""
    described = [identity(name, piece.shape) for name, piece in end.pieces.items()]
    inside = [one for one in described if one["layer"] >= 0]
    total = sum(one["parameters"] for one in inside)
    return [
        LeftOut(one["matrix"], f"{_WHOLE[one['block']]}, so it is in no mean", one["parameters"] / total)
        for one in inside
        if one["block"] in _WHOLE
    ]
