"""Training on a task of one's own: one call, and a run that can be looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdlab.errors import OpdlabError
from opdlab.models.files import local_folder
from opdlab.training.arms import Arm, with_local_models
from opdlab.training.config import Experiment, Recipe, with_fields
from opdlab.training.loop import install_model, train
from opdlab.training.rollouts import sample
from opdlab.training.store import Run
from opdlab.training.tasks import Task
from opdlab.training.trainer import Trainer, random_numbers, score, torch_generator

if TYPE_CHECKING:
    import pandas as pd

#: Shares of a training after which weights are kept, dense early, and after which accuracy is measured.
SNAPSHOTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
EVALUATIONS = (0.5, 1.0)
#: Prompts of a batch, completions of each, and prompts of an evaluation, unless told otherwise or there are fewer.
PROMPTS, SAMPLES, EVALUATION_PROMPTS = 32, 4, 256

#: Given the file of the weights at step 0 and those after it, and ``seed=`` of the nulls, measures the update.
Measure = Callable[..., Any]


def make_experiment(
    arm: Arm, task: Task, *, steps: int, learning_rate: float, seed: int = 0, name: str = "", **settings: Any
) -> Experiment:
    """Return an experiment with defaults that fit the task.

    A batch has 32 prompts with 4 completions each (SFT on demonstrations: 1), an evaluation 256 prompts, and where the
    task has fewer prompts, all of them. Completions end after 256 tokens, or half the student's context if that is
    less. Weights are kept and accuracy is measured at the shares :data:`SNAPSHOTS` and :data:`EVALUATIONS`.

    Args:
        arm: from :func:`opdlab.sft`, :func:`opdlab.opd` or :func:`opdlab.rlvr`. Models named on the hub are fetched.
        task: where prompts and rewards come from.
        steps: updates.
        learning_rate: of the optimizer.
        seed: of prompts and rollouts.
        name: of the run, in messages.
        settings: any other field of an experiment, its recipe, arm or compute.

    Raises:
        OpdlabError: if a field is unknown, or a model or a number cannot be used.
    """
    if steps < 1 or learning_rate <= 0:
        raise OpdlabError(f"steps is {steps} and learning_rate is {learning_rate}; expected numbers above 0")
    arm = with_local_models(arm, local_folder)
    recipe = Recipe(
        steps,
        prompts=min(PROMPTS, task.training_prompts or PROMPTS),
        samples=1 if arm.rollouts_by == "task" else SAMPLES,
        learning_rate=learning_rate,
        warmup=min(10, steps // 10),
    )
    experiment = Experiment(
        arm,
        task,
        recipe,
        seed,
        max_new_tokens=min(256, _context(arm) // 2),
        evaluations=recipe.steps_at(EVALUATIONS),
        evaluation_prompts=min(EVALUATION_PROMPTS, task.held_out or EVALUATION_PROMPTS),
        snapshots=recipe.steps_at(SNAPSHOTS),
        name=name,
    )
    return with_fields(experiment, settings)


def _context(arm: Arm) -> int:
    config = json.loads((Path(arm.student.folder) / "config.json").read_text())
    return int(config.get("max_position_embeddings", 1024))


def train_arm(
    arm: Arm, task: Task, *, out: Path | str, measure: Measure | None = None, progress: bool = True, **settings: Any
) -> Trained:
    """Train an arm on a task, or go on where an earlier call with the same arguments was stopped.

    Args:
        arm: from :func:`opdlab.sft`, :func:`opdlab.opd` or :func:`opdlab.rlvr`.
        task: such as one from :meth:`opdlab.Task.from_dataset`.
        out: the folder of the run.
        measure: what :attr:`Trained.trajectory` measures with.
        progress: show a bar.
        settings: ``steps``, ``learning_rate`` and what else :func:`make_experiment` takes.

    Raises:
        OpdlabError: on bad input, if ``out`` holds another experiment, or if the loss is not finite.
    """
    experiment, folder = make_experiment(arm, task, **settings), Path(out).expanduser()
    return Trained(train(experiment, folder, folder=folder, progress=progress), measure)


class Trained:
    """A finished run: what happened in it, how well it does, and how its weights moved."""

    def __init__(self, run: Run, measure: Measure | None = None):
        """Look at a finished run, whose trajectory is measured by ``measure``."""
        self.run, self._measure = run, measure

    def __repr__(self) -> str:
        """Say what was trained, and how well it does."""
        before, after = self.evaluations["sampled"].iloc[0], self.accuracy
        return f"{self.run.experiment.title}, {self.run.steps} steps: {before:.1%} -> {after:.1%} ({self.run.folder})"

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per step: loss, reward of the rollouts, entropy, kl_teacher, norms, tokens, seconds."""
        import pandas as pd

        return pd.DataFrame(self.run.lines("history")).rename(columns={"accuracy": "reward"})

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row per evaluation: the mean reward of held-out prompts, greedy and sampled, entropy and kl_teacher."""
        import pandas as pd

        return pd.DataFrame(self.run.lines("evaluations"))

    @property
    def accuracy(self) -> float:
        """The mean reward of sampled completions on the held-out prompts, at the end."""
        return float(self.evaluations["sampled"].iloc[-1])

    @property
    def model(self) -> Path:
        """A folder with the trained model, for ``from_pretrained`` or as the student of another arm."""
        folder = self.run.folder / "model"
        return folder if (folder / "config.json").exists() else install_model(self.run, folder)

    @cached_property
    def trajectory(self) -> Any:
        """The geometry of the update at each snapshot, an :class:`opdlab.measuring.update.Update`."""
        if self._measure is None:
            raise OpdlabError("this run came without a measure: train it by opdlab.train, or measure its snapshots")
        origin, *steps = self.run.experiment.kept
        path = [self.run.snapshot_path(step) for step in steps]
        return self._measure(self.run.snapshot_path(origin), path, seed=self.run.experiment.seed)

    def transcripts(self, count: int = 3) -> pd.DataFrame:
        """Return what the model writes on held-out prompts before the training and after it, with the rewards.

        Args:
            count: prompts, the first of an evaluation.
        """
        import pandas as pd

        experiment = self.run.experiment
        trainer = Trainer(experiment)
        prompts = experiment.task.prompts(count, random_numbers(0, "evaluation prompts", 0), evaluation=True)
        table: dict[str, Any] = {"prompt": prompts}
        for when, step in (("before", 0), ("after", self.run.steps)):
            trainer.student.load_state_dict(self.run.snapshot(step), strict=False)
            rollouts = sample(
                trainer.student,
                trainer.tokenizer,
                trainer.texts(prompts),
                max_new_tokens=experiment.max_new_tokens,
                generator=torch_generator(random_numbers(0, "evaluation rollouts", 0)),
            )
            table[when] = trainer.tokenizer.batch_decode(rollouts.completions, skip_special_tokens=True)
            table[f"reward {when}"] = score(trainer.tokenizer, experiment.task, prompts, rollouts).tolist()
        return pd.DataFrame(table)
