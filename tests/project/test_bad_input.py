"""Every way of holding it wrong: one sentence that names the thing and the remedy, and nothing computed is lost."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.records import find_tables, load_records, read_record
from opdlab.lab.scales import get_scale
from opdlab.models import files
from opdlab.models.files import load_tensors, write_whole
from opdlab.models.folders import load_model, load_tokenizer, save_model
from opdlab.training.loop import train
from opdlab.training.store import Home, Run


@pytest.fixture
def own(home, tmp_path):
    """A copy of the home that a test may damage."""
    shutil.copytree(home.root / "data", tmp_path / "data")
    return Home(tmp_path)


def test_unknown_scale(capsys):
    assert main(["train", "--arm", "opd", "--scale", "huge"]) == 2
    assert (
        capsys.readouterr().err
        == "opdlab: there is no scale 'huge'; choose one of smoke, tiny, small, full, full-0.6b, paper\n"
    )


def test_scale_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPDLAB_SCALE", "smoke")
    assert get_scale().name == "smoke"
    assert get_scale("tiny").name == "tiny"


@pytest.mark.parametrize("command", ["train", "record", "reproduce"])
def test_unknown_arm(command, capsys):
    assert main([command, "--arm", "ppo", "--scale", "smoke"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opdlab: there is no arm 'ppo'; 'opdlab scales' lists them") and error.count("\n") == 1


@pytest.mark.parametrize(("options", "what"), [([], "sft"), (["--arm", "opd"], "opd")])
def test_nothing_to_reproduce(options, what, tmp_path, capsys):
    assert main(["reproduce", "--scale", "smoke", "--home", str(tmp_path), "--seed", "7", *options]) == 2
    error = capsys.readouterr().err
    assert f"has no record of {what}" in error and "with seeds 7" in error and error.count("\n") == 1


def test_no_models(scale, tmp_path):
    with pytest.raises(OpdlabError, match=r"there is no model in .*base: run 'opdlab models --scale"):
        train("sft", 0, scale, home=Home(tmp_path))


def test_no_teacher_for_opd(scale, own):
    shutil.rmtree(own.models(scale) / "teacher")
    with pytest.raises(OpdlabError, match=r"there is no model in .*teacher: run 'opdlab models --scale"):
        train("opd", 0, scale, home=own)


def test_a_model_folder_without_weights(scale, own):
    (own.models(scale) / "anchor" / "model.safetensors").unlink()
    with pytest.raises(OpdlabError, match=r"anchor has no weights: it needs a model.safetensors"):
        train("opd", 0, scale, home=own)


def test_pickled_weights_are_refused(scale, own):
    folder = own.models(scale) / "anchor"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OpdlabError, match=r"pytorch_model.bin is a pickle, which can run code"):
        train("opd", 0, scale, home=own)


def test_truncated_weights(scale, own):
    path = own.models(scale) / "anchor" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OpdlabError, match=r"the model in .*anchor cannot be opened"):
        load_model(path.parent)


def test_code_in_a_model_folder_is_not_run(scale, own):
    folder = own.models(scale) / "anchor"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(OpdlabError, match=r"cannot be opened"):
        load_model(folder)


def test_different_vocabularies(scale, own):
    folder = own.models(scale) / "teacher"
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["é"])
    save_model(load_model(folder), tokenizer, folder)
    with pytest.raises(OpdlabError, match=r"different vocabularies \(28 and 29 tokens, 28 in common\)"):
        train("opd", 0, scale, home=own)


@pytest.mark.parametrize("damage", [lambda data: data[:500], lambda data: b"not a tensor", lambda data: b""])
def test_a_damaged_snapshot(damage, scale, own):
    run = train("opd", 0, scale, home=own)
    path = run.snapshot_path(run.config["snapshots"][1])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OpdlabError, match=r"step-\d+.safetensors is missing, truncated or not a safetensors file"):
        find_tables("opd", 0, scale, own)
    assert run.finished and run.lines("history"), "the rest of the run is kept"


def test_a_record_that_does_not_match_is_trained_again(scale, own, capsys):
    folder = find_tables("sft", 0, scale, own)
    recorded = own.records(scale) / "sft-seed0"
    shutil.copytree(folder, recorded)
    assert find_tables("sft", 0, scale, own) == recorded
    description = json.loads((recorded / "record.json").read_text())
    (recorded / "record.json").write_text(json.dumps(description | {"key": "something"}))
    records = load_records(("sft",), scale, seeds=(0,), home=own)
    assert not records.sources["recorded"].any()
    assert "sft seed 0: the record was made with another configuration; training it now" in capsys.readouterr().out or (
        find_tables("sft", 0, scale, own) == folder
    )


@pytest.mark.parametrize("name", ["record.json", "history.csv", "matrices.csv"])
def test_a_damaged_record(name, scale, own):
    folder = find_tables("sft", 0, scale, own)
    (folder / name).write_text("")
    with pytest.raises(OpdlabError, match=f"{name} is missing or damaged"):
        read_record(folder)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_text("before")

    def write(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OpdlabError, match=r"the disk is full: .*checkpoint.safetensors was not written; make room"):
        write_whole(path, write)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_disk_that_fills_up_while_training(scale, own, monkeypatch):
    saved = 0

    def save(tensors, path, metadata=None):
        nonlocal saved
        saved += 1
        if saved > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", save)
    with pytest.raises(OpdlabError, match=r"the disk is full"):
        train("opd", 1, scale, home=own)
    monkeypatch.undo()
    run = Run.of(scale, "opd", 1, own)
    assert [load_tensors(run.snapshot_path(step)) for step in run.config["snapshots"][:3]]
    assert train("opd", 1, scale, home=own).finished


def test_a_home_that_cannot_be_written(scale, own):
    (own.root / "runs").write_text("a file where a folder has to be")
    with pytest.raises(OpdlabError, match=r"cannot be written"):
        train("opd", 0, scale, home=own)
