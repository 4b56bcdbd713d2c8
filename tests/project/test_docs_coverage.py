"""Everything public is documented: on the API page, with a docstring, its parameters and its errors."""

import builtins
import importlib
import inspect
import pkgutil
import re
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path

import pytest

import opdlab

ROOT = Path(__file__).resolve().parents[2]
# A function with more parameters than this explains each of them.
FEW = 4


def is_public(name):
    return not any(part.startswith("_") for part in name.split("."))


MODULES = sorted(
    {"opdlab"} | {found.name for found in pkgutil.walk_packages(opdlab.__path__, "opdlab.") if is_public(found.name)}
)


def members_of(found):
    """Yield name and function of the public methods and properties of a class, and of an ``__init__`` that it wrote."""
    of_fields = {field.name for field in fields(found)} if is_dataclass(found) else set()
    for name, member in vars(found).items():
        if name in of_fields:
            continue
        if isinstance(member, (property, cached_property)):
            member = member.fget if isinstance(member, property) else member.func
        member = inspect.unwrap(getattr(member, "__func__", member))
        if not inspect.isfunction(member) or member.__code__.co_filename == "<string>":
            continue  # a constant, or made by dataclasses
        if is_public(name) or name == "__init__":
            yield name, member


def public():
    """Yield name, object and class (or None) of all that is public: modules, classes, functions and methods."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        yield module_name, module, None
        for name, found in vars(module).items():
            wanted = inspect.isclass(found) or inspect.isfunction(inspect.unwrap(found))
            if not wanted or not is_public(name) or found.__module__ != module_name:
                continue
            yield f"{module_name}.{name}", found, None
            if inspect.isclass(found):
                for method, member in members_of(found):
                    yield f"{module_name}.{name}.{method}", member, found


PUBLIC = list(public())
FUNCTIONS = [(name, found, owner) for name, found, owner in PUBLIC if inspect.isfunction(inspect.unwrap(found))]


def section(found, title):
    """Return the names that a section of a docstring in Google's style explains, or None if it has no such section."""
    text = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", inspect.getdoc(found) or "", re.MULTILINE)
    return re.findall(r"^ {4}\*{0,2}(\w+):", text[1], re.MULTILINE) if text else None


def parameters_of(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def is_inherited(name, owner):
    """Tell whether a method only does what its class's base has explained."""
    return owner is not None and any(name.rpartition(".")[2] in vars(base) for base in owner.__mro__[1:-1])


def test_every_module_is_on_the_api_page():
    page = (ROOT / "book" / "api.md").read_text()
    on_page = re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE)
    assert sorted(on_page) == MODULES


def test_what_comes_through_the_door_is_public_where_it_lies():
    names = {name for name, *_ in PUBLIC}
    for name in opdlab.__all__:
        found = getattr(opdlab, name)
        assert f"{found.__module__}.{found.__qualname__}" in names and name in dir(opdlab), name


def test_everything_public_has_a_docstring():
    assert len(PUBLIC) > 350, "the search finds too little"
    assert [name for name, found, _ in PUBLIC if not (found.__doc__ or "").strip()] == []


def test_parameters_are_explained_all_or_none_and_all_where_they_are_many():
    wrong = []
    for name, function, owner in FUNCTIONS:
        explained, parameters = section(function, "Args"), parameters_of(function)
        if explained is None and name.endswith(".__init__"):
            explained = section(owner, "Args")
        if explained is None and (len(parameters) <= FEW or is_inherited(name, owner)):
            continue
        if explained != parameters:
            wrong.append(f"{name} has {parameters} and explains {explained}")
    assert wrong == []


def test_the_errors_that_are_documented_exist():
    for name, found, _ in PUBLIC:
        module = inspect.getmodule(found)
        for error in section(found, "Raises") or ():
            kind = getattr(module, error, None) or getattr(builtins, error, None) or getattr(opdlab.errors, error, None)
            assert inspect.isclass(kind) and issubclass(kind, BaseException), f"{name}: there is no error {error}"


@pytest.mark.parametrize("title", ["Args", "Raises"])
def test_sections_are_found(title):
    assert sum(section(found, title) is not None for _, found, _ in PUBLIC) > 5
