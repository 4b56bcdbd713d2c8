"""Scales: one name stands for the models, the task, the budget, what is recorded, and how it is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from opdlab.errors import OpdlabError
from opdlab.lab.grid import RECORDED
from opdlab.training.config import Compute, Recipe


@dataclass(frozen=True)
class Models:
    """The models of a scale."""

    folder: str  #: under data/models, which holds the base, anchor, teacher and so on
    makers: tuple[str, ...]  #: the arms that make them
    shapes: dict[str, dict] = field(default_factory=dict)  #: of the models that are not made from others
    pretrained: dict[str, str] = field(default_factory=dict)  #: what is fetched instead (opdlab.models.fetch)
    taken: dict[str, str] = field(default_factory=dict)  #: models of another scale, by the folder here
    per_seed: tuple[str, ...] = ()  #: of which each seed makes its own; that of seed 0 has no number in its name
    dtype: str = "float32"  #: that the models are stored in, also those that are fetched with their own tokenizers
    instead: str = ""  #: the folder of another scale that is taken where all of its models are there
    tokenizer: str = ""  #: the pretrained model whose tokenizer, chat template and ends all take; "" for each its own

    @property
    def given(self) -> tuple[str, ...]:
        """The folders of the models that no arm of the scale makes."""
        return (*self.pretrained, *self.taken)


@dataclass(frozen=True)
class Budget:
    """What the runs of a scale may take."""

    recipes: dict[str, Recipe]  #: by name; an arm has its own or names another
    max_new_tokens: int = 48  #: of a completion
    typical_tokens: tuple[int, int] = (12, 20)  #: of a prompt and of a completion, which plans are computed from
    temperature: float = 1.0  #: of both models in training
    evaluation_prompts: int = 1024  #: of one evaluation
    evaluation_samples: int = 1  #: of each of these prompts
    confined_from: float = 0.0  #: the share of their training after which arms are confined; 0 for the arm's own


@dataclass(frozen=True)
class RecordPolicy:
    """What is recorded at a scale. Variants are many, so each has fewer seeds, snapshots and evaluations.

    Snapshots and evaluations are shares of the training, after which weights are kept or accuracy is measured.
    """

    arms: tuple[str, ...]
    analyses: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variant_seeds: tuple[int, ...] = (0, 1, 2)
    other_seeds: dict[str, tuple[int, ...]] = field(default_factory=dict)  #: by arm, where it has others than these
    snapshots: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    evaluations: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    other_evaluations: dict[str, tuple[float, ...]] = field(default_factory=dict)  #: by arm, as other seeds
    variant_snapshots: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    variant_evaluations: tuple[float, ...] = (0.2, 1.0)
    trajectory_block: str = ""  #: the block that is followed over training, as the paper follows attention; "" for all
    keep_snapshots: bool = True  #: of recorded runs; if not, they keep only what other runs need


@dataclass(frozen=True)
class Scale:
    """Everything that changes between a smoke test and a real model."""

    name: str  #: on the command line and in OPDLAB_SCALE
    summary: str
    task: str  #: of all arms but those in ``tasks``
    models: Models
    budget: Budget
    policy: RecordPolicy
    tasks: dict[str, str] = field(default_factory=dict)  #: by arm, where it, or what it is a variant of, has another
    compute: Compute = field(default_factory=Compute)
    gpu_only: bool = False
    engine: str = ""  #: what trains it, if it is too large for opdlab.training.loop; "trl" or nothing

    def later_seed(self, seed: int, count: int = 1) -> int:
        """Return the seed that comes ``count`` after ``seed``, beginning again after the last."""
        seeds = self.policy.seeds
        return seeds[(seeds.index(seed) + count) % len(seeds)] if seed in seeds else seed + count


_SHAPE = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 384,
    "max_position_embeddings": 128,
}  # fmt: skip
_LAYERS = {"base": 3, "teacher": 4, "teacher_same": 3, "young": 3}
_PRETRAINING = Recipe(2000, 64, 1, 3e-3, "cosine", 100, (0.9, 0.95))
# Rate and steps are chosen by OPD's size on seeds from 100 on, which no verdict uses, and by nothing else. No gradient
# is ever so long that it would be clipped.
_FROM_ANCHOR = Recipe(300, learning_rate=1.5e-6, clip=1e6)
_OF_TEACHERS = {"teacher": "teacher_mixture", "teacher_same": "teacher_mixture"}

# Small updates of a model that has the skill and seldom shows it. The base is pretrained on a corpus by careful and
# careless authors, SFT goes on with the careless ones, and what starts from there takes short steps.
TINY = Scale(
    name="tiny",
    summary="0.64 M parameters, sums, updates of the paper's sizes; two minutes per run on one CPU core",
    task="running_sum",
    tasks=_OF_TEACHERS | {"base": "corpus", "sft": "careless_sum"},
    models=Models(
        folder="tiny",
        makers=("base", "sft", "teacher", "teacher_same", "teacher_rlvr"),
        shapes={name: _SHAPE | {"num_hidden_layers": layers} for name, layers in _LAYERS.items()},
        taken={"young": "tiny-learning/anchor"},
        per_seed=("anchor", "teacher_rlvr"),
        dtype="bfloat16",
    ),
    budget=Budget(
        {
            "base": _PRETRAINING,
            "teacher": replace(_PRETRAINING, steps=1500),
            "sft": Recipe(1000, 64, 1, 1e-4, "cosine", 100, (0.9, 0.95)),
            "arm": _FROM_ANCHOR,
            "arm3": replace(_FROM_ANCHOR, steps=900),
            "arm10": replace(_FROM_ANCHOR, steps=3000),
            "teacher_rlvr": replace(_FROM_ANCHOR, steps=1000, learning_rate=2e-5),
        },
        evaluation_prompts=512,
        evaluation_samples=8,
    ),
    policy=RecordPolicy(
        arms=RECORDED,
        analyses=("similarity", "span", "landscape", "extrapolation", "gradients", "linearity", "retention", "taught"),
        other_seeds={
            **dict.fromkeys(("opd", "sft"), tuple(range(8))),
            # As many as were asked for, when three had left a claim undecided, by the table of open questions.
            "opd_first30": tuple(range(4)),
            "opd_random25": tuple(range(7)),
        },
        evaluations=(0.2, 1.0),
        variant_evaluations=(1.0,),
    ),
)

# The laboratory that the book had first, where the skill is learned in long steps: the five arms that stay.
TINY_LEARNING = replace(
    TINY,
    name="tiny-learning",
    summary="the first laboratory, as it was: updates twenty times larger, of a model that half has the skill",
    tasks=_OF_TEACHERS | {"base": "short_tasks"},
    models=replace(
        TINY.models, folder="tiny-learning", makers=("base", "sft", "teacher"), taken={}, per_seed=(), dtype="float32"
    ),
    budget=Budget(
        {
            "base": replace(_PRETRAINING, steps=2500),
            "teacher": replace(_PRETRAINING, steps=1500),
            # Stopped while there is room to improve.
            "sft": Recipe(340, 64, 1, 1.5e-3, "cosine", 40, (0.9, 0.95)),
            "arm": Recipe(steps=640),
        }
    ),
    policy=RecordPolicy(arms=("sft", "opd", "opd_full", "rlvr", "sft_matched")),
)

SMOKE = replace(
    TINY,
    name="smoke",
    summary="the models of tiny, six steps per run; seconds, to see that everything works",
    models=replace(
        TINY.models, folder="smoke", makers=(*TINY.models.makers, "young"), taken={}, instead="tiny", per_seed=()
    ),
    budget=replace(
        TINY.budget,
        recipes={
            arm: replace(recipe, steps=6, prompts=8, samples=min(recipe.samples, 2), warmup=2)
            for arm, recipe in TINY.budget.recipes.items()
        },
        max_new_tokens=16,
        evaluation_prompts=16,
        evaluation_samples=1,
    ),
    policy=replace(
        TINY.policy,
        seeds=(0, 1),
        snapshots=(0.2, 0.5, 1.0),
        evaluations=(0.5, 1.0),
        variant_seeds=(0,),
        other_seeds={},
        variant_snapshots=(0.2, 0.5, 1.0),
    ),
)

# A real pretrained model, on the grid of bfloat16. Passes are in bfloat16 on CPUs that have it, and the optimizer works
# on float32. SFT is on a mixture of tasks in which the target is rare, so that the anchor shows the skill seldom; the
# teacher's SFT is on nothing but the target. One anchor serves all seeds. All of it is meant to be made in a night by
# any two cores: so a step has 16 completions, random signs have one seed, and the confined arms go on for forty steps.
#
# As at tiny, rate and steps are chosen by OPD's size on pilots, and no gradient is clipped. Frozen before the first
# recorded run. Pilots of 40 steps with 16 completions each began at a KL to the teacher of 0.64 nats a token. At 3e-5
# it was 0.79 in the end if four questions were asked four times each, and 0.69 if sixteen were asked once, for credits
# of single tokens are mostly noise. (With the full vocabulary it was 0.52.) At 2e-5 it was 0.59, with a norm of 0.062 %
# and 84 % of the weights unchanged. A walk like this passes 0.15 % after 200 steps.
_FROM_MIXTURE = Recipe(200, prompts=16, samples=1, learning_rate=2e-5, clip=1e6)
_CONFINED = ("opd_update4", "opd_random_rescaled4", "opd_of_rlvr4")

SMALL = Scale(
    name="small",
    summary="SmolLM2-135M-Instruct, updates near the paper's sizes; 20 minutes to two hours per run on a CPU core",
    task="three_terms",
    tasks={"sft": "rarely_three_terms"},
    models=Models("small", ("sft", "expert"), pretrained={"base": "smollm2"}, dtype="bfloat16"),
    budget=Budget(
        {
            "sft": Recipe(1000, 8, 1, 1e-4, "cosine", 100, (0.9, 0.95)),
            "expert": Recipe(1000, 8, 1, 3e-4, "cosine", 100, (0.9, 0.95)),
            "arm": _FROM_MIXTURE,
            "rlvr": replace(_FROM_MIXTURE, prompts=4, samples=4),  # which it compares with each other
            **dict.fromkeys(_CONFINED, replace(_FROM_MIXTURE, steps=80)),
        },
        max_new_tokens=24,
        typical_tokens=(15, 19),
        evaluation_prompts=128,
        evaluation_samples=4,
        confined_from=0.5,
    ),
    policy=RecordPolicy(
        arms=("sft", "opd", "rlvr", "sft_matched", "random_signs", *_CONFINED),
        seeds=(0, 1, 2),
        other_seeds={"sft": (0,), "random_signs": (0,)},
        snapshots=(0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
        evaluations=(1.0,),
        # After two fifths it is compared with the arms that were confined halfway there.
        other_evaluations={"opd": (0.4, 1.0)},
        variant_snapshots=(0.5, 0.75, 1.0),
        variant_evaluations=(1.0,),
        trajectory_block="attention",
        keep_snapshots=False,
    ),
    # Logits of the tokens of completions only, which are few beside those of the mixture's questions.
    compute=Compute(dtype="bfloat16", cpu_dtype="bfloat16", gpu=True, tokens_at_once=4096),
)

# One GPU of 80 GB. The recipes have the paper's rates, with fewer and shorter rollouts. As in the paper, the student
# starts from a base model and the teacher is one that was trained for chats, which ends with another token. So the
# student takes the teacher's tokenizer, SFT teaches it the chat template and that end, and all prompts are written by
# this template: OPD compares the two on sequences that both know.
FULL = Scale(
    name="full",
    summary="Qwen3-1.7B taught by Qwen3-8B, competition mathematics; an hour or less per run on one GPU of 80 GB",
    task="math",
    models=Models(
        "full",
        ("sft",),
        pretrained={"base": "Qwen/Qwen3-1.7B-Base", "teacher": "Qwen/Qwen3-8B"},
        tokenizer="teacher",
    ),
    budget=Budget(
        {
            "sft": Recipe(400, 64, 1, 1e-5, "cosine", 40, (0.9, 0.95), weight_decay=0.1),
            "arm": Recipe(steps=200, prompts=16, samples=4, learning_rate=1e-6, weight_decay=0.1),
        },
        max_new_tokens=1024,
        typical_tokens=(120, 600),
        evaluation_prompts=256,
    ),
    policy=RecordPolicy(
        arms=(
            *("sft", "opd", "opd_full", "rlvr", "sft_matched", "random_signs"),
            *("opd_update4", "opd_random_rescaled4", "opd_weights4", "opd_of_rlvr4", "sft_matched_update4"),
            *("opd_gradient16", "opd_top25", "opd_random25", "opd_teacher100", "opd_mix50", "opd_mix5", "opd_mix1"),
        ),
        seeds=(0,),
        variant_seeds=(0,),
        snapshots=(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
        evaluations=(0.5, 1.0),
        variant_snapshots=(0.1, 0.2, 0.5, 1.0),
        variant_evaluations=(1.0,),
        trajectory_block="attention",
        keep_snapshots=False,
    ),
    compute=Compute(dtype="bfloat16", micro_batch=4, gpu=True, tokens_at_once=2048, recompute=True),
    gpu_only=True,
)

FULL_SMALLER = replace(
    FULL,
    name="full-0.6b",
    summary="Qwen3-0.6B taught by Qwen3-1.7B, as full",
    models=replace(
        FULL.models, folder="full-0.6b", pretrained={"base": "Qwen/Qwen3-0.6B-Base", "teacher": "Qwen/Qwen3-1.7B"}
    ),
)

# The paper's own recipes (2606.07082, Tables 3 to 5), for an engine that trains on many GPUs.
PAPER = replace(
    FULL,
    name="paper",
    summary="Qwen3-8B taught by Qwen3-32B, the paper's recipes; many GPUs, by --engine trl",
    models=replace(FULL.models, folder="paper", pretrained={"base": "Qwen/Qwen3-8B-Base", "teacher": "Qwen/Qwen3-32B"}),
    budget=replace(
        FULL.budget,
        recipes={
            "sft": Recipe(5375, 256, 1, 1e-5, "cosine", 537, (0.9, 0.95), weight_decay=0.1),
            "arm": Recipe(300, 8, 8, 1e-6, warmup=0, weight_decay=0.1),
            "rlvr": Recipe(1024, 64, 8, 1e-6, warmup=0, weight_decay=0.1),
        },
        max_new_tokens=16384,
        typical_tokens=(150, 6000),
    ),
    policy=replace(FULL.policy, arms=("sft", "opd", "opd_full", "rlvr", "sft_matched")),
    engine="trl",
)

SCALES = {scale.name: scale for scale in (SMOKE, TINY, TINY_LEARNING, SMALL, FULL, FULL_SMALLER, PAPER)}


def get_scale(name: str | None = None) -> Scale:
    """Return a scale by its name, by default that of ``OPDLAB_SCALE``, or tiny; raises an OpdlabError if there is none.

    >>> get_scale("tiny").task
    'running_sum'
    """
    name = name or os.environ.get("OPDLAB_SCALE") or TINY.name
    if name not in SCALES:
        run = "; a run of your own is opened by the same call of ol.train again" if os.path.isdir(name) else ""
        raise OpdlabError(f"there is no scale {name!r}; choose one of {', '.join(SCALES)}{run}")
    return SCALES[name]
