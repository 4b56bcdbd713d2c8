"""Read the weights of any model, one tensor at a time, whatever trained it.

A checkpoint is a Hugging Face folder (one safetensors file, or shards with or without an index), the folder of a LoRA
adapter (merged with its base on the fly), a single safetensors file such as a snapshot of a run, or weights in memory:
a state dict or a module. Fused projections are split into their matrices, stacked experts are read one at a time, and
tied embeddings appear once. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opdlab.errors import OpdlabError
from opdlab.geometry.matrices import describe

# Prefixes and infixes that trainers add to the names of weights when they wrap a model.
_WRAPPERS = re.compile(r"^base_model\.model\.|^module\.|_orig_mod\.|_fsdp_wrapped_module\.")
# Constants that older models store alongside their weights.
_BUFFERS = tuple(f".{block}.{buffer}" for block in ("attn", "attention") for buffer in ("bias", "masked_bias"))
_BUFFERS += ("rotary_emb.inv_freq", "position_ids")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HEAD = "lm_head.weight"
_LORA = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def plain_name(name: str) -> str:
    """Return the name of a weight without the parts that trainers add when they wrap a model.

    >>> plain_name("module._orig_mod.model.norm.weight")
    'model.norm.weight'
    """
    return _WRAPPERS.sub("", _WRAPPERS.sub("", name))


def embedding_of(names: Iterable[str]) -> str | None:
    """Return which of a model's weights is its embedding, of which an output head (``HEAD``) may be a copy."""
    return next((name for name in names if describe(name).block == "embedding"), None)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files in a model folder, sorted by name.

    Raises:
        OpdlabError: if the folder does not exist or contains no safetensors (pickled weights are refused).
    """
    if not folder.is_dir():
        raise OpdlabError(f"there is no model folder {folder}; run 'opdlab models' to make the lab's models")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_pickles(sorted(folder.iterdir()))
        raise OpdlabError(f"model folder {folder} has no weights: it needs a model.safetensors")
    return files


def _refuse_pickles(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix in (".bin", ".pt", ".pth"):
            raise OpdlabError(f"{path} is a pickle, which can run code: convert it to safetensors first")


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


@dataclass(frozen=True)
class Piece:
    """The source of one tensor: a file, a name in that file, and what turns the stored tensor into the one wanted."""

    file: Path | Mapping[str, Tensor]  #: or the tensors in memory
    stored: str
    shape: tuple[int, ...]
    dtype: str  #: as torch calls it; one that cannot be measured, as safetensors does
    index: int | None = None  #: which matrix, if the stored tensor is a stack of them
    takes: tuple[Callable[[Tensor], Tensor], ...] = ()

    def part(self, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]) -> Piece:
        """Return a piece of the given shape that applies ``take`` to what this one yields."""
        return replace(self, shape=shape, takes=(*self.takes, take))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model by name; of files, only shapes and dtypes are in memory until :meth:`read` is called."""

    path: Path | str  #: a str says what is in memory
    pieces: dict[str, Piece] = field(repr=False)
    #: The tensors as stored, with fused projections whole; an adapter is added to these.
    whole: dict[str, Piece] = field(repr=False)
    config: dict = field(repr=False)

    def read(self, name: str) -> Tensor:
        """Return one tensor in the dtype in which it is stored; a weight merged with an adapter is float64.

        Raises:
            OpdlabError: if the file is damaged, the weight is quantised or an entry is not finite, naming the tensor.
        """
        piece = self.pieces[name]
        if piece.dtype not in _FLOATS.values():
            raise OpdlabError(f"{name} in {self.path} is {piece.dtype}: quantised weights cannot be measured")
        tensor = _stored(piece.file, piece.stored, piece.index)
        for take in piece.takes:
            tensor = take(tensor)
        # If an entry is not finite, neither is the sum, which is faster to check; but a sum may also overflow.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise OpdlabError(f"{name} in {self.path} has entries that are not finite: this checkpoint is broken")
        return tensor

    @property
    def dtypes(self) -> str:
        """The dtypes in which the weights are stored, such as "bfloat16", separated by commas."""
        return ", ".join(sorted({piece.dtype for piece in self.pieces.values()}))


#: What :func:`open_checkpoint` opens.
Source = Path | str | Mapping[str, Tensor] | nn.Module | Checkpoint


def open_checkpoint(source: Source, base: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights; an open one is returned as it is.

    An adapter's update is added to the weights of ``base``. A state dict, which does not say what model it is of, is
    taken for one of the same model as ``base``.

    Raises:
        OpdlabError: if files are missing, pickled or damaged, or an adapter is given without its base.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, (Mapping, nn.Module)):
        return _in_memory(source, base)
    path = Path(source)
    if not path.exists():
        raise OpdlabError(f"there is no checkpoint {path}: give a model folder or a .safetensors file")
    _refuse_pickles([path])
    if (path / "adapter_config.json").is_file():
        return _adapter(path, base)
    pieces: dict[str, Piece] = {}
    for file in [path] if path.is_file() else _shards(path):
        for stored, shape, dtype in _header(file):
            name = plain_name(stored)
            if name in pieces:
                first = getattr(pieces[name].file, "name", "memory")
                raise OpdlabError(f"{path} has the tensor {name} twice, in {first} and {file.name}: delete one")
            if not name.endswith(_BUFFERS):
                pieces[name] = Piece(file, stored, shape, dtype)
    if not pieces:
        raise OpdlabError(f"{path} holds no weights: give the checkpoint of a model")
    beside = (path.parent if path.is_file() else path) / "config.json"
    config = _json(beside) if beside.is_file() else {}
    if config.get("tie_word_embeddings") and embedding_of(pieces):
        pieces.pop(HEAD, None)
    return _checkpoint(path, pieces, config)


def _in_memory(source: Mapping[str, Tensor] | nn.Module, base: Checkpoint | None) -> Checkpoint:
    if isinstance(source, nn.Module):
        what, config = f"the {type(source).__name__} in memory", getattr(source, "config", None)
        config = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
        tensors: dict[str, Tensor] = dict(source.named_parameters())  # each once, also where two layers share one
    else:
        what, config, tensors = "the state dict in memory", base.config if base else {}, dict(source)
    pieces: dict[str, Piece] = {}
    for stored, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise OpdlabError(f"{stored} in {what} is of type {type(tensor).__name__}: give names and tensors only")
        if not (name := plain_name(stored)).endswith(_BUFFERS):
            dtype = str(tensor.dtype).removeprefix("torch.")
            pieces[name] = Piece(tensors, stored, tuple(tensor.shape), dtype)
    if not pieces:
        raise OpdlabError(f"{what} holds no weights: give a model, or its state dict")
    # Of tied embeddings, a state dict lists both ends.
    tied = [tensors[pieces[name].stored].data_ptr() for name in (HEAD, embedding_of(pieces)) if name in pieces]
    if len(tied) == 2 and tied[0] == tied[1]:
        del pieces[HEAD]
    return _checkpoint(what, pieces, config)


def _checkpoint(path: Path | str, whole: dict[str, Piece], config: dict) -> Checkpoint:
    split = {part: piece for name, piece in whole.items() for part, piece in _split(name, piece, config)}
    return Checkpoint(path, dict(sorted(split.items(), key=lambda item: _natural(item[0]))), whole, config)


def _natural(name: str) -> list:
    """Return a sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise OpdlabError(f"{path} cannot be read ({problem}): restore it") from problem
    if not isinstance(found, dict):
        raise OpdlabError(f"{path} holds a {type(found).__name__}, not an object with names: restore it")
    return found


def _shards(folder: Path) -> list[Path]:
    files = weight_files(folder)
    index = folder / "model.safetensors.index.json"
    # The same order as transformers; other files in the folder, such as an optimizer's state, are ignored.
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise OpdlabError(f"{index} has no weight_map from tensors to files: restore it")
        wanted = {folder / name for name in weight_map.values()}
    else:
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
    return sorted(wanted)


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                entry = opened.get_slice(name)
                dtype = entry.get_dtype()
                yield name, tuple(entry.get_shape()), _FLOATS.get(dtype, dtype)
    except (SafetensorError, OSError) as problem:
        raise OpdlabError(
            f"{file} is damaged or not a safetensors file ({problem}): fetch it, or train its run, again"
        ) from problem


def _stored(file: Path | Mapping[str, Tensor], name: str, index: int | None = None) -> Tensor:
    if not isinstance(file, Path):
        return file[name].detach() if index is None else file[name].detach()[index]
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
    except (SafetensorError, OSError) as problem:
        raise OpdlabError(f"{name} in {file} cannot be read ({problem}): fetch the file again") from problem


# --- fused projections ------------------------------------------------------------------------------------------------


def _split(name: str, piece: Piece, config: dict) -> Iterator[tuple[str, Piece]]:
    """Yield a tensor, or the matrices fused in it, under the names that the Llama family uses."""
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    if len(piece.shape) == 3 and "experts" in parent.split("."):
        # The experts are stacked in one tensor. Families differ in whether each is (input, output) or the reverse, and
        # in how gate and up are combined, so each expert is measured as it is stored.
        for i in range(piece.shape[0]):
            yield f"{parent}.{i}.{module}.weight", replace(piece, shape=piece.shape[1:], index=i)
        return
    parts = {name: piece}
    if len(piece.shape) == 2 and name.endswith(".weight"):
        if config.get("model_type") == "gpt2" and module in ("c_fc", "c_proj", "c_attn"):
            # GPT-2 stores these as (input, output).
            parts[name] = piece = piece.part(piece.shape[::-1], torch.t)
        if module == "gate_up_proj":
            half = _divide(name, piece.shape[0], 2)
            names = [f"{parent}.{part}_proj.weight" for part in ("gate", "up")]
            parts = dict(zip(names, _row_blocks(piece, [half, half]), strict=True))
        elif module in ("qkv_proj", "query_key_value", "c_attn"):
            names = [f"{parent}.{part}_proj.weight" for part in "qkv"]
            parts = dict(zip(names, _of_attention(name, piece, config), strict=True))
    yield from parts.items()


def _of_attention(name: str, piece: Piece, config: dict) -> list[Piece]:
    """Return query, key and value."""
    heads, family = config.get("num_attention_heads") or config.get("n_head"), config.get("model_type")
    if not heads:
        raise OpdlabError(f"{name} holds several matrices; to split it, put the model's config.json beside it")
    rows, cols = piece.shape
    if family in ("phi3", "phi4_multimodal"):
        groups = config.get("num_key_value_heads") or heads
        width = _divide(name, rows, heads + 2 * groups)
        return _row_blocks(piece, [heads * width, groups * width, groups * width])
    if family == "gpt2":
        return _row_blocks(piece, [_divide(name, rows, 3)] * 3)
    if family == "gpt_neox":
        # Head by head: query, key and value of the first head, then of the second, and so on.
        shape = heads * _divide(name, rows, 3 * heads), cols
        return [piece.part(shape, partial(_of_heads, heads=heads, index=i)) for i in range(3)]
    raise OpdlabError(f"{name} of a {family!r} model holds several matrices, and how is not known: split it first")


def _divide(name: str, rows: int, parts: int) -> int:
    if rows % parts:
        raise OpdlabError(
            f"{name} has {rows} rows, which its config.json would split into {parts}: give its own config"
        )
    return rows // parts


def _row_blocks(piece: Piece, sizes: list[int]) -> list[Piece]:
    takes = [partial(torch.narrow, dim=0, start=sum(sizes[:i]), length=size) for i, size in enumerate(sizes)]
    return [piece.part((size, piece.shape[1]), take) for size, take in zip(sizes, takes, strict=True)]


def _of_heads(tensor: Tensor, heads: int, index: int) -> Tensor:
    return tensor.reshape(heads, 3, -1, tensor.shape[1])[:, index].reshape(-1, tensor.shape[1])


# --- adapters ---------------------------------------------------------------------------------------------------------


def _adapter(folder: Path, base: Checkpoint | None) -> Checkpoint:
    if base is None:
        raise OpdlabError(f"{folder} is an adapter, which only means something on its base: give the base first")
    config, file = _json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if not file.is_file():
        raise OpdlabError(f"{folder} has no adapter_model.safetensors (pickled adapters are refused)")
    # Some LoRA initialisations change the base itself, so adding B A to the original weights would be wrong.
    plain = config.get("init_lora_weights", True) in (True, False, "gaussian", "eva")
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out") or not plain:
        raise OpdlabError(f"{folder} is not a plain LoRA adapter: merge it with PEFT and measure the merged model")
    stored = {name: shape for name, shape, _ in _header(file)}
    if not stored:
        raise OpdlabError(f"{file} changes no weight: it is no LoRA adapter")
    pieces = dict(base.whole)
    for key, shape in stored.items():
        found = _LORA.fullmatch(key)
        if not found:
            raise OpdlabError(f"{file} has {key}, which is not part of a plain LoRA adapter: merge it with PEFT first")
        if found["part"] == "B":
            if key.replace("lora_B", "lora_A") not in stored:
                raise OpdlabError(f"{file} has {key} without its lora_A: fetch the adapter again")
            continue
        name, b = f"{found['name']}.weight", key.replace("lora_A", "lora_B")
        if name not in pieces:
            raise OpdlabError(
                f"{folder} changes {name}, which {base.path} does not have as one matrix: give its own base, or merge "
                "it with PEFT first"
            )
        origin, other = pieces[name], stored.get(b, (0, 0))
        if len(shape) != 2 or len(other) != 2 or (other[0], shape[1], shape[0]) != (*origin.shape, other[1]):
            raise OpdlabError(f"{key} in {file} does not fit {name} {origin.shape} of {base.path}: give its own base")
        scaling = _scaling(config, file, name, shape[0])
        pieces[name] = origin.part(origin.shape, partial(_merged, file=file, a=key, b=b, scaling=scaling))
    return _checkpoint(folder, pieces, base.config)


def _scaling(config: dict, file: Path, name: str, rank: int) -> float:
    def of(pattern: str, default: float) -> float:
        said = (config.get(pattern) or {}).items()
        return next((value for key, value in said if re.search(rf"(^|\.)({key})\.weight$", name)), default)

    try:
        alpha, said = of("alpha_pattern", config.get("lora_alpha", rank)), of("rank_pattern", config.get("r", rank))
        if said == rank:
            return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
    except (TypeError, AttributeError, re.error) as problem:
        beside = f"the adapter_config.json beside {file}"
        raise OpdlabError(f"{beside} cannot be understood ({problem}): restore it") from problem
    raise OpdlabError(f"{name} in {file} has rank {rank}, and adapter_config.json says {said}: give its own config")


def _merged(tensor: Tensor, file: Path, a: str, b: str, scaling: float) -> Tensor:
    # In float64, because rounding, as in a saved merged model, would destroy the low rank of the update.
    return tensor.double() + scaling * (_stored(file, b).double() @ _stored(file, a).double())
