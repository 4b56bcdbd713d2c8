"""Scales: one name stands for a student, a teacher, a task, a budget and the resolution of the measurements.

A scale is data. The code never asks for a scale's name: it reads the fields below, so the path from a laptop to a
large model is one flag, ``--scale`` on the command line or ``OPDLAB_SCALE`` in a notebook.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from math import cos, pi

from opdlab.errors import OpdlabError
from opdlab.geometry import Resolution
from opdlab.lab.grid import ARMS, RECORDED, Arm, get_arm


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
    # The folder under data/models that holds the base, anchor, teacher and so on; and the arms that make them.
    models: str
    makers: tuple[str, ...]
    task: str
    recipes: dict[str, Recipe]
    # The shapes of models that start from random weights, or what to fetch instead (:mod:`opdlab.models.fetch`).
    shapes: dict[str, dict] = field(default_factory=dict)
    pretrained: dict[str, str] = field(default_factory=dict)
    # Of which arms and analyses a record is kept.
    recorded: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_new_tokens: int = 48
    # Tokens of a prompt and of a completion, about: what plans reckon with.
    typical_tokens: tuple[int, int] = (12, 20)
    temperature: float = 1.0
    # Sequences in one forward pass: like lengths go together, and the loss does not depend on the split.
    micro_batch: int = 32
    evaluation_prompts: int = 1024
    # Shares of the training steps at which weights are kept (dense early) and accuracy is measured.
    snapshots: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    evaluations: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    # Of the variants there are many more, so each has fewer seeds, snapshots and evaluations.
    variant_seeds: tuple[int, ...] = (0, 1, 2)
    # By arm, where it has other seeds than these.
    other_seeds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    variant_snapshots: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    variant_evaluations: tuple[float, ...] = (0.2, 1.0)
    # CPU threads of a run: small matrices gain nothing from a second one, and with one the sums keep their order.
    threads: int = 1
    # Whether a GPU is used where there is one, and the dtype of the passes there; weights and moments stay float32.
    gpu: bool = False
    gpu_only: bool = False
    compute: str = "float32"
    # Completion tokens whose logits are held at once, by whole completions; 0 for those of a whole micro-batch.
    tokens_at_once: int = 0
    # Compute the activations of a layer again instead of keeping them: a third more work, for much less memory.
    recompute: bool = False
    # The block whose matrices are followed over training, as the paper follows attention; "" for all.
    trajectory_block: str = ""
    # Whether recorded runs keep all their snapshots, or only those that other runs need; records need none.
    keep_snapshots: bool = True
    # What trains it, if it is too large for the loop of opdlab.training.loop: "trl" (opdlab.training.trl).
    engine: str = ""
    geometry: Resolution = field(
        default_factory=lambda: Resolution(
            k=16, sim_ks=(4, 8, 16), mask_rank=16, alphas=(0.3, 0.5), angle_ks=(4, 8), matched_norm=0.002
        )
    )

    def recipe(self, arm: str) -> Recipe:
        """Return the recipe of an arm."""
        found = get_arm(arm)
        recipe = self.recipes[found.budget or arm]
        return replace(recipe, learning_rate=recipe.learning_rate * found.rate)

    def maker_of(self, folder: str) -> Arm:
        """Return the arm that makes the model folder called ``folder``.

        Raises:
            OpdlabError: if none does.
        """
        for name in self.makers:
            if ARMS[name].makes == folder:
                return ARMS[name]
        raise OpdlabError(f"at {self.name} no arm makes the model {folder!r}: put its folder among the models")

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds that an arm is recorded with."""
        return self.other_seeds.get(arm, self.variant_seeds if get_arm(arm).like else self.seeds)

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
    makers=(
        "base",
        "base_small",
        "sft",
        "sft_small",
        "sft_difference",
        "teacher",
        "teacher_weak",
        "teacher_same",
        "teacher_difference",
    ),
    recorded=tuple(name for name in RECORDED if name != "opd_products"),
    analyses=("similarity", "directions", "span", "landscape", "extrapolation", "gradients"),
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

# A real pretrained model. The budgets are such that one seed is an afternoon on two CPU cores. The anchor is young, for
# from one with 42 % nothing was learned in so few steps; and with half the sequences at three times the rate, the noise
# of OPD's estimator led away from the teacher (KL .2 to .3 in 18 steps).
_FROM_ANCHOR_SMALL = Recipe(steps=32, prompts=16, samples=4, learning_rate=1e-5, warmup=3)
_SFT_SMALL = Recipe(10, 32, 1, 5e-5, "cosine", 3, (0.9, 0.95))

SMALL = Scale(
    name="small",
    summary="SmolLM2-135M-Instruct, sums and differences; minutes per run on a GPU, half an hour without",
    models="small",
    makers=("sft", "expert", "sft_products", "expert_products"),
    pretrained={"base": "smollm2"},
    task="chain_sum",
    recipes={
        "sft": _SFT_SMALL,
        "expert": replace(_SFT_SMALL, steps=100, learning_rate=1e-4, warmup=5),
        "opd": _FROM_ANCHOR_SMALL,
        "opd_full": _FROM_ANCHOR_SMALL,
        "rlvr": _FROM_ANCHOR_SMALL,
        "sft_matched": _FROM_ANCHOR_SMALL,
        "short": replace(_FROM_ANCHOR_SMALL, steps=12),
    },
    recorded=(
        *("sft", "opd", "opd_full", "rlvr", "sft_matched", "opd_short", "rlvr_short", "sft_matched_short"),
        *("opd_update4", "opd_random4", "opd_weights4", "opd_of_rlvr4", "sft_matched_update4", "opd_gradient16"),
        *("opd_top25", "opd_random25", "opd_teacher100", "opd_mix50", "opd_mix5", "opd_mix1", "opd_products"),
    ),
    seeds=(0, 1, 2),
    # The second task takes an anchor and a teacher of its own first; no claim is about it.
    other_seeds={"opd_products": (0,)},
    max_new_tokens=16,
    typical_tokens=(11, 11),
    evaluation_prompts=128,
    snapshots=(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
    evaluations=(0.5, 1.0),
    variant_snapshots=(0.1, 0.2, 0.5, 1.0),
    variant_evaluations=(1.0,),
    trajectory_block="attention",
    gpu=True,
    compute="bfloat16",
    keep_snapshots=False,
    # As in the paper where the matrices are large enough: an eighth of the smaller side for most of them (72), 16 and
    # 64; the keys and values have 192 rows.
    geometry=Resolution(k=72, sim_ks=(4, 16), mask_rank=64, alphas=(0.3, 0.5), angle_ks=(4, 16), matched_norm=0.002),
)

# One GPU of 80 GB. The recipes have the paper's rates, with fewer and shorter rollouts.
_FROM_ANCHOR_FULL = Recipe(steps=200, prompts=16, samples=4, learning_rate=1e-6, weight_decay=0.1)
_SFT_FULL = Recipe(400, 64, 1, 1e-5, "cosine", 40, (0.9, 0.95), weight_decay=0.1)

FULL = Scale(
    name="full",
    summary="Qwen3-1.7B taught by Qwen3-8B, competition mathematics; an hour or less per run on one GPU of 80 GB",
    models="full",
    makers=("sft",),
    pretrained={"base": "Qwen/Qwen3-1.7B-Base", "teacher": "Qwen/Qwen3-8B"},
    task="math",
    recipes={
        "sft": _SFT_FULL,
        "opd": _FROM_ANCHOR_FULL,
        "opd_full": _FROM_ANCHOR_FULL,
        "rlvr": _FROM_ANCHOR_FULL,
        "sft_matched": _FROM_ANCHOR_FULL,
        "short": replace(_FROM_ANCHOR_FULL, steps=50),
    },
    recorded=SMALL.recorded[:-1],
    seeds=(0,),
    variant_seeds=(0,),
    max_new_tokens=1024,
    typical_tokens=(120, 600),
    micro_batch=4,
    evaluation_prompts=256,
    snapshots=SMALL.snapshots,
    evaluations=SMALL.evaluations,
    variant_snapshots=SMALL.variant_snapshots,
    variant_evaluations=SMALL.variant_evaluations,
    trajectory_block="attention",
    gpu=True,
    gpu_only=True,
    compute="bfloat16",
    tokens_at_once=2048,
    recompute=True,
    keep_snapshots=False,
    # The paper's: 16 directions over training, masks of rank 64; an eighth of 2048 singular vectors in the angles.
    geometry=Resolution(k=256, sim_ks=(4, 16), mask_rank=64, alphas=(0.3, 0.5), angle_ks=(16, 64)),
)

FULL_SMALLER = replace(
    FULL,
    name="full-0.6b",
    summary="Qwen3-0.6B taught by Qwen3-1.7B, as full",
    models="full-0.6b",
    pretrained={"base": "Qwen/Qwen3-0.6B-Base", "teacher": "Qwen/Qwen3-1.7B"},
    geometry=replace(FULL.geometry, k=128),
)

# The paper's own recipes (2606.07082, Tables 3 to 5), for an engine that trains on many GPUs.
_OPD_OF_PAPER = Recipe(300, 8, 8, 1e-6, warmup=0, weight_decay=0.1)

PAPER = replace(
    FULL,
    name="paper",
    summary="Qwen3-8B taught by Qwen3-32B, the paper's recipes; many GPUs, by --engine trl",
    models="paper",
    pretrained={"base": "Qwen/Qwen3-8B-Base", "teacher": "Qwen/Qwen3-32B"},
    recipes={
        "sft": Recipe(5375, 256, 1, 1e-5, "cosine", 537, (0.9, 0.95), weight_decay=0.1),
        "opd": _OPD_OF_PAPER,
        "opd_full": _OPD_OF_PAPER,
        "rlvr": Recipe(1024, 64, 8, 1e-6, warmup=0, weight_decay=0.1),
        "sft_matched": _OPD_OF_PAPER,
    },
    recorded=("sft", "opd", "opd_full", "rlvr", "sft_matched"),
    max_new_tokens=16384,
    typical_tokens=(150, 6000),
    engine="trl",
    geometry=replace(FULL.geometry, k=512),
)

SCALES = {scale.name: scale for scale in (SMOKE, TINY, SMALL, FULL, FULL_SMALLER, PAPER)}


def get_scale(name: str | None = None) -> Scale:
    """Return the scale called ``name``; by default the one in ``OPDLAB_SCALE``, or tiny.

    Raises:
        OpdlabError: if there is no such scale.

    >>> get_scale("tiny").task
    'running_sum'
    """
    name = name or os.environ.get("OPDLAB_SCALE") or TINY.name
    if name not in SCALES:
        raise OpdlabError(f"there is no scale {name!r}; choose one of {', '.join(SCALES)}")
    return SCALES[name]
