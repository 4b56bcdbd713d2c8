"""What a reader relies on beside the order of the rooms, which lint-imports checks (pyproject.toml)."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import opdlab
from opdlab.lab.scales import SCALES

SCRIPT = "scripts/draw_architecture.py"
PACKAGE = Path(opdlab.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
LINES, FLOORS, FIELDS, SCREEN = 400, 8, 12, 50


def by_name(sources):
    """Return the sources by the names that imports use: ``opdlab.lab.grid``, and ``opdlab.lab`` of its ``__init__``."""
    return {
        ".".join(("opdlab", *Path(path).with_suffix("").parts)).removesuffix(".__init__"): sources[path]
        for path in sources
    }


def imported(source, known, later=False):
    """Return the modules among ``known`` that must be there before a module can be, or also those it uses ``later``.

    What is only named in types is never counted.
    """
    found, tree = set(), ast.parse(source)
    types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in {*ast.walk(tree)}.difference(*map(ast.walk, types)) if later else tree.body:
        if isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members & known or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def floors(sources):
    """Return how many modules stand on one another up to each module, itself included.

    The ``__init__`` of a package hands on what it imports, and is no floor of its own.
    """
    modules = by_name(sources)
    packages = {name.rpartition(".")[0] for name in modules}
    below = {name: imported(source, set(modules)) for name, source in modules.items()}
    floor = {}
    for name in TopologicalSorter(below).static_order():
        floor[name] = max((floor[under] for under in below[name]), default=0) + (name not in packages)
    return floor


def test_floors_count_modules_but_not_packages_and_find_circles():
    sources = {
        "lab/a.py": "from opdlab.lab.inner import c",
        "lab/inner/__init__.py": "from opdlab.lab.inner.c import thing",
        "lab/inner/c.py": "import opdlab.lab.b\nimport torch",
        "lab/b.py": "def later():\n    from opdlab.lab import a",
        "lab/d.py": "from opdlab.lab.inner import thing",
    }
    assert {name.removeprefix("opdlab.lab."): floor for name, floor in floors(sources).items()} == {
        "b": 1,
        "inner.c": 2,
        "inner": 2,
        "a": 3,
        "d": 3,
    }
    with pytest.raises(CycleError):
        floors(sources | {"lab/b.py": "from opdlab.lab import a"})


def test_no_imports_go_in_a_circle():
    modules = by_name(SOURCES)
    uses = {name: imported(source, {*modules}, later=True) for name, source in modules.items()}
    TopologicalSorter(uses).prepare()  # what raises a CycleError


def test_no_room_is_higher_than_a_house():
    for room in {path.partition("/")[0] for path in SOURCES if "/" in path}:
        heights = floors({path: source for path, source in SOURCES.items() if path.startswith(f"{room}/")})
        assert max(heights.values()) <= FLOORS, f"{max(heights, key=heights.get)} stands on too many modules of {room}"


def test_losses_are_mathematics_alone():
    for name in imported(SOURCES["training/objectives.py"], set(by_name(SOURCES))):
        assert name.startswith(("opdlab.errors", "opdlab.geometry")), f"objectives imports {name}"


def test_no_code_asks_for_the_name_of_a_scale():
    for path, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Compare):
                constants = {
                    c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not constants & set(SCALES), f"{path}, line {node.lineno} compares with the name of a scale"


def test_modules_fit_an_evening():
    lengths = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    assert {path: lines for path, lines in lengths.items() if lines > LINES} == {}


def test_no_class_has_more_fields_than_a_reader_keeps_in_mind():
    for path, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                fields = sum(isinstance(line, ast.AnnAssign) for line in node.body)
                assert fields <= FIELDS, f"{path}: {node.name} has {fields} fields"


def test_functions_that_train_and_measure_fit_a_screen():
    for path, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if path.startswith(("training", "measuring")) and isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= SCREEN, f"{path}: {node.name} has {lines} lines"


def test_the_committed_picture_is_what_the_code_gives(script):
    assert script.PICTURE.read_text(encoding="utf-8") == script.draw(), "run python scripts/draw_architecture.py"


def test_every_room_and_every_module_stands_in_the_picture(script):
    words = set(re.findall(r"\w+", script.draw()))
    for path in SOURCES:
        missing = {*Path(path).with_suffix("").parts} - {"__init__"} - words
        assert not missing, f"opdlab/{path} is missing: give its room a layer in pyproject.toml"
