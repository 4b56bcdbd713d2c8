"""Checkpoints: the weights of a model on disk, whoever trained it, read one tensor at a time.

A checkpoint is a Hugging Face folder (one safetensors file or several shards, with or without their index), a LoRA
adapter's folder (merged with its base on the fly), or a single safetensors file such as a snapshot of a run. Fused
projections come out split into the matrices that they hold, and tied embeddings once. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opdlab.errors import OpdlabError

# What trainers put in front of the names of a model that they wrap.
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder.

    Raises:
        OpdlabError: if there is no such folder, or it holds no safetensors (pickled weights are refused).
    """
    if not folder.is_dir():
        raise OpdlabError(f"there is no model folder {folder}; run 'opdlab models' to make the lab's models")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise OpdlabError(f"{folder / pickles[0]} is a pickle, which can run code: convert it to safetensors first")
        raise OpdlabError(f"model folder {folder} has no weights: it needs a model.safetensors")
    return files


def weights_digest(folder: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of the weights in ``folder``: the identity of a start point."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Piece:
    """Where one tensor comes from: a file, its name there, and what turns the stored tensor into the one wanted."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model by name; nothing but their shapes is in memory until :meth:`read` is called."""

    path: Path
    pieces: dict[str, Piece] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored.

        Raises:
            OpdlabError: if its file is damaged or an entry is not finite, naming it.
        """
        piece = self.pieces[name]
        tensor = piece.take(_stored(piece.file, piece.stored))
        if not tensor.is_floating_point():
            raise OpdlabError(f"{name} in {self.path} is {tensor.dtype}: quantised weights cannot be measured")
        if not tensor.isfinite().all():
            raise OpdlabError(f"{name} in {self.path} has entries that are not finite: this checkpoint is broken")
        return tensor


def open_checkpoint(path: Path | str, base: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path: a model folder, an adapter folder, or one safetensors file.
        base: what an adapter was trained on; its updates are added to these weights.

    Raises:
        OpdlabError: if files are missing, pickled or damaged, or an adapter comes without its base.
    """
    path = Path(path)
    if not path.exists():
        raise OpdlabError(f"there is no checkpoint {path}: give a model folder or a .safetensors file")
    if (path / "adapter_config.json").is_file():
        return _adapter(path, base)
    files = [path] if path.is_file() else _shards(path)
    pieces: dict[str, Piece] = {}
    for file in files:
        for stored, shape in _header(file):
            name = stored
            for wrapper in _WRAPPERS:
                name = name.removeprefix(wrapper)
            if name in pieces:
                raise OpdlabError(f"{path} has the tensor {name} twice, in {pieces[name].file.name} and {file.name}")
            pieces[name] = Piece(file, stored, shape)
    config = _json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("tie_word_embeddings"):
        pieces.pop("lm_head.weight", None)
    split = {part: piece for name, piece in pieces.items() for part, piece in _split(name, piece, config)}
    return Checkpoint(path, split)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise OpdlabError(f"{path} cannot be read ({problem}): restore it") from problem


def _shards(folder: Path) -> list[Path]:
    files = weight_files(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = {folder / name for name in _json(index).get("weight_map", {}).values()}
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


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                yield name, tuple(opened.get_slice(name).get_shape())
    except (SafetensorError, OSError) as problem:
        raise OpdlabError(f"{file} is damaged or not a safetensors file ({problem}): fetch it again") from problem


def _stored(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as problem:
        raise OpdlabError(f"{name} in {file} cannot be read ({problem}): fetch the file again") from problem


# --- fused projections ------------------------------------------------------------------------------------------------


def _rows(start: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[start : start + count]


def _split(name: str, piece: Piece, config: dict) -> Iterator[tuple[str, Piece]]:
    """Yield a tensor, or the parts that it holds side by side, under the names of the Llama family."""
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    if not name.endswith(".weight") or module not in ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn"):
        if module in ("c_fc", "c_proj") and len(piece.shape) == 2:
            # GPT-2 stores these as (input, output).
            piece = Piece(piece.file, piece.stored, piece.shape[::-1], lambda tensor: tensor.T)
        yield name, piece
        return
    rows, cols = piece.shape
    if module == "gate_up_proj":
        parts = {"gate_proj": _rows(0, rows // 2), "up_proj": _rows(rows // 2, rows // 2)}
        sizes = dict.fromkeys(parts, rows // 2)
    else:
        heads = config.get("num_attention_heads") or config.get("n_head")
        if not heads:
            raise OpdlabError(f"{name} holds several matrices; to split it, put the model's config.json beside it")
        if module == "qkv_proj":
            groups = config.get("num_key_value_heads") or heads
            width = rows // (heads + 2 * groups)
            sizes = {"q_proj": heads * width, "k_proj": groups * width, "v_proj": groups * width}
            parts = {
                "q_proj": _rows(0, sizes["q_proj"]),
                "k_proj": _rows(sizes["q_proj"], sizes["k_proj"]),
                "v_proj": _rows(sizes["q_proj"] + sizes["k_proj"], sizes["v_proj"]),
            }
        elif module == "c_attn":
            # GPT-2: (input, output), the three side by side.
            rows, cols = cols, rows
            parts = {f"{x}_proj": _columns(i * rows // 3, rows // 3) for i, x in enumerate("qkv")}
            sizes = dict.fromkeys(parts, rows // 3)
        elif config.get("model_type") == "gpt_neox":
            # Head by head: query, key and value of the first head, then of the second.
            parts = {f"{x}_proj": _of_heads(i, heads) for i, x in enumerate("qkv")}
            sizes = dict.fromkeys(parts, rows // 3)
        else:
            raise OpdlabError(f"{name} of a {config.get('model_type')!r} model: how it is fused is not known")
    for part, take in parts.items():
        yield f"{parent}.{part}.weight", Piece(piece.file, piece.stored, (sizes[part], cols), take)


def _columns(start: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[:, start : start + count].T


def _of_heads(index: int, heads: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(heads, 3, -1, tensor.shape[1])[:, index].reshape(-1, tensor.shape[1])


# --- adapters ---------------------------------------------------------------------------------------------------------


def _adapter(folder: Path, base: Checkpoint | None) -> Checkpoint:
    if base is None:
        raise OpdlabError(f"{folder} is an adapter, which only means something on its base: give the base first")
    config, file = _json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if not file.is_file():
        raise OpdlabError(f"{folder} has no adapter_model.safetensors (pickled adapters are refused)")
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        raise OpdlabError(f"{folder} is not a plain LoRA adapter: merge it with PEFT and measure the merged model")
    stored, updates = dict(_header(file)), {}
    for key in stored:
        name = key.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            updates[name.replace(".lora_A.weight", ".weight")] = (key, key.replace("lora_A", "lora_B"))
        elif not name.endswith(".lora_B.weight"):
            raise OpdlabError(f"{file} has {key}, which is not part of a plain LoRA adapter: merge it with PEFT first")
    unknown = sorted(updates.keys() - base.pieces.keys())
    if unknown:
        raise OpdlabError(f"{folder} changes {unknown[0]}, which the base {base.path} does not have: give its own base")
    pieces = dict(base.pieces)
    for name, (a, b) in updates.items():
        pieces[name] = _merged(base, name, file, a, b, _scaling(config, name, stored[a][0]))
    return Checkpoint(folder, pieces)


def _scaling(config: dict, name: str, rank: int) -> float:
    def of(pattern: str, default: float) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.search(rf"(^|\.){key}\.weight$", name):
                return value
        return default

    alpha, rank = of("alpha_pattern", config.get("lora_alpha", rank)), of("rank_pattern", config.get("r", rank))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _merged(base: Checkpoint, name: str, file: Path, a: str, b: str, scaling: float) -> Piece:
    origin = base.pieces[name]

    def take(tensor: Tensor) -> Tensor:
        # Not rounded to the dtype of the base, as saving the merged model would: the update keeps its rank.
        update = scaling * (_stored(file, b).float() @ _stored(file, a).float())
        weight = origin.take(tensor)
        return weight.float() + update

    return Piece(origin.file, origin.stored, origin.shape, take)
