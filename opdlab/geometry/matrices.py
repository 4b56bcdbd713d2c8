"""Which tensors of a model are measured, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from torch import Tensor

from opdlab.errors import OpdlabError

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|resblocks)\.(\d+)\.")
# Parts of a model beside its language model, by what a name has before its layer.
_TOWERS = {
    "vision": re.compile(r"vis(?:ion|ual)|image|video"),
    "audio": re.compile(r"audio|speech|sound|talker|token2wav"),
    "projector": re.compile(r"projector|connector"),
    "mtp": re.compile(r"(?:^|\.)mtp\b"),  # which predicts several tokens ahead
}
# Blocks outside attention and MLP, by what a module is called; the first counts.
_OTHERS = {
    "bias": re.compile(r"bias"),
    "norm": re.compile(r"norm|^ln_"),
    "head": re.compile(r"head|^score$|^classifier$"),
    "embedding": re.compile(r"embed|^w[tp]e$|^shared$"),
}
# Several matrices side by side, or one above the other, of which no rule says how to split them.
_SEVERAL = {
    "fused": re.compile(r"qkv|gate_up|query_key_value|c_attn|w_pack|in_proj_(?:ba|weight)"),
    "stacked": re.compile(r"(?:^|\.)experts\.(?!\d)"),
}
# The matrices of a layer, by what a name has after its layer; the first counts.
_IN_LAYERS = {
    "attention": re.compile(r"attn|attention|\.[qkvo]_proj$|mlstm_layer\.(?:[qkv]|out_proj)$"),
    "router": re.compile(r"\.(?:gate|router|shared_expert_gate)(?:\.|$)"),
    "mlp": re.compile(
        r"mlp|experts|feed_forward|ffn|densereludense|\.(?:fc[12]|(?:gate|up|down)_proj)$|^\.(?:intermediate|output)\.dense$"
    ),
    "mixer": re.compile(r"mixer|mamba|ssm|conv|temporal_block"),
}

#: The blocks of which the paper's means are, and those of tensors that are no matrices of a layer.
LAYERS, OUTSIDE = ("attention", "mlp"), ("embedding", "head", "norm", "bias")
#: The blocks of what stands beside the language model.
TOWERS = tuple(_TOWERS)


class Description(NamedTuple):
    """Where a weight sits."""

    layer: int  #: -1 outside the layers
    module: str  #: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj in the Llama and Qwen families
    #: attention or mlp for the matrices of a layer of the language model; mixer for what mixes tokens in another way;
    #: vision, audio, projector or mtp (for predicting several tokens ahead) beside the language model; router for what
    #: chooses experts; embedding, head, norm, bias, fused or other for the rest
    block: str


def describe(name: str) -> Description:
    """Read layer, module and block from the name of a weight.

    A router is no matrix of the MLP: the paper means "standard weight matrices" (2606.07082, Appendix C.3).

    >>> describe("model.layers.2.self_attn.q_proj.weight")
    Description(layer=2, module='q_proj', block='attention')
    >>> describe("visual.blocks.2.attn.q_proj.weight").block, describe("model.embed_tokens.weight").block
    ('vision', 'embedding')
    """
    found = _LAYER.search(name)
    plain = name.removesuffix(".weight").removesuffix(".bias")
    after = plain[found.end() - 1 :] if found else f".{plain}"
    module = after.rpartition(".")[2]
    block = "bias" if name.endswith(".bias") else _first(_OTHERS, module.lower())
    block = block or _first(_SEVERAL, after.lower()) or tower_of(name)
    if not block:
        block = _first(_IN_LAYERS, after.lower()) if found else "head" if "head" in plain else ""
    # Mamba stores a table beside its matrices, A_log.
    if not block or (block == "mixer" and not name.endswith(".weight")):
        block = "other"
    return Description(int(found[1]) if found else -1, module, block)


def _first(kinds: Mapping[str, re.Pattern[str]], part: str) -> str:
    return next((kind for kind, called in kinds.items() if called.search(part)), "")


def tower_of(name: str) -> str:
    """Return the part of a model beside its language model that a name begins with, or "" in the language model."""
    return _first(_TOWERS, _LAYER.split(name, maxsplit=1)[0])


def identity(name: str, shape: tuple[int, ...]) -> dict:
    """Return the columns that say which tensor a row is about; what is not a matrix counts as a single column.

    >>> identity("norm.weight", (4,))
    {'matrix': 'norm.weight', 'layer': -1, 'module': 'norm', 'block': 'norm', 'rows': 4, 'cols': 1, 'parameters': 4}
    """
    layer, module, block = describe(name)
    if block not in OUTSIDE and len(shape) > 2:
        block = "stacked"  # a convolution, or matrices of which no rule says how they are stacked
    elif block not in OUTSIDE and len(shape) < 2:
        block = "other"  # those are for matrices
    rows, cols = shape if len(shape) == 2 and block not in ("bias", "norm") else (prod(shape), 1)
    where = {"layer": layer, "module": module, "block": block}
    return {"matrix": name} | where | {"rows": rows, "cols": cols, "parameters": rows * cols}


def weight_matrices(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the weights that the diagnostics are about: the matrices of the layers, in the order given.

    Embeddings and the output head are left out, which are not in a layer, and norms and biases, which are no matrices.

    Raises:
        OpdlabError: if no weight is left, or one holds several matrices, which the paper splits first.

    Source: 2606.07082, Appendix C.3 ("standard weight matrices across layers").

    >>> import torch
    >>> names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    >>> list(weight_matrices({name: torch.zeros(2, 2) for name in names}))
    ['model.layers.0.mlp.up_proj.weight']
    """
    matrices = {}
    for name, w in state_dict.items():
        layer, _, block = describe(name)
        if w.ndim != 2 or layer < 0 or block in OUTSIDE:
            continue
        if block in _SEVERAL:
            raise OpdlabError(f"the weight {name!r} holds several matrices side by side; split it before measuring")
        matrices[name] = w
    if not matrices:
        raise OpdlabError(f"state_dict has no matrix named ...layers.<i>... among its {len(state_dict)} weights")
    return matrices
