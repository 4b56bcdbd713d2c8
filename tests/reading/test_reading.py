"""What readers of single pages understood is kept, and pages that have changed since they were read are named."""

import json
from pathlib import Path

import pytest
import yaml
from pages import page_hash

HERE = Path(__file__).resolve().parent
READ = sorted(HERE.glob("*.json"))


@pytest.mark.parametrize("file", READ, ids=lambda file: file.stem)
def test_a_trial_is_whole_and_nine_of_ten_answers_are_right(file):
    trial = json.loads(file.read_text(encoding="utf-8"))
    questions = trial["questions"]
    assert len(questions) >= 10 and all(one["question"] and one["key"] for one in questions)
    kinds = [one["kind"] for one in questions]
    # Of what a how-to page is for, which is use, a direction is as good a question as a control.
    decide = {"control", "direction"} if "use" in kinds else {"control"}
    assert sum(kind in decide for kind in kinds) >= len(kinds) / 2
    readers = [reader for reader in trial["readers"] if reader["hash"] == trial["hash"]]
    assert len(readers) >= 3
    for reader in trial["readers"]:
        assert len(reader["answers"]) == len(reader["right"]) == len(questions)
    right = [grade for reader in readers for grade in reader["right"]]
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.parametrize("file", READ, ids=lambda file: file.stem)
def test_a_page_is_as_it_was_read(file):
    if json.loads(file.read_text(encoding="utf-8"))["hash"] != page_hash(file.stem):
        pytest.skip(f"{file.stem} has changed since it was read: let it be read again, as README.md says")


def test_only_pages_of_the_book_are_read():
    toc = yaml.safe_load((HERE.parents[1] / "_toc.yml").read_text())
    listed = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    assert {file.stem for file in READ} <= {Path(page).name for page in listed}
