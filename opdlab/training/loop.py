"""Training: one loop for every arm, whose runs can be stopped and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.models.files import load_tensors, read_json, write_json
from opdlab.models.folders import save_model, with_weights
from opdlab.processes import cpu_threads
from opdlab.training.config import Experiment
from opdlab.training.opening import load_student
from opdlab.training.store import Run, alone
from opdlab.training.trainer import Trainer

# Seconds between two checkpoints: what a kill can cost. But saving takes a twentieth of the time at most.
CHECKPOINT_SECONDS = 20.0


def train(
    experiment: Experiment,
    root: Path,
    *,
    folder: Path | None = None,
    branch_from: Experiment | None = None,
    branch_steps: tuple[int, ...] = (),
    progress: bool = False,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> Run:
    """Train an experiment, or go on where an earlier call was stopped, and return its run.

    Args:
        experiment: what to train.
        root: the folder of all runs.
        folder: of the run; by default in ``root``, named by the experiment's key.
        branch_from: an experiment that is the same until this one is projected: the first steps of its run in ``root``
            are taken over.
        branch_steps: steps after which the whole state is kept, for other runs to branch off from.
        progress: show a bar with step, loss, accuracy and time left.
        on_steps: called with the number of steps done since the call before; first with those of an earlier call.

    Raises:
        OpdlabError: on bad input, a loss that is not finite, or if another process trains the run; what was computed
            is kept.
        KeyboardInterrupt: on Ctrl-C; the run goes on from its last checkpoint when it is asked for again.
    """
    run = Run(experiment, root, folder)
    with cpu_threads(experiment.compute.threads):
        trainer = None if run.finished else Trainer(experiment)  # before the run has a folder: it may be refused
        with alone(run.folder) if trainer else nullcontext():
            if not trainer or run.finished:  # perhaps by a process that has just ended
                run.checkpoint.unlink(missing_ok=True)  # left by a call that was stopped right after the last step
                on_steps(run.steps)
                return run
            if run.checkpoint.exists() and experiment.compute.differs_between_processors(trainer.device):
                run.leave_if_elsewhere()
            if not run.checkpoint.exists():
                run.begin(trainer.device)
                if branch_from and experiment.begin:
                    run.branch_from(Run(branch_from, root), experiment.begin, trainer.device)
            done = _resume(run, trainer)
            on_steps(done)
            title = f"{experiment.title} seed {experiment.seed}"
            with tqdm(total=run.steps, initial=done, desc=title, unit="step", disable=not progress) as bar:
                _go_on(run, trainer, done, set(branch_steps), bar, on_steps)
            run.checkpoint.unlink(missing_ok=True)
    return run


def _resume(run: Run, trainer: Trainer) -> int:
    """Return the number of steps that are done, with the trainer in the state after them."""
    if run.checkpoint.exists():
        tensors, metadata = load_tensors(run.checkpoint)
        trainer.restore(tensors)
        run.write_config()  # It may go on under a version of its reward.
        done = int(metadata["step"])
        run.truncate_after(done)
        return done
    if 0 in run.experiment.kept:
        run.save_origin(dict(trainer.student.named_parameters()))
    return 0


def _go_on(
    run: Run, trainer: Trainer, done: int, branch_steps: set[int], bar: tqdm, on_steps: Callable[[int], None]
) -> None:
    """Make the steps that are left, and write down what comes of them."""
    experiment = run.experiment
    # The laboratory's rewards are 0 or 1; one's own may be of any size.
    name, written = ("reward", ".3g") if experiment.task.data else ("accuracy", ".0%")
    shown = {name: "?"}
    evaluations, projection, begin = run.config["evaluations"], experiment.arm.projection, experiment.begin or 0

    def evaluate(step: int) -> None:
        found = trainer.evaluate(step) if step else _at_origin(run, trainer)
        run.append("evaluations", found)
        shown[name] = format(found["sampled"], written)

    if done in evaluations and done not in {line["step"] for line in run.lines("evaluations")}:
        evaluate(done)
    saved, took = time.monotonic(), 0.0
    for step in range(done, run.steps):
        if projection and trainer.projector is None and step >= begin:
            whose = train(projection.source, run.root) if projection.source else run
            trainer.project(whose.snapshot(0), whose.snapshot(begin))
        line = trainer.step(step)
        done = step + 1
        run.append("history", line)
        if done in evaluations:
            evaluate(done)
        if done in experiment.kept:
            run.save(run.snapshot_path(done), dict(trainer.student.named_parameters()))
        if done in branch_steps:
            run.save(run.state_path(done), trainer.state(), step=str(done))
        if done < run.steps and time.monotonic() - saved > max(CHECKPOINT_SECONDS, 20 * took):
            began = time.monotonic()
            run.save(run.checkpoint, trainer.state(), step=str(done))
            saved = time.monotonic()
            took = saved - began
        if line["accuracy"] is not None:
            shown[name] = format(line["accuracy"], written)
        bar.set_postfix({"loss": f"{line['loss']:.3f}"} | shown, refresh=False)
        bar.update()
        on_steps(1)


def _at_origin(run: Run, trainer: Trainer) -> dict:
    """Evaluate a run before its first step, or read what was found for another that starts from the same."""
    path = run.origin_evaluation(trainer.device, trainer.dtype)
    remedy = "delete it and run it again"
    try:
        return read_json(path, remedy)
    except OpdlabError:  # It is missing, or damaged.
        write_json(path, trainer.evaluate(0))
    return read_json(path, remedy)


def install_model(run: Run, folder: Path, dtype: str = "float32") -> Path:
    """Write the last weights of a finished run as a Hugging Face folder, whole or not at all, and return it."""
    tokenizer, model = load_student(run.experiment)
    last, part = with_weights(model, run.snapshot(run.steps)), folder.with_name(f"{folder.name}.part")
    save_model(last.to(getattr(torch, dtype)), tokenizer, part)
    return part.replace(folder)
