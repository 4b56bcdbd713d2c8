"""What a reward is: its code and the values that it reads, as far as they can be seen."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from dis import get_instructions
from enum import Enum
from fractions import Fraction
from functools import cached_property, partial
from pathlib import PurePath
from types import CellType, CodeType, SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import torch

from opdlab.models.files import content_digest

# Values of other modules that are known by what Python writes of them.
_PLAIN = (bytearray, date, Decimal, Enum, Fraction, PurePath, range, time, timedelta, UUID)


def identity(reward: Any) -> Any:
    """Return what a reward does, as JSON values: its code, without names, comments and lines, and the values it reads.

    In doubt two rewards look different, as under two versions of Python. Functions and classes are looked into where
    they are of the module of the reward, and known by their names elsewhere.
    """
    home = getattr(inspect.unwrap(reward), "__module__", None)
    seen: dict[int, Any] = {}  # by id, and kept, so that no id comes twice

    def all_of(*values: Any) -> list:
        return [told(value) for value in values]

    def told(value: Any) -> Any:
        if isinstance(value, str | int | float | complex | bytes | re.Pattern | None):
            return repr(value)
        if id(value) in seen:
            return "again"
        if isinstance(value, Mapping | list | tuple):
            seen[id(value)] = value
            return all_of(*(value.items() if isinstance(value, Mapping) else value))
        if isinstance(value, np.ndarray | np.generic | torch.Tensor):
            return _array(value)
        if isinstance(value, property | cached_property):
            return all_of(*(getattr(value, name, None) for name in ("fget", "fset", "func")))
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        if isinstance(value, partial):
            return all_of(value.func, value.args, value.keywords)
        if inspect.ismethod(value):
            return all_of(value.__self__, value.__func__)
        value = inspect.unwrap(value) if callable(value) or isinstance(value, classmethod) else value
        kind = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
        if kind.__module__ != home or inspect.isbuiltin(value):
            if isinstance(value, _PLAIN):
                return repr(value)
            named = f"{kind.__module__}.{kind.__qualname__}"
            held = value.state_dict() if isinstance(value, torch.nn.Module) else None
            held = vars(value) if kind is SimpleNamespace else held
            return named if held is None else [named, told(held)]
        seen[id(value)] = value
        if inspect.isfunction(value):
            code, around = value.__code__, value.__globals__
            read = {name: around[name] for name in sorted(_names(code) & set(around))}
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            return [_code(code, value.__doc__), *all_of(value.__defaults__, value.__kwdefaults__, cells, read)]
        if isinstance(value, type):
            return all_of(*filter(callable, vars(value).values()), *_around(value, home))
        return all_of(kind, object.__getstate__(value) or {})

    return told(reward)


def _around(kind: type, home: str | None) -> list:
    """Return what a class has beside its functions: its constants and properties, and its bases of the same module."""
    own = {name: value for name, value in vars(kind).items() if not (callable(value) or name.startswith("__"))}
    bases = [base for base in kind.__bases__ if base.__module__ == home]
    return [part for part in (own, *bases) if part]


def _array(value: Any) -> Any:
    """Return what an array or a tensor holds, by a digest of its bytes where it has some."""
    kind = [str(value.dtype), *value.shape]
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided:
            return kind
        return [*kind, content_digest(value)]
    if value.dtype.hasobject:
        return [*kind, repr(value.tolist())]
    return [*kind, hashlib.sha256(value.tobytes()).hexdigest()]


def _names(code: CodeType) -> set[str]:
    """Return the global names that code reads, which are some of its ``co_names``: others are names of attributes."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    read = {line.argval for line in get_instructions(code) if line.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return read.union(*inner)


def _code(code: CodeType, doc: str | None = None) -> Any:
    def told(constant: Any) -> Any:
        if isinstance(constant, frozenset):  # whose order is another in every process
            return sorted(map(repr, constant))
        return _code(constant) if isinstance(constant, CodeType) else repr(constant)

    # Without a docstring, None is in its place.
    return [code.co_code.hex(), code.co_names, [told(None if c == doc else c) for c in code.co_consts]]
