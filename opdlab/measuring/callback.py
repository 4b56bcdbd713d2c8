"""A callback for trainers: it logs the geometry of the update while a model trains."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from opdlab.errors import OpdlabError
from opdlab.geometry import Svd, bf16_sparsity, relative_norm, sim_k, stable_rank, svd, top_left, top_right
from opdlab.models.files import save_tensors
from opdlab.models.names import plain_name


class GeometryCallback(TrainerCallback):
    """Log rank, size, sparsity and direction of the update at regular intervals.

    Logged are, each as the mean over the chosen matrices, geometry/stable_rank and geometry/relative_norm of the update
    since the start; geometry/sparsity (bf16); geometry/sim_right_K16 and geometry/sim_left_K16, the similarity of its
    leading subspaces to those at the previous measurement (unrelated subspaces have geometry/sim_random_K16 on the
    right; a shared history raises it for any run); and geometry/seconds, which the measurement took: 3 for the 120
    attention matrices of a 135 M model on one CPU core, so 0.06 per step at the default. The CPU's memory holds a copy
    of the chosen matrices.

    It works with transformers' Trainer and trainers derived from it, as all of TRL's are, and gathers sharded weights
    (DTensor). A LoRA adapter's weights are no update by themselves: save it, and measure it with ``opdlab measure``.

    Args:
        trainer: the trainer that it is added to, which logs the results.
        every: optimizer steps between measurements; the last step is always measured.
        matrices: regular expression for the names of the matrices; by default attention's, which the paper follows.
        k: dimension of the subspaces; the paper's 16.
        snapshots: folder for the model's weights, one file a step, for ``opdlab measure BASE --trajectory SNAPSHOTS``.
        snapshot_steps: the steps at which they are written.

    Raises:
        OpdlabError: when training begins, if no trained matrix is chosen, k exceeds a side of one, or training is
            resumed, since the update would be counted from there. Later, if a snapshot cannot be written.

    Example::

        trainer.add_callback(GeometryCallback(trainer, every=50))
        trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 50,
        matrices: str = "attn|attention",
        k: int = 16,
        snapshots: Path | str | None = None,
        snapshot_steps: Collection[int] = (),
    ):
        """Prepare to measure; nothing is kept before training begins."""
        if not all(isinstance(number, int) and number >= 1 for number in (every, k)):
            raise OpdlabError(f"every is {every} and k is {k}; expected whole numbers of 1 or more")
        try:
            self.matrices = re.compile(matrices)
        except re.error as problem:
            raise OpdlabError(f"matrices is {matrices!r}, which is no regular expression: {problem}") from problem
        self.trainer, self.every, self.k = trainer, every, k
        self.snapshots = Path(snapshots).expanduser() if snapshots else None
        self.snapshot_steps = frozenset(snapshot_steps if snapshots else ())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights that training starts from."""
        if state.global_step > 0:
            raise OpdlabError(
                f"training resumes at step {state.global_step}, so its first weights are not here: leave out "
                "GeometryCallback, and measure the checkpoints with 'opdlab measure BASE --trajectory DIR'"
            )
        self._last: dict[str, Svd] = {}
        self._measured = 0
        # On the CPU, which has more room than a device.
        self._origin = {
            name: _whole(weight).to("cpu", copy=True)
            for name, weight in _matrices(kwargs["model"])
            if weight.requires_grad and self.matrices.search(name) and ".lora_" not in name
        }
        if not self._origin:
            raise OpdlabError(
                f"no trained matrix has a name with {self.matrices.pattern!r}: say which in matrices, for example "
                "'mlp'; an adapter is measured once it is saved, with 'opdlab measure'"
            )
        for name, w0 in self._origin.items():
            if min(w0.shape) < self.k:
                raise OpdlabError(f"k is {self.k}, more than a side of {name} {tuple(w0.shape)}: choose a smaller one")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log, and write a snapshot, if it is time."""
        if state.global_step in self.snapshot_steps:
            self._snapshot(state, kwargs["model"])
        if state.global_step % self.every == 0:
            self._log(state, control, kwargs["model"])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the last step, unless it was measured already."""
        if state.global_step > self._measured:
            self._log(state, control, kwargs["model"])

    def _snapshot(self, state: TrainerState, model: nn.Module) -> None:
        weights = {}
        for name, weight in model.named_parameters():
            whole = _whole(weight)  # in every process, or those that ask would wait for the others
            if state.is_world_process_zero:
                weights[plain_name(name)] = whole.cpu()
        if state.is_world_process_zero and self.snapshots:
            save_tensors(self.snapshots / f"step-{state.global_step:06d}.safetensors", weights)

    def _log(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        self._measured, start = state.global_step, time.perf_counter()
        rows = [self._measure(name, _whole(weight)) for name, weight in _matrices(model) if name in self._origin]
        logs = {}
        for key in rows[0]:
            values = torch.tensor([row[key] for row in rows])
            # A matrix that did not move has no direction yet.
            if not values.isnan().all():
                logs[f"geometry/{key}"] = float(values.nanmean())
        logs["geometry/seconds"] = time.perf_counter() - start
        # Trainer's own method: those of derived trainers would add their metrics here and then forget them. Logging
        # also tells the trainer that this step's loss has been logged, which it has not.
        should_log = control.should_log
        Trainer.log(self.trainer, logs)
        control.should_log = should_log

    def _measure(self, name: str, weight: Tensor) -> dict[str, float]:
        w0 = self._origin[name].to(weight.device)
        delta = svd(weight.double() - w0.double(), f"the update of {name}", k=self.k)
        last, self._last[name] = self._last.get(name), delta
        row = {"stable_rank": stable_rank(delta)}
        row |= {"relative_norm": relative_norm(w0, weight), "sparsity": bf16_sparsity(w0, weight)}
        if last is not None:
            row[f"sim_right_K{self.k}"] = sim_k(top_right(last, self.k), top_right(delta, self.k))
            row[f"sim_left_K{self.k}"] = sim_k(top_left(last, self.k), top_left(delta, self.k))
            row[f"sim_random_K{self.k}"] = self.k / w0.shape[1]
        return row


class _FromStart(GeometryCallback):
    """Of a run that may go on from a checkpoint: it counts from the weights that its trainer is made with."""

    def __init__(self, trainer: Trainer, every: int, **options: Any):
        super().__init__(trainer, every, **options)
        super().on_train_begin(trainer.args, TrainerState(), TrainerControl(), model=trainer.model)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what there is: the weights are those of a checkpoint by now."""


def callback_for(trainer: Trainer, folder: Path, steps: tuple[int, ...]) -> GeometryCallback:
    """Return a callback that writes snapshots at ``steps``, the last of which ends the run, into the run's ``folder``.

    It logs ten times in a run, because at 8 billion weights a measurement takes minutes.
    """
    every = max(1, max(steps) // 10)
    return _FromStart(trainer, every, snapshots=folder / "snapshots", snapshot_steps=steps)


def _matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(plain_name(name), weight) for name, weight in model.named_parameters() if weight.ndim == 2]


def _whole(weight: Tensor) -> Tensor:
    """Return a sharded weight as one tensor; every process must call this."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
