"""Singular values: how large an update is, how many directions it has, and how far it moves the spectrum.

Every function here and in :mod:`opdlab.geometry.subspaces` that looks at a spectrum takes a matrix or its :class:`Svd`,
so that a decomposition is computed once and passed on. All arithmetic is in float64 on the CPU.
"""

from __future__ import annotations

from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from opdlab.geometry import _checks


class Svd(NamedTuple):
    """A thin singular value decomposition, w = u diag(s) vh, in float64; r is min(m, n)."""

    u: Tensor  # (m, r), left singular vectors in columns: the output side of a PyTorch weight
    s: Tensor  # (r,), descending
    vh: Tensor  # (r, n), right singular vectors in rows: the input side

    @property
    def rank(self) -> int:
        """The number of singular values above max(m, n) eps s[0], below which they are rounding noise."""
        size = max(self.u.shape[0], self.vh.shape[1])
        return int((self.s > size * torch.finfo(self.s.dtype).eps * self.s[0]).sum())


def svd(w: Tensor | Svd, name: str = "w") -> Svd:
    """Decompose a matrix; an :class:`Svd` is returned as it is.

    Args:
        w: (m, n) matrix, any dtype, computed in float64.
        name: what to call it in an error.

    Raises:
        OpdlabError: if ``w`` is not a non-empty matrix or an entry is not finite.

    Source: 2606.07082, Appendix C.3 (float64 on the CPU: on a GPU the angles of nearly equal matrices are unstable).

    >>> svd(torch.diag(torch.tensor([3.0, 4.0]))).s
    tensor([4., 3.], dtype=torch.float64)
    >>> svd(torch.ones(2, 3)).rank
    1
    """
    if isinstance(w, Svd):
        return w
    w = _checks.matrix(w, name)
    if w.shape[0] >= w.shape[1]:
        return Svd(*torch.linalg.svd(w, full_matrices=False))
    # LAPACK takes a tall matrix faster than a wide one: by a quarter here, by nearly a half without the vectors.
    u, s, vh = torch.linalg.svd(w.T, full_matrices=False)
    return Svd(vh.T, s, u.T)


def singular_values(w: Tensor | Svd, name: str = "w") -> Tensor:
    """Return the singular values (min(m, n),) in float64, descending; cheaper than :func:`svd` for a matrix.

    Args and errors are those of :func:`svd`.

    >>> singular_values(torch.diag(torch.tensor([3.0, 4.0])))
    tensor([4., 3.], dtype=torch.float64)
    """
    if isinstance(w, Svd):
        return w.s
    w = _checks.matrix(w, name)
    return torch.linalg.svdvals(w if w.shape[0] >= w.shape[1] else w.T)


def frobenius(delta: Tensor) -> float:
    """Return ||delta||_F, the size of an update, in the units of the weights.

    Args:
        delta: a tensor of any shape.

    Raises:
        OpdlabError: if an entry is not finite.

    Source: 2606.07082, Appendix E; its Figure 4b uses it to rule out "low rank because nothing moved".

    >>> frobenius(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    5.0
    """
    return float(torch.linalg.vector_norm(_checks.finite(delta, "delta")))


def relative_norm(w0: Tensor, w1: Tensor) -> float:
    """Return ||w1 - w0||_F / ||w0||_F, without unit; NaN if w0 is zero.

    Args:
        w0: weights before, any shape.
        w1: weights after, the same shape.

    Raises:
        OpdlabError: if the shapes differ or an entry is not finite.

    Source: 2606.07082, the right-hand side of its bound on :func:`spectral_drift`.

    >>> relative_norm(torch.eye(2), 1.5 * torch.eye(2))
    0.5
    """
    w0, w1 = _checks.pair(w0, w1)
    return _ratio(frobenius(w1 - w0), frobenius(w0))


def spectral_drift(w0: Tensor | Svd, w1: Tensor | Svd) -> float:
    """Return the normalised spectral shift, NSS = ||s(w1) - s(w0)||_2 / ||s(w0)||_2; NaN if w0 is zero.

    The singular values are paired in descending order. By Mirsky's theorem NSS is at most :func:`relative_norm`; it is
    far less when an update turns the singular vectors and keeps the values.

    Args:
        w0: (m, n) matrix before, or its Svd.
        w1: (m, n) matrix after, or its Svd.

    Raises:
        OpdlabError: if the numbers of singular values differ, or as for :func:`svd`.

    Source: 2606.07082, Appendix C.3; 2511.08567.

    >>> spectral_drift(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0])))  # 1 / sqrt(2)
    0.7071...
    """
    s0, s1 = singular_values(w0, "w0"), singular_values(w1, "w1")
    _checks.same_shape(s0, "the spectrum of w0", s1, "the spectrum of w1")
    return _ratio(frobenius(s1 - s0), frobenius(s0))


def stable_rank(delta: Tensor | Svd) -> float:
    """Return ||delta||_F^2 / ||delta||_op^2, a count of directions from 1 to the rank; NaN for a zero update.

    Args:
        delta: (m, n) update, or its Svd.

    Raises:
        OpdlabError: as for :func:`svd`.

    Source: 2606.07082, Appendix E and Figure 4a.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    2.25
    >>> stable_rank(torch.zeros(3, 3))
    nan
    """
    s = singular_values(delta, "delta")
    # Divide before squaring: the square of a very small update would underflow to a "zero" one.
    return float((s / s[0]).square().sum()) if s[0] > 0 else nan


def gaussian_stable_rank(m: int, n: int) -> float:
    """Return m n / (sqrt(m) + sqrt(n))^2, about the stable rank of an m x n matrix of independent Gaussian entries.

    Raises:
        OpdlabError: if a dimension is not a whole number of 1 or more.

    Source: the largest singular value of a Gaussian matrix is about sqrt(m) + sqrt(n) (Davidson and Szarek, 2001); the
    paper gives no reference value.

    >>> gaussian_stable_rank(4096, 4096)
    1024.0
    """
    m, n = _checks.whole(m, "m", 1), _checks.whole(n, "n", 1)
    return m * n / (sqrt(m) + sqrt(n)) ** 2


def _ratio(a: float, b: float) -> float:
    """Divide; what has no denominator is undefined."""
    return a / b if b > 0 else nan
