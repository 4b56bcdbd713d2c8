"""Which tensors of a model are measured, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry.spectrum import Svd, svd

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
# Blocks outside attention and MLP, by what a name contains.
_OTHERS = {"embed": "embedding", "wte": "embedding", "wpe": "embedding", "norm": "norm", "ln_": "norm", "head": "head"}
# What models call their MLPs, and the matrices of those that have no name for it.
_MLP_PARENTS, _MLP_MODULES = ("mlp", "experts", "feed_forward", "ffn", "densereludense"), ("fc1", "fc2")


class Description(NamedTuple):
    """Where a weight sits."""

    layer: int  #: -1 outside the layers
    module: str  #: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj in the Llama and Qwen families
    block: (
        str  #: attention or mlp for the matrices of a layer; embedding, head, norm, bias, fused or other for the rest
    )


def describe(name: str) -> Description:
    """Read layer, module and block from the name of a weight.

    >>> describe("model.layers.2.self_attn.q_proj.weight")
    Description(layer=2, module='q_proj', block='attention')
    >>> describe("model.embed_tokens.weight")
    Description(layer=-1, module='embed_tokens', block='embedding')
    """
    found = _LAYER.search(name)
    *parents, module = name.removesuffix(".weight").removesuffix(".bias").split(".")
    inside = " ".join(parents).lower()
    block = next((block for part, block in _OTHERS.items() if part in module.lower()), "other")
    if name.endswith(".bias"):
        block = "bias"
    elif "qkv" in module or "gate_up" in module:
        block = "fused"
    elif found and block == "other":
        if "attn" in inside or "attention" in inside:
            block = "attention"
        elif module in _MLP_MODULES or any(part in inside for part in _MLP_PARENTS):
            block = "mlp"
    return Description(int(found[1]) if found else -1, module, block)


def identity(name: str, shape: tuple[int, ...]) -> dict:
    """Return the columns that say which tensor a row is about; what is not a matrix counts as a single column.

    >>> identity("norm.weight", (4,))
    {'matrix': 'norm.weight', 'layer': -1, 'module': 'norm', 'block': 'norm', 'rows': 4, 'cols': 1, 'parameters': 4}
    """
    layer, module, block = describe(name)
    if len(shape) > 2:
        block = "stacked"  # several matrices in one tensor, and how is not known
    elif len(shape) < 2 and block in ("attention", "mlp"):
        block = "other"  # those two are for matrices
    rows, cols = shape if len(shape) == 2 else (prod(shape), 1)
    where = {"layer": layer, "module": module, "block": block}
    return {"matrix": name} | where | {"rows": rows, "cols": cols, "parameters": rows * cols}


def weight_matrices(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the weights that the diagnostics are about: the matrices of the layers, in the order given.

    Embeddings, the output head, norms and biases are left out: the first two are not in a layer, and the others are not
    matrices.

    Raises:
        OpdlabError: if no weight is left, or one holds several matrices side by side, which the paper splits first.

    Source: 2606.07082, Appendix C.3 ("standard weight matrices across layers").

    >>> import torch
    >>> names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    >>> list(weight_matrices({name: torch.zeros(2, 2) for name in names}))
    ['model.layers.0.mlp.up_proj.weight']
    """
    matrices = {name: w for name, w in state_dict.items() if w.ndim == 2 and _LAYER.search(name)}
    for name in matrices:
        if describe(name).block == "fused":
            raise OpdlabError(f"the weight {name!r} holds several matrices side by side; split it before measuring")
    if not matrices:
        raise OpdlabError(f"state_dict has no matrix named ...layers.<i>... among its {len(state_dict)} weights")
    return matrices


def decompose(w0s: Mapping[str, Tensor]) -> dict[str, Svd]:
    """Decompose the :func:`weight_matrices` of an origin, once for all the updates that start from it.

    >>> import torch
    >>> decompose({"layers.0.mlp.up_proj.weight": torch.eye(2)})["layers.0.mlp.up_proj.weight"].rank
    2
    """
    return {name: svd(w0, name) for name, w0 in weight_matrices(w0s).items()}


def float64_matrices(
    weights: Mapping[str, Tensor], name: str, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return :func:`weight_matrices` in float64, finite, and with the names and shapes of ``like`` where it is given.

    An error calls the state dict by its ``name``.

    Raises:
        OpdlabError: naming the first matrix that is wrong.

    >>> import torch
    >>> float64_matrices({"layers.0.mlp.up_proj.weight": torch.eye(2)}, "w0s")["layers.0.mlp.up_proj.weight"].dtype
    torch.float64
    """
    chosen = weight_matrices(weights)
    if like is not None:
        for missing in sorted(chosen.keys() ^ like.keys()):
            raise OpdlabError(f"{name} and w0s do not both have the matrix {missing!r}; expected the same in both")
        for matrix, w0 in like.items():
            _checks.same_shape(w0, f"{matrix} in w0s", chosen[matrix], f"{matrix} in {name}")
    return {matrix: _checks.matrix(w, f"{matrix} in {name}") for matrix, w in chosen.items()}
