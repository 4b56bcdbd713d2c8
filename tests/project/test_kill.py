"""Kill -9 at random moments, again and again: what comes out in the end is what comes out without.

Six kills by default, and as many as ``OPDLAB_KILLS`` says: ``OPDLAB_KILLS=50 python tests/project/test_kill.py``.
"""

import importlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "data" / "models" / "tiny-learning"
KILLS = int(os.environ.get("OPDLAB_KILLS", 6))
#: Kills of one run, before it may end.
MOST = 4


def _home(folder):
    models = folder / "data" / "models"
    models.mkdir(parents=True, exist_ok=True)
    if not (models / "smoke").exists():
        (models / "smoke").symlink_to(MODELS)
    return ["--scale", "smoke", "--home", str(folder)]


def _without(lines, *words):
    """Return lines of a log without what tells of time, or has one of the ``words`` in its name."""
    words = ("second", "runtime", *words)
    return [{key: value for key, value in line.items() if not any(word in key for word in words)} for line in lines]


def _weights(folder):
    from opdlab.models.files import load_tensors, tensors_digest

    paths = sorted((folder / "snapshots").glob("*.safetensors"))
    return {path.name: tensors_digest(load_tensors(path)[0]) for path in paths}


class Train:
    """``opdlab train``."""

    arm, options = "opd", ()

    def work(self, folder):
        from opdlab.cli import main

        return main(["train", "--arm", self.arm, *_home(folder), *self.options])

    def outcome(self, folder):
        (run,) = (folder / "runs" / "smoke").glob(f"{self.arm}-*")
        assert not list(run.rglob("*.part")) and not (run / "checkpoint.safetensors").exists()
        lines = {name: map(json.loads, (run / f"{name}.jsonl").open()) for name in ("history", "evaluations")}
        return _weights(run), {name: _without(of) for name, of in lines.items()}


class Record(Train):
    """``opdlab record``, whose worker process is not killed: it has to end by itself."""

    def work(self, folder):
        from opdlab.cli import main

        return main(["record", "--arm", "rlvr", "--seed", "0", "--processes", "1", *_home(folder)])

    def outcome(self, folder):
        import pandas as pd

        records = folder / "data" / "records" / "smoke"
        tables = {name: (records / "rlvr" / f"{name}.csv") for name in ("evaluations", "matrices", "trajectory")}
        history = pd.read_csv(records / "rlvr" / "history.csv").drop(columns="seconds").to_csv()
        index = pd.read_csv(records / "runs.csv").drop(columns="seconds").to_csv()
        return {name: path.read_bytes() for name, path in tables.items()}, history, index


class Measure:
    """``opdlab measure``."""

    def work(self, folder):
        from opdlab.cli import main

        models = [str(MODELS / name) for name in ("base", "anchor")]
        return main(["measure", *models, "--out", str(folder), "--no-cache", "--processes", "1"])

    def outcome(self, folder):
        assert not list(folder.glob("*.part"))
        return [(folder / name).read_bytes() for name in ("matrices.csv", "summary.json", "report.html")]


class Engine(Train):
    """What ``opdlab train --engine trl`` starts."""

    def work(self, folder):
        from opdlab.training import trl

        options = ["--engine", "trl", "--processes", "1"]
        if not (run := list((folder / "runs" / "smoke").glob("opd-*/run.pickle"))):
            from opdlab.cli import main

            main(["train", "--arm", "opd", *_home(folder), *options, "--dry-run"])
            run = list((folder / "runs" / "smoke").glob("opd-*/run.pickle"))
        trl.run(run[0])
        return 0

    def outcome(self, folder):
        (run,) = (folder / "runs" / "smoke").glob("opd-*")
        assert not list(run.glob("checkpoint*")) and not list(run.rglob("*.part"))
        log = json.loads((run / "trainer_state.json").read_text())["log_history"]
        # Of these TRL, and what the callback compares with the step before, begin anew.
        return _weights(run), _without(log, "epoch", "train_loss", "geometry/sim")


KINDS = {"train": Train, "measure": Measure, "record": Record, "engine": Engine}


def start(kind, folder):
    """Fork a process that works in the folder: nothing needs to be imported again."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with open(folder.with_suffix(".log"), "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        status = kind.work(folder)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status or 0)


def wait(pid, seconds):
    """Wait for a process to end, and return its status; kill it when the time is over, and return None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def attack(name, folder, kills, chance):
    """Kill one kind of work so often, and hold what comes out against the same work undisturbed."""
    kind, killed, runs = KINDS[name](), 0, 0
    began = time.monotonic()
    finish(kind, folder / f"{name}-whole")
    took, expected = time.monotonic() - began, kind.outcome(folder / f"{name}-whole")
    while killed < kills:
        place, before, status = folder / f"{name}-{runs}", killed, None
        while status is None and killed < min(kills, before + MOST):
            status = wait(start(kind, place), chance.uniform(0.05, took))
            killed += status is None
        finish(kind, place)
        assert kind.outcome(place) == expected, f"{place} differs after {killed - before} kills"
        runs += 1
    print(f"{name}: {killed} kills of {runs} runs of {took:.1f} s, all as undisturbed", flush=True)


def finish(kind, folder):
    """Let the work end."""
    status = wait(start(kind, folder), 600)
    assert status == 0, f"status {status}: {folder.with_suffix('.log').read_text()[-3000:]}"


def main():
    """Share the kills among the kinds of work."""
    # One thread, and all that is needed, once.
    for module in ("opdlab.lab.records", "opdlab.lab.scheduler", "opdlab.measuring.report", "opdlab.training.loop"):
        importlib.import_module(module)
    kinds = list(KINDS)
    if importlib.util.find_spec("trl"):
        importlib.import_module("opdlab.training.trl")
        importlib.import_module("trl.experimental.iw_opd")
    else:
        kinds.remove("engine")
    chance = random.Random(KILLS)
    with TemporaryDirectory(prefix="kills-") as folder:
        for i, name in enumerate(kinds):
            attack(name, Path(folder), KILLS // len(kinds) + (i < KILLS % len(kinds)), chance)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by forking")
def test_killed_again_and_again():
    """In a process of its own, which forks: pytest's has other threads."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("all as undisturbed") >= 3, done.stdout


if __name__ == "__main__":
    main()
