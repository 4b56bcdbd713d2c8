"""The picture on the page Architecture is drawn from the imports in the code, as they are now."""

import re

import pytest

SCRIPT = "scripts/draw_architecture.py"


def test_the_committed_picture_is_what_the_code_gives(script):
    assert script.PICTURE.read_text(encoding="utf-8") == script.draw(), "run python scripts/draw_architecture.py"


def test_an_arrow_stands_for_every_import_that_does_not_follow_from_others(script):
    pairs = script.edges()
    assert ("Training", "What is learned") in pairs and ("What is learned", "Training") not in pairs
    assert script.draw().count("marker-end") == len(script.shown(pairs)) < len(pairs)
    assert script.shown([("Records", "Training"), ("Training", "Geometry"), ("Records", "Geometry")]) == [
        ("Records", "Training"),
        ("Training", "Geometry"),
    ]


def test_every_module_stands_in_it_once(script):
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", script.draw())
    words = re.findall(r"\w+", " ".join(texts))
    assert [name for name in script.modules() if name not in words] == []


def test_a_module_without_a_group_is_named(script, monkeypatch):
    monkeypatch.delitem(script.GROUPS, "Geometry")
    with pytest.raises(ValueError, match="geometry"):
        script.edges()


def test_imports_lead_down(script, monkeypatch):
    _, columns, names = script.GROUPS["Training"]
    monkeypatch.setitem(script.GROUPS, "Training", (4, columns, names))
    with pytest.raises(ValueError, match=r"below it|cross a row"):
        script.draw()
