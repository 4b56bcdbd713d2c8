"""The house rules that a reader relies on, checked on the code itself."""

import ast
from pathlib import Path

import opdlab
from opdlab.lab.scales import SCALES

PACKAGE = Path(opdlab.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPT = "scripts/draw_architecture.py"  # which reads the imports


def test_geometry_and_objectives_know_nothing_of_training(script):
    allowed = ("opdlab.errors", "opdlab.geometry")
    for path in [*PACKAGE.glob("geometry/*.py"), PACKAGE / "objectives.py"]:
        foreign = {name for name in script.imports(path) if not name.startswith(allowed)}
        assert not foreign, f"{path.name} imports {foreign}"


def test_the_library_never_imports_the_book():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("book"))


def test_no_code_asks_for_the_name_of_a_scale():
    names = set(SCALES)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {
                    c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not constants & names, f"{path.name}, line {node.lineno} compares with the name of a scale"


def test_modules_fit_an_evening():
    long = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
