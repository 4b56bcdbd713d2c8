"""Training: one loop for every arm, whose runs can be stopped and gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from opdlab.lab.budget import check_room
from opdlab.lab.grid import ARMS
from opdlab.lab.scales import Scale, get_scale
from opdlab.lab.tasks import TASKS
from opdlab.models.files import link_or_copy, load_tensors, save_tensors, write_json
from opdlab.models.folders import character_tokenizer, load_model, load_tokenizer, new_model, save_model
from opdlab.processes import cpu_threads, provenance
from opdlab.training.store import Home, Run, config_key, default_home, model_folder, partings
from opdlab.training.trainer import Learner

# Seconds between two checkpoints: what a kill can cost. But saving takes a twentieth of the time at most.
CHECKPOINT_SECONDS = 20.0


def train(
    arm: str,
    seed: int = 0,
    scale: Scale | None = None,
    *,
    home: Home | None = None,
    progress: bool = False,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> Run:
    """Train one arm, or go on where an earlier call was stopped, and return its run.

    Args:
        arm: a name in :data:`opdlab.lab.grid.ARMS`.
        seed: of prompts and rollouts (and of the weights where they start at random).
        scale: the scale; by default that of ``OPDLAB_SCALE``.
        home: where models and runs lie; by default the repository.
        progress: show a bar with step, loss, accuracy and time left.
        on_steps: called with the number of steps done since the call before; first with those of an earlier call.

    Raises:
        OpdlabError: on bad input or a loss that is not finite; what was computed is kept.
        KeyboardInterrupt: on Ctrl-C; the run goes on from its last checkpoint when it is asked for again.
    """
    scale, home = scale or get_scale(), home or default_home()
    run = Run.of(scale, arm, seed, home)
    config, checkpoint = run.config, run.folder / "checkpoint.safetensors"
    if run.finished:
        checkpoint.unlink(missing_ok=True)  # left by a call that was stopped right after the last step
        on_steps(config["recipe"]["steps"])
        return run
    for name in filter(None, (ARMS[arm].start, ARMS[arm].teacher)):
        model_folder(name, scale, home)
    check_room(scale, arm, home)
    with cpu_threads(scale.threads):
        learner = Learner(scale, ARMS[arm], scale.recipe(arm), TASKS[config["task"]], home.models(scale), seed)
        done = 0
        if not checkpoint.exists():
            write_json(run.folder / "config.json", config)
            write_json(run.folder / "provenance.json", provenance(learner.device))
            run.forget_after(-1)  # of a run killed before its first checkpoint nothing counts, not even step 0
            if "constraint" in config:
                # Until the switch a projected run is its free run: where that one is there, a part of the work is done.
                free = Run.of(scale, ARMS[arm].like, seed, home)
                run.begin_like(free, config["constraint"]["begin"], learner.device)
        if checkpoint.exists():
            tensors, metadata = load_tensors(checkpoint)
            learner.restore(tensors)
            done = int(metadata["step"])
            run.forget_after(done)
        on_steps(done)
        steps = config["recipe"]["steps"]
        bar = tqdm(total=steps, initial=done, desc=f"{arm} seed {seed}", disable=not progress, unit="step")
        accuracy = None

        def evaluate(step: int) -> None:
            nonlocal accuracy
            evaluation = learner.evaluate(step) if step else _at_origin(learner, run, home.runs(scale) / "origins")
            run.append("evaluations", evaluation)
            accuracy = evaluation["sampled"]

        def save(step: int) -> None:
            save_tensors(checkpoint, learner.state(), step=str(step))

        if done == 0 and 0 in config["snapshots"]:
            _save_origin(learner, run, home.runs(scale) / "origins")
        if done in config["evaluations"] and done not in {line["step"] for line in run.lines("evaluations")}:
            evaluate(done)
        saved, took = time.monotonic(), 0.0
        begin = config.get("constraint", {}).get("begin", steps)
        parting = partings(arm, scale)
        try:
            for step in range(done, steps):
                if step >= begin and learner.confinement is None:
                    learner.confine(_source_weights(run, scale, home), at_start=step == begin)
                line = learner.step(step)
                done = step + 1
                run.append("history", line)
                if done in config["evaluations"]:
                    evaluate(done)
                if done in config["snapshots"]:
                    save_tensors(run.snapshot_path(done), dict(learner.student.named_parameters()))
                if done in parting:
                    save_tensors(run.state_path(done), learner.state(), step=str(done))
                if done < steps and time.monotonic() - saved > max(CHECKPOINT_SECONDS, 20 * took):
                    began = time.monotonic()
                    save(done)
                    saved = time.monotonic()
                    took = saved - began
                accuracy = line["accuracy"] if line["accuracy"] is not None else accuracy
                shown = {"loss": f"{line['loss']:.3f}", "accuracy": "?" if accuracy is None else f"{accuracy:.0%}"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                on_steps(1)
        finally:
            bar.close()
        checkpoint.unlink(missing_ok=True)
    return run


def _at_origin(learner: Learner, run: Run, folder: Path) -> dict:
    """Evaluate a run before its first step, or read what was found for another that starts from the same."""
    names = ("start", "teacher", "task", "evaluation_prompts", "max_new_tokens", "micro_batch", "threads")
    decisive = {name: run.config[name] for name in names} | provenance(learner.device)
    decisive |= {"stored": learner.arm.stored, "compute": str(learner.dtype)}
    if not learner.arm.start:
        decisive["seed"] = learner.seed
    path = folder / f"{config_key(decisive)}.json"
    if not path.exists():
        write_json(path, learner.evaluate(0))
    return json.loads(path.read_text())


def _save_origin(learner: Learner, run: Run, folder: Path) -> None:
    """Save the weights before the first step, on the disk once for all runs that start from the same."""
    path = folder / f"{run.config['start']}-{learner.arm.stored}.safetensors"
    if not path.exists():
        save_tensors(path, dict(learner.student.named_parameters()))
    link_or_copy(run.snapshot_path(0), path)


def _source_weights(run: Run, scale: Scale, home: Home) -> dict[str, Tensor]:
    """Return the weights whose update gives the directions of a projected run: its own, or those of another run."""
    constraint = run.config["constraint"]
    source = run
    if "arm" in constraint:
        source = train(constraint["arm"], constraint["seed"], scale, home=home)
    return source.snapshot(constraint["step"])


def install_model(run: Run, home: Home, scale: Scale, name: str) -> Path:
    """Write the last weights of a run as a Hugging Face folder, and return it.

    Args:
        run: a finished one.
        home: where the models lie.
        scale: whose models they are.
        name: of the folder.
    """
    arm = ARMS[run.config["arm"]["name"]]
    folder = home.models(scale)
    if arm.start:
        model, tokenizer = load_model(folder / arm.start), load_tokenizer(folder / arm.start)
    else:
        model, tokenizer = new_model(scale.shapes[arm.name], run.config["seed"]), character_tokenizer()
    model.load_state_dict(run.snapshot(run.config["recipe"]["steps"]), strict=False)
    save_model(model, tokenizer, folder / name)
    return folder / name
