"""Projected training: updates confined to a few directions, or a few entries, of each weight matrix.

The paper takes the top-16 right singular vectors V of an early update and replaces every gradient g by g V Vᵀ
(2606.07082, section 4; 2.9 of its appendix). Adam then divides entry by entry, which leads out of the subspace again:
here both can be confined, the gradient as in the paper, or the update that the optimizer makes of it, strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import svd, weight_matrices
from opdlab.geometry.masks import largest_entries
from opdlab.geometry.matrices import describe


@dataclass(frozen=True)
class Constraint:
    """What training is confined to, and from when on.

    Attributes:
        start: share of the training at which it begins.
        k: directions on the input side of each matrix; of entries, the share k / n of them.
        space: where they come from. "update": the top right singular vectors of the update W_t - W_0 so far;
            "weights": those of W_0; "random"; "entries": the largest entries of the update so far; "random entries".
        acts_on: the "gradient", before clipping, as in the paper; or the "update", after the optimizer.
        arm: take the update of this arm, at the same step, instead of the run's own.
        other_seed: take it from the run of the next seed.
        final: take the update at its end, not at ``start``.
        block: "attention" leaves the MLP free; the paper has only attention matrices. Embeddings and norms are free.
        reset: forget the optimizer's moments at ``start``.
        rescale: of a confined update: give it the norm that it had before.
    """

    start: float = 0.2
    k: int = 16
    space: str = "update"
    acts_on: str = "update"
    arm: str = ""
    other_seed: bool = False
    final: bool = False
    block: str = ""
    reset: bool = False
    rescale: bool = False


class Confinement:
    """Projections, one per matrix, made once at the start of projected training."""

    def __init__(
        self, constraint: Constraint, origin: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int = 0
    ):
        """Find the subspaces.

        Args:
            constraint: which kind.
            origin: state dict of W_0.
            weights: state dict of W_t, whose update from ``origin`` gives the directions.
            seed: of random subspaces.

        Raises:
            OpdlabError: if the kind of space is unknown, or k exceeds a matrix.
        """
        self.acts_on, self.rescale = constraint.acts_on, constraint.rescale
        self.random = torch.Generator().manual_seed(seed)
        self.of: dict[str, Tensor] = {}
        for name, w0 in weight_matrices(origin).items():
            if constraint.block in ("", describe(name).block):
                if constraint.k > min(w0.shape):
                    raise OpdlabError(f"k is {constraint.k}; expected {min(w0.shape)} at most, as {name} is smaller")
                delta = weights[name].detach().double().cpu() - w0.detach().double().cpu()
                found = self._find(constraint, w0.detach().double().cpu(), delta)
                self.of[name] = found.to(w0.device if found.dtype == torch.bool else w0)

    def _find(self, constraint: Constraint, w0: Tensor, delta: Tensor) -> Tensor:
        """Return V (n, k), or a mask (m, n) of entries."""
        if constraint.space in ("update", "weights"):
            return svd(delta if constraint.space == "update" else w0, k=constraint.k).vh[: constraint.k].T
        if constraint.space == "random":
            gaussian = torch.randn(w0.shape[1], constraint.k, generator=self.random, dtype=torch.float64)
            return torch.linalg.qr(gaussian).Q
        count = round(constraint.k / w0.shape[1] * w0.numel())
        if constraint.space == "entries":
            return largest_entries(delta, count)
        if constraint.space == "random entries":
            return largest_entries(torch.rand(w0.shape, generator=self.random, dtype=torch.float64), count)
        raise OpdlabError(
            f"there is no space {constraint.space!r}; choose update, weights, random, entries or random entries"
        )

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of ``tensor`` (m, n) that lies in the subspace of the matrix called ``name``.

        >>> w0 = {"layers.0.mlp.up_proj.weight": torch.eye(2)}
        >>> w1 = {"layers.0.mlp.up_proj.weight": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}
        >>> Confinement(Constraint(k=1), w0, w1).apply("layers.0.mlp.up_proj.weight", torch.ones(2, 2))
        tensor([[1., 0.],
                [1., 0.]])
        """
        space = self.of[name]
        return tensor * space if space.dtype == torch.bool else tensor @ space @ space.T

    @torch.no_grad()
    def confine_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace the gradients of the matrices by their projections."""
        for name in self.of:
            gradient = parameters[name].grad
            assert gradient is not None, f"{name} has no gradient yet"
            parameters[name].grad = self.apply(name, gradient)

    @torch.no_grad()
    def confine_update(self, parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Replace the step that was just made from ``before`` by its projection."""
        for name, old in before.items():
            step = parameters[name] - old
            confined = self.apply(name, step)
            if self.rescale:
                confined *= step.norm() / confined.norm().clamp(min=torch.finfo(step.dtype).tiny)
            parameters[name].copy_(old + confined)
