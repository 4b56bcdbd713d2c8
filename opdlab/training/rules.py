"""Rules for the fields of an experiment: a table for each part, and one sentence about the value that breaks a rule."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from types import MappingProxyType, UnionType
from typing import Any

from opdlab.errors import OpdlabError

#: Whether a value will do, and what to give instead.
Rule = tuple[Callable[[Any], bool], str]


class Checked:
    """A part of an experiment, whose fields are checked by its ``rules`` as soon as it is made.

    >>> from opdlab.training.config import Recipe
    >>> Recipe(steps=0)
    Traceback (most recent call last):
    opdlab.errors.OpdlabError: steps is 0: give a whole number above 0
    """

    rules = MappingProxyType[str, Rule]({})

    def __post_init__(self) -> None:
        """Raise an OpdlabError about the first field that breaks its rule."""
        for name, (fits, wanted) in self.rules.items():
            if not fits(value := getattr(self, name)):
                raise OpdlabError(f"{name} is {value!r}: give {wanted}")


def whole(least: int) -> Rule:
    """Ask for a whole number, not below ``least``, 0 or 1."""
    return lambda value: _is_whole(value, least), f"a whole number{' above 0' if least else ', 0 or above'}"


def number(wanted: str, fits: Callable[[float], bool]) -> Rule:
    """Ask for a number, perhaps infinite, that ``fits``; a message says what is ``wanted``."""
    return lambda value: _is_number(value) and fits(value), wanted


def one_of(*choices: str) -> Rule:
    """Ask for one of some words."""
    return lambda value: value in choices, f"{', '.join(choices[:-1])} or {choices[-1]}"


def of_kind(kind: type | UnionType, wanted: str) -> Rule:
    """Ask for an object of a class, or of one of several; a message says what is ``wanted``."""
    return lambda value: isinstance(value, kind), wanted


#: A finite number above 0; one that may be infinite; a share, or None; some steps; Adam's decays; and yes or no.
POSITIVE = number("a number above 0", lambda value: 0 < value < inf)
LIMIT = number("a number above 0", lambda value: value > 0)
OPTIONAL_SHARE: Rule = (lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a number from 0 to 1")
STEPS: Rule = (lambda value: isinstance(value, tuple) and all(_is_whole(step, 0) for step in value), "a tuple of steps")
DECAYS: Rule = (
    lambda value: isinstance(value, tuple) and [*map(_is_decay, value)] == [True, True],
    "two numbers from 0 to below 1, as (0.9, 0.95)",
)
FLAG = of_kind(bool, "True or False")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_decay(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
