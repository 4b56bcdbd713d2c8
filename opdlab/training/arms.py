"""Arms: who is taught, on whose completions, by which loss.

:func:`sft`, :func:`opd` and :func:`rlvr` make an :class:`Arm`; a variant is one of their arguments, such as
``tokens=top("log-ratio", 0.25)`` or ``projection=project(k=16, start=0.2)``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opdlab.errors import OpdlabError
from opdlab.models.files import local_folder
from opdlab.models.pieces import weights_digest
from opdlab.training.losses import LOSSES, RANKINGS, READ_REWARDS, READ_TEACHER
from opdlab.training.rules import OPTIONAL_SHARE, Checked, number, of_kind, one_of, whole

if TYPE_CHECKING:
    from opdlab.training.config import Experiment

#: Who can write the completions. Of the task they are its worked solutions, of the initial student those of the student
#: as it was at the start.
WRITERS = ("task", "student", "teacher", "initial student")
#: The estimators of OPD's objective, and the loss that each of them is.
ESTIMATORS = {"sampled": "opd_sampled", "full": "reverse_kl"}


@dataclass(frozen=True)
class Model:
    """A model: the folder that its weights are read from, or the shape of one with random weights."""

    folder: str = ""  #: a Hugging Face folder
    shape: tuple[tuple[str, int], ...] = ()  #: fields of Qwen3Config, for random weights instead
    known: str = ""  #: the digest of the weights, for a folder that is not there

    @property
    def identity(self) -> Any:
        """The digest of the weights, or the shape, as JSON values; an OpdlabError without a folder and a digest."""
        if self.shape:
            return dict(self.shape)
        return self.known if self.known and not Path(self.folder).is_dir() else weights_digest(Path(self.folder))

    def fetched(self) -> Model:
        """Return the model with its folder on this machine: one that is named on the hub is fetched."""
        return replace(self, folder=str(local_folder(self.folder))) if self.folder else self


@dataclass(frozen=True)
class Tokens(Checked):
    """Which tokens count: the share with the largest key, ranked by one of :data:`opdlab.training.losses.RANKINGS`."""

    ranking: str
    share: float
    per_completion: bool = True  #: or ranked within the whole batch

    rules = MappingProxyType({
        "ranking": one_of(*RANKINGS), "share": number("a number above 0 and up to 1", lambda share: 0 < share <= 1),
    })  # fmt: skip


@dataclass(frozen=True)
class Projection(Checked):
    """What training is projected onto, and from when on (2606.07082, section 4). Embeddings and norms stay free.

    The ``space`` is "update", the top right singular vectors of the update W_t - W_0 so far; "weights", those of W_0;
    or "random". The paper has only attention matrices, and here all matrices of a layer are projected.
    """

    start: float = 0.2  #: share of the training at which it begins
    k: int = 16  #: directions on the input side of each matrix
    space: str = "update"
    acts_on: str = "update"  #: after the optimizer; or "gradient", before clipping, as in the paper
    source: Experiment | None = None  #: whose update gives the directions, at the same step; None for the run's own
    rescale: bool = False  #: give a projected update the norm that it had before

    rules = MappingProxyType({
        "start": number("a number from 0 to below 1", lambda share: 0 <= share < 1), "k": whole(1),
        "space": one_of("update", "weights", "random"), "acts_on": one_of("update", "gradient"),
    })  # fmt: skip


@dataclass(frozen=True)
class Arm(Checked):
    """One way of training: from which model, on whose completions, by which loss."""

    student: Model
    rollouts_by: str  #: who writes the completions, one of WRITERS
    loss: str  #: per token, a key of opdlab.training.losses.LOSSES
    teacher: Model | None = None  #: grades or writes
    tokens: Tokens | None = None  #: which tokens count; None for all
    alpha: float | None = None  #: weight of ``loss`` in a mixture with RLVR's, which gets the rest
    projection: Projection | None = None
    optimizer: str = "adamw"  #: or "sgd" or "muon"
    weight_dtype: str = "float32"  #: that weights are rounded to after each step

    rules = MappingProxyType({
        "rollouts_by": one_of(*WRITERS), "loss": one_of(*LOSSES), "optimizer": one_of("adamw", "sgd", "muon"),
        "alpha": OPTIONAL_SHARE, "weight_dtype": one_of("float32", "bfloat16", "float16"),
        "student": of_kind(Model, "a Model"), "teacher": of_kind(Model | None, "a Model"),
        "tokens": of_kind(Tokens | None, "what top or random_tokens returns"),
        "projection": of_kind(Projection | None, "what project returns"),
    })  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse what no step could be made of."""
        super().__post_init__()
        if (self.reads_teacher or self.rollouts_by == "teacher") and self.teacher is None:
            raise OpdlabError(f"the loss {self.loss!r} on rollouts by the {self.rollouts_by} needs a teacher: give one")
        if self.reads_rewards and self.rollouts_by in ("task", "teacher"):
            raise OpdlabError(f"the loss {self.loss!r} needs rollouts by the student, not by the {self.rollouts_by}")

    @property
    def losses(self) -> dict[str, float]:
        """The losses of a step and their weights."""
        return {self.loss: 1.0} if self.alpha is None else {self.loss: self.alpha, "grpo": 1 - self.alpha}

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss reads the teacher's logits."""
        return not READ_TEACHER.isdisjoint(self.losses)

    @property
    def reads_rewards(self) -> bool:
        """Whether the loss reads the rewards of the completions."""
        return not READ_REWARDS.isdisjoint(self.losses)

    def fetched(self) -> Arm:
        """Return the arm with the folders of its models on this machine (:meth:`Model.fetched`)."""
        return replace(self, student=self.student.fetched(), teacher=self.teacher and self.teacher.fetched())


def top(ranking: str = "log-ratio", share: float = 0.25, per_completion: bool = True) -> Tokens:
    """Choose the share of tokens with the largest key (2606.07082, section 5.1); :func:`random_tokens` is its control.

    >>> top("log-ratio", 0.25)
    Tokens(ranking='log-ratio', share=0.25, per_completion=True)
    """
    return Tokens(ranking, share, per_completion)


def random_tokens(share: float = 0.25, per_completion: bool = True) -> Tokens:
    """Choose a random share of tokens."""
    return Tokens("random", share, per_completion)


def project(k: int = 16, start: float = 0.2, **how: Any) -> Projection:
    """Project training, from the share ``start`` of it on, onto the top ``k`` input directions of its update so far.

    Other fields of :class:`Projection`, such as ``acts_on="gradient"``, change what is projected onto what.
    """
    return Projection(start, k, **how)


def sft(student: Model | str | Path, *, teacher: Model | str | Path | None = None, **variant: Any) -> Arm:
    """Supervised fine-tuning: imitate the task's demonstrations.

    With a teacher, its completions are imitated instead (matched SFT, the control of the book). A model is given by its
    folder; ``variant`` sets other fields of :class:`Arm`.
    """
    author = "task" if teacher is None else "teacher"
    return Arm(_model("student", student), author, "cross_entropy", _model("teacher", teacher), **variant)


def opd(student: Model | str | Path, teacher: Model | str | Path, *, estimator: str = "sampled", **variant: Any) -> Arm:
    """On-policy distillation: the student writes, and the teacher grades each token (2606.07082, section 5).

    Models are given by their folders, and share a vocabulary. The estimator of the reverse KL is "sampled" (the
    paper's) or "full" (over the whole vocabulary); any other raises an OpdlabError. ``variant`` sets fields of
    :class:`Arm`, such as ``tokens`` (:func:`top`), ``projection`` (:func:`project`) and ``loss="forward_kl"``.
    """
    if estimator not in ESTIMATORS:
        raise OpdlabError(f"there is no estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    options = {"rollouts_by": "student", "loss": ESTIMATORS[estimator]} | variant
    return Arm(_model("student", student), teacher=_model("teacher", teacher), **options)


def rlvr(student: Model | str | Path, *, teacher: Model | str | Path | None = None, **variant: Any) -> Arm:
    """Reinforcement learning with verifiable rewards, by GRPO (2402.03300): the student writes, the task rewards.

    A teacher is never listened to: with one, evaluations also say how far the student is from it. Models are given by
    their folders; ``variant`` sets other fields of :class:`Arm`.
    """
    return Arm(_model("student", student), "student", "grpo", _model("teacher", teacher), **variant)


def _model(role: str, given: Model | str | Path | None) -> Any:
    """Return a model that is given as one or by its folder; a teacher may be None."""
    if isinstance(given, Model) or (given is None and role == "teacher"):
        return given
    if not isinstance(given, str | Path):
        raise OpdlabError(f"{role} is {given!r:.40}: give the folder of a model, or OWNER/NAME on the hub")
    return Model(str(given))


def changed_fields(value: Any) -> dict[str, Any]:
    """Return the fields of an arm or a projection that differ from their defaults, as plain values.

    Models and projections are left out, as they have an identity of their own.

    >>> changed_fields(project(k=4, acts_on="gradient"))
    {'k': 4, 'acts_on': 'gradient'}
    """
    found = {}
    for item in fields(value):
        entry = getattr(value, item.name)
        if entry != item.default and item.name not in ("student", "teacher", "projection", "source"):
            found[item.name] = asdict(entry) if isinstance(entry, Tokens) else entry
    return found
