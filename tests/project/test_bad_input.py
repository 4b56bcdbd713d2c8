"""Every way of holding it wrong: one sentence that names the thing and the remedy, and nothing computed is lost."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import add_run, find_tables, has_record, load, read_index, write_table
from opdlab.lab.scales import get_scale
from opdlab.models import files
from opdlab.models.files import load_tensors, write_whole
from opdlab.models.folders import load_model, load_tokenizer, save_model


@pytest.fixture
def own(lab, tmp_path):
    """A laboratory with copies of the models, which a test may damage."""
    own = replace(lab, root=tmp_path)
    shutil.copytree(lab.models, own.models)
    return own


def test_unknown_scale(capsys):
    assert main(["train", "--arm", "opd", "--scale", "huge"]) == 2
    assert (
        capsys.readouterr().err
        == "opdlab: there is no scale 'huge'; choose one of smoke, tiny, tiny-learning, small, full, full-0.6b, paper\n"
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
        Laboratory(scale, tmp_path).train("sft")


def test_no_teacher_for_opd(own):
    shutil.rmtree(own.models / "teacher")
    with pytest.raises(OpdlabError, match=r"there is no model in .*teacher: run 'opdlab models --scale"):
        own.train("opd")


def test_a_model_folder_without_weights(own):
    (own.models / "anchor" / "model.safetensors").unlink()
    with pytest.raises(
        OpdlabError, match=r"anchor has no weights: it holds config.json, .* and needs a model.safetensors"
    ):
        own.train("opd")


def test_pickled_weights_are_refused(own):
    folder = own.models / "anchor"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OpdlabError, match=r"pytorch_model.bin is a pickle, which can run code"):
        own.train("opd")


def test_truncated_weights(own):
    path = own.models / "anchor" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OpdlabError, match=r"the model in .*anchor cannot be opened"):
        load_model(path.parent)


def test_code_in_a_model_folder_is_not_run(own):
    folder = own.models / "anchor"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(OpdlabError, match=r"cannot be opened"):
        load_model(folder)


def test_different_vocabularies(own):
    folder = own.models / "teacher"
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["é"])
    save_model(load_model(folder), tokenizer, folder)
    with pytest.raises(OpdlabError, match=r"different vocabularies \(28 and 29 tokens, 28 in common\)"):
        own.train("opd")


@pytest.mark.parametrize("damage", [lambda data: data[:500], lambda data: b"not a tensor", lambda data: b""])
def test_a_damaged_snapshot(damage, own):
    run = own.train("opd")
    path = run.snapshot_path(run.experiment.kept[1])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        OpdlabError,
        match=r"step-\d+.safetensors is missing, truncated or not a safetensors file: delete its run folder",
    ):
        find_tables("opd", 0, own)
    assert run.finished and run.lines("history"), "the rest of the run is kept"


def test_a_record_that_does_not_match_is_not_read_and_nothing_is_trained_for_it(own, monkeypatch):
    add_run(find_tables("sft", 0, own), own)
    assert load(own, ("sft",), seeds=(0,)).runs["key"].item() == own.experiment("sft").key
    write_table(own.records / "runs.csv", read_index(own.records).assign(key="something"))
    monkeypatch.setattr("opdlab.lab.laboratory.train", lambda *args, **options: pytest.fail("it is trained"))
    with pytest.raises(OpdlabError, match=r"has no record of sft as .*'opdlab record --scale smoke --arm sft'"):
        load(own, ("sft",), seeds=(0,))
    monkeypatch.undo()
    # Made again, it is there: from the finished run, whose tables are measured already.
    add_run(find_tables("sft", 0, own), own)
    assert has_record("sft", 0, own) and len(read_index(own.records)) == 1


@pytest.mark.parametrize("name", ["runs.csv", "sft/history.csv", "sft/matrices.csv"])
@pytest.mark.parametrize("damage", [lambda path: path.write_text(""), lambda path: path.unlink()])
def test_a_damaged_record(name, damage, own):
    add_run(find_tables("sft", 0, own), own)
    path = own.records / name
    damage(path)
    # Without its index a folder has no records.
    error = "no record of sft" if not path.exists() and name == "runs.csv" else f"{name} is missing or damaged"
    with pytest.raises(OpdlabError, match=error):
        load(own, ("sft",), seeds=(0,))


def test_damaged_sets_of_claims(own):
    """To train again would not bring them back."""
    judging = replace(own, claims={"it": "01234567"})
    tables = find_tables("sft", 0, judging)
    write_whole(own.records / "claims.json", lambda file: file.write_text("{"))
    with pytest.raises(OpdlabError, match=r"claims.json is missing or damaged \(.*\): restore it"):
        add_run(tables, judging)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_text("before")

    def write(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OpdlabError, match=r"cannot be written \(.*No space left on device\): make room"):
        write_whole(path, write)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_disk_that_fills_up_while_training(own, monkeypatch):
    saved = 0

    def save(tensors, path, metadata=None):
        nonlocal saved
        saved += 1
        if saved > 4:  # the start, two snapshots, and the state that projected runs branch off from
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", save)
    with pytest.raises(OpdlabError, match=r"No space left on device"):
        own.train("opd", 1)
    monkeypatch.undo()
    run = own.run("opd", 1)
    assert [load_tensors(run.snapshot_path(step)) for step in run.experiment.kept[:3]]
    assert own.train("opd", 1).finished


def test_a_home_that_cannot_be_written(own):
    (own.root / "runs").write_text("a file where a folder has to be")
    with pytest.raises(OpdlabError, match=r"cannot be written"):
        own.train("opd")
