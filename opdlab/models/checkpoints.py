"""Read the weights of any model, one tensor at a time, whatever trained it.

A checkpoint is a Hugging Face folder (one safetensors file, or shards with or without an index), the folder of a LoRA
adapter (merged with its base on the fly), a single safetensors file such as a snapshot of a run, or weights in memory:
a state dict or a module. Fused projections are split into their matrices, stacked experts are read one at a time, and
tied embeddings appear once. Pickles are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from opdlab.errors import OpdlabError
from opdlab.models.formats import header, read_json, refuse_pickles, shards
from opdlab.models.lora import with_adapter
from opdlab.models.names import HEAD, embedding_of, plain_name, split_all
from opdlab.models.pieces import Checkpoint, Piece

# Constants that older models store alongside their weights.
_BUFFERS = tuple(f".{block}.{buffer}" for block in ("attn", "attention") for buffer in ("bias", "masked_bias"))
_BUFFERS += ("rotary_emb.inv_freq", "position_ids")

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
    refuse_pickles([path])
    if (path / "adapter_config.json").is_file():
        return _checkpoint(path, with_adapter(path, base), base.config if base else {})
    pieces: dict[str, Piece] = {}
    for file in [path] if path.is_file() else shards(path):
        for stored, shape, dtype in header(file):
            name = plain_name(stored)
            if name in pieces:
                first = getattr(pieces[name].file, "name", "memory")
                raise OpdlabError(f"{path} has the tensor {name} twice, in {first} and {file.name}: delete one")
            if not name.endswith(_BUFFERS):
                pieces[name] = Piece(file, stored, shape, dtype)
    if not pieces:
        raise OpdlabError(f"{path} holds no weights: give the checkpoint of a model")
    beside = (path.parent if path.is_file() else path) / "config.json"
    config = read_json(beside) if beside.is_file() else {}
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
    parts = split_all(whole, config)
    return Checkpoint(path, dict(sorted(parts.items(), key=lambda item: _natural(item[0]))), whole, config)


def _natural(name: str) -> list:
    """Return a sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
