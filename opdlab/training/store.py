"""Runs on disk: where things lie, what identifies a run, and how its files are written so that nothing is lost.

A run is a folder::

    runs/tiny/opd-seed0-1f2e3d4c/
        config.json             everything that decides the result; the folder's last word is its hash
        provenance.json         versions, device and threads that it ran on
        history.jsonl           one line per training step
        evaluations.jsonl       one line per evaluation
        snapshots/step-000040.safetensors
        states/step-000007.safetensors  weights and optimizer moments, from which projected runs go on
        checkpoint.safetensors  the same, to resume from

Beside them lies ``origins``: the weights and the accuracy before the first step, which runs from one model share.
Every file is written under another name first and then moved into place, so a killed run leaves whole files only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.lab.grid import Arm, get_arm
from opdlab.lab.scales import Scale
from opdlab.models.checkpoints import weights_digest
from opdlab.models.files import link_or_copy, load_tensors, write_text
from opdlab.processes import provenance
from opdlab.training.projection import Constraint

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Home:
    """The folder under which models, records and runs lie."""

    root: Path

    def models(self, scale: Scale) -> Path:
        """The folder with the base, anchor and teacher of ``scale``."""
        return self.root / "data" / "models" / scale.models

    def records(self, scale: Scale) -> Path:
        """The folder with the recorded tables of ``scale``."""
        return self.root / "data" / "records" / scale.name

    def runs(self, scale: Scale) -> Path:
        """The folder with the runs of ``scale``; it is not part of the repository."""
        return self.root / "runs" / scale.name


def default_home() -> Home:
    """Return the folder in ``OPDLAB_HOME``, or the repository that this package was installed from."""
    return Home(Path(os.environ.get("OPDLAB_HOME") or Path(__file__).resolve().parents[2]))


def resolve(scale: Scale, arm_name: str, seed: int, home: Home) -> dict:
    """Return everything that decides the result of a run, as JSON values.

    Args:
        scale: at which scale.
        arm_name: of which arm.
        seed: with which seed.
        home: where the models lie that it starts from and listens to.

    Raises:
        OpdlabError: if the arm is unknown, or a model that it needs is missing (no teacher for OPD, say).
    """
    arm, recipe = get_arm(arm_name), scale.recipe(arm_name)
    config: dict[str, Any] = {
        "scale": scale.name,
        "arm": arm.decisive,
        "recipe": asdict(recipe),
        "seed": seed,
        "task": arm.task or scale.task,
        "start": model_digest(arm.start, scale, home) if arm.start else scale.shapes[arm.name],
        "teacher": model_digest(arm.teacher, scale, home) if arm.teacher else None,
        "max_new_tokens": scale.max_new_tokens,
        "temperature": scale.temperature,
        "micro_batch": scale.micro_batch,
        "threads": scale.threads,
        "evaluation_prompts": scale.evaluation_prompts,
        "evaluations": [0, *scale.steps_at(arm_name, scale.evaluations_of(arm_name))],
        # The lab's own pretraining is not measured: only its last weights are kept.
        "snapshots": [0, *scale.steps_at(arm_name, scale.snapshots_of(arm_name))] if arm.start else [recipe.steps],
    }
    # Named only where it is not as usual, which leaves older records valid.
    if scale.compute != "float32":
        config["compute"] = scale.compute
    if arm.constraint:
        config["constraint"] = _directions(scale, arm, arm.constraint, seed, home)
        config["snapshots"] = sorted({*config["snapshots"], config["constraint"]["begin"]})
    return json.loads(json.dumps(config))


def model_digest(name: str, scale: Scale, home: Home) -> str:
    """Return the identity of a model; where the model itself is not there, that of the one that the records are of.

    Raises:
        OpdlabError: if there is neither the model nor a record.
    """
    if (home.models(scale) / name).is_dir():
        return weights_digest(home.models(scale) / name)
    for arm in map(get_arm, scale.recorded):
        if name in (arm.start, arm.teacher):
            record = home.records(scale) / f"{arm.name}-seed{scale.seeds[0]}" / "record.json"
            with suppress(OSError, ValueError, KeyError):
                return json.loads(record.read_text())["config"]["start" if name == arm.start else "teacher"]
    return weights_digest(model_folder(name, scale, home))


def model_folder(name: str, scale: Scale, home: Home) -> Path:
    """Return the folder of a model.

    Raises:
        OpdlabError: if it is not there.
    """
    folder = home.models(scale) / name
    if not folder.is_dir():
        raise OpdlabError(f"there is no model in {folder}: run 'opdlab models --scale {scale.name}' first")
    return folder


def source_of(arm: Arm, seed: int, scale: Scale) -> tuple[str, int] | None:
    """Return the arm and the seed of the other run that a projected run takes its directions from, if it does."""
    constraint = arm.constraint
    if constraint is None or not (constraint.arm or constraint.other_seed or constraint.final):
        return None
    return constraint.arm or arm.like, scale.later_seed(seed) if constraint.other_seed else seed


def partings(arm: str, scale: Scale) -> set[int]:
    """Return the steps at which the projected runs that a scale records part from the free runs of an arm."""
    projected = [other for other in map(get_arm, scale.recorded) if other.like == arm]
    return set(scale.steps_at(arm, tuple({other.constraint.start for other in projected if other.constraint})))


def kept_steps(arm: str, scale: Scale) -> set[int]:
    """Return the steps whose weights a run still has once it is recorded.

    They are all that it took, or only those that other runs need: before they part from it, or for their directions.
    """
    taken = {0, *scale.steps_at(arm, scale.snapshots_of(arm))}
    constraint = get_arm(arm).constraint
    if constraint:
        taken |= set(scale.steps_at(arm, (constraint.start,)))
    if scale.keep_snapshots:
        return taken
    parts = partings(arm, scale)
    kept = {0, scale.recipe(arm).steps} | {step for step in taken if step <= max(parts, default=0)}
    for other in map(get_arm, scale.recorded):
        source = source_of(other, scale.seeds[0], scale)
        if other.constraint and source and source[0] == arm:
            kept |= set(scale.steps_at(arm, (other.constraint.start,)))
    return kept


def _directions(scale: Scale, arm: Arm, constraint: Constraint, seed: int, home: Home) -> dict:
    """Return when a projected run is confined, and which run and step its directions are from, if not from itself."""
    (begin,) = scale.steps_at(arm.name, (constraint.start,))
    source = source_of(arm, seed, scale)
    if source is None:
        return {"begin": begin, "step": begin}
    config = resolve(scale, *source, home)
    step = config["recipe"]["steps"] if constraint.final else begin
    return {"begin": begin, "step": step, "arm": source[0], "seed": source[1], "run": config_key(config)}


def config_key(config: dict) -> str:
    """Return the first 8 hex digits of the SHA-256 of ``config``."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


class Run:
    """One run's folder."""

    def __init__(self, folder: Path, config: dict):
        """Open the run of ``config`` in ``folder``, which need not exist yet."""
        self.folder, self.config = folder, config

    @classmethod
    def of(cls, scale: Scale, arm: str, seed: int, home: Home) -> Run:
        """Return a run, which need not have begun.

        Args:
            scale: at which scale.
            arm: of which arm.
            seed: with which seed.
            home: where models and runs lie.
        """
        config = resolve(scale, arm, seed, home)
        return cls(home.runs(scale) / f"{arm}-seed{seed}-{config_key(config)}", config)

    @property
    def finished(self) -> bool:
        """Whether the last step's weights are there."""
        return self.snapshot_path(self.config["recipe"]["steps"]).exists()

    def snapshot_path(self, step: int) -> Path:
        """Return the file with the weights after ``step`` updates."""
        return self.folder / "snapshots" / f"step-{step:06d}.safetensors"

    def snapshot(self, step: int) -> dict[str, Tensor]:
        """Return the weights after ``step`` updates."""
        return load_tensors(self.snapshot_path(step))[0]

    def state_path(self, step: int) -> Path:
        """Return the file with all that training needs to go on after ``step`` updates, kept where other runs part."""
        return self.folder / "states" / f"step-{step:06d}.safetensors"

    def begin_like(self, other: Run, step: int, device: torch.device) -> None:
        """Take over the first ``step`` steps of a run that is the same until then, if it kept its state there.

        On ``device``, that is: elsewhere the same steps give other bits.
        """
        snapshots = [s for s in self.config["snapshots"] if s <= step]
        if not (other.state_path(step).exists() and all(other.snapshot_path(s).exists() for s in snapshots)):
            return
        if json.loads((other.folder / "provenance.json").read_text()) != provenance(device):
            return
        copies = [(other.snapshot_path(s), self.snapshot_path(s)) for s in snapshots]
        # Last: with a checkpoint the run counts as begun.
        copies.append((other.state_path(step), self.folder / "checkpoint.safetensors"))
        for name in ("history", "evaluations"):
            for line in other.lines(name):
                if line["step"] <= step and (name == "history" or line["step"] in self.config["evaluations"]):
                    self.append(name, line)
        for source, target in copies:
            link_or_copy(target, source)

    def drop_snapshots(self, kept: set[int]) -> None:
        """Delete the snapshots after other steps than ``kept``."""
        for step in set(self.config["snapshots"]) - kept:
            self.snapshot_path(step).unlink(missing_ok=True)

    def drop_states(self) -> None:
        """Delete what other runs could have gone on from."""
        shutil.rmtree(self.folder / "states", ignore_errors=True)

    def append(self, name: str, line: dict) -> None:
        """Add one line to ``history`` or ``evaluations``."""
        try:
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as problem:
            raise OpdlabError(
                f"{self.folder / name}.jsonl cannot be written ({problem.strerror}); make room and run it again"
            ) from problem

    def lines(self, name: str) -> list[dict]:
        """Return the lines of ``history`` or ``evaluations``."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget_after(self, step: int) -> None:
        """Drop the lines that were written after the checkpoint of ``step``, which a resumed run writes again."""
        for name in ("history", "evaluations"):
            path = self.folder / f"{name}.jsonl"
            if path.exists():
                # A kill may have cut the last line, so keep whole lines only.
                whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                kept = [line for line in whole if json.loads(line)["step"] <= step]
                write_text(path, "".join(kept))
