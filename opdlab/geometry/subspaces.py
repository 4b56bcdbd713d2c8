"""Directions: the leading singular subspaces of weights and updates, and how two of them compare.

A subspace is an orthonormal basis (n, K), one direction per column. Directions that a matrix of rank below K does not
have are columns of NaN, not arbitrary vectors of its null space, and whatever is computed from them is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import _checks
from opdlab.geometry.spectrum import Svd, svd


class Rotation(NamedTuple):
    """Principal angles in degrees, ascending, between the leading singular subspaces before and after."""

    left: Tensor  #: (k,), the output side
    right: Tensor  #: (k,), the input side


class Similarity(NamedTuple):
    """Sim_K(t, t_end) of every snapshot t, in order."""

    left: list[float]
    right: list[float]


def top_right(delta: Tensor | Svd, k: int) -> Tensor:
    """Return the top-k right singular vectors as columns, (n, k) in float64: the paper's V_k.

    Columns past the numerical rank (:attr:`Svd.rank`) are NaN.

    Source: 2606.07082, Appendix E (k = 16, of the update).

    >>> top_right(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 1).abs().T
    tensor([[0., 1.]], dtype=torch.float64)
    >>> top_right(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 2)[:, 1]
    tensor([nan, nan], dtype=torch.float64)
    """
    found = svd(delta, "delta", k)
    return _leading(found.vh.T, found.rank, k)


def top_left(delta: Tensor | Svd, k: int) -> Tensor:
    """Return the top-k left singular vectors as columns, (m, k) in float64: the paper's U_k.

    >>> top_left(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 1).abs().T
    tensor([[1., 0.]], dtype=torch.float64)
    """
    found = svd(delta, "delta", k)
    return _leading(found.u, found.rank, k)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Return the principal angles between two orthonormal bases (n, K): (K,) in degrees from 0 to 90, ascending.

    cos(theta_i) is the i-th singular value of a^T b (descending). The arccosine loses half of the digits near 1, so
    angles up to 45 degrees come from their sines, the singular values of (I - a a^T) b, and the others from their
    cosines: either is good to about 1e-13 degrees. All are NaN if a basis contains NaN; one that is not orthonormal to
    1e-10 is an error.

    Source: 2606.07082, Appendix C.3; Björck and Golub (1973); Knyazev and Argentati (2002), whose Algorithm 3.1
    ``scipy.linalg.subspace_angles`` follows. Here the choice of form is made for each angle by its own cosine.

    >>> line = torch.tensor([[1.0], [0.0]])
    >>> principal_angles(line, torch.tensor([[0.5], [0.75**0.5]], dtype=torch.float64))
    tensor([60.0000], dtype=torch.float64)
    """
    _checks.same_shape(a, "a", b, "b")
    left, right = _checks.basis(a, "a"), _checks.basis(b, "b")
    if left is None or right is None:
        return torch.full((a.shape[-1],), nan, dtype=torch.float64)
    overlap = left.T @ right  # (K, K)
    cosines = torch.linalg.svdvals(overlap)  # descending: angles ascend
    sines = torch.linalg.svdvals(right - left @ overlap).flip(0)  # (n, K), ascending after the flip
    angles = torch.where(cosines.square() >= 0.5, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos())
    return angles.rad2deg()


def rotation(w0: Tensor | Svd, w1: Tensor | Svd, k: int) -> Rotation:
    """Return the k angles, a side, by which an update turned the top-k singular subspaces of a weight matrix.

    The largest angle is governed by the gap between the k-th and the next singular value of w0 (Wedin's bound:
    ||delta||_op over the gap), so look at the mean and the median as well. NaN if a matrix has a rank below k.

    Source: 2606.07082, Appendix C.3 and Figure 2, with k = 512, an eighth of its 4096; 2511.08567.

    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> w0 = torch.diag(torch.tensor([2.0, 1.0]))
    >>> rotation(w0, turn @ w0, 1)  # outputs turned by a right angle, inputs left alone
    Rotation(left=tensor([90.], dtype=torch.float64), right=tensor([0.], dtype=torch.float64))
    """
    svd0, svd1 = svd(w0, "w0", k), svd(w1, "w1", k)
    return Rotation(*(principal_angles(top(svd0, k), top(svd1, k)) for top in (top_left, top_right)))


class Energy(NamedTuple):
    """Shares of an update's energy in the leading singular subspaces of a weight matrix, from 0 to 1."""

    left: float  #: ||U^T delta||^2 / ||delta||^2
    right: float  #: ||delta V||^2 / ||delta||^2
    both: float  #: ||U^T delta V||^2 / ||delta||^2


def subspace_energy(delta: Tensor, w0: Tensor | Svd, k: int) -> Energy:
    """Return how much of an update lies in the top-k singular subspaces of the weights it is applied to.

    A random update (m, n) has k / m on the left, k / n on the right and their product on both sides. NaN for a zero
    update, or if w0 has a rank below k.

    Source: the two-sided share is the "principal projection" of neighbouring analyses (their k is a tenth of the
    smaller side); 2606.07082 has none.

    >>> subspace_energy(torch.ones(2, 2), torch.diag(torch.tensor([2.0, 1.0])), 1)
    Energy(left=0.5, right=0.5, both=0.25)
    """
    delta, _ = _checks.squarable(_checks.matrix(delta, "delta"))
    svd0 = svd(w0, "w0", k)
    u, v = top_left(svd0, k), top_right(svd0, k)
    if delta.shape != (len(u), len(v)):
        raise OpdlabError(f"delta has shape {tuple(delta.shape)}; expected that of w0, {(len(u), len(v))}")
    whole = float(delta.square().sum())
    if whole == 0:
        return Energy(nan, nan, nan)
    inside = u.T @ delta
    return Energy(*(float(part.square().sum()) / whole for part in (inside, delta @ v, inside @ v)))


def cosine(delta_a: Tensor, delta_b: Tensor) -> float:
    """Return the cosine of the angle between two updates as vectors, from -1 to 1; NaN if one is zero.

    Two unrelated updates of p weights have 0, give or take 1 / sqrt(p).

    >>> round(cosine(torch.eye(2), torch.ones(2, 2)), 4)  # 1 / sqrt(2)
    0.7071
    """
    both = _checks.pair(delta_a, delta_b, "delta_a", "delta_b")
    a, b = (_checks.squarable(delta)[0].flatten() for delta in both)
    # Divide before multiplying: the product of two very small updates would underflow.
    size_a, size_b = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    return float((a / size_a) @ (b / size_b)) if size_a > 0 and size_b > 0 else nan


def sim_k(v_a: Tensor, v_b: Tensor) -> float:
    """Return ||v_a^T v_b||_F^2 / K, from 0 (orthogonal) to 1 (the same subspace): the mean cos^2 of the angles.

    The bases are (n, K); two random ones have K / n on average. A basis with NaN, of an update that has fewer than K
    directions, gives NaN; one that is not orthonormal to 1e-10 is an error.

    Source: 2606.07082, Appendix E and Figure 5 (right side, K = 16).

    >>> sim_k(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])  # one shared direction of two
    0.5
    """
    _checks.same_shape(v_a, "v_a", v_b, "v_b")
    a, b = _checks.basis(v_a, "v_a"), _checks.basis(v_b, "v_b")
    return nan if a is None or b is None else shared(a, b)


def shared(a: Tensor, b: Tensor) -> float:
    """Return :func:`sim_k` of two bases that come from an SVD, and so need no check; NaN if one holds NaN."""
    # Equal subspaces can come out as 1 + 1e-15.
    return min(float((a.T @ b).square().sum()) / a.shape[1], 1.0)


def similarity_to_end(deltas: Sequence[Tensor | Svd], k: int) -> Similarity:
    """Return Sim_K(t, t_end) of T cumulative updates w_t - w0, in order, to the last of them: T numbers a side.

    Successive updates share their history, so the similarity climbs to 1 for any process; compare with
    :func:`opdlab.geometry.random_walk`. NaN where this update or the last has a rank below k.

    Source: 2606.07082, Appendix E and Figure 5.

    >>> similarity_to_end([torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([1.0, 2.0]))], 1)
    Similarity(left=[0.0, 1.0], right=[0.0, 1.0])
    """
    if not deltas:
        raise OpdlabError("deltas is empty; expected one update or more")
    svds = [svd(delta, f"deltas[{t}]", k) for t, delta in enumerate(deltas)]
    sides = [[top(delta, k) for delta in svds] for top in (top_left, top_right)]
    return Similarity(*([shared(basis, bases[-1]) for basis in bases] for bases in sides))


def _leading(vectors: Tensor, rank: int, k: int) -> Tensor:
    columns = vectors[:, : _checks.whole(k, "k", 1, vectors.shape[1])].clone()
    columns[:, rank:] = nan
    return columns
