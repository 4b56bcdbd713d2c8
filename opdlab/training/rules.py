"""Rules for the fields of an experiment: a table of them for each part, and one sentence for what breaks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from opdlab.errors import OpdlabError

#: Whether a value will do, and what to give instead.
Rule = tuple[Callable[[Any], bool], str]


def check_fields(owner: Any, rules: Mapping[str, Rule]) -> None:
    """Raise an OpdlabError about the first field of ``owner`` that breaks its rule.

    >>> from types import SimpleNamespace
    >>> check_fields(SimpleNamespace(steps=0), {"steps": whole(1)})
    Traceback (most recent call last):
    opdlab.errors.OpdlabError: steps is 0: give a whole number above 0
    """
    for name, (fits, wanted) in rules.items():
        if not fits(value := getattr(owner, name)):
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


#: A finite number above 0; one that may be infinite; a share of a whole; and some steps.
POSITIVE = number("a number above 0", lambda value: 0 < value < inf)
LIMIT = number("a number above 0", lambda value: value > 0)
SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
STEPS: Rule = (lambda value: isinstance(value, tuple) and all(_is_whole(step, 0) for step in value), "a tuple of steps")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
