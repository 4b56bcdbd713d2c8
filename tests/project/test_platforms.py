"""Shells, terminals, installations and scripts as people have them."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

import opdlab as ol
from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab import laboratory
from opdlab.lab.laboratory import Laboratory
from opdlab.models.folders import load_model


@pytest.fixture
def home(tmp_path, monkeypatch, pair):
    """A home with two models, from which ``~`` is far away."""
    monkeypatch.setenv("IPYTHONDIR", str(Path.home() / ".ipython"))
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for folder in pair:
        (tmp_path / "home" / folder.name).symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("OPDLAB_HOME", raising=False)
    yield tmp_path / "home"
    assert not [path.name for path in (tmp_path / "elsewhere").iterdir()], "something was made in the current folder"


def test_a_tilde_is_the_home_on_the_command_line(home, capsys):
    """Bash leaves it as it is in ``--out=~/x``."""
    assert main(["measure", "~/base", "~/tuned", "--out=~/one", "--no-nulls", "--no-cache", "--processes", "1"]) == 0
    assert f"with figures: {home / 'one' / 'report.html'}" in capsys.readouterr().out
    assert main(["measure", "~/base", "~/tuned", "--out=~/two", "--seed", "1", "--no-cache", "--processes", "1"]) == 0
    assert main(["compare", "~/one/summary.json", "~/two/summary.json", "--out=~/both", "--processes", "1"]) == 0
    assert (home / "both" / "compare.html").is_file()
    assert main(["train", "--arm", "opd", "--scale", "smoke", "--home=~/lab"]) == 2
    assert f"there is no model in {home / 'lab' / 'data' / 'models'}" in capsys.readouterr().err


def test_a_tilde_is_the_home_in_python(home, monkeypatch):
    update = ol.measure("~/base", "~/tuned", out="~/out", cache=Path("~/cache"), processes=1)
    update.save("~/again")
    assert (home / "out" / "report.html").is_file() and (home / "again" / "report.html").is_file()
    assert list((home / "cache").iterdir())
    ol.compare(["~/out", update], out=Path("~/both"))
    assert (home / "both" / "compare.html").is_file()
    trainer = Trainer(load_model(home / "base"), TrainingArguments(home / "run", use_cpu=True, report_to=[]))
    callback = ol.GeometryCallback(trainer, snapshots="~/snapshots", snapshot_steps=(1,))
    assert callback.snapshots == home / "snapshots"
    monkeypatch.setenv("OPDLAB_HOME", "~/lab")
    assert Laboratory.at("tiny").root == Laboratory.at("tiny", Path("~/lab")).root == home / "lab"
    with pytest.raises(OpdlabError, match=rf"^{home}/lab/data/records/tiny has no record of any arm"):
        ol.load("tiny", root=Path("~/lab"))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_terminal_can_show_what_is_printed(encoding, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    assert main(["scales"]) == 0
    assert main(["plan", "--scale", "tiny", "--arm", "opd"]) == 0
    print("α")
    sys.stdout.flush()
    assert shown.getvalue().endswith(b"\\u03b1\n" if encoding != "utf-8" else "α\n".encode())


def test_an_installation_outside_the_repository_works_in_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(laboratory, "__file__", str(tmp_path / "site-packages" / "opdlab" / "lab" / "laboratory.py"))
    monkeypatch.delenv("OPDLAB_HOME", raising=False)
    monkeypatch.setenv("OPDLAB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "home"
    remedy = "git clone https://github.com/opdlab/opdlab, and set OPDLAB_HOME to it"
    for command, said in {
        "train --arm opd": f"no model in {home}/data/models/smoke/anchor: run 'opdlab models --scale smoke' first",
        "reproduce --arm opd": f"{home}/data/records/smoke has no record of opd with seeds 0: record them first",
    }.items():
        assert main([*command.split(), "--scale", "smoke"]) == 2
        error = capsys.readouterr().err
        assert said in error and remedy in error and error.count("\n") == 1
    with pytest.raises(OpdlabError, match=remedy):
        ol.load("tiny")
    assert not (tmp_path / "site-packages").exists()


def test_six_steps_make_no_models_of_another_scale(tmp_path):
    """At smoke those of tiny are taken if they are there, all of them."""
    smoke, tiny = Laboratory.at("smoke", tmp_path), Laboratory.at("tiny", tmp_path)
    assert smoke.models.name == "smoke" and tiny.models.name == "tiny"
    for arm in smoke.scale.models.makers:
        assert smoke.models.name == "smoke"
        (tiny.models / smoke.arms[arm].produces).mkdir(parents=True)
    assert smoke.models == tiny.models


def test_a_script_needs_no_main_guard(tmp_path):
    """Its worker processes do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import opdlab as ol, torch\nprint('once')\n"
        "w0 = {f'layers.{i}.q_proj.weight': torch.eye(8) for i in range(3)}\n"
        "print(len(ol.measure(w0, {k: 2 * w for k, w in w0.items()}, processes=2).table))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["once", "3"]), done.stderr
