"""Tokenizers of student and teacher: how they pad, and whether they agree."""

import pytest
import transformers

from opdlab.errors import OpdlabError
from opdlab.models.folders import character_tokenizer, check_same_vocabulary, load_tokenizer


def write_tokenizer(folder, **tokens):
    tokenizer = character_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    transformers.Qwen3Config(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def test_without_a_padding_token_the_end_of_sequence_pads(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, pad_token=None))
    assert tokenizer.pad_token == tokenizer.eos_token == "$"
    end = tokenizer.eos_token_id
    batch = tokenizer(["1+2", "1"], padding=True)
    assert batch.input_ids == [[1, 10, 2], [end, end, 1]]
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]
    # A padding token that is there stays.
    assert load_tokenizer(write_tokenizer(tmp_path / "other")).pad_token == "_"


def test_no_end_of_sequence_is_refused(tmp_path):
    with pytest.raises(OpdlabError, match="no end-of-sequence token"):
        load_tokenizer(write_tokenizer(tmp_path, eos_token=None))


def test_student_and_teacher_must_end_alike(tmp_path):
    student, teacher = write_tokenizer(tmp_path / "student"), write_tokenizer(tmp_path / "teacher", eos_token="#")
    check_same_vocabulary(student, student)
    with pytest.raises(OpdlabError, match=r"student .* with '\$' \(token 26\) and teacher .* with '#' \(token 14\)"):
        check_same_vocabulary(student, teacher)
