"""Runs on disk outlive a loss of power, a damaged file and a second process."""

import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.records import add_run, find_tables
from opdlab.models.files import load_tensors, only_process, save_tensors
from opdlab.training import loop


class Disk:
    """What a disk holds of a folder: bytes since their file's last fsync, and names since that of their folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.bytes, self.names = folder, {}, {}
        really, opened = os.fsync, os.open

        def open_(path, *arguments, **options):
            descriptor = opened(path, *arguments, **options)
            self.paths[descriptor] = Path(path)
            return descriptor

        def fsync(descriptor):
            really(descriptor)
            self.fsynced(self.paths[descriptor])

        self.paths = {}
        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "fsync", fsync)

    def fsynced(self, path):
        if path.is_dir():
            self.names[path] = {file.name: file.stat().st_ino for file in path.iterdir() if file.is_file()}
        else:
            self.bytes[path.stat().st_ino] = path.read_bytes()
        self.after(path)

    def after(self, path):
        """Called after each fsync."""

    def after_power_loss(self, target):
        """Write what is left; what was added to a file since is zeros, as file systems may leave it."""
        for folder, names in self.names.items():
            place = target / folder.relative_to(self.folder)
            place.mkdir(parents=True, exist_ok=True)
            for name, inode in names.items():
                held = self.bytes.get(inode, b"")
                now = folder / name
                added = now.stat().st_size - len(held) if now.exists() and now.stat().st_ino == inode else 0
                (place / name).write_bytes(held + bytes(max(added, 0)))


def whole(run):
    return [load_tensors(run.snapshot_path(step))[0] for step in run.experiment.kept]


def assert_same(run, expected):
    for name in ("history", "evaluations"):
        told = [[{k: v for k, v in line.items() if k != "seconds"} for line in r.lines(name)] for r in (run, expected)]
        assert told[0] == told[1]
    for found, right in zip(whole(run), whole(expected), strict=True):
        assert found.keys() == right.keys() and all(found[name].equal(right[name]) for name in right)


@pytest.fixture(scope="module")
def opd(lab):
    """The run that nothing happened to."""
    return lab.train("opd")


def test_a_loss_of_power_costs_no_run(opd, lab, copy_of, tmp_path, monkeypatch):
    """At each fsync that makes a step count, the disk alone is enough to go on, bit for bit."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1e9)
    there = copy_of(lab, tmp_path / "there")
    lost, moments = [], []

    def after(path):
        moments.append(path.name in ("snapshots", there.run("opd").folder.name))
        if moments[-1] and sum(moments) % 6 == 5:
            lost.append(copy_of(lab, tmp_path / str(len(lost))))
            disk.after_power_loss(lost[-1].runs)

    # A checkpoint takes no time, or on a busy machine few would be written: it is looked at before, and twice at, each.
    clock = (n // 3 for n in count(2))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        disk = Disk(there.runs, patch)
        disk.after = after
        assert_same(there.train("opd"), opd)
    assert len(lost) > 2
    resumed = []
    for other in lost:
        resumed.append(other.run("opd")._read("history")[1])
        assert_same(other.train("opd"), opd)
    assert max(resumed) > 0


def test_a_second_process_is_refused(opd, lab, copy_of, tmp_path, capsys):
    """The lock is the system's: it goes with a process that is killed."""
    there = copy_of(lab, tmp_path)
    folder = there.run("opd").folder
    code = f"""if True:
        from pathlib import Path; import time
        from opdlab.models.files import only_process
        with only_process(Path({str(folder)!r}), "trains"), only_process(Path({str(there.runs)!r}), "makes records"):
            print(flush=True); time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(OpdlabError, match=rf"^another process trains in {folder}: wait until it ends, or stop it$"):
            there.train("opd")
        assert main(["record", "--scale", "smoke", "--home", str(tmp_path), "--arm", "opd", "--seed", "0"]) == 2
        assert f"another process makes records or models in {there.runs}: wait" in capsys.readouterr().err
        assert not (folder / "config.json").exists()
        other.kill()
    assert_same(there.train("opd"), opd)
    with only_process(folder, "trains"):
        assert there.train("opd").finished, "a finished run is only read"


def test_what_a_killed_process_half_wrote_goes(lab, copy_of, tmp_path):
    there = copy_of(lab, tmp_path)
    part = there.run("opd").snapshot_path(3).with_name("step-000003.safetensors.4711.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    there.train("opd")
    assert not part.exists()


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(opd, lab, copy_of, tmp_path):
    """A laboratory with that run, whose files a test may damage."""
    there = copy_of(lab, tmp_path)
    # Another test may have measured the run, and what has tables is not read again.
    shutil.copytree(opd.folder, there.run("opd").folder, ignore=shutil.ignore_patterns("tables"))
    return there


@pytest.mark.parametrize("damage", [lambda data: data[:500], lambda data: data[:-9] + b"x" + data[-8:]])
def test_a_damaged_origin_is_written_anew(damage, opd, lab, copy_of, tmp_path):
    """Runs share it: what one run says about it has to help."""
    there = copy_of(lab, tmp_path)
    origins = shutil.copytree(lab.runs / "origins", there.runs / "origins")
    for path in origins.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert_same(there.train("opd"), opd)


@pytest.mark.parametrize("damage", [lambda data: data[:500], lambda data: data[:-9] + b"x" + data[-8:]])
def test_one_byte_of_a_snapshot_is_enough(damage, damaged):
    for step in (0, damaged.run("opd").steps):
        path = damaged.run("opd").snapshot_path(step)
        before = path.read_bytes()
        path.write_bytes(damage(before))
        with pytest.raises(OpdlabError, match=rf"^{path} is .*: delete its run folder and train again$"):
            find_tables("opd", 0, damaged)
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["history.jsonl", "evaluations.jsonl", "provenance.json", "tables/record.json"])
@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: "{" + text, lambda text: "\0" * len(text)])
def test_a_damaged_line_or_file_has_a_sentence(name, damage, damaged):
    path = damaged.run("opd").folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(damage(path.read_text() if path.exists() else '{"arm": "opd", "seed": 0}'))
    with pytest.raises(OpdlabError, match=rf"{path} is (missing or )?damaged.*: delete ") as problem:
        add_run(find_tables("opd", 0, damaged), damaged)
    assert "\n" not in str(problem.value)


def test_a_damaged_line_before_the_checkpoint_is_not_passed_over(damaged):
    run = damaged.run("opd")
    history = run.folder / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join([*lines[:3], lines[3][:20], "\n", *lines[4:]]))
    with pytest.raises(OpdlabError, match=rf"^line 4 of {history} is damaged: delete its run folder and train again$"):
        run.truncate_after(5)
    run.truncate_after(3)
    assert [line["step"] for line in run.lines("history")] == [1, 2, 3]


def test_tensors_of_every_kind_have_a_checksum(tmp_path):
    tensors = {
        "a": torch.tensor(1.5),
        "b": torch.zeros(0, 3),
        "c": torch.randn(3, 2).bfloat16().T,
        "d": torch.arange(3),
    }
    save_tensors(tmp_path / "x", tensors, step="3")
    found, metadata = load_tensors(tmp_path / "x")
    assert metadata["step"] == "3" and all(found[name].equal(tensor) for name, tensor in tensors.items())
