"""What a chapter says follows from the numbers, whichever way they fall."""

import pytest

from opdlab.claims.sentences import check, states
from opdlab.errors import OpdlabError


def test_sentences_have_to_be_true(monkeypatch):
    monkeypatch.setenv("OPDLAB_SCALE", "tiny")
    assert states("It rises.", True, f"It ends at {0.5:.0%}.", 2 > 1).data == "It rises. It ends at 50\u00a0%."
    with pytest.raises(OpdlabError, match=r"^the records do not say that 'It ends high.': rewrite the sentence"):
        states("It rises.", True, "It ends high.", False)
    with pytest.raises(ValueError):
        states("It rises.")
    monkeypatch.setenv("OPDLAB_SCALE", "smoke")
    assert states("It rises.", False).data == "*Not at this scale. At tiny:* It rises."
    with pytest.raises(OpdlabError):
        states("One is two.", False, at="")


@pytest.mark.parametrize(
    ("said", "right", "good"),
    [(1.0, 1, True), (0.985, 1, True), (1.03, 1, False), (-1, 1, False), (True, True, True), (1, False, False),
     ("seen", "seen", True), ("Seen", "seen", False), (0, 0, True), (1e-9, 0, False)],
)  # fmt: skip
def test_answers_of_readers(said, right, good):
    assert check(said, right, hint="Not quite.") == ("Right." if good else "Not quite.")
    assert check(None, right).startswith("Not answered yet")
