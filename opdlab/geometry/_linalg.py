"""Eigenvalues of Gram matrices: all of them, and the few vectors that most diagnostics ask for."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor


def gram(tall: Tensor) -> Tensor:
    """Return the lower triangle of tall^T tall, all that an eigensolver reads, at five eighths of the cost."""
    n = tall.shape[1]
    squares, block = tall.new_zeros(n, n), -(-n // 4)
    for start in range(0, n, block):
        squares[start:, start : start + block] = tall[:, start:].T @ tall[:, start : start + block]
    return squares


def eigenvalues(lower: Tensor, k: int = 0) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues (n,) of a symmetric matrix, ascending, and the vectors (n, k) of the k largest.

    On a CPU this calls LAPACK step by step: torch.linalg.eigh would compute every vector and take two to three times as
    long. Of the matrix, (n, n) in float64, only the lower triangle is read.
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
