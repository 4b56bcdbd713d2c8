"""Read the weights of any model, one tensor at a time, whatever trained it.

A checkpoint is a Hugging Face folder, the folder of a LoRA adapter (merged with its base on the fly), a single
safetensors file such as a snapshot of a run, or a state dict or a module in memory. Fused projections are split into
their matrices, stacked experts are read one at a time, and tied embeddings appear once. Pickles are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from opdlab.errors import OpdlabError
from opdlab.models.files import read_json
from opdlab.models.lora import with_adapter
from opdlab.models.names import HEAD, canonical_name, embedding_of, plain_names, split_all
from opdlab.models.pieces import FLOATS, Checkpoint, Piece, refuse_quantised, refuse_tensors, stored_pieces

# Constants that older models store alongside their weights.
_BUFFERS = tuple(f".{block}.{buffer}" for block in ("attn", "attention") for buffer in ("bias", "masked_bias"))
_BUFFERS += ("rotary_emb.inv_freq", "position_ids")
_BUFFERS += (".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")  # of MiniMax's linear attention

#: What :func:`open_checkpoint` opens.
Source = Path | str | Mapping[str, Tensor] | nn.Module | Checkpoint


def open_checkpoint(source: Source, base: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights; an open one is returned as it is.

    An adapter's update is added to the weights of ``base``. What does not say what model it is of, such as a state dict
    or a file without config.json beside it, is taken for the same model as ``base``.

    Raises:
        OpdlabError: if files are missing, pickled or damaged, or an adapter is given without its base.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, (Mapping, nn.Module)):
        return _in_memory(source, base)
    path = Path(source)
    if not path.exists():
        raise OpdlabError(
            f"there is no checkpoint {path}: give a model folder, a .safetensors file or OWNER/NAME on the hub"
        )
    if (path / "adapter_config.json").is_file():
        whole = with_adapter(path, base)
        return _checkpoint(path, whole, base.config, base.left_out) if base else _checkpoint(path, whole, {}, {})
    stored = stored_pieces(path)
    beside = (path.parent if path.is_file() else path) / "config.json"
    config = read_json(beside) if beside.is_file() else base.config if base else {}
    return _of_weights(path, stored, config)


def _in_memory(source: Mapping[str, Tensor] | nn.Module, base: Checkpoint | None) -> Checkpoint:
    if isinstance(source, nn.Module):
        what = f"the {type(source).__name__} in memory"
        # Shared weights come once.
        tensors = as_saved({name: weight.detach() for name, weight in source.named_parameters()}, source)
        config = _config(model_in(source)[1])
    else:
        what, config, tensors = "the state dict in memory", base.config if base else {}, dict(source)
    stored: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise OpdlabError(f"{name} in {what} is of type {type(tensor).__name__}: give names and tensors only")
        if tensor.is_meta:
            raise OpdlabError(f"{name} of {what} is on the meta device: load it without device_map, or give its folder")
        stored[name] = Piece(tensors, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return _of_weights(what, stored, config)


def as_saved(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return weights that are called as in a module as ``save_pretrained`` writes those of the model in it."""
    place, model = model_in(module)
    begins, rest = f"{place}." if place else "", dict(weights)
    own = {name.removeprefix(begins): rest.pop(name) for name in weights if name.startswith(begins)}
    if hasattr(model, "save_pretrained"):
        from transformers.core_model_loading import revert_weight_conversion

        with suppress(Exception):  # What transformers cannot turn back, as of quantised models, keeps its name.
            own = revert_weight_conversion(cast(Any, model), own)
    return own | {f"{type(module).__name__}.{name}" if name in own else name: beside for name, beside in rest.items()}


def model_in(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the model of transformers that a module is or wraps, and its place there; or the module itself."""
    found = [(name, inside) for name, inside in module.named_modules() if _config(inside)]
    if not found:
        return "", module
    from transformers import PreTrainedModel  # imported late, which takes seconds, and here somebody has done it

    return next((one for one in found if isinstance(one[1], PreTrainedModel)), found[0])


def _config(module: nn.Module) -> dict:
    return getattr(getattr(module, "config", None), "to_dict", dict)()


def _of_weights(path: Path | str, stored: dict[str, Piece], config: dict) -> Checkpoint:
    refuse_tensors(path, {name: piece.shape for name, piece in stored.items()})
    pieces: dict[str, Piece] = {}
    left_out: dict[str, str] = {}
    for name, plain in plain_names(stored).items():
        piece = stored[name]
        if plain.endswith(_BUFFERS):
            left_out[plain] = "a constant of the model, not a weight"
        elif piece.dtype in FLOATS.values():
            pieces[plain] = piece
        else:
            refuse_quantised(path, name, piece.dtype, config)
            left_out[plain] = f"a buffer of {piece.dtype}, not a weight"
    if not pieces:
        why = "".join(f" ({name} is {reason})" for name, reason in list(left_out.items())[:1])
        raise OpdlabError(f"{path} holds no weights{why}: give the checkpoint of a model, with real numbers")
    return _checkpoint(path, pieces, config, left_out)


def _checkpoint(path: Path | str, whole: dict[str, Piece], config: dict, left_out: dict[str, str]) -> Checkpoint:
    head, embedding = next((name for name in whole if canonical_name(name) == HEAD), None), embedding_of(whole)
    if head and embedding:
        one, other = whole[head], whole[embedding]
        # Transformers ties a head to the embedding only where they are equal. The first rows nearly always tell.
        if (one.shape, one.dtype) == (other.shape, other.dtype) and all(
            torch.equal(one.rows(0, rows).read(), other.rows(0, rows).read()) for rows in (1, one.shape[0])
        ):
            whole = {name: piece for name, piece in whole.items() if name != head}
            left_out = left_out | {head: "a copy of the embedding"}
    pieces = split_all(whole, config)
    # Layer 2 comes before layer 10.
    in_order = sorted(pieces, key=lambda name: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", name)])
    return Checkpoint(path, {name: pieces[name] for name in in_order}, whole, config, left_out)
