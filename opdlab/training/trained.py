"""Training on a task of one's own: one call, and a run that can be looked at."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from opdlab.errors import OpdlabError
from opdlab.models.folders import (
    ALPHABET,
    character_tokenizer,
    context_length,
    load_config,
    load_tokenizer,
    with_weights,
)
from opdlab.training.arms import Arm
from opdlab.training.config import Experiment, Recipe, with_fields
from opdlab.training.loop import install_model
from opdlab.training.rollouts import encode_completions, encode_prompts
from opdlab.training.store import Run
from opdlab.training.tasks import Task
from opdlab.training.trainer import Trainer, answers, score

#: Shares of a training after which weights are kept, dense early.
SNAPSHOTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
#: Shares of a training after which accuracy is measured.
EVALUATIONS = (0.5, 1.0)
#: Prompts of a batch, completions of each, and prompts of an evaluation, unless told otherwise or there are fewer.
PROMPTS, SAMPLES, EVALUATION_PROMPTS = 32, 4, 256
#: From how many tokens on a vocabulary is large, and how many logits are then held at once.
LARGE_VOCABULARY, LOGITS = 2**15, 2**28
#: Of so many prompts, the longest by characters, tokens are counted before a training begins.
CHECKED = 1000

#: Given the file of the weights at step 0 and those after it, and ``seed=`` of the nulls, measures the update.
Measure = Callable[..., Any]


def make_experiment(
    arm: Arm, task: Task, *, steps: int, learning_rate: float, seed: int = 0, name: str = "", **settings: Any
) -> Experiment:
    """Return an experiment with the defaults of :func:`opdlab.train`, as far as they fit the task and the models.

    Completions end after half the context if that is below 256 tokens. Weights are kept and accuracy is measured at
    the shares :data:`SNAPSHOTS` and :data:`EVALUATIONS` of the training. Without a GPU one thread computes, or with a
    vocabulary above 32 768 tokens all that PyTorch is set to; their number decides the last digits.

    Args:
        arm: whose models are fetched if they are named on the hub.
        task: where prompts and rewards come from.
        steps: updates.
        learning_rate: of the optimizer.
        seed: of prompts and rollouts.
        name: of the run, in messages.
        settings: any other field of an experiment, its recipe, arm or compute, such as ``prompts`` and ``samples`` of
            a batch, ``max_new_tokens``, ``schedule="cosine"``, ``threads`` or ``dtype="bfloat16"``.

    Raises:
        OpdlabError: if a field is unknown, or an arm, a task, a model or a number cannot be used.
    """
    _check_kinds(arm, task)
    arm, task = arm.fetched(), replace(task)  # whose digest is of the reward as it is now
    context, vocabulary = _sizes(arm)
    large: dict[str, Any] = {"tokens_at_once": LOGITS // vocabulary, "threads": torch.get_num_threads()}
    prompts, samples = min(PROMPTS, task.training_prompts or PROMPTS), 1 if arm.rollouts_by == "task" else SAMPLES
    recipe = Recipe(steps, prompts, samples, learning_rate)
    experiment = Experiment(arm, task, recipe, seed, min(256, context // 2), name=name)
    measured: dict[str, Any] = {
        "warmup": min(10, steps // 10),
        "evaluations": recipe.steps_at(EVALUATIONS),
        "evaluation_prompts": min(EVALUATION_PROMPTS, task.held_out or EVALUATION_PROMPTS),
        "snapshots": recipe.steps_at(SNAPSHOTS),
        "gpu": True,
    }
    experiment = with_fields(experiment, measured | (large if vocabulary > LARGE_VOCABULARY else {}) | settings)
    # The end counts: a run is finished when it has those weights, and is as good as it is then.
    kept: Any = {name: tuple(sorted({*getattr(experiment, name), steps})) for name in ("evaluations", "snapshots")}
    experiment = replace(experiment, **kept)
    _check_numbers(experiment, context)
    _check_lengths(experiment, context)
    return experiment


def _check_kinds(arm: Any, task: Any) -> None:
    """Refuse an arm and a task that are something else."""
    for role, value, kind, made in (
        ("arm", arm, Arm, "ol.sft, ol.opd or ol.rlvr"),
        ("task", task, Task, "ol.Task.from_dataset"),
    ):
        if not isinstance(value, kind):
            raise OpdlabError(f"{role} is {str(value)[:60]!r}: give one that {made} made")


def _sizes(arm: Arm) -> tuple[int, int]:
    """Return the context that student and teacher share, and the student's vocabulary."""
    if arm.student.shape:
        return dict(arm.student.shape).get("max_position_embeddings", 1024), len(ALPHABET)
    configs = []
    for role, model in {"student": arm.student, "teacher": arm.teacher or arm.student}.items():
        if (Path(model.folder) / "adapter_config.json").is_file():
            how = "merge_and_unload() of PEFT and save_pretrained, with the tokenizer"
            raise OpdlabError(f"the {role} is {model.folder!r}, a LoRA adapter: merge it with its base first, by {how}")
        if not (Path(model.folder) / "config.json").is_file():
            raise OpdlabError(
                f"the {role} is {model.folder!r}, where there is no model: give a folder with its config.json, weights "
                "and tokenizer, or OWNER/NAME on the hub"
            )
        configs.append(load_config(model.folder))
    return min(map(context_length, configs)), configs[0].vocab_size


def _check_numbers(experiment: Experiment, context: int) -> None:
    """Refuse numbers that do not fit the task, the arm or the models."""
    recipe, task, steps = experiment.recipe, experiment.task, experiment.recipe.steps
    if experiment.arm.reads_rewards and recipe.samples < 2:
        raise OpdlabError(f"samples is {recipe.samples}: give at least 2")
    limits = {
        "prompts": (recipe.prompts, task.training_prompts, "the prompts to train on"),
        "evaluation_prompts": (experiment.evaluation_prompts, task.held_out, "the prompts held out"),
        "max_new_tokens": (experiment.max_new_tokens, context - 1, "what the context leaves beside a prompt"),
        "evaluations": (max(experiment.evaluations), steps, "the steps"),
        "snapshots": (max(experiment.snapshots), steps, "the steps"),
    }
    for name, (number, most, what) in limits.items():
        if most is not None and number > most:
            raise OpdlabError(f"{name} is {number}, more than {what} ({most}): give fewer, or leave it out")


def _check_lengths(experiment: Experiment, context: int) -> None:
    """Refuse a data set with an empty prompt, or a text that is too long, before the training comes to it."""
    task, budget, folder = experiment.task, experiment.max_new_tokens, experiment.arm.student.folder
    if not task.data:
        return
    tokenizer = load_tokenizer(folder) if folder else character_tokenizer()
    looked_at = [prompt for prompt in task.data if not prompt.strip()] + sorted(task.data, key=len)[-CHECKED:]
    encode_prompts(tokenizer, task.texts(tokenizer, looked_at), context - budget)
    if experiment.arm.rollouts_by != "task":
        return
    texts = sorted(map(task.demonstration, task.data), key=len)[-CHECKED:]
    longest = max(encode_completions(tokenizer, texts), key=len)
    if len(longest) > budget:
        raise OpdlabError(
            f"the demonstration {tokenizer.decode(longest)[:40]!r} has {len(longest)} tokens with its end, but "
            f"completions are cut after max_new_tokens={budget}: raise that, or shorten it"
        )


class Trained:
    """A finished run: what happened in it, how well it does, and how its weights moved."""

    def __init__(self, run: Run, measure: Measure):
        """Look at a finished run, whose trajectory ``measure`` measures."""
        self.run, self._measure = run, measure

    def __repr__(self) -> str:
        """Say what was trained, how well it does, and if most steps changed nothing."""
        before, after = self.evaluations["sampled"].iloc[0], self.accuracy
        said = f"{self.run.experiment.title}, {self.run.steps} steps: mean reward {before:.3g} -> {after:.3g}"
        skipped = int(self.history["skipped"].sum())
        if 2 * skipped <= self.run.steps:
            return said
        cut = self.history["cut"].mean() if "cut" in self.history else 0.0  # which older runs did not write down
        why = "all completions of a prompt earned the same"
        if cut > 0.5:
            why = f"{cut:.0%} of the completions were cut at max_new_tokens, and earned 0"
        return f"{said}; {skipped} of {self.run.steps} steps changed no weight, as {why}"

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per step, with loss, mean reward, entropy, kl_teacher, norms, tokens, the share cut, seconds."""
        return self._table("history").rename(columns={"accuracy": "reward"})

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row per evaluation, with rewards of held-out prompts, greedy and sampled, cut, entropy, kl_teacher."""
        return self._table("evaluations")

    def _table(self, name: str) -> pd.DataFrame:
        table = pd.DataFrame(self.run.lines(name))
        # None becomes NaN.
        return table.astype({column: float for column in ("accuracy", "kl_teacher") if column in table})

    @property
    def accuracy(self) -> float:
        """The mean reward of completions sampled at temperature 1 on held-out prompts, at the end."""
        return float(self.evaluations["sampled"].iloc[-1])

    @property
    def model(self) -> Path:
        """A folder with the trained model, for ``from_pretrained`` or as the student of another arm."""
        folder = self.run.folder / "model"
        return folder if folder.exists() else install_model(self.run, folder)

    @cached_property
    def trajectory(self) -> Any:
        """The geometry of the update at each snapshot, an :class:`opdlab.measuring.update.Update`.

        Raises:
            OpdlabError: if there is no update: no step changed a weight, or the student started from random ones.
        """
        if self.run.experiment.arm.student.shape:
            raise OpdlabError("a student that starts from random weights has no update to measure: train it on")
        if self.history["skipped"].all():
            raise OpdlabError(f"no step of {self.run.experiment.title} changed a weight: print the run, which says why")
        origin, *steps = self.run.experiment.kept
        path = [self.run.snapshot_path(step) for step in steps]
        return self._measure(self.run.snapshot_path(origin), path, seed=self.run.experiment.seed)

    def where(self) -> Any:
        """Return where the run is, beside updates that were published, an :class:`opdlab.measuring.where.Where`."""
        adam = self.run.experiment.arm.optimizer == "adamw"  # whose steps are as long as its learning rate
        return self.trajectory.where(self.history, self.run.experiment.recipe if adam else None)

    def transcripts(self, count: int = 3) -> pd.DataFrame:
        """Return what the model writes on the first prompts of an evaluation before and after the training, graded.

        Texts are as the reward sees them, special tokens included. One that was cut ends in an ellipsis, and earns 0.

        Raises:
            OpdlabError: if fewer are held out, or the student's folder is gone.
        """
        experiment, task = self.run.experiment, self.run.experiment.task
        if replace(task).digest != experiment.config["data"]:
            warnings.warn(
                f"the reward of task {task.name!r} is not the one that {experiment.title} was trained with: it reads "
                "other values now, and these grades are by it",
                stacklevel=2,
            )
        # No teacher is asked.
        alone = Arm(experiment.arm.student, "task", "cross_entropy", weight_dtype=experiment.arm.weight_dtype)
        trainer = Trainer(replace(experiment, arm=alone))
        prompts = trainer.held_out(count)
        table: dict[str, Any] = {"prompt": prompts, "demonstration": list(map(task.demonstration, prompts))}
        tuned = with_weights(trainer.student, self.run.snapshot(self.run.steps))
        for when, model in {"before": trainer.student, "after": tuned}.items():
            rollouts = trainer.answer(model, prompts)
            texts = zip(*answers(trainer.tokenizer, rollouts), strict=True)
            table[when] = [text if ended else f"{text}…" for text, ended in texts]
            table[f"reward {when}"] = score(trainer.tokenizer, task, prompts, rollouts).tolist()
        return pd.DataFrame(table)
