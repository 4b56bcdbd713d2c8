"""The laboratory: a scale and a folder, and with them every experiment of the book by its arm and seed."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from opdlab.errors import OpdlabError
from opdlab.lab.grid import ARMS, NamedArm
from opdlab.lab.scales import Scale, get_scale
from opdlab.lab.tasks import TASKS
from opdlab.models.files import cache_folder
from opdlab.processes import computes_in_bfloat16
from opdlab.training.arms import Model
from opdlab.training.config import Experiment, Recipe
from opdlab.training.loop import train
from opdlab.training.store import Run
from opdlab.training.tasks import Task


def default_root() -> Path:
    """Return the folder in ``OPDLAB_HOME``, the repository that this package lies in, or if it lies in none a cache."""
    if home := os.environ.get("OPDLAB_HOME"):
        return Path(home).expanduser()
    around = Path(__file__).resolve().parents[2]
    return around if _is_repository(around) else cache_folder() / "home"


def _is_repository(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file()


@dataclass(frozen=True)
class Laboratory:
    """The experiments of the book at one scale, and where their files lie."""

    scale: Scale
    root: Path  #: holds data/models, data/records and runs
    arms: Mapping[str, NamedArm] = field(default_factory=lambda: dict(ARMS), repr=False)
    tasks: Mapping[str, Task] = field(default_factory=lambda: dict(TASKS), repr=False)
    #: The digests of the claims that a record is made to judge, by name, since they may be changed afterwards.
    claims: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, scale: str | None = None, root: Path | None = None) -> Laboratory:
        """Return the laboratory of a scale (:func:`opdlab.lab.scales.get_scale`) in ``root`` or the repository."""
        return cls(get_scale(scale), root.expanduser() if root else default_root())

    def on_this_machine(self) -> Laboratory:
        """Return the laboratory as it trains here, which on a CPU without bfloat16 is in float32."""
        scale = self.scale
        if computes_in_bfloat16():
            return self
        return replace(self, scale=replace(scale, compute=replace(scale.compute, cpu_dtype="float32")))

    @property
    def models(self) -> Path:
        """The folder with the base, anchor, teacher and so on."""
        models, folders = self.scale.models, self.root / "data" / "models"
        # Those that six steps made are not those of the other scale.
        whole = models.instead and all(
            (folders / models.instead / self.arms[arm].produces).is_dir() for arm in models.makers
        )
        return folders / (models.instead if whole else models.folder)

    @property
    def records(self) -> Path:
        """The folder with the recorded tables."""
        return self.root / "data" / "records" / self.scale.name

    @property
    def runs(self) -> Path:
        """The folder with the runs, which is not part of the repository."""
        return self.root / "runs" / self.scale.name

    @property
    def elsewhere(self) -> str:
        """What a message about a missing model or record ends with, where ``root`` is not the book's repository."""
        if _is_repository(self.root):
            return ""
        return " (the book's own: git clone https://github.com/opdlab/opdlab, and set OPDLAB_HOME to it)"

    # --- experiments --------------------------------------------------------------------------------------------------

    def experiment(self, name: str, seed: int = 0) -> Experiment:
        """Return the experiment of an arm and a seed; raises as :meth:`recipe` does."""
        named, policy, budget, recipe = self.arm(name), self.scale.policy, self.scale.budget, self.recipe(name)
        evaluations, snapshots = policy.evaluations, policy.snapshots
        if named.parent:
            evaluations, snapshots = policy.variant_evaluations, policy.variant_snapshots
        if named.start:
            student = self.model(self.place(named.start, seed))
        else:
            student = Model(shape=tuple(self.scale.models.shapes[name].items()))
        arm = replace(named.arm, student=student)
        if named.teacher:
            arm = replace(arm, teacher=self.model(self.place(named.teacher, seed)))
        source = named.directions(seed, self.scale.later_seed(seed))
        if arm.projection and source:
            arm = replace(arm, projection=replace(arm.projection, source=self.experiment(*source)))
        tasks = self.scale.tasks
        return Experiment(
            arm=arm,
            task=self.tasks[tasks.get(name) or tasks.get(named.parent) or self.scale.task],
            recipe=recipe,
            seed=seed + named.seed_shift,
            max_new_tokens=budget.max_new_tokens,
            temperature=budget.temperature,
            evaluations=recipe.steps_at(policy.other_evaluations.get(name, evaluations)),
            evaluation_prompts=budget.evaluation_prompts,
            evaluation_samples=budget.evaluation_samples,
            snapshots=recipe.steps_at(snapshots),
            compute=self.scale.compute,
            name=name,
        )

    def arm(self, name: str) -> NamedArm:
        """Return the arm called ``name`` as the scale has it, or raise an OpdlabError if there is none."""
        if name not in self.arms:
            raise OpdlabError(f"there is no arm {name!r}; 'opdlab scales' lists them")
        named, start = self.arms[name], self.scale.budget.confined_from
        if named.arm.projection and start:
            return replace(named, arm=replace(named.arm, projection=replace(named.arm.projection, start=start)))
        return named

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of an arm, or raise an OpdlabError if the scale has none."""
        named, recipes = self.arm(name), self.scale.budget.recipes
        recipe = recipes.get(name) or recipes.get(named.recipe)
        if recipe is None:
            raise OpdlabError(f"{self.scale.name} has no recipe for arm {name!r}; it has those of {', '.join(recipes)}")
        return replace(recipe, learning_rate=recipe.learning_rate * named.lr_factor)

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Return the seeds that an arm is recorded with."""
        policy = self.scale.policy
        return policy.other_seeds.get(name, policy.variant_seeds if self.arm(name).parent else policy.seeds)

    # --- models -------------------------------------------------------------------------------------------------------

    def place(self, name: str, seed: int) -> str:
        """Return the folder of a model for a seed: a name, with a number where each seed has its own.

        >>> Laboratory.at("tiny").place("anchor", 3), Laboratory.at("tiny").place("teacher", 3)
        ('anchor-3', 'teacher')
        """
        return f"{name}-{seed}" if seed and name in self.scale.models.per_seed else name

    def models_of(self, name: str, seed: int) -> tuple[str, ...]:
        """Return the folders of the models that an arm needs for a seed."""
        named = self.arm(name)
        return tuple(self.place(model, seed) for model in (named.start, named.teacher) if model)

    def model(self, name: str) -> Model:
        """Return a model by the name of its folder. Where that is missing, its digest is taken from the records.

        A model that the scale takes from the Hugging Face hub, tokenizer and all, is then named as it is there.
        """
        folder, models = self.models / name, self.scale.models
        published = models.pretrained.get(name, "") if models.tokenizer in ("", name) else ""
        if folder.is_dir():
            return Model(str(folder))
        return Model(published if "/" in published else str(folder), known=self._recorded_digest(name))

    def _recorded_digest(self, name: str) -> str:
        path = self.records / "runs.csv"
        for row in csv.DictReader(path.read_text().splitlines()) if path.is_file() else ():
            if row["arm"] in self.arms and name in self.models_of(row["arm"], int(row["seed"])):
                start = self.place(self.arms[row["arm"]].start, int(row["seed"]))
                return row["student" if name == start else "teacher"]
        return ""

    def model_folder(self, name: str) -> Path:
        """Return the folder of a model, or raise an OpdlabError if it is not there."""
        if not (self.models / name).is_dir():
            raise OpdlabError(
                f"there is no model in {self.models / name}: run 'opdlab models --scale {self.scale.name}' first"
                f"{self.elsewhere}"
            )
        return self.models / name

    def maker_of(self, folder: str) -> tuple[NamedArm, int]:
        """Return arm and seed that make the model folder called ``folder``, or raise an OpdlabError if none does."""
        name, _, number = folder.rpartition("-")
        seed = int(number) if name in self.scale.models.per_seed and number.isdigit() else 0
        for maker in map(self.arm, self.scale.models.makers):
            if self.place(maker.produces, seed) == folder:
                return maker, seed
        raise OpdlabError(f"at {self.scale.name} no arm makes the model {folder!r}: put its folder among the models")

    # --- runs ---------------------------------------------------------------------------------------------------------

    def run(self, name: str, seed: int = 0) -> Run:
        """Return the run of an arm and a seed, which need not have begun."""
        return Run(self.experiment(name, seed), self.runs)

    def train(
        self,
        name: str,
        seed: int = 0,
        *,
        change: Callable[[Experiment], Experiment] = lambda experiment: experiment,
        progress: bool = False,
        on_steps: Callable[[int], None] = lambda steps: None,
    ) -> Run:
        """Train the experiment of an arm and a seed, or go on with it (:func:`opdlab.training.loop.train`).

        Args:
            name: of the arm.
            seed: of prompts and rollouts.
            change: makes another experiment of it.
            progress: show a bar.
            on_steps: called with the steps that were done.

        Raises:
            OpdlabError: if a model is missing, and whatever the loop raises.
        """
        named = self.arm(name)
        for folder in self.models_of(name, seed):
            self.model_folder(folder)  # which says what is missing
        experiment = change(self.experiment(name, seed))
        return train(
            experiment,
            self.runs,
            branch_from=self.experiment(named.parent, seed) if named.parent and experiment.arm.projection else None,
            branch_steps=tuple(self.branch_steps(name)),
            progress=progress,
            on_steps=on_steps,
        )

    def branch_steps(self, name: str) -> set[int]:
        """Return the steps at which the projected runs that the scale records branch off from the runs of an arm."""
        return {begin for other, begin in self._projected() if other.parent == name}

    def _projected(self) -> Iterator[tuple[NamedArm, int]]:
        """Yield the projected arms that the scale records, each with the step where it begins."""
        for named in map(self.arm, self.scale.policy.arms):
            if named.arm.projection:
                yield named, self.recipe(named.name).steps_at((named.arm.projection.start,))[0]

    def kept_steps(self, name: str) -> set[int]:
        """Return the steps whose weights a run still has once it is recorded.

        They are all that it took, or only those that other runs need: before they branch off, or for their directions.
        """
        taken = self.experiment(name).kept
        if self.scale.policy.keep_snapshots:
            return set(taken)
        last_branch = max(self.branch_steps(name), default=0)
        # Of which seed makes no difference here.
        sources = ((other.directions(0, 1), begin) for other, begin in self._projected())
        read = {begin for source, begin in sources if source and source[0] == name}
        return {0, self.recipe(name).steps} | {step for step in taken if step <= last_branch} | read
