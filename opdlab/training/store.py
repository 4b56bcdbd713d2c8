"""Runs on disk: their folders and files, written so that nothing is lost when a run is killed.

A run is a folder::

    runs/tiny/opd-seed0-1f2e3d4c/
        config.json             everything that decides the result; the folder's last word is its hash
        provenance.json         versions, device and threads that it ran on
        history.jsonl           one line per training step
        evaluations.jsonl       one line per evaluation
        snapshots/step-000040.safetensors
        states/step-000007.safetensors  weights and optimizer moments, from which projected runs branch off
        checkpoint.safetensors  the same, to resume from

Beside it lies ``origins``: the weights and the accuracy before the first step, which runs from one model share.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models import files
from opdlab.processes import processor, provenance
from opdlab.training.config import Experiment, config_key

REMEDY = "delete its run folder and train again"
LINES = ("history", "evaluations")
# What a run has; where it writes, and what a kill leaves there of a file: its name, the process, and "part".
_ITS_OWN = ("config.json", "history.jsonl", "evaluations.jsonl", "model", "states", "snapshots/*.safetensors")
_PLACES = (".", "snapshots", "states", "origins")
_LEFT = re.compile(
    r"(config|provenance|history|evaluations|checkpoint|step-\d+|[0-9a-f]{8,}(-\w+)?|trl|accelerate|run|trainer_state)"
    r"\.(jsonl?|safetensors|pickle)\.\d+\.part"
)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Train in the ``with`` block on a run's folder, which raises an OpdlabError if another process is there."""
    with files.only_process(folder, "trains"):
        for left in (path for place in _PLACES for path in (folder / place).glob("*.part")):
            if _LEFT.fullmatch(left.name) and left.is_file():
                left.unlink()
        yield


# What is known by a digest, and what to say where it is another.
_DIGESTS = {
    "data": "data or reward differ", "student": "student differs", "teacher": "teacher differs",
    "template": "chat template differs", "settings": "config.json or tokenizer of a model differs",
    "run": "the run that gives directions differs",
}  # fmt: skip


def _differences(there: dict, here: dict) -> Iterator[str]:
    """Say in which entries two configurations differ, part by part; the steps that are kept follow from others."""
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif name in _DIGESTS and old != new:
            yield _DIGESTS[name]
        elif name not in ("evaluations", "snapshots") and old != new:
            yield f"{name} is {new} and was {old}"


class Run:
    """One run's folder."""

    def __init__(self, experiment: Experiment, root: Path, folder: Path | None = None):
        """Open the run of an experiment, which need not have begun.

        Its folder is by default named by the experiment's key, in ``root``, the folder of all runs. If another
        experiment is in it, an OpdlabError is raised.
        """
        self.experiment, self.root, self.steps = experiment, root, experiment.recipe.steps
        self.folder = folder or root / experiment.folder
        if folder:
            self._refuse_others()

    def _refuse_others(self) -> None:
        """Raise an OpdlabError if something else is in the folder, or another experiment."""
        path = self.folder / "config.json"
        there = files.read_json(path, f"{REMEDY}, or choose another out") if path.is_file() else {}
        if not {"arm", "data", "recipe"} <= there.keys():
            # A run writes its config.json first. Without it such files are of somebody else.
            for name in _ITS_OWN:
                for found in self.folder.glob(name):
                    said = found.relative_to(self.folder).as_posix()
                    raise OpdlabError(f"out is {self.folder}, which holds {said} of something else: choose another")
        # A run that failed before its first step holds nothing yet, so another reward may follow.
        elif self._read("history")[1] or [*self.folder.glob("snapshots/step-*[1-9]*.*")]:
            rows, task = there.pop("rows", ""), self.experiment.task
            differ = sorted(key for key in {*there, *self.config} if there.get(key) != self.config.get(key))
            same_rows = {*differ} <= {"data", "version"} and rows == task.rows
            # By a version the user answers for the reward; a finished run would be returned as that of another one.
            may_go_on = same_rows and "version" not in there and not self.finished
            if not differ or (may_go_on and task.version):
                return
            said = ", ".join(_differences(there, self.config)) or f"{' and '.join(differ)} differ"
            what = f"out is {self.folder}, which holds another experiment ({said}): choose another"
            if there["recipe"].get("steps", 0) < self.steps:
                what += ", and to train on, begin there with the model of this run as the student"
            if same_rows and not may_go_on and "version" not in there:
                what += ", and give the task a version=... if its reward only looks like another one"
            elif same_rows:
                named = repr(there.get("version", "..."))
                what += f", or give the task version={named} if the reward is the same, or was mended"
            raise OpdlabError(what)

    @property
    def config(self) -> dict:
        """Everything that decides the result."""
        return self.experiment.config

    @property
    def finished(self) -> bool:
        """Whether the last step's weights are on the disk."""
        return self.snapshot_path(self.steps).exists()

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run is resumed from."""
        return self.folder / "checkpoint.safetensors"

    def snapshot_path(self, step: int) -> Path:
        """Return the file with the weights after ``step`` updates."""
        return self.folder / "snapshots" / f"step-{step:06d}.safetensors"

    def snapshot(self, step: int) -> dict[str, Tensor]:
        """Return the weights after ``step`` updates."""
        return files.load_tensors(self.snapshot_path(step))[0]

    def state_path(self, step: int) -> Path:
        """Return the file with the whole state of training after ``step`` updates, kept where other runs branch off."""
        return self.folder / "states" / f"step-{step:06d}.safetensors"

    def write_config(self) -> None:
        """Write all that decides the result, and the digest of the rows, which says whether only the reward differs."""
        rows = self.experiment.task.rows
        files.write_json(self.folder / "config.json", self.config | ({"rows": rows} if rows else {}))

    def begin(self, device: torch.device) -> None:
        """Write what the run is; of one that was killed before its first checkpoint nothing counts, not even step 0."""
        self.write_config()
        files.write_json(self.folder / "provenance.json", provenance(device))
        self.truncate_after(-1)

    def leave_if_elsewhere(self) -> None:
        """Forget what was computed of an unfinished run on another processor, so that it begins anew, and say so."""
        there = files.read_json(self.folder / "provenance.json", REMEDY)["processor"]
        if there != processor():
            warnings.warn(
                f"{self.folder.name} was begun on {there}, and passes in bfloat16 give other numbers on {processor()}: "
                "it begins anew",
                stacklevel=3,
            )
            self.drop_states()
            self.checkpoint.unlink()

    def branch_from(self, other: Run, step: int, device: torch.device) -> None:
        """Take over the first ``step`` steps of a run that is the same until then, if it kept its state there.

        On ``device``, that is: elsewhere the same steps give other bits.
        """
        copies = [(other.snapshot_path(s), self.snapshot_path(s)) for s in self.experiment.kept if s <= step]
        # Last: with a checkpoint the run counts as begun.
        copies.append((other.state_path(step), self.checkpoint))
        if not all(source.exists() for source, _ in copies):
            return
        if files.read_json(other.folder / "provenance.json", REMEDY) != provenance(device):
            return
        for name in LINES:
            for line in other.lines(name):
                if line["step"] <= step and (name == "history" or line["step"] in self.config["evaluations"]):
                    self.append(name, line)
        self._sync_lines()
        for source, target in copies:
            files.link_or_copy(target, source)

    def save_origin(self, weights: dict[str, Tensor]) -> None:
        """Save the weights before the first step, on the disk once for all runs that start from the same.

        What is there is read first: a damaged file is written anew.
        """
        path = self.root / "origins" / f"{self.config['student']}-{self.experiment.arm.weight_dtype}.safetensors"
        try:
            files.load_tensors(path)
        except OpdlabError:
            files.save_tensors(path, weights)
        files.link_or_copy(self.snapshot_path(0), path)

    def origin_evaluation(self, device: torch.device, dtype: torch.dtype) -> Path:
        """Return the file for the evaluation before the first step, the same for all runs that start from the same."""
        names = {"student", "teacher", "settings", "template", "task", "data", "evaluation_prompts", "max_new_tokens"}
        names |= {"micro_batch", "threads"}
        decisive = {name: self.config[name] for name in names & self.config.keys()} | provenance(device)
        decisive["evaluation_samples"] = self.experiment.evaluation_samples
        decisive |= {"weight_dtype": self.experiment.arm.weight_dtype, "compute": str(dtype)}
        if self.experiment.arm.student.shape:
            decisive["seed"] = self.experiment.seed
        return self.root / "origins" / f"{config_key(decisive)}.json"

    def drop_snapshots(self, kept: set[int]) -> None:
        """Delete the snapshots after other steps than ``kept``."""
        for step in set(self.experiment.kept) - kept:
            self.snapshot_path(step).unlink(missing_ok=True)

    def drop_states(self) -> None:
        """Delete what other runs could have branched off from."""
        shutil.rmtree(self.folder / "states", ignore_errors=True)

    def save(self, path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        """Save weights or a state, by which steps count as done: so the lines about them are on the disk before."""
        self._sync_lines()
        files.save_tensors(path, tensors, **metadata)

    def _sync_lines(self) -> None:
        for name in LINES:
            if self._path(name).exists():
                files.sync(self._path(name))
        files.sync(self.folder)

    def append(self, name: str, line: dict) -> None:
        """Add one line to ``history`` or ``evaluations``."""
        files.append_json(self._path(name), line)

    def lines(self, name: str) -> list[dict]:
        """Return the lines of ``history`` or ``evaluations``, or raise an OpdlabError if one is damaged."""
        whole, count = self._read(name)
        self._check(name, whole, count)
        return whole

    def truncate_after(self, step: int) -> None:
        """Drop the lines that were written after the checkpoint of ``step``, which a resumed run writes again.

        Raises:
            OpdlabError: if a line about an earlier step is damaged.
        """
        for name in LINES:
            # A kill may have cut the last line, and a loss of power all that came after the checkpoint.
            kept = [line for line in self._read(name)[0] if line["step"] <= step]
            self._check(name, kept, step if name == "history" else 0)
            if self._path(name).exists():
                files.write_text(self._path(name), "".join(json.dumps(line) + "\n" for line in kept))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _read(self, name: str) -> tuple[list[dict], int]:
        """Return the lines before the first that is cut or damaged, and how many there are in all."""
        path, whole = self._path(name), list[dict]()
        written = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        with suppress(ValueError):
            for line in written:
                found = json.loads(line)
                if not (line.endswith("\n") and isinstance(found, dict)):
                    break
                whole.append(found)
        return whole, len(written)

    def _check(self, name: str, whole: list[dict], count: int) -> None:
        if len(whole) < count:
            raise OpdlabError(f"line {len(whole) + 1} of {self._path(name)} is damaged: {REMEDY}")
