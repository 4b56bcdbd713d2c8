"""Projected training: gradients or updates projected onto a few directions of each weight matrix.

The paper takes the top-16 right singular vectors V of an early update and replaces every gradient g by g V Vᵀ
(2606.07082, section 4; 2.9 of its appendix). Adam then divides entry by entry, which leads out of the subspace again:
here both can be projected, the gradient as in the paper, or the update that the optimizer makes of it, strictly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import svd, weight_matrices
from opdlab.training.arms import Projection


def projected_matrices(projection: Projection, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices of a state dict that a projection is about, or raise an OpdlabError if k exceeds one."""
    found = weight_matrices(weights)
    for name, matrix in found.items():
        if projection.k > (least := min(matrix.shape)):
            raise OpdlabError(f"k is {projection.k}; expected {least} at most, as {name} is smaller")
    return found


class Projector:
    """The subspaces of a projection, one per matrix, found once at the start of projected training."""

    def __init__(
        self,
        projection: Projection,
        start: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        """Find the subspaces.

        Args:
            projection: which, how many directions, and on what they act.
            start: the state dict of W_0 of the run whose update gives the directions.
            weights: that of its W_t.
            seed: of random ones.
            device: of the gradients or updates that are projected.

        Raises:
            OpdlabError: if k exceeds a matrix.
        """
        self.acts_on, self.rescale = projection.acts_on, projection.rescale
        self.random = torch.Generator().manual_seed(seed)
        self.of: dict[str, Tensor] = {}
        for name, matrix in projected_matrices(projection, start).items():
            w0 = matrix.double()
            self.of[name] = self._find(projection, w0, weights[name].double() - w0).to(device, matrix.dtype)

    def _find(self, projection: Projection, w0: Tensor, delta: Tensor) -> Tensor:
        """Return V (n, k)."""
        if projection.space == "random":
            gaussian = torch.randn(w0.shape[1], projection.k, generator=self.random, dtype=torch.float64)
            return torch.linalg.qr(gaussian).Q
        return svd(delta if projection.space == "update" else w0, k=projection.k).vh[: projection.k].T

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of ``tensor`` (m, n) that lies in the subspace of the matrix called ``name``.

        >>> w0 = {"layers.0.mlp.up_proj.weight": torch.eye(2)}
        >>> w1 = {"layers.0.mlp.up_proj.weight": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}
        >>> Projector(Projection(k=1), w0, w1).apply("layers.0.mlp.up_proj.weight", torch.ones(2, 2))
        tensor([[1., 0.],
                [1., 0.]])
        """
        return tensor @ self.of[name] @ self.of[name].T

    @torch.no_grad()
    def project_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace the gradients of the matrices by their projections."""
        for name in self.of:
            gradient = parameters[name].grad
            assert gradient is not None, f"{name} has no gradient yet"
            parameters[name].grad = self.apply(name, gradient)

    @torch.no_grad()
    def project_update(self, parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Replace the step that was just made from ``before`` by its projection."""
        for name, old in before.items():
            step = parameters[name] - old
            projected = self.apply(name, step)
            if self.rescale:
                projected *= step.norm() / projected.norm().clamp(min=torch.finfo(step.dtype).tiny)
            parameters[name].copy_(old + projected)
