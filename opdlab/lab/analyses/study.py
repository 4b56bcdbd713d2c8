"""What analyses work on: the finished runs of one seed, their updates, and how well any weights do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from opdlab.geometry import weight_matrices
from opdlab.lab.grid import ARMS
from opdlab.lab.scales import Scale
from opdlab.lab.tasks import TASKS
from opdlab.models.folders import load_model
from opdlab.training.loop import train
from opdlab.training.store import Home, Run
from opdlab.training.trainer import Learner

Weights = dict[str, Tensor]


class Study:
    """The runs of one seed at a scale; what is not trained yet is trained when it is asked for."""

    def __init__(self, scale: Scale, home: Home, seed: int, progress: bool = False):
        """Take the runs of a seed.

        Args:
            scale: at which scale.
            home: where models and runs lie.
            seed: of the runs.
            progress: show bars.
        """
        self.scale, self.home, self.seed, self.progress = scale, home, seed, progress

    def follow(self, items: Collection, what: str) -> Iterator:
        """Go through ``items`` under a bar called ``what``."""
        yield from tqdm(items, desc=f"{what}, seed {self.seed}", disable=not self.progress)

    def later(self, count: int = 1) -> int:
        """Return the seed that comes ``count`` after this one."""
        return self.scale.later_seed(self.seed, count)

    def run(self, arm: str, seed: int | None = None) -> Run:
        """Return the finished run of an arm, with this seed or another."""
        seed = self.seed if seed is None else seed
        return train(arm, seed, self.scale, home=self.home, progress=self.progress)

    def weights(self, arm: str, progress: float = 1.0, seed: int | None = None) -> Weights:
        """Return all weights of an arm at the snapshot nearest to a share of its training, 0 for its origin."""
        run = self.run(arm, seed)
        step = progress * run.config["recipe"]["steps"]
        return run.snapshot(min(run.config["snapshots"], key=lambda kept: abs(kept - step)))

    def update(self, arm: str, progress: float = 1.0, seed: int | None = None) -> Weights:
        """Return the update of all weights from the origin to a share of the training, in float64."""
        origin, now = self.weights(arm, 0.0, seed), self.weights(arm, progress, seed)
        return {name: weight.double() - origin[name].double() for name, weight in now.items()}

    def model(self, folder: str) -> Weights:
        """Return all weights of a model folder, in float64."""
        model = load_model(self.home.models(self.scale) / folder)
        return {name: weight.detach().double() for name, weight in model.named_parameters()}

    def learner(self, arm: str) -> Learner:
        """Return the models and the task of an arm, as they are at the start of its training."""
        found = ARMS[arm]
        task = TASKS[found.task or self.scale.task]
        return Learner(self.scale, found, self.scale.recipe(arm), task, self.home.models(self.scale), self.seed)

    @cached_property
    def _judge(self) -> Learner:
        return self.learner("opd")

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor]) -> dict:
        """Return greedy and sampled accuracy, entropy and KL to the teacher of any weights of the student's shape."""
        for name, weight in self._judge.student.named_parameters():
            weight.copy_(weights[name])
        found = self._judge.evaluate(0)
        return {key: found[key] for key in ("greedy", "sampled", "entropy", "kl_teacher")}


def layers(update: Mapping[str, Tensor]) -> Weights:
    """Choose the matrices of attention and MLP, which all geometry is about."""
    return weight_matrices(update)


def add(weights: Mapping[str, Tensor], *terms: tuple[float, Mapping[str, Tensor]]) -> Weights:
    """Return ``weights`` plus a multiple of each update, in float64."""
    return {name: weight.double() + sum(c * update[name] for c, update in terms) for name, weight in weights.items()}


@dataclass(frozen=True)
class Analysis:
    """Something that is computed from finished runs, seed by seed, without training any more.

    Attributes:
        name: the name in records and code.
        what: what it finds out.
        measure: turns a study into a table, one row per thing compared (and matrix).
        arms: whose runs it reads, with the seed of the study; or, if not ``trained``, whose losses.
        later: arms whose runs of later seeds it reads too, and how many seeds on.
        keys: the columns that tell apart what is compared, if a row is of one matrix; its record has means by block.
        trained: whether it needs the runs, or only what they start from.
        few_seeds: take the seeds of variants, because it measures the accuracy of many weights.
        one_seed: take the first seed only, because it is for looking at, not for averages.
    """

    name: str
    what: str
    measure: Callable[[Study], pd.DataFrame]
    arms: tuple[str, ...]
    later: tuple[tuple[str, int], ...] = ()
    keys: tuple[str, ...] = ()
    trained: bool = True
    few_seeds: bool = False
    one_seed: bool = False

    def seeds(self, scale: Scale) -> tuple[int, ...]:
        """Return the seeds that it is recorded with."""
        if self.one_seed:
            return scale.seeds[:1]
        return scale.variant_seeds if self.few_seeds else scale.seeds

    def runs(self, scale: Scale, seed: int) -> list[tuple[str, int]]:
        """Return the runs that it reads, as arms and seeds."""
        here = [(arm, seed) for arm in self.arms if seed in scale.seeds_of(arm)]
        return here + [(arm, scale.later_seed(seed, count)) for arm, count in self.later]
