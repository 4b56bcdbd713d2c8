"""Names of weights: one for each matrix, whatever wrapped the model or fused its projections."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry.matrices import describe
from opdlab.models.pieces import Piece

# What torch, accelerate, Lightning, PEFT and TRL put into the names of weights, anywhere or in front, when they wrap a
# model. A second "model." in front is the attribute in which a module of one's own holds the model.
_INSIDE = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_IN_FRONT = re.compile(r"(?:(?:module|base_model\.model|policy|pretrained_model|model(?=\.(?:model|lm_head)\.))\.)+")
HEAD = "lm_head.weight"


def plain_name(name: str) -> str:
    """Return the name of a weight without the parts that trainers add when they wrap a model, in whatever order.

    >>> plain_name("module._orig_mod.model.norm.weight"), plain_name("model.model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    name = _INSIDE.sub("", name)
    return name[found.end() :] if (found := _IN_FRONT.match(name)) else name


def plain_names(names: Collection[str]) -> dict[str, str]:
    """Return the :func:`plain_name` of each of a model's weights; where two would be the same, both stay as they are.

    >>> plain_names(["policy.norm.weight", "module.norm.weight", "policy.bias"])
    {'policy.norm.weight': 'policy.norm.weight', 'module.norm.weight': 'module.norm.weight', 'policy.bias': 'bias'}
    """
    plain = {name: plain_name(name) for name in names}
    count = Counter(plain.values())
    return {name: short if count[short] == 1 else name for name, short in plain.items()}


def embedding_of(names: Iterable[str]) -> str | None:
    """Return which of a model's weights is its embedding, of which an output head (``HEAD``) may be a copy."""
    return next((name for name in names if describe(name).block == "embedding"), None)


def split(name: str, piece: Piece, config: dict) -> Iterator[tuple[str, Piece]]:
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
        if is_turned(name, config):
            parts[name] = piece = piece.part(piece.shape[::-1], torch.t)
        if module == "gate_up_proj":
            half = _divide(name, piece.shape[0], 2)
            names = [f"{parent}.{part}_proj.weight" for part in ("gate", "up")]
            parts = dict(zip(names, _row_blocks(piece, [half, half]), strict=True))
        elif module in ("qkv_proj", "query_key_value", "c_attn"):
            names = [f"{parent}.{part}_proj.weight" for part in "qkv"]
            parts = dict(zip(names, _of_attention(name, piece, config), strict=True))
    yield from parts.items()


def is_turned(name: str, config: dict) -> bool:
    """Return whether a model stores a matrix as (input, output), as GPT-2 does."""
    return config.get("model_type") == "gpt2" and name.split(".")[-2] in ("c_fc", "c_proj", "c_attn")


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
