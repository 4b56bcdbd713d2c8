"""What a chapter says follows from the numbers, whichever way they fall."""

import pandas as pd
import pytest

from opdlab.claims.sentences import answer, check, effect_table, list_results, name_arms, states
from opdlab.errors import OpdlabError


def test_sentences_have_to_be_true(monkeypatch):
    monkeypatch.setenv("OPDLAB_SCALE", "tiny")
    assert states("It rises.", True, "It ends high.", 2 > 1).data == "It rises. It ends high."
    with pytest.raises(OpdlabError, match=r"^the records do not say that 'It ends high.': rewrite the sentence"):
        states("It rises.", True, "It ends high.", False)
    with pytest.raises(ValueError):
        states("It rises.")
    monkeypatch.setenv("OPDLAB_SCALE", "smoke")
    assert states("It rises.", False).data == "*Not at this scale. At tiny:* It rises."
    with pytest.raises(OpdlabError):
        states("One is two.", False, at="")


@pytest.mark.parametrize(
    ("values", "above", "said"),
    [
        ([1.0, 1.1, 0.9], 0.0, "yes (+1.00 [+0.75, +1.25])"),
        ([1.0, 1.1, 0.9], 2.0, "no (+1.00 [+0.75, +1.25])"),
        ([1.0, 1.1, 0.9], 0.9, "undecided (+1.00 [+0.75, +1.25])"),
        ([1.0, 1.1, 0.9, None], 0.0, "yes (+1.00 [+0.75, +1.25])"),
        ([1.0], 0.0, "undecided (+1.00)"),
        ([], 0.0, "undecided (+nan)"),
    ],
)
def test_answers_follow_from_the_interval(values, above, said):
    assert answer(pd.Series(values, dtype=float), above) == said


def test_answers_take_other_words():
    assert answer(pd.Series([1.0, 1.1, 0.9]), yes="higher", no="lower", digits=1) == "higher (+1.0 [+0.8, +1.2])"


@pytest.mark.parametrize(
    ("said", "right", "good"),
    [(1.0, 1, True), (0.985, 1, True), (1.03, 1, False), (-1, 1, False), (True, True, True), (1, False, False),
     ("seen", "seen", True), ("Seen", "seen", False), (0, 0, True), (1e-9, 0, False)],
)  # fmt: skip
def test_answers_of_readers(said, right, good):
    assert check(said, right, hint="Not quite.") == ("Right." if good else "Not quite.")
    assert check(None, right).startswith("Not answered yet")


def test_lists_of_what_was_computed():
    values = pd.Series([1.0, 1.1, 0.9])
    said = list_results({"It rises": values, "Which": name_arms(["opd_top25", "rlvr"])}, "at the end")
    assert said.splitlines() == [
        "**Computed from the records**, at the end:",
        "",
        "- It rises: yes (+1.00 [+0.75, +1.25])",
        "- Which: top 25 %; RLVR",
    ]
    assert list_results(["one", "two"]) == "**Computed from the records.**\n\n- one\n- two"


def test_effects_as_a_table():
    effects = {"rank": pd.DataFrame({"opd_top25": [1.0, 1.1, 0.9], "rlvr": [2.0, 2.0, 2.0]})}
    table = effect_table(effects)
    assert table["rank"].to_dict() == {"top 25 %": "+1.00 [+0.75, +1.25]", "RLVR": "+2.00 [+2.00, +2.00]"}
    assert effect_table(effects, ["rlvr"]).index.tolist() == ["RLVR"]
