"""Singular values: how large an update is, how many directions it has, and how far it moves the spectrum.

What looks at a spectrum, here and in :mod:`opdlab.geometry.subspaces`, takes a matrix or its :class:`Svd`, so that a
decomposition is computed once and passed on.
"""

from __future__ import annotations

from math import inf, nan, sqrt
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from opdlab.geometry import _checks


class Svd(NamedTuple):
    """A singular value decomposition, w = u diag(s) vh, in float64: all r = min(m, n) values, the first k vectors."""

    u: Tensor  #: (m, k), left singular vectors in columns, the output side of a PyTorch weight
    s: Tensor  #: (r,), descending
    vh: Tensor  #: (k, n), right singular vectors in rows, the input side

    @property
    def rank(self) -> int:
        """The number of singular values above max(m, n) eps s[0], below which they are rounding noise."""
        size = max(self.u.shape[0], self.vh.shape[1])
        return int((self.s > size * torch.finfo(self.s.dtype).eps * self.s[0]).sum())


# A Gram matrix squares the spectrum: its eigenvalues carry an error of a few eps s[0]^2, so a singular value one of a
# few eps s[0]^2 / s. If the smallest is above this share of the largest, every value is good to about 2e-10 of the
# largest; below it, or where a matrix has no full rank, LAPACK's SVD takes over. (A square Gaussian matrix of 4096 rows
# has a smallest value of some 1e-4 of the largest.) So it does where the squares are too small to be exact.
_GRAM_FLOOR, _EXACT = 1e-5, 1e-280
# Its leading subspaces are s[0] / 2 s[k] times less sure than those of the full SVD, so the last vector wanted must
# belong to a value above this share of the largest.
_GRAM_LEADING = 1e-2


def svd(w: Tensor | Svd, name: str = "w", k: int | None = None) -> Svd:
    """Decompose a matrix, which errors call by its ``name``; an :class:`Svd` is returned as it is.

    With k, all singular values and k vectors come from the eigenvalues of the Gram matrix, five to ten times faster
    than the full SVD, which is used where that would lose more than two digits: values are good to 2e-10 of the
    largest, subspaces to about 1e-9 degrees where the gap behind them is wide. Without k, all vectors are computed.

    Source: 2606.07082, Appendix C.3 (float64 on the CPU: on a GPU the angles of nearly equal matrices are unstable).

    >>> svd(torch.diag(torch.tensor([3.0, 4.0]))).s
    tensor([4., 3.], dtype=torch.float64)
    >>> svd(torch.ones(2, 3)).rank
    1
    >>> svd(torch.diag(torch.tensor([3.0, 4.0])), k=1).vh.abs()
    tensor([[0., 1.]], dtype=torch.float64)
    """
    if isinstance(w, Svd):
        return w
    w = _checks.matrix(w, name)
    if w.shape[0] < w.shape[1]:
        # LAPACK takes a tall matrix faster than a wide one: by a quarter here, by nearly a half without the vectors.
        v, s, uh = svd(w.T, name, k)
        return Svd(uh.T, s, v.T)
    if k is not None:
        squares, vectors = eigenvalues(gram(w), _checks.whole(k, "k", 1, w.shape[1]))  # ascending
        if _sure(squares) and squares[-k] > _GRAM_LEADING**2 * squares[-1]:
            v = vectors.flip(1)
            # The columns of w @ v are orthogonal already except for rounding, which QR removes.
            u, r = torch.linalg.qr(w @ v)
            return Svd(u * r.diagonal().sign(), squares.flip(0).sqrt(), v.T)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    # Copied, because views would keep all the vectors alive.
    return Svd(u, s, vh) if k is None else Svd(u[:, :k].clone(), s, vh[:k].clone())


def singular_values(w: Tensor | Svd, name: str = "w") -> Tensor:
    """Return the singular values (min(m, n),) in float64, descending; cheaper than :func:`svd` for a matrix.

    >>> singular_values(torch.diag(torch.tensor([3.0, 4.0])))
    tensor([4., 3.], dtype=torch.float64)
    """
    if isinstance(w, Svd):
        return w.s
    w = _checks.matrix(w, name)
    tall = w if w.shape[0] >= w.shape[1] else w.T
    squares, _ = eigenvalues(gram(tall))
    if _sure(squares):
        return squares.flip(0).sqrt()
    return torch.linalg.svdvals(tall)


def _sure(squares: Tensor) -> bool:
    return bool(squares[0] > _GRAM_FLOOR**2 * squares[-1] > _GRAM_FLOOR**2 * _EXACT)


def gram(tall: Tensor) -> Tensor:
    """Return the lower triangle of tall^T tall, all that an eigensolver reads, at five eighths of the cost."""
    n = tall.shape[1]
    squares, block = tall.new_zeros(n, n), -(-n // 4)
    for start in range(0, n, block):
        squares[start:, start : start + block] = tall[:, start:].T @ tall[:, start : start + block]
    return squares


def eigenvalues(lower: Tensor, k: int = 0) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues (n,) of a symmetric matrix, ascending, and the vectors (n, k) of the k largest.

    Only the lower triangle is read. On a CPU this calls LAPACK step by step: torch.linalg.eigh would compute every
    vector and take two to three times as long.
    """
    n = len(lower)
    if lower.device.type != "cpu" or n == 1:
        values, vectors = torch.linalg.eigh(lower)
        return values, vectors[:, n - k :]
    work = int(lapack.dsytrd_lwork(n, lower=1)[0])
    reflectors, diagonal, beside, factors, _ = lapack.dsytrd(lower.numpy(), lower=1, lwork=work)
    values, failed = lapack.dsterf(diagonal, beside)
    vectors = np.empty((n, k), order="F")
    if k:
        # Selected by index (2); LAPACK needs room for one more entry beside the diagonal.
        _, _, found, failed_too = lapack.dstemr(diagonal, np.append(beside, 0.0), 2, 0.0, 0.0, n - k + 1, n)
        failed |= failed_too
        # The reflectors turn the vectors of the tridiagonal matrix into those of the full one, except their first row.
        vectors[0] = found[0, :k]
        vectors[1:], _, _ = lapack.dormqr("L", "N", reflectors[1:, :-1], factors, found[1:, :k], 64 * k)
    if failed:
        raise torch.linalg.LinAlgError(f"LAPACK found no eigenvalues of a matrix of {n} rows")
    return torch.from_numpy(values), torch.from_numpy(vectors)


def frobenius(delta: Tensor) -> float:
    """Return ||delta||_F, the size of an update of any shape, in the units of the weights.

    Source: 2606.07082, Appendix E; its Figure 4b uses it to rule out "low rank because nothing moved".

    >>> frobenius(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    5.0
    """
    delta, unit = _checks.squarable(_checks.finite(delta, "delta"))
    return float(torch.linalg.vector_norm(delta)) * unit


def relative_norm(w0: Tensor, w1: Tensor) -> float:
    """Return ||w1 - w0||_F / ||w0||_F, a number without a unit; NaN if w0 is zero.

    Source: 2606.07082, the right-hand side of its bound on :func:`spectral_drift`.

    >>> relative_norm(torch.eye(2), 1.5 * torch.eye(2))
    0.5
    """
    w0, w1 = _checks.pair(w0, w1)
    return _checks.ratio(frobenius(w1 - w0), frobenius(w0))


def spectral_drift(w0: Tensor | Svd, w1: Tensor | Svd) -> float:
    """Return the normalised spectral shift, NSS = ||s(w1) - s(w0)||_2 / ||s(w0)||_2; NaN if w0 is zero.

    The singular values are paired in descending order. By Mirsky's theorem NSS is at most :func:`relative_norm`; it is
    far less when an update turns the singular vectors and keeps the values.

    Source: 2606.07082, Appendix C.3; 2511.08567.

    >>> spectral_drift(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0])))  # 1 / sqrt(2)
    0.7071...
    """
    s0, s1 = singular_values(w0, "w0"), singular_values(w1, "w1")
    _checks.same_shape(s0, "the spectrum of w0", s1, "the spectrum of w1")
    return _checks.ratio(frobenius(s1 - s0), frobenius(s0))


def stable_rank(delta: Tensor | Svd) -> float:
    """Return ||delta||_F^2 / ||delta||_op^2, a count of directions from 1 to the rank; NaN for a zero update.

    Source: 2606.07082, Appendix E and Figure 4a.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    2.25
    >>> stable_rank(torch.zeros(3, 3))
    nan
    """
    s = singular_values(delta, "delta")
    # Divide before squaring: the square of a very small update would underflow to a "zero" one.
    return float((s / s[0]).square().sum()) if s[0] > 0 else nan


def effective_rank(delta: Tensor | Svd, squared: bool = False) -> float:
    """Return exp(H), with H the entropy of the normalised spectrum: a count of directions; NaN for a zero update.

    Two conventions are in use, and they differ widely: shares of the singular values (Roy and Vetterli's, the default),
    which the long tail of small values dominates, or with ``squared`` those of their squares, the shares of the energy.

    Source: Roy and Vetterli (2007). Not in 2606.07082; neighbouring papers report it beside :func:`stable_rank`.

    >>> delta = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
    >>> round(effective_rank(delta), 3), round(effective_rank(delta, squared=True), 3)
    (2.381, 1.531)
    """
    s = singular_values(delta, "delta")
    if s[0] == 0:
        return nan
    shares = (s / s[0]) ** (2 if squared else 1)
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


def top_energy(delta: Tensor | Svd, k: int) -> float:
    """Return the share of ||delta||_F^2 in the first k singular values, from 0 to 1; NaN for a zero update.

    Source: the share of energy of neighbouring analyses (2606.13657); 2606.07082 has none.

    >>> top_energy(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])), 1)
    0.6666666666666666
    """
    s = singular_values(delta, "delta")
    k = _checks.whole(k, "k", 1, len(s))
    if s[0] == 0:
        return nan
    energy = (s / s[0]).square()
    return float(energy[:k].sum() / energy.sum())


def hill(delta: Tensor | Svd, k: int) -> float:
    """Return the Hill estimate of the tail exponent of the spectrum, from its k largest values, two at least.

    It is 1 over the mean of log(s_i / s_k) for i < k. A small exponent is a heavy tail: few values far above the rest.
    The paper does not give its k, on which the estimate depends, so always report k. NaN for an update with fewer than
    k directions, and infinite if the k values are equal.

    Source: Hill (1975); 2606.07082, Appendix E.

    >>> round(hill(torch.diag(torch.tensor([8.0, 4.0, 2.0])), 3), 4)  # 1 / (3 log(2) / 2)
    0.9618
    """
    s = singular_values(delta, "delta")
    k = _checks.whole(k, "k", 2, len(s))
    size = max(delta.u.shape[0], delta.vh.shape[1]) if isinstance(delta, Svd) else max(delta.shape)
    if s[k - 1] <= size * torch.finfo(s.dtype).eps * s[0]:
        return nan
    mean = float((s[: k - 1] / s[k - 1]).log().mean())
    return 1 / mean if mean > 0 else inf


def gaussian_stable_rank(m: int, n: int) -> float:
    """Return m n / (sqrt(m) + sqrt(n))^2, about the stable rank of an m x n matrix of independent Gaussian entries.

    Source: the largest singular value of a Gaussian matrix is about sqrt(m) + sqrt(n) (Davidson and Szarek, 2001); the
    paper gives no reference value.

    >>> gaussian_stable_rank(4096, 4096)
    1024.0
    """
    m, n = _checks.whole(m, "m", 1), _checks.whole(n, "n", 1)
    return m * n / (sqrt(m) + sqrt(n)) ** 2


def spectrum_stats(delta: Tensor | Svd, k: int) -> dict[str, float]:
    """Return what an update's singular values tell: its ranks, and energy and tail of the k largest."""
    if not isinstance(delta, Svd):
        m, n = delta.shape
        delta = Svd(delta.new_empty(m, 0), singular_values(delta), delta.new_empty(0, n))
    return {
        "stable_rank": stable_rank(delta),
        "effective_rank": effective_rank(delta),
        "effective_rank_squared": effective_rank(delta, squared=True),
        "top_energy": top_energy(delta, k),
        "hill": hill(delta, k) if k > 1 else nan,
    }
