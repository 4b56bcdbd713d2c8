"""A callback for trainers: it logs the geometry of the update while a model trains."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.core_model_loading import revert_weight_conversion

from opdlab.errors import OpdlabError
from opdlab.geometry import Svd, bf16_sparsity, noise_curve, relative_norm, sim_k, stable_rank, svd, top_left, top_right
from opdlab.geometry.matrices import LAYERS, identity
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.files import save_tensors, write_text
from opdlab.models.names import plain_name
from opdlab.models.pieces import Checkpoint, Piece

_LATER = "measure the checkpoints that the trainer saves with 'opdlab measure BASE --trajectory DIR'"


class GeometryCallback(TrainerCallback):
    """Log rank, size, sparsity and direction of the update at regular intervals.

    Logged are, each as the mean over the chosen matrices, geometry/stable_rank and geometry/relative_norm of the update
    since the start; geometry/sparsity (bf16), and geometry/sparsity_ruler, what noise of the same norm would leave
    unchanged; geometry/sim_right_K16 and geometry/sim_left_K16, the similarity of its leading subspaces to those at the
    previous measurement (unrelated subspaces have geometry/sim_random_K16 on the right; a shared history raises it for
    any run); and geometry/seconds, which the measurement took: 3 for the 120 attention matrices of a 135 M model on one
    CPU core, so 0.06 per step at the default. The CPU's memory holds a copy of the chosen matrices.

    It works with transformers' Trainer and those derived from it, as TRL's are, and gathers sharded weights (DTensor).
    Fused projections and stacked experts are followed as ``opdlab measure`` takes them, which also measures LoRA
    adapters, once they are saved. In a run that is resumed, the first weights are gone: it warns, logs nothing, and
    still writes its snapshots.

    Args:
        trainer: the trainer that it is added to, which logs the results.
        every: optimizer steps between measurements; the last step is always measured.
        matrices: regular expression for their names, in upper or lower case; by default attention's, which the paper
            follows. Of those that match, it takes the trained ones of attention and MLP, or else all that are trained.
        k: dimension of the subspaces; the paper's 16.
        snapshots: folder for the model's weights, one file a step under the names that ``save_pretrained`` gives them,
            with config.json, for ``opdlab measure BASE --trajectory SNAPSHOTS``.
        snapshot_steps: the steps at which they are written.

    Raises:
        OpdlabError: if ``trainer`` or a number will not do; when training begins, if no trained matrix is chosen, k
            exceeds a side of one, or processes have parts of weights (ZeRO-3, FSDP1); later, if a weight is not finite
            or a snapshot cannot be written. If ``matrices`` is no regular expression, ``re`` says so itself.

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
        if not isinstance(trainer, Trainer):
            raise OpdlabError(f"trainer is a {type(trainer).__name__}; expected transformers' Trainer")
        steps = frozenset(snapshot_steps if isinstance(snapshot_steps, Collection) else [None])
        if not all(isinstance(number, Integral) and number >= 1 for number in (every, k, *steps)):
            raise OpdlabError(f"every is {every}, k {k} and snapshot_steps {snapshot_steps}: give whole numbers from 1")
        if bool(snapshots) != bool(steps):
            raise OpdlabError("snapshots and snapshot_steps belong together: give a folder and steps, or neither")
        self.trainer, self.every, self.k = trainer, every, k
        self.matrices = re.compile(matrices, re.IGNORECASE)  # T5 writes SelfAttention
        self.snapshots, self.snapshot_steps = Path(snapshots or "").expanduser(), steps

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights that training starts from."""
        self._last: dict[str, Svd] = {}
        self._measured = 0
        self._followed: dict[str, dict[str, Piece]] = {}
        _check_whole(kwargs["model"])
        if late := sorted(step for step in self.snapshot_steps if step > state.max_steps > 0):
            warnings.warn(
                f"training ends at step {state.max_steps}, so there will be no snapshots of the snapshot_steps {late}",
                stacklevel=2,
            )
        if state.global_step > 0:
            warnings.warn(
                f"training resumes at step {state.global_step}, so its first weights are not here and GeometryCallback "
                f"logs nothing: {_LATER}",
                stacklevel=2,
            )
            return
        self._follow(kwargs["model"])
        # On the CPU, which has more room than a device.
        self._origin = {name: weight.to("cpu", copy=True) for name, weight in self._weights(kwargs["model"])}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log, and write a snapshot, if it is time."""
        if state.global_step in self.snapshot_steps:
            self._snapshot(state, kwargs["model"])
        if state.global_step % self.every == 0:
            self._log(state, control, kwargs["model"])

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the last step when the trainer logs its closing line, before it may load its best weights."""
        if "train_loss" in (kwargs.get("logs") or {}) and state.global_step > self._measured:
            self._log(state, control, kwargs["model"])

    def _follow(self, model: nn.Module) -> None:
        """Choose the matrices, by the parameter that holds each."""
        trained = {name: w for name, w in model.named_parameters() if w.requires_grad and ".lora_" not in name}
        config: dict = getattr(getattr(model, "config", None), "to_dict", dict)()
        pieces = open_checkpoint(trained, Checkpoint("the model", {}, {}, config)).pieces if trained else {}
        found = {
            name: piece
            for name, piece in pieces.items()
            if len(piece.shape) == 2 and any(map(self.matrices.search, (name, plain_name(piece.stored))))
        }
        if not found:
            raise OpdlabError(
                f"no trained matrix has a name with {self.matrices.pattern!r}: say which in matrices, for example "
                "'mlp'; an adapter is measured once it is saved, with 'opdlab measure'"
            )
        in_layers = {name: piece for name, piece in found.items() if identity(name, piece.shape)["block"] in LAYERS}
        for name, piece in (in_layers or found).items():
            if min(piece.shape) < self.k:
                raise OpdlabError(f"k is {self.k}, more than a side of {name} {piece.shape}: choose a smaller one")
            self._followed.setdefault(piece.stored, {})[name] = piece

    def _weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the matrices that are followed; every process must ask for all of them."""
        parameters = dict(model.named_parameters())
        for stored, pieces in self._followed.items():
            whole = {stored: _whole(parameters[stored])}
            for name, piece in pieces.items():
                yield name, replace(piece, file=whole).read()

    def _snapshot(self, state: TrainerState, model: nn.Module) -> None:
        model = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        weights, seen = {}, set()
        for name, weight in model.state_dict(keep_vars=True).items():
            if isinstance(weight, Tensor) and id(weight) not in seen:  # no second name of one weight
                seen.add(id(weight))
                whole = _whole(weight)  # in every process, or those that ask would wait for the others
                if state.is_world_process_zero:
                    weights[plain_name(name)] = whole.cpu()
        if not state.is_world_process_zero:
            return
        if isinstance(model, PreTrainedModel):
            weights = revert_weight_conversion(model, weights)
            write_text(self.snapshots / "config.json", model.config.to_json_string())
        save_tensors(self.snapshots / f"step-{state.global_step:06d}.safetensors", weights)

    def _log(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if not self._followed:
            return
        self._measured, start = state.global_step, time.perf_counter()
        try:
            rows = [self._measure(name, weight) for name, weight in self._weights(model)]
        except OpdlabError as problem:
            raise OpdlabError(
                f"at step {state.global_step} {problem}: the training has diverged, so lower its learning rate"
            ) from problem
        # A matrix that did not move has no direction, and counts in the sparsity alone where others did.
        table = pd.DataFrame(rows)
        if (moved := table["relative_norm"] > 0).any():
            table["relative_norm"] = table["relative_norm"].where(moved)
        means = table.mean().dropna().add_prefix("geometry/")
        logs = means.to_dict() | {"geometry/seconds": time.perf_counter() - start}
        # Trainer's own method: those of derived trainers would add their metrics here and then forget them. Logging
        # also tells the trainer that this step's loss has been logged, which it has not.
        should_log = control.should_log
        Trainer.log(self.trainer, logs)
        control.should_log = should_log

    def _measure(self, name: str, weight: Tensor) -> dict[str, float]:
        weight = weight.cpu() if weight.device.type == "mps" else weight  # which has no float64
        w0 = self._origin[name].to(weight.device)
        delta = svd(weight.double() - w0.double(), f"the update of {name}", k=self.k)
        last, self._last[name] = self._last.get(name), delta
        row = {"stable_rank": stable_rank(delta)}
        row |= {"relative_norm": relative_norm(w0, weight), "sparsity": bf16_sparsity(w0, weight)}
        row["sparsity_ruler"] = noise_curve(w0, [row["relative_norm"]])["sparsity"][0]
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


def _check_whole(model: nn.Module) -> None:
    """Raise if the processes of a training have parts of its weights that cannot be put together here."""
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_shape") or re.search("_fsdp_wrapped_module.|_flat_param", name):
            raise OpdlabError(
                f"ZeRO-3 of DeepSpeed, or FSDP1, leaves each process a part of {plain_name(name)}, which "
                "GeometryCallback cannot gather: train with ZeRO-2, or with FSDP2 (fsdp_version 2 for accelerate), or "
                f"leave it out, and {_LATER}"
            )


def _whole(weight: Tensor) -> Tensor:
    """Return a sharded weight as one tensor; every process must call this."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
