"""The files of a checkpoint, and its tensors: where each is stored, and what makes it of the stored tensor.

What people bring that is no checkpoint to measure is refused, saying what it is: foreign.toml lists the kinds. Of such
files only the first bytes are read: pickles can run code.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models.files import read_json

#: What safetensors calls the dtypes that can be measured, and what torch calls them.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True)
class Piece:
    """The source of one tensor: a file, a name in that file, and what turns the stored tensor into the one wanted."""

    file: Path | Mapping[str, Tensor]  #: or the tensors in memory
    stored: str
    shape: tuple[int, ...]
    dtype: str  #: as torch calls it; one that cannot be measured, as safetensors does
    index: int | slice | None = None  #: which matrix, if the stored tensor is a stack of them; or which rows
    takes: tuple[Callable[[Tensor], Tensor], ...] = ()

    def part(self, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]) -> Piece:
        """Return a piece of the given shape that applies ``take`` to what this one yields."""
        return replace(self, shape=shape, takes=(*self.takes, take))

    def read(self) -> Tensor:
        """Return the tensor as it is, without looking at what it holds."""
        tensor = read_stored(self.file, self.stored, self.index)
        for take in self.takes:
            tensor = take(tensor)
        return tensor.contiguous()  # the order of sums, and so a last digit, must not tell how a matrix is stored

    def rows(self, start: int, stop: int) -> Piece:
        """Return the piece of some rows, which are read alone if nothing is done to the stored tensor first."""
        shape = (stop - start, *self.shape[1:])
        if self.takes or isinstance(self.index, int):
            return self.part(shape, partial(torch.narrow, dim=0, start=start, length=stop - start))
        first = self.index.start if self.index else 0
        return replace(self, shape=shape, index=slice(first + start, first + stop))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model by name; of files, only shapes and dtypes are in memory until :meth:`read` is called."""

    path: Path | str  #: a str says what is in memory
    pieces: dict[str, Piece] = field(repr=False)
    #: The tensors as stored, with fused projections whole; an adapter is added to these.
    whole: dict[str, Piece] = field(repr=False)
    config: dict = field(repr=False)
    #: The reason for each tensor that reading left out, by its name.
    left_out: dict[str, str] = field(default_factory=dict, repr=False)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or some of its rows, in the dtype in which it is stored; with an adapter it is float64.

        Raises:
            OpdlabError: if the file is damaged or an entry is not finite, naming the tensor.
        """
        piece = self.pieces[name].rows(*rows) if rows else self.pieces[name]
        tensor = piece.read()
        # If an entry is not finite, neither is the sum, which is faster to check; but a sum may also overflow.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise OpdlabError(f"{name} in {self.path} has entries that are not finite: this checkpoint is broken")
        return tensor

    @property
    def dtypes(self) -> str:
        """The dtypes in which the weights are stored, such as "bfloat16", separated by commas; or an adapter."""
        if (Path(self.path) / "adapter_config.json").is_file():
            return "an adapter, added in float64"
        return ", ".join(sorted({piece.dtype for piece in self.pieces.values()}))


def read_stored(file: Path | Mapping[str, Tensor], name: str, index: int | slice | None = None) -> Tensor:
    """Return a tensor of a file or of memory, one matrix of a stack, or some rows."""
    if not isinstance(file, Path):
        return file[name].detach() if index is None else file[name].detach()[index]
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
    except (SafetensorError, OSError) as problem:
        raise OpdlabError(f"{name} in {file} cannot be read ({problem}): fetch the file again") from problem


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder by name, or raise an OpdlabError with what it holds instead."""
    if not folder.is_dir():
        raise OpdlabError(f"there is no model folder {folder}; run 'opdlab models' to make the lab's models")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if inside := sorted({file.parent for file in folder.glob("*/*.safetensors")}):
            names = ", ".join(str(place) for place in inside[:4])
            what = f"{folder} has no weights of its own, but folders in it have"
            raise OpdlabError(f"{what}: give one of them ({names}), or all of a training as --trajectory {folder}")
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


def stored_pieces(path: Path) -> dict[str, Piece]:
    """Return the tensors of a file, or those of a folder that transformers would load, by their names in the file.

    Raises:
        OpdlabError: if a file is missing, damaged or of another kind, or holds what another one should.
    """
    if path.is_file():
        if (found := _SHARD.search(path.name)) and int(found[2]) > 1:
            raise OpdlabError(f"{path} is one of {int(found[2])} shards of a model: give its folder, {path.parent}")
        return pieces_of(path)
    files, weight_map = _shards(path)
    pieces: dict[str, Piece] = {}
    for file in files:
        for name, piece in pieces_of(file).items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in pieces:
                raise OpdlabError(f"{pieces[name].file} and {file} both have the tensor {name}: delete one of them")
            pieces[name] = piece
    for name in weight_map.keys() - pieces.keys():
        raise OpdlabError(f"{path / weight_map[name]} lacks {name}, which the index says it has: fetch that file again")
    return pieces


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files of a folder that transformers would load, and which has which tensor, if it says."""
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


def pieces_of(file: Path) -> dict[str, Piece]:
    """Return the tensors of a safetensors file by name, or raise an OpdlabError if it is damaged or is none."""
    pieces = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                entry = opened.get_slice(name)
                dtype = entry.get_dtype()
                pieces[name] = Piece(file, name, tuple(entry.get_shape()), FLOATS.get(dtype, dtype))
    except (SafetensorError, OSError) as problem:
        refuse_foreign([file])
        raise OpdlabError(
            f"{file} is damaged or not a safetensors file ({problem}): fetch it, or train its run, again"
        ) from problem
    return pieces


# What people bring that is no checkpoint to measure.
_FOREIGN = tomllib.loads(Path(__file__).with_name("foreign.toml").read_text("utf-8"))
_SAFETENSORS = re.compile(rb".{4}\x00{4}{", re.DOTALL)  # the length of its header, and the header
# The codes of quantised weights; integers may also be counters, tables or masks, which stop nothing.
_CODES = re.compile(r"(?:F|float)[468].*|(?:[IU]|u?int)(?:8|16|32)")
_CODED = re.compile(r"weight|_blocks$|W_q|codes")
# What transformers calls the config that turns a quantised model into one with weights, by its quant_method.
_DEQUANTISE = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def refuse_foreign(files: Iterable[Path]) -> None:
    """Raise, saying what they are, if one of the files is of a kind that is known and cannot be measured."""
    starts = {file: start for file in files if file.is_file() and not _SAFETENSORS.match(start := _start(file))}
    for kind in _FOREIGN["files"]:
        begins = tuple(begin.encode("latin-1") for begin in kind.get("starts", ()))
        for file, start in starts.items():
            if re.search(rf"/(?:{kind.get('names', '')})$", file.absolute().as_posix()) or start.startswith(begins):
                where = {"path": file, "folder": file.parent, "name": file.name, "stem": file.with_suffix("")}
                common = {key: remedy.format(**where) for key, remedy in _FOREIGN["remedies"].items()}
                raise OpdlabError(f"{file} is {kind['what']}: {kind['remedy'].format(**where, **common)}")


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(32)
    except OSError:
        return b""


def refuse_tensors(path: Path | str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise, saying what it is, if a checkpoint has tensors that are not the weights of a model."""
    remedies = _FOREIGN["remedies"]
    for name, shape in shapes.items():
        if name.endswith(".weight") and shape == (0,):
            left = f"what DeepSpeed's ZeRO left of a model (its {name} is empty)"
            raise OpdlabError(f"{path} is {left}: {remedies['zero']}")
    for kind in _FOREIGN["tensors"]:
        for name in shapes:
            if re.search(kind["names"], name):
                raise OpdlabError(f"{path} is {kind['what']} (it has {name}): {kind['remedy'].format(**remedies)}")


def refuse_quantised(path: Path | str, name: str, dtype: str, config: dict) -> None:
    """Raise if a tensor holds the codes of a quantised weight: the difference of two codes is no update."""
    said = config.get("quantization_config") or config.get("quantization")
    floats = dtype.lower().startswith("f")
    if not _CODES.fullmatch(dtype) or not (said or floats or _CODED.search(name)):
        return
    method = str(said.get("quant_method", "")) if isinstance(said, dict) else ""
    remedy = "give the model from before it was quantised"
    if method in _DEQUANTISE:
        remedy += (
            f', or dequantise it with python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained('
            f"'{path}', dtype='bfloat16', quantization_config=t.{_DEQUANTISE[method]}(dequantize=True))"
            f".save_pretrained('{path}-bf16', save_original_format=False)\" and measure {path}-bf16"
        )
    of = f" by {method}" if method else ""
    raise OpdlabError(f"{path} is quantised{of} ({name} is {dtype}): quantised weights cannot be measured; {remedy}")
