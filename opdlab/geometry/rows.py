"""What is not decomposed, some rows at a time: norms, biases, and embeddings, the largest matrices of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor

from opdlab.geometry._checks import ratio
from opdlab.geometry.measure import generator_of, visible_shares
from opdlab.geometry.nulls import permute
from opdlab.geometry.sparsity import update_mask

_BLOCK = 2**19  # entries that are in memory at a time: 4 MB in float64
_BITS = 16  # of the sizes, by which they are told apart at a time

#: Returns the rows of a weight from one number to another.
Read = Callable[[int, int], Tensor]


def measure_rows(
    name: str,
    shape: tuple[int, ...],
    before: Read,
    after: Read,
    alphas: tuple[float, ...] = (),
    seed: int = 0,
    nulls: bool = True,
) -> dict[str, float]:
    """Measure the update of a weight of any shape without any directions, and without holding all of it in memory.

    Args:
        name: of the weight: it seeds the permutation.
        shape: of the weight.
        before: reads rows of it before, from one number to another.
        after: the same after.
        alphas: shares of the entries in the masks of small weights; only for what has rows and columns.
        seed: of the permutation.
        nulls: whether to permute.

    Keys: frobenius, relative_norm, sparsity, sparsity_absolute, sparsity_relative and density; and for each of
    ``alphas`` low_overlap_a30 and low_share_a30, all as :func:`~opdlab.geometry.measure_matrix` has them; and
    low_overlap_a30_null, where the update was permuted within blocks of rows.

    >>> w0, w1 = torch.tensor([[0.1, 2.0], [3.0, 4.0]]), torch.tensor([[0.2, 2.0], [3.0, 5.0]])
    >>> before, after = (lambda start, stop, w=w: w[start:stop] for w in (w0, w1))
    >>> found = measure_rows("wte.weight", (2, 2), before, after, (0.25,))
    >>> found["sparsity"], found["low_overlap_a25"]
    (0.5, 0.5)
    """
    rows, entries = shape[0] if shape else 1, prod(shape)
    step = max(1, _BLOCK // max(1, prod(shape[1:])))
    counts = {f"a{100 * alpha:g}": round(alpha * entries) for alpha in alphas}

    def blocks(read: Read) -> Iterator[Tensor]:
        return (read(start, min(start + step, rows)) for start in range(0, max(1, rows), step))

    limits = {percent: _Limit(partial(blocks, before), count) for percent, count in counts.items()}
    random = generator_of(seed, name)
    squares, totals = np.zeros(2), Counter[str]()
    for w0, w1 in zip(blocks(before), blocks(after), strict=True):
        origin, moved = w0.double(), update_mask(w0, w1)
        delta = w1.double() - origin
        squares += [float(delta.square().sum()), float(origin.square().sum())]
        shares = visible_shares(w0, w1, moved).items()
        found = {key: round(share * w0.numel()) if w0.numel() else 0 for key, share in shares}
        masks = {"": moved}
        if counts and nulls:
            masks["_null"] = update_mask(w0, origin + permute(delta, random))
            found["null"] = int(masks["_null"].count_nonzero())
        for percent, limit in limits.items():
            small = limit.take(w0)
            found |= {f"low_overlap_{percent}{of}": int((small & mask).count_nonzero()) for of, mask in masks.items()}
        totals.update(found)
    size, size0 = (sqrt(square) for square in squares)
    row = {"frobenius": size, "relative_norm": ratio(size, size0)}
    visible, permuted = totals["density"], totals.pop("null", 0)
    for key, count in totals.items():
        row[key] = ratio(count, permuted if key.endswith("_null") else visible if "overlap" in key else entries)
    return row | {f"low_share_{percent}": ratio(count, entries) for percent, count in counts.items()}


class _Limit:
    """The size up to which a count of weights is small; of those that are as large, the first are counted."""

    def __init__(self, blocks: Callable[[], Iterator[Tensor]], count: int):
        """Find the size of that rank, some of its bits at a time."""
        self.bits, self.ties, shift = 0, count, None
        while shift != 0:
            tally = np.zeros(2**_BITS, dtype=np.int64)
            for w0 in blocks():
                sizes = _size_bits(w0).flatten()
                left = 8 * sizes.element_size() if shift is None else shift
                inside = sizes if shift is None else sizes[(sizes >> left) == self.bits]
                tally += np.bincount((inside >> (left - _BITS)).cpu().numpy() & (2**_BITS - 1), minlength=2**_BITS)
            shift, below = left - _BITS, np.concatenate([[0], tally.cumsum()])
            here = int(np.searchsorted(below[1:], max(1, self.ties)))
            self.bits, self.ties = (self.bits << _BITS) + here, self.ties - int(below[here])

    def take(self, w0: Tensor) -> Tensor:
        """Mark the small weights of the next block."""
        sizes = _size_bits(w0)
        equal = sizes == self.bits
        first = equal & (equal.flatten().cumsum(0).reshape(equal.shape) <= self.ties)
        self.ties -= int(first.count_nonzero())
        return (sizes < self.bits) | first


def _size_bits(w: Tensor) -> Tensor:
    """Return whole numbers in the order of the sizes of the entries: the bits of their absolute values."""
    wide = w.dtype == torch.float64
    return w.abs().view(torch.int64) if wide else w.float().abs().view(torch.int32)
