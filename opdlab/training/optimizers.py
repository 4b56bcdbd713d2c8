"""Optimizers: AdamW as in the paper, and two others that answer what of the geometry is Adam's.

Their moments are read and written by the names of the weights, so that a stopped run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import transformers
from torch import Tensor
from torch.optim import SGD, AdamW, Muon, Optimizer

from opdlab.errors import OpdlabError
from opdlab.geometry import weight_matrices
from opdlab.training.config import Recipe

_MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")


def make_optimizers(model: transformers.PreTrainedModel, recipe: Recipe, name: str) -> list[Optimizer]:
    """Return the optimizers that share out a model's weights. The learning rate is set at each step.

    They are "adamw"; "sgd", without momentum; or "muon", which makes the update of each matrix nearly orthogonal
    (K. Jordan, 2024), with entries about as large as AdamW's, beside AdamW for all that is no layer's matrix. Norms and
    biases are spared from weight decay, by the rule of transformers' Trainer.

    Raises:
        OpdlabError: if there is no such optimizer.
    """
    if name not in ("adamw", "sgd", "muon"):
        raise OpdlabError(f"there is no optimizer {name!r}; choose adamw, sgd or muon")
    weights = dict(model.named_parameters())
    matrices = weight_matrices(weights) if name == "muon" else {}
    others = weights.keys() - matrices.keys()
    decayed = {*transformers.Trainer.get_decay_parameter_names(None, model)}  # type: ignore[arg-type]  # needs no self
    groups = [
        {"params": [weight for key, weight in weights.items() if key in names], "weight_decay": decay}
        for names, decay in ((others & decayed, recipe.weight_decay), (others - decayed, 0.0))
    ]
    if name == "sgd":
        return [SGD(groups, lr=0.0)]
    optimizers: list[Optimizer] = [AdamW(groups, lr=0.0, betas=recipe.betas)]
    if matrices:
        optimizers.append(
            Muon(matrices.values(), lr=0.0, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def moments(optimizers: list[Optimizer], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments of all weights, by kind and name."""
    return {
        f"{kind}.{name}": moment
        for optimizer in optimizers
        for name, weight in weights.items()
        for kind, moment in optimizer.state.get(weight, {}).items()
        if kind in _MOMENTS
    }


def load_moments(optimizers: list[Optimizer], weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizers back what :func:`moments` returned; ``tensors`` may hold more."""
    names = {weight: name for name, weight in weights.items()}
    for optimizer in optimizers:
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            state = {
                # AdamW counts its steps on the CPU.
                kind: tensors[f"{kind}.{names[weight]}"].to("cpu" if kind == "step" else weight.device)
                for kind in _MOMENTS
                if f"{kind}.{names[weight]}" in tensors
            }
            if state:
                optimizer.state[weight] = state
