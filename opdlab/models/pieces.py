"""The tensors of an open checkpoint: where each is stored, and what turns the stored tensor into the one wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opdlab.errors import OpdlabError

#: What safetensors calls the dtypes that can be measured, and what torch calls them.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Piece:
    """The source of one tensor: a file, a name in that file, and what turns the stored tensor into the one wanted."""

    file: Path | Mapping[str, Tensor]  #: or the tensors in memory
    stored: str
    shape: tuple[int, ...]
    dtype: str  #: as torch calls it; one that cannot be measured, as safetensors does
    index: int | slice | None = None  #: which matrix, if the stored tensor is a stack of them; or which rows
    takes: tuple[Callable[[Tensor], Tensor], ...] = ()

    def part(self, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]) -> Piece:
        """Return a piece of the given shape that applies ``take`` to what this one yields."""
        return replace(self, shape=shape, takes=(*self.takes, take))

    def read(self) -> Tensor:
        """Return the tensor as it is, without looking at what it holds."""
        tensor = read_stored(self.file, self.stored, self.index)
        for take in self.takes:
            tensor = take(tensor)
        return tensor.contiguous()  # the order of sums, and so a last digit, must not tell how a matrix is stored

    def rows(self, start: int, stop: int) -> Piece:
        """Return the piece of some rows, which are read alone if nothing is done to the stored tensor first."""
        shape = (stop - start, *self.shape[1:])
        if self.takes or isinstance(self.index, int):
            return self.part(shape, partial(torch.narrow, dim=0, start=start, length=stop - start))
        first = self.index.start if self.index else 0
        return replace(self, shape=shape, index=slice(first + start, first + stop))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model by name; of files, only shapes and dtypes are in memory until :meth:`read` is called."""

    path: Path | str  #: a str says what is in memory
    pieces: dict[str, Piece] = field(repr=False)
    #: The tensors as stored, with fused projections whole; an adapter is added to these.
    whole: dict[str, Piece] = field(repr=False)
    config: dict = field(repr=False)
    #: The reason for each tensor that reading left out, by its name.
    left_out: dict[str, str] = field(default_factory=dict, repr=False)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or some of its rows, in the dtype in which it is stored; with an adapter it is float64.

        Raises:
            OpdlabError: if the file is damaged or an entry is not finite, naming the tensor.
        """
        piece = self.pieces[name].rows(*rows) if rows else self.pieces[name]
        tensor = piece.read()
        # If an entry is not finite, neither is the sum, which is faster to check; but a sum may also overflow.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise OpdlabError(f"{name} in {self.path} has entries that are not finite: this checkpoint is broken")
        return tensor

    @property
    def dtypes(self) -> str:
        """The dtypes in which the weights are stored, such as "bfloat16", separated by commas."""
        return ", ".join(sorted({piece.dtype for piece in self.pieces.values()}))


def read_stored(file: Path | Mapping[str, Tensor], name: str, index: int | slice | None = None) -> Tensor:
    """Return a tensor of a file or of memory, one matrix of a stack, or some rows."""
    if not isinstance(file, Path):
        return file[name].detach() if index is None else file[name].detach()[index]
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
    except (SafetensorError, OSError) as problem:
        raise OpdlabError(f"{name} in {file} cannot be read ({problem}): fetch the file again") from problem
