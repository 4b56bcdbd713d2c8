"""The files of a checkpoint: which of them transformers would load, and what each holds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opdlab.errors import OpdlabError
from opdlab.models.foreign import refuse_foreign
from opdlab.models.pieces import FLOATS, Piece

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files in a model folder, sorted by name.

    Raises:
        OpdlabError: if the folder does not exist or contains no safetensors, with what it holds instead.
    """
    if not folder.is_dir():
        raise OpdlabError(f"there is no model folder {folder}; run 'opdlab models' to make the lab's models")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if inside := sorted({file.parent for file in folder.glob("*/*.safetensors")}):
            names = ", ".join(str(place) for place in inside[:4])
            raise OpdlabError(f"{folder} has no weights of its own, but folders in it have: give one of them ({names})")
        held = sorted(folder.iterdir())
        refuse_foreign(file for file in (*held, *sorted(folder.glob("*/*"))) if file.suffix != ".json")
        names = ", ".join(path.name for path in held[:4]) or "nothing"
        raise OpdlabError(f"model folder {folder} has no weights: it holds {names}, and needs a model.safetensors")
    return files


def weights_digest(folder: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of the weight files in ``folder``, which identify a starting point.

    It raises as :func:`weight_files` does.
    """
    return _digest(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in weight_files(folder)))


@lru_cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    # Every run asks for it, but only a few models exist. Time and size are in the key, so a changed file is read again.
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> dict:
    """Return the object in a JSON file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise OpdlabError(f"{path} cannot be read ({problem}): restore it") from problem
    if not isinstance(found, dict):
        raise OpdlabError(f"{path} holds a {type(found).__name__}, not an object with names: restore it")
    return found


def stored_pieces(path: Path) -> dict[str, Piece]:
    """Return the tensors of a file, or those of a folder that transformers would load, by their names in the file.

    Raises:
        OpdlabError: if a file is missing, damaged or of another kind, or holds what another one should.
    """
    files, weight_map = ([path], {}) if path.is_file() else _shards(path)
    if path.is_file() and (found := _SHARD.search(path.name)) and int(found[2]) > 1:
        raise OpdlabError(f"{path} is one of {int(found[2])} shards of a model: give its folder, {path.parent}")
    pieces: dict[str, Piece] = {}
    for file in files:
        for name, shape, dtype in header(file):
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in pieces:
                first = pieces[name].file
                assert isinstance(first, Path)
                raise OpdlabError(f"{path} has the tensor {name} twice, in {first.name} and {file.name}: delete one")
            pieces[name] = Piece(file, name, shape, dtype)
    for name in weight_map.keys() - pieces.keys():
        raise OpdlabError(f"{path / weight_map[name]} lacks {name}, which the index says it has: fetch that file again")
    return pieces


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files of a folder that transformers would load, and which file has which tensor, if it says."""
    index, weight_map = folder / "model.safetensors.index.json", dict[str, str]()
    # The same order as transformers; other files in the folder, such as an optimizer's state, are ignored.
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], {}
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
            raise OpdlabError(f"{index} has no weight_map from tensors to files: restore it")
        if outside := [name for name in weight_map.values() if re.search(r"[/\\]|^\.\.$", name)]:
            raise OpdlabError(f"{index} names a file outside its folder, {outside[0]}: fetch it again from who made it")
        wanted = {folder / name for name in weight_map.values()}
    else:
        files = weight_files(folder)
        numbered = [(file, found) for file in files if (found := _SHARD.search(file.name))]
        wanted = {
            file.with_name(f"{file.name[: found.start()]}-{i:0{len(found[1])}d}-of-{found[2]}.safetensors")
            for file, found in numbered
            for i in range(1, int(found[2]) + 1)
        } or set(files)
    missing = sorted(file.name for file in wanted if not file.is_file())
    if missing:
        raise OpdlabError(
            f"{folder} lacks {len(missing)} of {len(wanted)} shards: fetch {', '.join(missing[:4])} again"
        )
    return sorted(wanted), weight_map


def header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype of each tensor in a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                entry = opened.get_slice(name)
                dtype = entry.get_dtype()
                yield name, tuple(entry.get_shape()), FLOATS.get(dtype, dtype)
    except (SafetensorError, OSError) as problem:
        refuse_foreign([file])
        raise OpdlabError(
            f"{file} is damaged or not a safetensors file ({problem}): fetch it, or train its run, again"
        ) from problem
