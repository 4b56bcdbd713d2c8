"""Names of weights: one for each matrix, whatever wrapped the model, named its parts or fused its projections.

One table, names.toml, serves all naming schemes of transformers 4 and 5, so both sides of a pair meet whichever scheme
each has.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry.matrices import describe, tower_of
from opdlab.models.pieces import Piece

# What torch, accelerate, Lightning, PEFT and TRL put into the names of weights, anywhere or in front, when they wrap a
# model. One "model." too many in front is the attribute in which a module of one's own holds the model.
_INSIDE = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_WRAPPERS = r"module|base_model\.model|policy|pretrained_model"
_IN_FRONT = re.compile(rf"^(?:(?:{_WRAPPERS}|model(?=\.(?:model|lm_head|{_WRAPPERS})\.))\.)+")
HEAD = "lm_head.weight"

# What holds the language model, and how the names of its parts begin where nothing does.
_HOLDERS = re.compile(r"^(?:(?:model|language_model|text_model|llm|thinker|backbone)\.)+")
_BARE = {"model.": re.compile(r"(?:layers|embed_tokens|norm)\."), "transformer.": re.compile(r"(?:h|wte|wpe|ln_f)\.")}
_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_RENAMED = {re.compile(pattern): name for pattern, name in _TABLE["renamed"].items()}
_FAMILIES: dict[str, list[str]] = _TABLE["families"]
_SEVERAL = "holds several matrices; to split it, put the model's config.json beside it, or give the module in memory"
_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv")


def plain_name(name: str) -> str:
    """Return the name of a weight without the parts that trainers add when they wrap a model, in whatever order.

    >>> plain_name("module._orig_mod.model.norm.weight"), plain_name("model.model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    return _IN_FRONT.sub("", _INSIDE.sub("", name))


def plain_names(names: Collection[str]) -> dict[str, str]:
    """Return the :func:`plain_name` of each of a model's weights; where two would be the same, both stay as they are.

    >>> plain_names(["policy.norm.weight", "module.norm.weight", "policy.bias"])
    {'policy.norm.weight': 'policy.norm.weight', 'module.norm.weight': 'module.norm.weight', 'policy.bias': 'bias'}
    """
    plain = {name: plain_name(name) for name in names}
    count = Counter(plain.values())
    return {name: short if count[short] == 1 else name for name, short in plain.items()}


def canonical_name(name: str) -> str:
    """Return the one name under which a weight is measured, for all that families and versions call it.

    >>> canonical_name("language_model.model.layers.0.block_sparse_moe.experts.7.w2.weight")
    'model.layers.0.mlp.experts.7.down_proj.weight'
    >>> canonical_name("model.visual.patch_embed.proj.weight"), canonical_name("h.0.ln_1.weight")
    ('visual.patch_embed.proj.weight', 'transformer.h.0.ln_1.weight')
    """
    bare = _HOLDERS.sub("", name)
    if tower_of(bare) or bare.startswith("lm_head."):
        name = bare
    else:
        begins = "model." if bare != name else ""
        name = (begins or next((begins for begins, called in _BARE.items() if called.match(bare)), "")) + bare
    for pattern, instead in _RENAMED.items():
        name = pattern.sub(instead, name)
    return name


def embedding_of(names: Iterable[str]) -> str | None:
    """Return which of a model's weights is its embedding, of which an output head (``HEAD``) may be a copy."""
    known = {name: canonical_name(name) for name in names}
    return next(
        (name for name, as_is in known.items() if describe(as_is).block == "embedding" and not tower_of(as_is)), None
    )


def split_all(whole: Mapping[str, Piece], config: dict) -> dict[str, Piece]:
    """Return the matrices of all tensors of a model, each under its canonical name.

    Raises:
        OpdlabError: if two tensors are one matrix, or a fused one cannot be split as its config says.
    """
    parts: dict[str, Piece] = {}
    sources: dict[str, str] = {}
    config = config | (config.get("text_config") or config.get("llm_config") or {})
    for stored, piece in whole.items():
        for name, part in _split(_mtp(canonical_name(stored), config), piece, config):
            if name in parts:
                raise OpdlabError(f"{sources[name]} and {stored} are both {name}: delete one from the checkpoint")
            parts[name], sources[name] = part, stored
    return parts


def is_turned(name: str, config: dict) -> bool:
    """Return whether a model stores a weight as (input, output)."""
    linear = name.split(".")[-2:-1] in (["c_fc"], ["c_proj"], ["c_attn"])
    return linear and config.get("model_type") in _FAMILIES["transposed"]


def _mtp(name: str, config: dict) -> str:
    """Name the layers that DeepSeek and others append to predict several tokens ahead, which transformers drops."""
    depth, found = config.get("num_hidden_layers"), re.match(r"model\.layers\.(\d+)\.", name)
    if found and depth and config.get("num_nextn_predict_layers") and int(found[1]) >= depth:
        return f"mtp.layers.{int(found[1]) - depth}.{name[found.end() :]}"
    return name


def _split(name: str, piece: Piece, config: dict) -> Iterator[tuple[str, Piece]]:
    """Yield the matrices fused or stacked in a tensor, as (output, input), or that tensor itself if no rule splits it.

    :func:`opdlab.geometry.describe` then calls it fused or stacked.
    """
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    if len(piece.shape) == 2:
        turned = is_turned(name, config)
        yield from _fused(name, piece.part(piece.shape[::-1], torch.t) if turned else piece, config)
        return
    hidden = config.get("hidden_size")
    if len(piece.shape) != 3 or not parent.endswith("experts") or hidden not in piece.shape[1:]:
        yield name, piece
        return
    count, rows, cols = piece.shape
    # The output of an expert is the hidden state, or its input is.
    out, into = (rows, cols) if module == "down_proj" else (cols, rows)
    turned = out != hidden or (into == hidden and config.get("model_type") in _FAMILIES["transposed_experts"])
    for i in range(count):
        expert = replace(piece, shape=(rows, cols), index=i)
        expert = expert.part((cols, rows), torch.t) if turned else expert
        yield from _fused(f"{parent}.{i}.{module}.weight", expert, config)


def _fused(name: str, piece: Piece, config: dict) -> Iterator[tuple[str, Piece]]:
    """Yield the matrices that are fused in one, or that one itself."""
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    rows, names = piece.shape[0], ["q_proj", "k_proj", "v_proj"]
    takes: list[_Take] = []
    if module == "gate_up_proj":
        half, names = _divide(name, rows, 2), ["gate_proj", "up_proj"]
        alternates = config.get("model_type") in _FAMILIES["alternating"]
        takes = _blocks(half, 1, 1) if alternates else _blocks(1, half, half)
    elif module in ("qkv", "in_proj_weight"):  # of vision towers, and of torch's own attention
        takes = _blocks(1, *[_divide(name, rows, 3)] * 3)
    elif module in _QKV:
        takes = _of_attention(name, rows, config)
    elif module in ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv"):
        names = [f"in_proj_{part}" for part in module.removeprefix("in_proj_")]
        takes = _of_linear_attention(name, rows, config, len(names))
    if not takes:
        yield name, piece
    for part, (size, take) in zip(names, takes, strict=False):
        yield f"{parent}.{part}.weight", piece.part((size, piece.shape[1]), take)


# A number of rows, and what takes them from a fused tensor.
_Take = tuple[int, partial[Tensor]]


def _blocks(count: int, *sizes: int) -> list[_Take]:
    """Take blocks of rows, one after the other, from each of ``count`` groups of rows."""
    return [
        (count * size, partial(_block, count=count, start=sum(sizes[:i]), size=size)) for i, size in enumerate(sizes)
    ]


def _block(tensor: Tensor, count: int, start: int, size: int) -> Tensor:
    return tensor.reshape(count, -1, tensor.shape[1])[:, start : start + size].reshape(-1, tensor.shape[1])


def _of_attention(name: str, rows: int, config: dict) -> list[_Take]:
    """Take query, key and value, if it is known how they are stored."""
    family, counts = config.get("model_type"), ("num_attention_heads", "n_head", "n_heads", "num_heads")
    heads = next((config[key] for key in counts if config.get(key)), None)
    if not heads:
        raise OpdlabError(f"{name} {_SEVERAL}")
    if family not in _FAMILIES["in_blocks"] + _FAMILIES["in_groups"]:
        return []
    groups = _key_heads(config, heads)
    width = _divide(name, rows, heads + 2 * groups)
    if family in _FAMILIES["in_blocks"]:
        return _blocks(1, heads * width, groups * width, groups * width)
    return _blocks(groups, heads // groups * width, width, width)


def _key_heads(config: dict, heads: int) -> int:
    if config.get("model_type") == "falcon" and config.get("new_decoder_architecture"):
        return config.get("num_kv_heads") or heads
    if config.get("multi_query"):
        return 1
    own = config.get("num_key_value_heads") or config.get("multi_query_group_num")
    return own or (config.get("attn_config") or {}).get("kv_n_heads") or heads


def _of_linear_attention(name: str, rows: int, config: dict, count: int) -> list[_Take]:
    """Take the projections of a gated delta net: one after the other in Qwen3.5, by groups of heads in Qwen3-Next."""
    keys, values = config.get("linear_num_key_heads"), config.get("linear_num_value_heads")
    if not keys or not values:
        raise OpdlabError(f"{name} {_SEVERAL}")
    k, v = config["linear_key_head_dim"], values // keys * config["linear_value_head_dim"]
    sizes = {2: [values // keys] * 2, 3: [k, k, v], 4: [k, k, v, v]}[count]
    if keys * sum(sizes) != rows:
        raise OpdlabError(f"{name} has {rows} rows, and its config.json says {keys * sum(sizes)}: give its own config")
    return _blocks(1, *[keys * size for size in sizes]) if count == 3 else _blocks(keys, *sizes)


def _divide(name: str, rows: int, parts: int) -> int:
    if rows % parts:
        raise OpdlabError(
            f"{name} has {rows} rows, which its config.json would split into {parts}: give its own config"
        )
    return rows // parts
