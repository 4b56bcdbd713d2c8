"""The arms: what each way of training starts from, which sequences it sees, and which signal it takes from them.

An arm is data too. All of them run through one loop (:mod:`opdlab.training.loop`) and differ in the entries below
only: the paper's arms first, then those that make models, then the variants, each of which differs from the arm that it
is ``like`` in what is written in its line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.training.objectives import READ_REWARDS, READ_TEACHER
from opdlab.training.projection import Constraint


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: the name in commands, records and code.
        label: the name in figures.
        start: the model folder it starts from, or "" for random weights.
        sequences: who writes the completions: the "task" (worked solutions), the "student", the "teacher", or "stale":
            the student as it was at the start.
        signal: the per-token loss, a key of :data:`opdlab.training.objectives.LOSSES`.
        task: where the prompts come from, if not from the scale's task.
        teacher: the model folder of the teacher, or "".
        makes: the model folder that its last weights become with seed 0, or "".
        like: the arm that it varies, or "".
        budget: the recipe it follows, a key of a scale's recipes, if not its own name.
        teacher_share: share of the prompts whose completions the teacher writes instead.
        ranking: what chooses the tokens that count (:data:`opdlab.training.objectives.RANKINGS`), or "" for all.
        token_share: the share of tokens that counts.
        per_completion: choose tokens within each completion, not within a batch.
        alpha: weight of ``signal`` in a mixture with RLVR's, which gets the rest; None for no mixture.
        balanced: mix gradients scaled to equal norms, not the raw ones.
        constraint: what training is confined to, or None.
        optimizer: "adamw", "sgd" or "muon".
        rate: factor on the recipe's learning rate.
        stored: dtype that weights are rounded to after each step, if not float32.
    """

    name: str
    label: str
    start: str
    sequences: str
    signal: str
    task: str = ""
    teacher: str = ""
    makes: str = ""
    like: str = ""
    budget: str = ""
    teacher_share: float = 0.0
    ranking: str = ""
    token_share: float = 1.0
    per_completion: bool = True
    alpha: float | None = None
    balanced: bool = False
    constraint: Constraint | None = None
    optimizer: str = "adamw"
    rate: float = 1.0
    stored: str = "float32"

    @property
    def signals(self) -> dict[str, float]:
        """The signals and their weights in the loss."""
        return {self.signal: 1.0} if self.alpha is None else {self.signal: self.alpha, "grpo": 1 - self.alpha}

    @property
    def listens_to_teacher(self) -> bool:
        """Whether the loss itself reads the teacher's logits."""
        return any(signal in READ_TEACHER for signal in self.signals)

    @property
    def listens_to_rewards(self) -> bool:
        """Whether the loss reads the rewards of the completions."""
        return any(signal in READ_REWARDS for signal in self.signals)

    @property
    def ancestor(self) -> str:
        """The paper's arm that it descends from, which gives its colour in figures."""
        return ARMS[self.like].ancestor if self.like else self.name

    @property
    def decisive(self) -> dict:
        """The entries that decide its results, where not as usual. So a new kind of entry leaves old records valid."""
        described = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("label", "like", "makes") and value != field.default:
                described[field.name] = asdict(value) if isinstance(value, Constraint) else value
        return described


def _from_anchor(name: str, label: str, sequences: str, signal: str) -> Arm:
    return Arm(name, label, start="anchor", sequences=sequences, signal=signal, teacher="teacher")


_PAPER = (
    # The paper's protocol: SFT makes the anchor, OPD and RLVR start from it.
    Arm("sft", "SFT", start="base", sequences="task", signal="cross_entropy", makes="anchor"),
    _from_anchor("opd", "OPD", "student", "opd_sampled"),
    _from_anchor("opd_full", "OPD, full vocabulary", "student", "reverse_kl"),
    _from_anchor("rlvr", "RLVR", "student", "grpo"),
    # The control that the paper lacks: SFT with OPD's origin, prompts, learning rate, steps and batch.
    _from_anchor("sft_matched", "matched SFT", "teacher", "cross_entropy"),
)


def _pretrained(name: str, label: str, task: str) -> Arm:
    return Arm(name, label, start="", sequences="task", signal="cross_entropy", task=task, makes=name)


# What the lab makes for itself; no record is kept of these.
_MAKERS = (
    _pretrained("base", "pretraining", "short_tasks"),
    _pretrained("teacher", "teacher", "teacher_mixture"),
    _pretrained("teacher_weak", "teacher, stopped early", "teacher_mixture"),
    _pretrained("teacher_same", "teacher of the student's size", "teacher_mixture"),
    _pretrained("teacher_difference", "teacher of the second task", "difference_mixture"),
    _pretrained("base_small", "pretraining, smaller", "short_tasks"),
    Arm("sft_small", "SFT, smaller", start="base_small", sequences="task", signal="cross_entropy",
        budget="sft_long", makes="anchor_small"),
    Arm("sft_difference", "SFT, second task", start="base", sequences="task", signal="cross_entropy",
        task="running_difference", budget="sft_long", makes="anchor_difference"),
    # From a pretrained base, the teacher is SFT that goes on for longer.
    Arm("expert", "teacher, by SFT", start="base", sequences="task", signal="cross_entropy", makes="teacher"),
    Arm("sft_products", "SFT, products", start="base", sequences="task", signal="cross_entropy",
        task="products", budget="sft", makes="anchor_products"),
    Arm("expert_products", "teacher of products", start="base", sequences="task", signal="cross_entropy",
        task="products", budget="expert", makes="teacher_products"),
)  # fmt: skip

#: All arms, by name.
#:
#: :meta hide-value:
ARMS: dict[str, Arm] = {arm.name: arm for arm in (*_PAPER, *_MAKERS)}


def _vary(parent: str, name: str, label: str, **differences: Any) -> None:
    """Add an arm that is like ``parent`` but for ``differences``."""
    ARMS[name] = replace(ARMS[parent], name=name, label=label, like=parent, makes="", **differences)


def _confine(parent: str, name: str, label: str, **entries: Any) -> None:
    arm = ARMS[parent]
    _vary(parent, name, label, constraint=Constraint(**entries), budget=arm.budget or arm.name)


# Variants take a fifth of the steps, enough to learn, and so do the arms that they are compared with.
for _name, _label in (("opd", "OPD"), ("opd_full", "OPD, full vocabulary"), ("rlvr", "RLVR"),
                      ("sft_matched", "matched SFT")):  # fmt: skip
    _vary(_name, f"{_name}_short", _label, budget="short")

# Other teachers, another student, another task: the rows of the paper's Table 1.
_vary("opd_short", "opd_weak_teacher", "weaker teacher", teacher="teacher_weak")
_vary("opd_short", "opd_same_teacher", "teacher of the same size", teacher="teacher_same")
_vary("opd_short", "opd_small", "smaller student", start="anchor_small")
_vary("opd_short", "opd_difference", "second task", start="anchor_difference", teacher="teacher_difference",
      task="running_difference")  # fmt: skip
_vary("opd_short", "opd_products", "second task", start="anchor_products", teacher="teacher_products", task="products")

# Which tokens count: the paper's quarter and half, by the signed log-ratio or by chance, and on to one in a hundred.
for _share in (50, 25, 5, 1):
    for _short, _ranking in (("top", "log-ratio"), ("random", "random")):
        _vary("opd_short", f"opd_{_short}{_share}", f"{_short} {_share} %", ranking=_ranking, token_share=_share / 100,
              per_completion=_share >= 5)  # fmt: skip
_vary("opd_short", "opd_absolute5", "largest 5 %", ranking="absolute log-ratio", token_share=0.05)
_vary("opd_short", "opd_entropy5", "uncertain 5 %", ranking="entropy", token_share=0.05)

# Who writes.
for _share in (25, 50, 75):
    _vary("opd_short", f"opd_teacher{_share}", f"{_share} % by the teacher", teacher_share=_share / 100)
_vary("opd_short", "opd_teacher100", "all by the teacher", sequences="teacher")
_vary("opd_short", "opd_stale", "all by the anchor", sequences="stale")

# OPD's objective mixed with RLVR's: the paper's grid, raw, and three points with gradients of equal norm.
for _share in (75, 50, 25, 5, 1):
    _vary("opd_short", f"opd_mix{_share}", f"α = {_share / 100:g}", alpha=_share / 100)
for _share in (50, 25, 5):
    _vary("opd_short", f"opd_balanced{_share}", f"α = {_share / 100:g}, balanced", alpha=_share / 100, balanced=True)

# Projected training: the paper's (16 directions, gradients), the strict kind, other widths, other directions, other
# starts, and the other arms.
_confine("opd_short", "opd_gradient16", "gradients in 16", acts_on="gradient")
_confine("opd_short", "opd_gradient4", "gradients in 4", acts_on="gradient", k=4)
for _k in (16, 4, 2):
    _confine("opd_short", f"opd_update{_k}", f"updates in {_k}", k=_k)
_confine("opd_short", "opd_attention16", "gradients in 16, attention", acts_on="gradient", block="attention")
_confine("opd_short", "opd_reset16", "gradients in 16, new moments", acts_on="gradient", reset=True)
_confine("opd_short", "opd_random16", "gradients in 16 random", space="random", acts_on="gradient")
_confine("opd_short", "opd_random4", "4 random directions", k=4, space="random")
_confine("opd_short", "opd_rescaled4", "updates in 4, full size", k=4, rescale=True)
_confine("opd_short", "opd_random_rescaled4", "4 random, full size", k=4, space="random", rescale=True)
_confine("opd_short", "opd_weights4", "4 of W0", k=4, space="weights")
_confine("opd_short", "opd_final4", "4 of its end", k=4, final=True)
_confine("opd_short", "opd_of_rlvr4", "4 of RLVR", k=4, arm="rlvr_short")
_confine("opd_short", "opd_of_seed4", "4 of another seed", k=4, other_seed=True)
for _share in (5, 10, 40):
    _confine("opd_short", f"opd_from{_share}", f"from {_share} %", k=4, start=_share / 100)
for _name in ("sft", "sft_matched_short", "rlvr_short"):
    _stem = _name.removesuffix("_short")
    _confine(_name, f"{_stem}_gradient16", "gradients in 16", acts_on="gradient")
    _confine(_name, f"{_stem}_update4", "updates in 4", k=4)
# The controls again, confined.
_confine("opd_top25", "opd_top25_update4", "top 25 %, updates in 4", k=4)
_confine("opd_mix5", "opd_mix5_update4", "α = 0.05, updates in 4", k=4)
_confine("opd_teacher100", "opd_teacher100_update4", "all by the teacher, updates in 4", k=4)

# Mechanism. In 24 steps Muon moves as far as AdamW at this rate. SGD moves a third as far at twice its rate here; at
# eight times its rate here it diverges.
_vary("opd_short", "opd_sequence_mean", "one credit per completion", signal="opd_sequence_mean")
_vary("opd_short", "opd_sign", "the sign of the credit", signal="opd_sign")
_vary("opd_full_short", "opd_forward", "forward KL", signal="forward_kl")
_vary("opd_short", "opd_sgd", "SGD", optimizer="sgd", rate=200.0)
_vary("opd_short", "opd_muon", "Muon", optimizer="muon", rate=2.0)
for _name, _label, _rate in (("half", "half", 0.5), ("double", "twice", 2.0), ("quadruple", "four times", 4.0)):
    _vary("opd_short", f"opd_{_name}_rate", f"{_label} the learning rate", rate=_rate)
_vary("opd_short", "opd_bf16", "weights stored in bf16", stored="bfloat16")
_confine("opd_short", "opd_entries", "an eighth of the entries", space="entries")
_confine("opd_short", "opd_random_entries", "a random eighth", space="random entries")

#: The paper's arms and matched SFT.
PAPER = tuple(arm.name for arm in _PAPER)
#: The arms that a record can be kept of, which are all but those that only make models.
#:
#: :meta hide-value:
RECORDED = tuple(name for name in ARMS if name not in {arm.name for arm in _MAKERS})


def get_arm(name: str) -> Arm:
    """Return the arm called ``name``.

    Raises:
        OpdlabError: if there is no such arm.
    """
    if name not in ARMS:
        raise OpdlabError(f"there is no arm {name!r}; 'opdlab scales' lists them")
    return ARMS[name]
