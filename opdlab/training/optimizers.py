"""Optimizers: AdamW as in the paper, and two others that answer what of the geometry is Adam's."""

from __future__ import annotations

import transformers
from torch.optim import SGD, AdamW, Muon, Optimizer

from opdlab.geometry import weight_matrices
from opdlab.training.config import Recipe


def make_optimizers(model: transformers.PreTrainedModel, recipe: Recipe, name: str) -> list[Optimizer]:
    """Return the optimizers that share out a model's weights. The learning rate is set at each step.

    They are "adamw"; "sgd", without momentum; or "muon", which makes the update of each matrix nearly orthogonal
    (K. Jordan, 2024), with entries about as large as AdamW's, beside AdamW for all that is no layer's matrix. Norms and
    biases are spared from weight decay, by the rule of transformers' Trainer. An arm refuses any other name.
    """
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
    adamw = AdamW(groups, lr=0.0, betas=recipe.betas)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices.values(), lr=0.0, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")]
