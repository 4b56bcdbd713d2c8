"""Scales: one name stands for a student, a teacher, a task, a budget and the resolution of the measurements.

A scale is data. The code never asks for a scale's name: it reads the fields below, so the path from a laptop to a
large model is one flag, ``--scale`` on the command line or ``OPDLAB_SCALE`` in a notebook.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from math import cos, pi

from opdlab.arms import get_arm
from opdlab.errors import OpdlabError
from opdlab.geometry import GeometrySettings


@dataclass(frozen=True)
class Recipe:
    """The budget and the optimizer of one arm. A batch is ``prompts`` x ``samples`` sequences."""

    steps: int
    prompts: int = 32
    samples: int = 4
    learning_rate: float = 1.5e-4
    # The paper trains OPD and RLVR at a constant rate; its SFT decays along a cosine to a tenth of the peak.
    schedule: str = "constant"
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.98)
    # The paper's 0.1 shrinks weights by 1e-7 a step at its learning rate; at ours it would rival the update itself.
    weight_decay: float = 0.0
    clip: float = 1.0

    @property
    def sequences(self) -> int:
        """The number of sequences in a batch."""
        return self.prompts * self.samples

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the update that follows ``step`` updates."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "cosine":
            rate *= 0.1 + 0.45 * (1 + cos(pi * step / self.steps))
        return rate


@dataclass(frozen=True)
class Scale:
    """Everything that changes between a smoke test and a real model."""

    name: str
    summary: str
    # The folder under data/models that holds the base, anchor and teacher, and how the lab builds the first and last.
    models: str
    shapes: dict[str, dict]
    task: str
    recipes: dict[str, Recipe]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_new_tokens: int = 48
    temperature: float = 1.0
    # Sequences in one forward pass: like lengths go together, and the loss does not depend on the split.
    micro_batch: int = 32
    evaluation_prompts: int = 1024
    # Shares of the training steps at which weights are kept (dense early) and accuracy is measured.
    snapshots: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    evaluations: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    # Of the variants there are many more, so each has fewer seeds, snapshots and evaluations.
    variant_seeds: tuple[int, ...] = (0, 1, 2)
    variant_snapshots: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    variant_evaluations: tuple[float, ...] = (0.2, 1.0)
    # CPU threads of a run: small matrices gain nothing from a second one, and with one the sums keep their order.
    threads: int = 1
    geometry: GeometrySettings = field(
        default_factory=lambda: GeometrySettings(
            k=16, sim_ks=(4, 8, 16), mask_rank=16, alphas=(0.3, 0.5), angle_ks=(4, 8), matched_norm=0.002
        )
    )

    def recipe(self, arm: str) -> Recipe:
        """Return the recipe of an arm."""
        found = get_arm(arm)
        recipe = self.recipes[found.budget or arm]
        return replace(recipe, learning_rate=recipe.learning_rate * found.rate)

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds that an arm is recorded with."""
        return self.variant_seeds if get_arm(arm).like else self.seeds

    def later_seed(self, seed: int, count: int = 1) -> int:
        """Return the seed that comes ``count`` after ``seed``, beginning again after the last."""
        return self.seeds[(self.seeds.index(seed) + count) % len(self.seeds)] if seed in self.seeds else seed + count

    def snapshots_of(self, arm: str) -> tuple[float, ...]:
        """Return the shares of its training at which an arm's weights are kept."""
        return self.variant_snapshots if get_arm(arm).like else self.snapshots

    def evaluations_of(self, arm: str) -> tuple[float, ...]:
        """Return the shares of its training at which an arm's accuracy is measured."""
        return self.variant_evaluations if get_arm(arm).like else self.evaluations

    def steps_at(self, arm: str, shares: tuple[float, ...]) -> list[int]:
        """Turn shares of an arm's training into steps, without repeats."""
        steps = self.recipe(arm).steps
        return sorted({max(1, round(share * steps)) for share in shares})


_LAYER = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
_ATTENTION_AND_MLP = _LAYER | {"intermediate_size": 384, "max_position_embeddings": 128}

# One learning rate for all arms that start from the anchor, or their updates could not be compared.
_FROM_ANCHOR = Recipe(steps=640)
_PRETRAINING = Recipe(2500, 64, 1, 3e-3, "cosine", 100, (0.9, 0.95))
# About ten times the rate of the other arms, as in the paper, and stopped while there is room to improve.
_SFT = Recipe(340, 64, 1, 1.5e-3, "cosine", 40, (0.9, 0.95))
_OF_TEACHER = replace(_PRETRAINING, steps=1500)

TINY = Scale(
    name="tiny",
    summary="0.64 M parameters, a sum with running totals; minutes per run on one CPU core",
    models="tiny",
    shapes={
        "base": _ATTENTION_AND_MLP | {"num_hidden_layers": 3},
        "base_small": _ATTENTION_AND_MLP | {"num_hidden_layers": 2},
        "teacher": _ATTENTION_AND_MLP | {"num_hidden_layers": 4},
        "teacher_weak": _ATTENTION_AND_MLP | {"num_hidden_layers": 4},
        "teacher_same": _ATTENTION_AND_MLP | {"num_hidden_layers": 3},
        "teacher_difference": _ATTENTION_AND_MLP | {"num_hidden_layers": 4},
    },
    task="running_sum",
    recipes={
        "base": _PRETRAINING,
        "base_small": _PRETRAINING,
        "teacher": _OF_TEACHER,
        "teacher_weak": replace(_OF_TEACHER, steps=750),
        "teacher_same": _OF_TEACHER,
        "teacher_difference": _OF_TEACHER,
        "sft": _SFT,
        # The smaller student, and the second task, need longer to get as far.
        "sft_long": replace(_SFT, steps=600),
        "opd": _FROM_ANCHOR,
        "opd_full": _FROM_ANCHOR,
        "rlvr": _FROM_ANCHOR,
        "sft_matched": _FROM_ANCHOR,
        # A fifth of it: all variants, and the runs that they are compared with.
        "short": replace(_FROM_ANCHOR, steps=128),
    },
)

SMOKE = replace(
    TINY,
    name="smoke",
    summary="the models of tiny, six steps per run; seconds, to see that everything works",
    recipes={
        arm: replace(recipe, steps=6, prompts=8, samples=min(recipe.samples, 2), warmup=2)
        for arm, recipe in TINY.recipes.items()
    },
    max_new_tokens=16,
    evaluation_prompts=16,
    seeds=(0, 1, 2),
    snapshots=(0.1, 0.25, 0.5, 0.75, 1.0),
    evaluations=(0.5, 1.0),
    variant_seeds=(0,),
    variant_snapshots=(0.2, 0.5, 1.0),
    variant_evaluations=(1.0,),
)

SCALES = {scale.name: scale for scale in (SMOKE, TINY)}
# Names kept for models that need a hub and a GPU.
RESERVED = ("small", "full")


def get_scale(name: str | None = None) -> Scale:
    """Return the scale called ``name``; by default the one in ``OPDLAB_SCALE``, or tiny.

    Raises:
        OpdlabError: if there is no such scale.

    >>> get_scale("tiny").task
    'running_sum'
    """
    name = name or os.environ.get("OPDLAB_SCALE") or TINY.name
    if name in RESERVED:
        raise OpdlabError(f"the scale {name!r} is reserved for real models and cannot run yet; use {', '.join(SCALES)}")
    if name not in SCALES:
        raise OpdlabError(f"there is no scale {name!r}; choose one of {', '.join(SCALES)}")
    return SCALES[name]
