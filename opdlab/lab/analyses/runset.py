"""What analyses work on: the finished runs of one seed, their updates, and how well any weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from opdlab.geometry import describe
from opdlab.lab.laboratory import Laboratory
from opdlab.models.folders import load_model
from opdlab.training.config import config_key
from opdlab.training.store import Run
from opdlab.training.trainer import Trainer

Weights = dict[str, Tensor]
#: Dimensions of the subspaces that are compared.
SIM_KS = (4, 8, 16)


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of matrices: "all" of them, and those of each block.

    >>> blocks(["layers.0.mlp.up_proj.weight"])
    {'all': ['layers.0.mlp.up_proj.weight'], 'mlp': ['layers.0.mlp.up_proj.weight']}
    """
    groups: dict[str, list[str]] = {"all": list(names)}
    for name in groups["all"]:
        groups.setdefault(describe(name).block, []).append(name)
    return groups


@torch.no_grad()
def put(weights: Mapping[str, Tensor], trainer: Trainer) -> None:
    """Give the student of a trainer other weights."""
    for name, weight in trainer.student.named_parameters():
        weight.copy_(weights[name])


@dataclass
class RunSet:
    """The runs of one seed at a scale, and of its anchor; what is not trained yet is trained when it is asked for."""

    lab: Laboratory
    seed: int

    def later(self, count: int = 1) -> int:
        """Return the seed that comes ``count`` after this one."""
        return self.lab.scale.later_seed(self.seed, count)

    def run(self, arm: str, seed: int | None = None) -> Run:
        """Return the finished run of an arm, with this seed or another."""
        return self.lab.train(arm, self.seed if seed is None else seed)

    def weights(self, arm: str, progress: float = 1.0, seed: int | None = None) -> Weights:
        """Return all weights of an arm at the snapshot nearest to a share of its training, 0 for its origin."""
        run = self.run(arm, seed)
        return run.snapshot(min(run.experiment.kept, key=lambda kept: abs(kept - progress * run.steps)))

    def update(self, arm: str, progress: float = 1.0, seed: int | None = None) -> Weights:
        """Return the update of all weights from the origin to a share of the training, in float64."""
        origin, now = self.weights(arm, 0.0, seed), self.weights(arm, progress, seed)
        return {name: weight.double() - origin[name].double() for name, weight in now.items()}

    def model(self, folder: str) -> Weights:
        """Return all weights of a model folder, in float64."""
        model = load_model(self.lab.models / self.lab.place(folder, self.seed))
        return {name: weight.detach().double() for name, weight in model.named_parameters()}

    @cached_property
    def _judge(self) -> Trainer:
        return Trainer(replace(self.lab.experiment("opd", self.seed), evaluation_samples=1))

    def evaluate(self, weights: Mapping[str, Tensor]) -> dict:
        """Return greedy and sampled accuracy, entropy and KL to the teacher of any weights of the student's shape.

        Each prompt is sampled once. All weights take the same random numbers, so differences are surer than numbers.
        """
        put(weights, self._judge)
        found = self._judge.evaluate(0)
        return {key: found[key] for key in ("greedy", "sampled", "entropy", "kl_teacher")}


def add(weights: Mapping[str, Tensor], *terms: tuple[float, Mapping[str, Tensor]]) -> Weights:
    """Return ``weights`` plus a multiple of each update, in float64."""
    return {name: weight.double() + sum(c * update[name] for c, update in terms) for name, weight in weights.items()}


def to_norms(update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Weights:
    """Scale every tensor of an update to the norm that it has in another."""
    return {name: w * (like[name].norm() / w.norm()) if w.any() else w for name, w in update.items()}


@dataclass(frozen=True)
class Part:
    """One part of an analysis, which is recorded by itself."""

    analysis: str
    runs: tuple[tuple[str, int], ...]  #: that it reads, as arms and seeds
    entries: dict[str, object] = field(default_factory=dict)  #: what all of its rows have in common, by column

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms of its runs, each once."""
        return tuple(dict.fromkeys(arm for arm, _ in self.runs))

    def key(self, lab: Laboratory) -> str:
        """Return the hash of everything that decides its rows."""
        runs = {f"{arm}-seed{seed}": lab.experiment(arm, seed).key for arm, seed in self.runs}
        return config_key({"analysis": self.analysis, "entries": self.entries, "runs": runs})


@dataclass(frozen=True)
class Analysis:
    """Something that is computed from finished runs, seed by seed, without training any more."""

    name: str  #: in records and code
    what: str  #: it finds out
    #: Turns runs, and the parts that are wanted, into a table with a row per thing compared (and matrix).
    measure: Callable[[RunSet, Sequence[Part]], pd.DataFrame]
    #: Whose runs it reads, with the seed of the run set; or, if not ``trained``, whose losses. Those that a scale does
    #: not record are left out; "()" is all that it records and that are no variants.
    arms: tuple[str, ...] = ()
    later: tuple[tuple[str, int], ...] = ()  #: arms whose runs of later seeds it reads too, and how many seeds on
    keys: tuple[str, ...] = ()  #: columns that tell apart what is compared by matrix; its record has means by block
    trained: bool = True  #: whether it needs the runs, or only what they start from
    few: bool = False  #: whether it has only the seeds of variants, because it measures the accuracy of many weights
    pairs: Callable[[Laboratory, int], list[Part]] | None = None  #: its parts; by default the whole is one part

    def seeds(self, lab: Laboratory) -> tuple[int, ...]:
        """Return the seeds that it is recorded with."""
        return lab.scale.policy.variant_seeds if self.few else lab.scale.policy.seeds

    def arms_at(self, lab: Laboratory) -> tuple[str, ...]:
        """Return the arms whose runs it reads at a scale."""
        recorded = lab.scale.policy.arms
        listed = self.arms or tuple(arm for arm in recorded if not lab.arm(arm).parent)
        return tuple(arm for arm in listed if arm in recorded)

    def parts(self, lab: Laboratory, seed: int) -> list[Part]:
        """Return what of it is recorded by itself."""
        if self.pairs:
            return self.pairs(lab, seed)
        here = [(arm, seed) for arm in self.arms_at(lab) if seed in lab.seeds_of(arm)]
        later = [(arm, lab.scale.later_seed(seed, count)) for arm, count in self.later]
        return [Part(self.name, (*here, *later))]
