"""The book's arms by name: those of the paper, those that make models, and the variants.

Each is an :class:`opdlab.training.arms.Arm` whose models are named by their folders at a scale, with what the book
needs beside it: a label, the recipe, and the arm that it is a variant of. A variant's line says what it differs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from opdlab.training.arms import Arm, Model, Projection, Tokens


@dataclass(frozen=True)
class NamedArm:
    """An arm of the book; its models are named by their folders among a scale's models."""

    name: str  #: in commands, records and code
    label: str  #: in figures
    arm: Arm
    parent: str = ""  #: the arm that it is a variant of
    recipe: str = ""  #: a key of a scale's recipes
    task: str = ""  #: where the prompts come from, if not from the scale's task
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

    @property
    def models(self) -> tuple[str, ...]:
        """The model folders that it needs."""
        return tuple(filter(None, (self.start, self.teacher)))

    def directions(self, seed: int, next_seed: int) -> tuple[str, int] | None:
        """Return arm and seed of the other run that a projected run takes its directions from, if it does."""
        projection = self.arm.projection
        if projection is None or not (self.directions_of or self.other_seed or projection.final):
            return None
        return self.directions_of or self.parent, next_seed if self.other_seed else seed


def _from_anchor(name: str, label: str, rollouts_by: str, loss: str) -> NamedArm:
    return NamedArm(name, label, Arm(Model("anchor"), rollouts_by, loss, Model("teacher")), recipe=name)


def _imitating(name: str, label: str, start: str, **entries: Any) -> NamedArm:
    return NamedArm(name, label, Arm(Model(start), "task", "cross_entropy"), **{"recipe": name} | entries)


_PAPER = (
    # The paper's protocol: SFT makes the anchor, OPD and RLVR start from it.
    _imitating("sft", "SFT", "base", produces="anchor"),
    _from_anchor("opd", "OPD", "student", "opd_sampled"),
    _from_anchor("opd_full", "OPD, full vocabulary", "student", "reverse_kl"),
    _from_anchor("rlvr", "RLVR", "student", "grpo"),
    # The control that the paper lacks: SFT with OPD's origin, prompts, learning rate, steps and batch.
    _from_anchor("sft_matched", "matched SFT", "teacher", "cross_entropy"),
)


def _maker(name: str, label: str, start: str = "", **entries: Any) -> NamedArm:
    return _imitating(name, label, start, recorded=False, **{"produces": name} | entries)


# What the lab makes for itself; no record is kept of these.
_MAKERS = (
    _maker("base", "pretraining", task="short_tasks"),
    _maker("teacher", "teacher", task="teacher_mixture"),
    _maker("teacher_weak", "teacher, stopped early", task="teacher_mixture"),
    _maker("teacher_same", "teacher of the student's size", task="teacher_mixture"),
    _maker("teacher_difference", "teacher of the second task", task="difference_mixture"),
    _maker("base_small", "pretraining, smaller", task="short_tasks"),
    _maker("sft_small", "SFT, smaller", "base_small", recipe="sft_long", produces="anchor_small"),
    _maker("sft_difference", "SFT, second task", "base", task="running_difference", recipe="sft_long",
           produces="anchor_difference"),
    # From a pretrained base, the teacher is SFT that goes on for longer.
    _maker("expert", "teacher, by SFT", "base", produces="teacher"),
    _maker("sft_products", "SFT, products", "base", task="products", recipe="sft", produces="anchor_products"),
    _maker("expert_products", "teacher of products", "base", task="products", recipe="expert",
           produces="teacher_products"),
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


def project(
    arms: dict[str, NamedArm], parent: str, name: str, label: str, directions_of: str = "", other_seed: bool = False,
    **how: Any,
) -> None:  # fmt: skip
    """Add an arm that is like another but projected.

    Args:
        arms: what it is added to.
        parent: the other arm.
        name: in commands and records.
        label: in figures.
        directions_of: the arm whose update gives the directions, if not its own.
        other_seed: take the directions from the run of the next seed.
        how: fields of its :class:`~opdlab.training.arms.Projection`.
    """
    projection = Projection(**how)
    vary(arms, parent, name, label, projection=projection, directions_of=directions_of, other_seed=other_seed)


_vary, _project = partial(vary, _arms), partial(project, _arms)


# Variants take a fifth of the steps, enough to learn, and so do the arms that they are compared with.
for _name, _label in (("opd", "OPD"), ("opd_full", "OPD, full vocabulary"), ("rlvr", "RLVR"),
                      ("sft_matched", "matched SFT")):  # fmt: skip
    _vary(_name, f"{_name}_short", _label, recipe="short")

# Other teachers, another student, another task: the rows of the paper's Table 1.
_vary("opd_short", "opd_weak_teacher", "weaker teacher", teacher="teacher_weak")
_vary("opd_short", "opd_same_teacher", "teacher of the same size", teacher="teacher_same")
_vary("opd_short", "opd_small", "smaller student", student="anchor_small")
_vary("opd_short", "opd_difference", "second task", student="anchor_difference", teacher="teacher_difference",
      task="running_difference")  # fmt: skip
_vary("opd_short", "opd_products", "second task", student="anchor_products", teacher="teacher_products",
      task="products")  # fmt: skip

# Which tokens count: the paper's quarter and half, by the signed log-ratio or by chance, and on to one in a hundred.
for _share in (50, 25, 5, 1):
    for _short, _ranking in (("top", "log-ratio"), ("random", "random")):
        _vary("opd_short", f"opd_{_short}{_share}", f"{_short} {_share} %",
              tokens=Tokens(_ranking, _share / 100, per_completion=_share >= 5))  # fmt: skip
_vary("opd_short", "opd_absolute5", "largest 5 %", tokens=Tokens("absolute log-ratio", 0.05))
_vary("opd_short", "opd_entropy5", "uncertain 5 %", tokens=Tokens("entropy", 0.05))

# Who writes.
for _share in (25, 50, 75):
    _vary("opd_short", f"opd_teacher{_share}", f"{_share} % by the teacher", teacher_share=_share / 100)
_vary("opd_short", "opd_teacher100", "all by the teacher", rollouts_by="teacher")
_vary("opd_short", "opd_stale", "all by the anchor", rollouts_by="initial student")

# OPD's objective mixed with RLVR's: the paper's grid, raw, and three points with gradients of equal norm.
for _share in (75, 50, 25, 5, 1):
    _vary("opd_short", f"opd_mix{_share}", f"α = {_share / 100:g}", alpha=_share / 100)
for _share in (50, 25, 5):
    _vary("opd_short", f"opd_balanced{_share}", f"α = {_share / 100:g}, balanced", alpha=_share / 100, balanced=True)

# Projected training: the paper's (16 directions, gradients), the strict kind, other widths, other directions, other
# starts, and the other arms.
_project("opd_short", "opd_gradient16", "gradients in 16", acts_on="gradient")
_project("opd_short", "opd_gradient4", "gradients in 4", acts_on="gradient", k=4)
for _k in (16, 4, 2):
    _project("opd_short", f"opd_update{_k}", f"updates in {_k}", k=_k)
_project("opd_short", "opd_attention16", "gradients in 16, attention", acts_on="gradient", block="attention")
_project("opd_short", "opd_reset16", "gradients in 16, new moments", acts_on="gradient", reset=True)
_project("opd_short", "opd_random16", "gradients in 16 random", space="random", acts_on="gradient")
_project("opd_short", "opd_random4", "4 random directions", k=4, space="random")
_project("opd_short", "opd_rescaled4", "updates in 4, full size", k=4, rescale=True)
_project("opd_short", "opd_random_rescaled4", "4 random, full size", k=4, space="random", rescale=True)
_project("opd_short", "opd_weights4", "4 of W0", k=4, space="weights")
_project("opd_short", "opd_final4", "4 of its end", k=4, final=True)
_project("opd_short", "opd_of_rlvr4", "4 of RLVR", k=4, directions_of="rlvr_short")
_project("opd_short", "opd_of_seed4", "4 of another seed", k=4, other_seed=True)
for _share in (5, 10, 40):
    _project("opd_short", f"opd_from{_share}", f"from {_share} %", k=4, start=_share / 100)
for _name in ("sft", "sft_matched_short", "rlvr_short"):
    _stem = _name.removesuffix("_short")
    _project(_name, f"{_stem}_gradient16", "gradients in 16", acts_on="gradient")
    _project(_name, f"{_stem}_update4", "updates in 4", k=4)
# The controls again, projected.
_project("opd_top25", "opd_top25_update4", "top 25 %, updates in 4", k=4)
_project("opd_mix5", "opd_mix5_update4", "α = 0.05, updates in 4", k=4)
_project("opd_teacher100", "opd_teacher100_update4", "all by the teacher, updates in 4", k=4)

# Mechanism. In 24 steps Muon moves as far as AdamW at this rate. SGD moves a third as far at twice its rate here; at
# eight times its rate here it diverges.
_vary("opd_short", "opd_sequence_mean", "one credit per completion", loss="opd_sequence_mean")
_vary("opd_short", "opd_sign", "the sign of the credit", loss="opd_sign")
_vary("opd_full_short", "opd_forward", "forward KL", loss="forward_kl")
_vary("opd_short", "opd_sgd", "SGD", optimizer="sgd", lr_factor=200.0)
_vary("opd_short", "opd_muon", "Muon", optimizer="muon", lr_factor=2.0)
for _name, _label, _rate in (("half", "half", 0.5), ("double", "twice", 2.0), ("quadruple", "four times", 4.0)):
    _vary("opd_short", f"opd_{_name}_rate", f"{_label} the learning rate", lr_factor=_rate)
_vary("opd_short", "opd_bf16", "weights stored in bf16", weight_dtype="bfloat16")
_project("opd_short", "opd_entries", "an eighth of the entries", space="entries")
_project("opd_short", "opd_random_entries", "a random eighth", space="random entries")

#: All arms, by name.
#:
#: :meta hide-value:
ARMS: Mapping[str, NamedArm] = MappingProxyType(_arms)
#: The paper's arms and matched SFT.
PAPER = tuple(arm.name for arm in _PAPER)
#: The arms that a record can be kept of, which are all but those that only make models.
#:
#: :meta hide-value:
RECORDED = tuple(name for name, arm in ARMS.items() if arm.recorded)


def ancestor(name: str) -> str:
    """Return the paper's arm that an arm descends from, which gives its colour in figures.

    >>> ancestor("opd_top25_update4")
    'opd'
    """
    return ancestor(ARMS[name].parent) if ARMS[name].parent else name
