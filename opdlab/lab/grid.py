"""The book's arms by name: those of the paper, those that make models, and the variants, by what they differ in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from opdlab.training.arms import Arm, Model, Projection, Tokens


@dataclass(frozen=True)
class NamedArm:
    """An arm of the book, with what the book says of it; models are named by their folders among a scale's."""

    name: str  #: in commands, records and code
    label: str  #: in figures
    arm: Arm
    parent: str = ""  #: the arm that it is a variant of
    recipe: str = ""  #: a key of a scale's recipes
    produces: str = ""  #: the model folder that its last weights become with seed 0
    lr_factor: float = 1.0  #: on the recipe's learning rate
    directions_of: str = ""  #: the arm whose update gives the directions of a projection, if not its own
    seed_shift: int = 0  #: added to the seed, for a run that must never be another's with fewer steps
    other_seed: bool = False  #: take the directions from the run of the next seed
    recorded: bool = True  #: whether a record can be kept of it, or it only makes a model

    @property
    def start(self) -> str:
        """The model folder that it starts from, or "" for random weights."""
        return self.arm.student.folder

    @property
    def teacher(self) -> str:
        """The model folder of its teacher, or ""."""
        return self.arm.teacher.folder if self.arm.teacher else ""

    def directions(self, seed: int, next_seed: int) -> tuple[str, int] | None:
        """Return arm and seed of the other run that a projected run takes its directions from, if it does."""
        if not (self.directions_of or self.other_seed):
            return None
        return self.directions_of or self.parent, next_seed if self.other_seed else seed


def _arm(name: str, label: str, rollouts_by: str, loss: str, start: str = "anchor", **entries: Any) -> NamedArm:
    teacher = None if rollouts_by == "task" else Model("teacher")
    return NamedArm(name, label, Arm(Model(start), rollouts_by, loss, teacher), **{"recipe": "arm"} | entries)


def _maker(name: str, label: str, start: str = "", **entries: Any) -> NamedArm:
    own: dict[str, Any] = {"recipe": name, "produces": name, "recorded": False}
    return _arm(name, label, "task", "cross_entropy", start, **own | entries)


_PAPER = (
    # The paper's protocol: SFT makes the anchor, OPD and RLVR start from it.
    _arm("sft", "SFT", "task", "cross_entropy", "base", recipe="sft", produces="anchor"),
    _arm("opd", "OPD", "student", "opd_sampled"),
    _arm("opd_full", "OPD, full vocabulary", "student", "reverse_kl"),
    _arm("rlvr", "RLVR", "student", "grpo"),
    # The controls that the paper lacks: SFT with OPD's origin, prompts, learning rate, steps and batch; and credits
    # without meaning.
    _arm("sft_matched", "matched SFT", "teacher", "cross_entropy"),
    _arm("random_signs", "random signs", "student", "random_signs"),
)

# What the lab makes for itself; no record is kept of these.
_MAKERS = (
    _maker("base", "pretraining"),
    _maker("teacher", "teacher"),
    _maker("teacher_same", "teacher of the student's size", recipe="teacher"),
    # From a pretrained base, the teacher is SFT that goes on for longer.
    _maker("expert", "teacher, by SFT", "base", produces="teacher"),
    # The anchor that has half learned the skill, where no other scale has one.
    _maker("young", "young anchor", "base", recipe="sft"),
    # The teacher that RLVR makes of the anchor itself, with prompts of its own.
    _arm("teacher_rlvr", "teacher made by RLVR", "student", "grpo", recipe="teacher_rlvr", produces="teacher_rlvr",
         recorded=False, seed_shift=1000),
)  # fmt: skip

_arms: dict[str, NamedArm] = {arm.name: arm for arm in (*_PAPER, *_MAKERS)}


def vary(arms: dict[str, NamedArm], parent: str, name: str, label: str, **differences: Any) -> None:
    """Add an arm that is like another but for some fields.

    Args:
        arms: what it is added to.
        parent: the other arm.
        name: in commands and records.
        label: in figures.
        differences: fields of the arm itself, or of what the book says of it.
    """
    own = {key: differences.pop(key) for key in list(differences) if key in NamedArm.__dataclass_fields__}
    models: dict[str, Any] = {key: Model(differences[key]) for key in ("student", "teacher") if key in differences}
    arm = replace(arms[parent].arm, **differences | models)
    arms[name] = replace(arms[parent], name=name, label=label, parent=parent, produces="", arm=arm, **own)


_vary = partial(vary, _arms)

# The same arms from an anchor that has half learned the skill: there the skill is learned, here it is elicited.
for _name in ("opd", "opd_full", "rlvr", "sft_matched", "random_signs"):
    _vary(_name, f"young_{_name}", _arms[_name].label, student="young")
    _arms[f"young_{_name}"] = replace(_arms[f"young_{_name}"], parent="")
# Which tokens count.
_vary("opd", "opd_top25", "top 25 %", tokens=Tokens("log-ratio", 0.25))
_vary("opd", "opd_random25", "random 25 %", tokens=Tokens("random", 0.25))
_vary("opd", "opd_first30", "first 30 %", tokens=Tokens("first", 0.3))
_vary("opd", "opd_last30", "last 30 %", tokens=Tokens("last", 0.3))
# Who writes.
_vary("opd", "opd_teacher100", "all by the teacher", rollouts_by="teacher")
_vary("opd", "opd_stale", "all by the anchor", rollouts_by="initial student")
_vary(
    "opd_full", "opd_stale_forward", "all by the anchor, forward KL", loss="forward_kl", rollouts_by="initial student"
)
# The objective mixed with RLVR's.
for _share in (50, 5, 1):
    _vary("opd", f"opd_mix{_share}", f"α = {_share / 100:g}", alpha=_share / 100)
# The teacher.
_vary("opd", "opd_same_teacher", "teacher of the same size", teacher="teacher_same")
_vary("opd", "opd_rlvr_teacher", "teacher made by RLVR", teacher="teacher_rlvr")
# Confined from step 60 on.
_vary("opd", "opd_gradient16", "gradients in 16", projection=Projection(acts_on="gradient"))
_vary("opd", "opd_update4", "updates in 4", projection=Projection(k=4))
_vary("opd", "opd_random_rescaled4", "4 random, full size", projection=Projection(k=4, space="random", rescale=True))
_vary("opd", "opd_weights4", "4 of W0", projection=Projection(k=4, space="weights"))
_vary("opd", "opd_of_rlvr4", "4 of RLVR", projection=Projection(k=4), directions_of="rlvr")
_vary("opd", "opd_of_seed4", "4 of another seed", projection=Projection(k=4), other_seed=True)
_vary("sft_matched", "sft_matched_update4", "updates in 4", projection=Projection(k=4))
_vary("rlvr", "rlvr_update4", "updates in 4", projection=Projection(k=4))
_vary("sft", "sft_gradient16", "gradients in 16", projection=Projection(acts_on="gradient"))
# Mechanism.
_vary("opd", "opd_sign", "the sign of the credit", loss="opd_sign")
_vary("opd", "opd_sequence_mean", "one credit per completion", loss="opd_sequence_mean")
_vary("opd_full", "opd_forward", "forward KL", loss="forward_kl")
_vary("opd", "opd_half_rate", "half the learning rate", lr_factor=0.5)
_vary("opd", "opd_quadruple_rate", "four times the learning rate", lr_factor=4.0)
_vary("opd", "opd_sgd", "SGD", optimizer="sgd", lr_factor=200.0)
_vary("opd", "opd_bf16", "weights stored in bf16", weight_dtype="bfloat16")
_vary("rlvr", "rlvr_bf16", "weights stored in bf16", weight_dtype="bfloat16")
# How long.
_vary("rlvr", "rlvr_3", "three times the steps", recipe="arm3")
_vary("rlvr", "rlvr_10", "ten times the steps", recipe="arm10")

#: All arms, by name.
#:
#: :meta hide-value:
ARMS: Mapping[str, NamedArm] = MappingProxyType(_arms)
#: The paper's arms and the controls that it lacks.
PAPER = tuple(arm.name for arm in _PAPER)
#: The arms that a record can be kept of, which are all but those that only make models.
#:
#: :meta hide-value:
RECORDED = tuple(name for name, arm in ARMS.items() if arm.recorded)


def ancestor(name: str) -> str:
    """Return the arm whose colour an arm has in figures: the one that it descends from, or is like from another anchor.

    >>> ancestor("opd_update4"), ancestor("young_rlvr")
    ('opd', 'rlvr')
    """
    return ancestor(ARMS[name].parent) if ARMS[name].parent else name.removeprefix("young_")
