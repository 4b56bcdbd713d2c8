"""The arms: what each way of training starts from, which sequences it sees, and which signal it takes from them.

An arm is data too. All of them run through one loop (:mod:`opdlab.training`) and differ in the entries below only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from opdlab import objectives
from opdlab.errors import OpdlabError


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: the name in commands, records and code.
        label: the name in figures.
        start: the model folder it starts from, or "" for random weights.
        sequences: who writes the completions: the "task" (worked solutions), the "student" or the "teacher".
        signal: the per-token loss, a key of :data:`SIGNALS`.
        task: where the prompts come from, if not from the scale's task.
    """

    name: str
    label: str
    start: str
    sequences: str
    signal: str
    task: str = ""

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is there, as all arms that start from the anchor are measured against it."""
        return self.start == "anchor"

    @property
    def listens_to_teacher(self) -> bool:
        """Whether the loss itself reads the teacher's logits."""
        return self.signal in ("opd_sampled", "reverse_kl")


ARMS = {
    arm.name: arm
    for arm in (
        # The two models that the lab makes for itself.
        Arm("base", "pretraining", start="", sequences="task", signal="cross_entropy", task="short_tasks"),
        Arm("teacher", "teacher", start="", sequences="task", signal="cross_entropy", task="teacher_mixture"),
        # The paper's protocol: SFT makes the anchor, OPD and RLVR start from it.
        Arm("sft", "SFT", start="base", sequences="task", signal="cross_entropy"),
        Arm("opd", "OPD", start="anchor", sequences="student", signal="opd_sampled"),
        Arm("opd_full", "OPD, full vocabulary", start="anchor", sequences="student", signal="reverse_kl"),
        Arm("rlvr", "RLVR", start="anchor", sequences="student", signal="grpo"),
        # The control that the paper lacks: SFT with OPD's origin, prompts, learning rate, steps and batch.
        Arm("sft_matched", "matched SFT", start="anchor", sequences="teacher", signal="cross_entropy"),
    )
}

# What a record is kept of; base and teacher are only means to an end.
RECORDED = ("sft", "opd", "opd_full", "rlvr", "sft_matched")


def get_arm(name: str) -> Arm:
    """Return the arm called ``name``.

    Raises:
        OpdlabError: if there is no such arm.
    """
    if name not in ARMS:
        raise OpdlabError(f"there is no arm {name!r}; choose one of {', '.join(ARMS)}")
    return ARMS[name]


# A signal turns a micro-batch into a loss per token: student logits (B, T, V), tokens (B, T), teacher logits
# (B, T, V) or None, and the advantage of each row (B,) or None  ->  loss (B, T).
Signal = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def _cross_entropy(student: Tensor, tokens: Tensor, teacher: Tensor | None, advantages: Tensor | None) -> Tensor:
    return objectives.cross_entropy(student, tokens)


def _opd_sampled(student: Tensor, tokens: Tensor, teacher: Tensor, advantages: Tensor | None) -> Tensor:
    logps = objectives.token_logps(student, tokens)
    return objectives.policy_gradient(logps, objectives.opd_advantages(logps, objectives.token_logps(teacher, tokens)))


def _reverse_kl(student: Tensor, tokens: Tensor, teacher: Tensor, advantages: Tensor | None) -> Tensor:
    return objectives.reverse_kl(student, teacher)


def _grpo(student: Tensor, tokens: Tensor, teacher: Tensor | None, advantages: Tensor) -> Tensor:
    logps = objectives.token_logps(student, tokens)
    return objectives.policy_gradient(logps, advantages[:, None].expand_as(logps))


SIGNALS: dict[str, Signal] = {
    "cross_entropy": _cross_entropy,
    "opd_sampled": _opd_sampled,
    "reverse_kl": _reverse_kl,
    "grpo": _grpo,
}
