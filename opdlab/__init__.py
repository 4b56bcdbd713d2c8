"""opdlab: the parameter-space geometry of on-policy distillation, next to SFT and RLVR.

>>> import opdlab as ol
>>> student = ol.opd(student="student-folder", teacher="teacher-folder", tokens=ol.top("log-ratio", 0.25))
>>> student.loss, student.tokens.share
('opd_sampled', 0.25)

Names are imported when they are first used; what lies behind them is on the page :doc:`architecture`.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdlab.errors import OpdlabError

if TYPE_CHECKING:
    import pandas as pd

    from opdlab.lab.records import Records
    from opdlab.training.arms import Arm
    from opdlab.training.tasks import Task
    from opdlab.training.trained import Trained

# transformers imports tqdm.auto, which warns in every notebook kernel without ipywidgets; our bars are plain text.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

# Where each name comes from.
_ROOMS = {
    "GeometryCallback": "measuring.callback",
    "Task": "training.tasks",
    "compare": "measuring.compare",
    "load": "lab.records",
    "measure": "measuring.update",
    "opd": "training.arms",
    "project": "training.arms",
    "random_tokens": "training.arms",
    "rlvr": "training.arms",
    "sft": "training.arms",
    "top": "training.arms",
}

__all__ = [*_ROOMS, "OpdlabError", "judge", "train"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f"opdlab.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'opdlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])


def train(arm: Arm, task: Task, *, steps: int, learning_rate: float, out: Path | str, **settings: Any) -> Trained:
    """Train an arm on a task, and return the run; the same call goes on where it was stopped.

    By default a batch has 32 prompts with 4 completions each (SFT: its one demonstration), a completion ends after 256
    tokens, and one prompt in eight is held out: 256 of these, greedy and sampled, are what evaluations measure, before
    the training, halfway and at the end. A data set with fewer prompts shrinks these numbers, and a model with a short
    context the completions; a number that was asked for is not shrunk but refused. A GPU is used where there is one.

    Args:
        arm: from :func:`sft`, :func:`opd` or :func:`rlvr`.
        task: such as one from :meth:`Task.from_dataset`.
        steps: updates.
        learning_rate: of the optimizer.
        out: the folder of the run, which messages call by its name.
        settings: ``seed``, ``progress=False`` for no bar, or any other field of an experiment, such as ``prompts``,
            ``samples`` or ``max_new_tokens`` (:func:`opdlab.training.trained.make_experiment`).

    Returns:
        The run: ``history`` with a row per step, ``evaluations``, ``accuracy`` (the mean reward on held-out prompts, at
        the end), ``transcripts()``, ``model`` (a folder) and ``trajectory`` (how the weights moved).

    Raises:
        OpdlabError: on bad input, if ``out`` holds another experiment (other data or another reward included), or if
            the loss is not finite.
    """
    from opdlab.measuring.update import measure
    from opdlab.training.loop import train as train_experiment
    from opdlab.training.trained import Trained, make_experiment

    if not isinstance(out, Path | str) or (folder := Path(out).expanduser().resolve()).is_file():
        raise OpdlabError(f"out is {out}: give the folder of the run")
    progress = settings.pop("progress", True)
    settings = {"name": folder.name} | settings
    experiment = make_experiment(arm, task, steps=steps, learning_rate=learning_rate, **settings)
    return Trained(train_experiment(experiment, folder, folder=folder, progress=progress), measure)


def judge(records: Records, finding: str = "") -> pd.DataFrame:
    """Judge the paper's claims by the records of :func:`load`, and return the scorecard, a row per claim they can test.

    ``finding``, a key of :data:`opdlab.claims.paper.FINDINGS`, leaves only the claims of this one.

    Raises:
        OpdlabError: if there is no such finding, or ``records`` are none.
    """
    from opdlab import claims
    from opdlab.lab.records import Records

    if not isinstance(records, Records):
        raise OpdlabError(
            f"records is a {type(records).__name__}: give what ol.load returns, as in judge(load('tiny'))"
        )
    if finding and finding not in claims.FINDINGS:
        raise OpdlabError(f"there is no finding {finding!r}; choose one of {', '.join(claims.FINDINGS)}")
    return claims.scorecard(claims.judge(claims.judgeable(records, finding), records))
