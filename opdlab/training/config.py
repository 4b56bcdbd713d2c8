"""Experiments: everything that decides a run, held together as one value.

An :class:`Experiment` is an arm (:mod:`opdlab.training.arms`), a task (:mod:`opdlab.training.tasks`), a recipe and a
seed. It is its own identity: its key is a hash of everything that decides the result, and names the folder of the run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property
from math import cos, inf, pi
from types import MappingProxyType
from typing import Any

import torch

from opdlab.errors import OpdlabError
from opdlab.models.folders import load_tokenizer, settings_digest
from opdlab.processes import computes_in_bfloat16
from opdlab.training.arms import Arm, changed_fields
from opdlab.training.rules import DECAYS, FLAG, LIMIT, POSITIVE, STEPS, Checked, number, of_kind, one_of, whole
from opdlab.training.tasks import Task

#: What other libraries call a field, and what it is called here.
ELSEWHERE = {
    "num_generations": "samples", "batch_size": "prompts", "per_device_train_batch_size": "prompts",
    "lr": "learning_rate", "max_completion_length": "max_new_tokens", "max_grad_norm": "clip",
    "lr_scheduler_type": "schedule", "warmup_steps": "warmup", "bf16": "dtype", "gradient_checkpointing": "recompute",
}  # fmt: skip
#: The largest learning rate that leaves AdamW within float32.
LARGEST_RATE = 1e30
_DTYPE = one_of("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe(Checked):
    """The budget and the optimizer of a run. A batch is ``prompts`` x ``samples`` completions."""

    steps: int
    prompts: int = 32
    samples: int = 4
    learning_rate: float = 1.5e-4
    #: The paper trains OPD and RLVR at a constant rate; its SFT decays along a cosine to a tenth of the peak.
    schedule: str = "constant"
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.98)
    #: The paper's 0.1 shrinks weights by 1e-7 a step at its learning rate; at the book's it would rival the update.
    weight_decay: float = 0.0
    clip: float = 1.0

    rules = MappingProxyType({
        "steps": whole(1), "prompts": whole(1), "samples": whole(1),
        "learning_rate": number(f"a number above 0 and up to {LARGEST_RATE:g}", lambda rate: 0 < rate <= LARGEST_RATE),
        "schedule": one_of("constant", "cosine"), "warmup": whole(0), "betas": DECAYS, "clip": LIMIT,
        "weight_decay": number("a number, 0 or above", lambda decay: 0 <= decay < inf),
    })  # fmt: skip

    @property
    def completions(self) -> int:
        """The number of completions in a batch."""
        return self.prompts * self.samples

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the update that follows ``step`` updates."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "cosine":
            rate *= 0.1 + 0.45 * (1 + cos(pi * step / self.steps))
        return rate

    def steps_at(self, shares: tuple[float, ...]) -> tuple[int, ...]:
        """Turn shares of the training into steps, without repeats.

        >>> Recipe(steps=50).steps_at((0.001, 0.1, 1.0))
        (1, 5, 50)
        """
        return tuple(sorted({max(1, round(share * self.steps)) for share in shares}))


@dataclass(frozen=True)
class Compute(Checked):
    """How a run is computed. None of it is meant to change a result by more than rounding."""

    dtype: str = "float32"  #: of the passes on a GPU; weights and moments stay float32
    cpu_dtype: str = "float32"  #: of the passes without a GPU; few CPUs gain by less, those with avx512_bf16 do
    micro_batch: int = 32  #: completions in one pass, about; like lengths go together, whatever the loss
    threads: int = 1  #: of the CPU; with one, sums keep their order, and small matrices gain nothing from a second
    gpu: bool = False  #: use a GPU where there is one
    tokens_at_once: int = 0  #: completion tokens whose logits are held at once; 0 for those of a whole micro-batch
    recompute: bool = False  #: compute the activations of a layer again instead of keeping them

    rules = MappingProxyType({
        "dtype": _DTYPE, "cpu_dtype": _DTYPE, "micro_batch": whole(1), "threads": whole(1), "tokens_at_once": whole(0),
        "gpu": FLAG, "recompute": FLAG,
    })  # fmt: skip

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return what passes compute in on a device; an OpdlabError if in bfloat16 on a CPU that lacks it."""
        if device.type == "cuda":
            return getattr(torch, self.dtype)
        if self.cpu_dtype == "bfloat16" and not computes_in_bfloat16():
            raise OpdlabError("cpu_dtype is bfloat16, and this CPU has no avx512_bf16: give float32, or another scale")
        return getattr(torch, self.cpu_dtype)

    def differs_between_processors(self, device: torch.device) -> bool:
        """Tell whether passes differ between processors by more than rounding in float32."""
        return device.type != "cuda" and self.cpu_dtype != "float32"


@dataclass(frozen=True)
class Experiment(Checked):
    """Everything that decides a run."""

    arm: Arm
    task: Task
    recipe: Recipe
    seed: int = 0  #: of prompts and rollouts, and of the weights where they start at random
    max_new_tokens: int = 64  #: where a completion is cut
    temperature: float = 1.0  #: of both models in training, in rollouts and losses; evaluations sample at 1
    evaluations: tuple[int, ...] = ()  #: steps after which accuracy is measured, beside step 0
    evaluation_prompts: int = 256
    evaluation_samples: int = 1  #: of each prompt, beside the greedy completion
    snapshots: tuple[int, ...] = ()  #: steps after which the weights are kept, beside step 0
    compute: Compute = Compute()
    name: str = ""  #: of the run in folders and messages; it decides nothing

    rules = MappingProxyType({
        "seed": whole(0), "max_new_tokens": whole(1), "temperature": POSITIVE, "evaluations": STEPS, "snapshots": STEPS,
        "evaluation_prompts": whole(1), "evaluation_samples": whole(1), "name": of_kind(str, "a text"),
        "arm": of_kind(Arm, "an Arm"), "task": of_kind(Task, "a Task"), "recipe": of_kind(Recipe, "a Recipe"),
        "compute": of_kind(Compute, "a Compute"),
    })  # fmt: skip

    @property
    def begin(self) -> int | None:
        """The step after which training is projected, or None."""
        return self.recipe.steps_at((self.arm.projection.start,))[0] if self.arm.projection else None

    @property
    def kept(self) -> tuple[int, ...]:
        """The steps whose weights are kept, which are 0, those in ``snapshots``, a projection's start and the last.

        Of a model that starts from random weights only the last.
        """
        if self.arm.student.shape:
            return (self.recipe.steps,)
        steps = {0, self.begin or 0, *self.snapshots, self.recipe.steps}
        return tuple(sorted(step for step in steps if step <= self.recipe.steps))

    @cached_property
    def config(self) -> dict:
        """All that decides the result, as JSON values; an OpdlabError if a model is missing or a reward fails."""
        arm = self.arm
        config: dict[str, Any] = {
            "arm": changed_fields(arm), "student": arm.student.identity,
            "teacher": arm.teacher.identity if arm.teacher else None,
            # A data set's digest says what it is: its name is for messages.
            "task": "" if self.task.data else self.task.name, "data": self.task.digest, "recipe": asdict(self.recipe),
            "seed": self.seed, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature,
            "micro_batch": self.compute.micro_batch, "threads": self.compute.threads,
            "evaluation_prompts": self.evaluation_prompts, "evaluations": [0, *self.evaluations],
            "snapshots": self.kept,
        }  # fmt: skip
        # Named only where it is not as usual, so that a new kind of entry leaves older records valid.
        if self.task.chat and arm.student.folder:
            template = str(load_tokenizer(arm.student.folder).chat_template or "")
            config["template"] = hashlib.sha256(template.encode()).hexdigest()[:8]
        if self.task.data and arm.student.folder:
            config["settings"] = [settings_digest(model.folder) for model in (arm.student, arm.teacher) if model]
        if self.task.version:
            config["version"] = self.task.version
        if self.evaluation_samples != 1:
            config["evaluation_samples"] = self.evaluation_samples
        dtypes = {"compute": self.compute.dtype, "cpu_compute": self.compute.cpu_dtype}
        config |= {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}
        if projection := arm.projection:
            # With which step of which run gives the directions.
            run = {"run": projection.source.key} if projection.source else {}
            config["projection"] = changed_fields(projection) | {"begin": self.begin, "step": self.begin} | run
        return json.loads(json.dumps(config))

    @cached_property
    def key(self) -> str:
        """The first 8 hex digits of the SHA-256 of :attr:`config`."""
        return config_key(self.config)

    @property
    def title(self) -> str:
        """What the run is called."""
        return self.name or self.arm.loss

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        return f"{self.title}-seed{self.seed}-{self.key}"


def config_key(config: dict) -> str:
    """Return the first 8 hex digits of the SHA-256 of ``config``."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def with_fields(experiment: Experiment, settings: dict[str, Any]) -> Experiment:
    """Return an experiment with fields replaced by name, be they its own or of its recipe, arm or compute.

    Raises:
        OpdlabError: if no part has such a field, naming those that are near, or a value breaks its rule.
    """
    parts = {part: getattr(experiment, part) for part in ("recipe", "arm", "compute")}
    part_of = {item.name: part for part, owner in ({"": experiment} | parts).items() for item in fields(owner)}
    changes: dict[str, dict[str, Any]] = {part: {} for part in ("", *parts)}
    for name, value in settings.items():
        if name not in part_of:
            names = sorted(part_of.keys() - parts.keys())
            near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, names, 3) or names
            raise OpdlabError(f"an experiment has no field {name!r}: choose another, such as {', '.join(near)}")
        changes[part_of[name]][name] = value
    changed = {part: replace(owner, **changes[part]) for part, owner in parts.items()}
    return replace(experiment, **changed | changes[""])
