"""Checks of the arguments of every geometry function, with errors that name the argument, and a safe division."""

from __future__ import annotations

from math import isfinite, nan
from numbers import Integral

import torch
from torch import Tensor

from opdlab.errors import OpdlabError

# Squares vanish where the largest entry is below this, and overflow where it is above the inverse.
_SMALLEST = 1e-140


def real(w: Tensor, name: str) -> Tensor:
    """Return ``w``, or raise unless it is a dense tensor of real numbers that are there."""
    if not isinstance(w, Tensor):
        raise OpdlabError(f"{name} is a {type(w).__name__}; expected a torch tensor")
    if w.is_complex() or w.layout != torch.strided or w.is_meta:
        what = f"holds {w.dtype} as {w.layout} on {w.device}"
        raise OpdlabError(f"{name} {what}; expected a dense tensor of real numbers, on the CPU or a GPU")
    return w


def finite(w: Tensor, name: str) -> Tensor:
    """Return ``w`` as a float64 tensor on its device, or raise if an entry is NaN, infinite or beyond squaring."""
    w = real(w, name).detach().to(torch.float64)
    if not w.numel():
        return w
    # If an entry is not finite, neither is the smallest or the largest.
    if not isfinite(size := _largest(w)):
        broken = int((~w.isfinite()).sum())
        raise OpdlabError(f"{name} has {broken} entries that are NaN or infinite; expected finite weights")
    if size > 1 / _SMALLEST:
        raise OpdlabError(f"the largest entry of {name} is {size:.0e}; expected one of 1e140 at most: rescale it")
    return w


def squarable(w: Tensor) -> tuple[Tensor, float]:
    """Return ``w`` divided by a number that keeps its squares from vanishing, and that number, which as a rule is 1."""
    size = _largest(w) if w.numel() else 0.0
    return (w / size, size) if 0 < size < _SMALLEST else (w, 1.0)


def _largest(w: Tensor) -> float:
    return float(torch.stack(w.aminmax()).abs().max())


def matrix(w: Tensor, name: str) -> Tensor:
    """Return ``w`` as a finite float64 matrix with at least one row and one column."""
    if real(w, name).ndim != 2 or 0 in w.shape:
        raise OpdlabError(f"{name} has shape {tuple(w.shape)}; expected a matrix, (rows, columns), that is not empty")
    return finite(w, name)


def same_shape(a: Tensor, name_a: str, b: Tensor, name_b: str) -> None:
    """Raise unless the two tensors have the same shape (nothing here is meant to broadcast)."""
    if real(a, name_a).shape != real(b, name_b).shape:
        raise OpdlabError(f"{name_b} has shape {tuple(b.shape)}; expected that of {name_a}, {tuple(a.shape)}")


def pair(a: Tensor, b: Tensor, name_a: str = "w0", name_b: str = "w1") -> tuple[Tensor, Tensor]:
    """Return two arguments as finite float64 tensors of the same shape."""
    same_shape(a, name_a, b, name_b)
    return finite(a, name_a), finite(b, name_b)


def whole(value: int, name: str, low: int, high: int | None = None) -> int:
    """Return ``value``, or raise unless it is a whole number in ``low..high``: a rank is never silently clipped."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        limits = f"from {low} to {high}" if high is not None else f"of {low} or more"
        raise OpdlabError(f"{name} is {value!r}; expected a whole number {limits}")
    return value


def share(value: float, name: str) -> float:
    """Return ``value``, or raise unless it is a share, from 0 to 1."""
    if not 0 <= value <= 1:
        raise OpdlabError(f"{name} is {value!r}; expected a share from 0 to 1")
    return value


def at_least_zero(value: float, name: str) -> float:
    """Return ``value``, or raise unless it is a finite number of 0 or more."""
    if not 0 <= value < float("inf"):
        raise OpdlabError(f"{name} is {value!r}; expected a finite number of 0 or more")
    return value


def ratio(a: float, b: float) -> float:
    """Divide two numbers that are not negative; NaN if the denominator is zero."""
    return a / b if b > 0 else nan


def mask(m: Tensor, name: str) -> Tensor:
    """Return ``m``, or raise unless it holds booleans."""
    if real(m, name).dtype != torch.bool:
        raise OpdlabError(f"{name} holds {m.dtype}; expected a mask of torch.bool")
    return m


def basis(v: Tensor, name: str) -> Tensor | None:
    """Return ``v`` (n, K) as a float64 orthonormal basis; None if it contains a NaN, which marks it as undefined."""
    if real(v, name).ndim != 2 or v.shape[0] < v.shape[1] or v.shape[1] == 0:
        raise OpdlabError(f"{name} has shape {tuple(v.shape)}; expected (n, K), one column per direction, 1 <= K <= n")
    if v.isnan().any():
        return None
    v = finite(v, name)
    gap = float((v.T @ v - torch.eye(v.shape[1], dtype=v.dtype, device=v.device)).abs().max())
    if gap > 1e-10:  # of a float64 SVD it is about 1e-14, of a float32 one about 1e-6
        raise OpdlabError(f"{name} is {gap:.1e} away from orthonormal columns; expected a basis from a float64 SVD")
    return v
