"""The trainer: one training step for every arm, strictly on-policy, as in the paper's recipes.

All randomness of a step comes from (seed, purpose, step). So two arms with the same seed see the same prompts, and a
run that was killed goes on bit for bit as if nothing had happened.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import OpdlabError
from opdlab.geometry import update_mask
from opdlab.processes import find_device
from opdlab.training import objectives
from opdlab.training.config import Experiment
from opdlab.training.losses import LOSSES, RANKINGS, token_weights
from opdlab.training.opening import encode, open_models
from opdlab.training.optimizers import make_optimizers
from opdlab.training.projection import Projector, projected_matrices
from opdlab.training.rollouts import MicroBatch, Rollouts, encode_completions, logits_of, micro_batches, sample
from opdlab.training.tasks import Task

Tensors = dict[str, Tensor]
_PURPOSES = {"prompts": 0, "rollouts": 1, "evaluation prompts": 2, "evaluation rollouts": 3, "tokens": 4, "authors": 5}

#: What is added up over a batch, and what messages call it.
_SUMS = {"entropy": "entropy of the student's logits", "kl": "divergence from the teacher's logits", "loss": "loss"}


def random_numbers(seed: int, purpose: str, step: int) -> np.random.Generator:
    """Return the source of randomness for one purpose at one step."""
    return np.random.default_rng([seed, _PURPOSES[purpose], step])


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Return a torch generator seeded from ``rng``."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def answers(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> tuple[list[str], list[bool]]:
    """Return the text of each completion without its end, special tokens included, and whether it ended or was cut."""
    ended = have_ended(tokenizer, rollouts)
    kept = (tokens[: len(tokens) - whole] for tokens, whole in zip(rollouts.completions, ended, strict=True))
    return tokenizer.batch_decode(list(kept)), ended


def have_ended(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> list[bool]:
    """Tell of each completion whether it came to its end; the others were cut."""
    return [tokens[-1] == tokenizer.eos_token_id for tokens in rollouts.completions]


def score(tokenizer: PreTrainedTokenizerBase, task: Task, prompts: list[str], rollouts: Rollouts) -> Tensor:
    """Return the reward of each completion (B,) of ``prompts``, the texts that the rollouts started from.

    A completion without the end of the sequence was cut, and earns nothing.
    """
    of_each = enumerate(zip(*answers(tokenizer, rollouts), strict=True))
    rewards = [task.reward(prompts[i // rollouts.samples], text) if ended else 0.0 for i, (text, ended) in of_each]
    return torch.tensor(rewards)


def check_finite(experiment: Experiment, numbers: dict[str, float], step: int) -> None:
    """Raise an OpdlabError about the first number of a step that is not finite. Steps are counted from 1."""
    for what, number in numbers.items():
        if not math.isfinite(number):
            raise OpdlabError(
                f"{what} of {experiment.title!r} is {number} at step {step}: lower its learning rate "
                f"({experiment.recipe.learning_rate:g}); the run is kept up to its last checkpoint"
            )


class Trainer:
    """The models, the task and the optimizer of a run: what one training step works on."""

    def __init__(self, experiment: Experiment):
        """Load and check the models of an experiment; raises what :func:`opdlab.training.opening.open_models` does."""
        self.experiment = experiment
        self.arm, self.task, self.recipe = experiment.arm, experiment.task, experiment.recipe
        self.device = find_device(experiment.compute.gpu)
        self.dtype = experiment.compute.dtype_on(self.device)
        prompts = self.task.prompts(min(2, self.recipe.prompts), random_numbers(experiment.seed, "prompts", 0))
        self.tokenizer, self.student, self.teacher = open_models(experiment, prompts, self.device, self.dtype)
        if self.arm.projection:  # whose k may not fit
            projected_matrices(self.arm.projection, dict(self.student.named_parameters()))
        self.round_weights()
        self.origin = {name: weight.detach().clone() for name, weight in self.student.named_parameters()}
        writers = {"student": self.student, "teacher": self.teacher, "task": None}
        initial = self.arm.rollouts_by == "initial student"
        self.writer = copy.deepcopy(self.student) if initial else writers[self.arm.rollouts_by]
        self.optimizers = make_optimizers(self.student, self.recipe, self.arm.optimizer)
        self.projector: Projector | None = None

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict:
        """Make update number ``step`` (counted from 0) and return what the history keeps of it.

        Raises:
            OpdlabError: if the loss is not finite (the weights are then as before the step), or what comes of it.
        """
        # On a CPU what the step itself took, whatever else runs there; while a GPU works, the processor only waits.
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        began = clock()
        rollouts, rewards = self.batch(step)
        advantages = objectives.grpo_advantages(rewards, rollouts.samples) if self.arm.reads_rewards else None
        sums, gradients = self._gradients(step, rollouts, advantages)
        # What is not finite first says why: entropy is of the student's logits alone, the divergence of both models'.
        check_finite(self.experiment, {f"the {what}": sums[name] for name, what in _SUMS.items()}, step + 1)
        mixed = self._mix(gradients)
        if self.projector and self.projector.acts_on == "gradient":
            self.projector.project_gradients(dict(self.student.named_parameters()))
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        # A batch whose rewards are all alike says nothing: skip the update, or Adam's momentum would make one.
        skipped = self.arm.loss == "grpo" and not bool(advantages.any())
        if not skipped:
            self._update(step)
        update_norm = self.update_norm()
        check_finite(self.experiment, {"the norm of the update": update_norm}, step + 1)
        return {
            "step": step + 1,
            "loss": sums["loss"],
            "accuracy": None if rewards is None else float(rewards.mean()),
            "entropy": sums["entropy"],
            "kl_teacher": sums["kl"] if self.arm.reads_teacher else None,
            "grad_norm": float(norm),
            "update_norm": update_norm,
            "skipped": skipped,
            "tokens": rollouts.tokens,
            "cut": 1 - float(np.mean(have_ended(self.tokenizer, rollouts))),
            "seconds": round(clock() - began, 4),
        } | mixed

    def batch(self, step: int) -> tuple[Rollouts, Tensor | None]:
        """Return the completions of a step, and their rewards (B,) if a student wrote them."""
        recipe, seed = self.recipe, self.experiment.seed
        prompts = self.task.prompts(recipe.prompts, random_numbers(seed, "prompts", step))
        if self.writer is None:
            solutions = self.task.demonstrations(prompts, random_numbers(seed, "authors", step))
            asked = encode(self.experiment, self.tokenizer, self.student, prompts)
            return Rollouts(asked, encode_completions(self.tokenizer, solutions)), None
        texts = self.task.texts(self.tokenizer, prompts)
        how: Any = {"max_new_tokens": self.experiment.max_new_tokens, "temperature": self.experiment.temperature}
        how |= {"samples": recipe.samples, "generator": torch_generator(random_numbers(seed, "rollouts", step))}
        rollouts = sample(self.in_dtype(self.writer), self.tokenizer, texts, **how)
        if self.writer is self.teacher:
            return rollouts, None
        return rollouts, score(self.tokenizer, self.task, prompts, rollouts)

    def _gradients(self, step: int, rollouts: Rollouts, advantages: Tensor | None) -> tuple[dict[str, float], Tensors]:
        """Add up the gradients of a batch, and return loss, entropy and KL, and a mixture's gradients (P,) by loss."""
        random = torch_generator(random_numbers(self.experiment.seed, "tokens", step))
        sums, gradients = dict.fromkeys(_SUMS, 0.0), Tensors()
        self.student.zero_grad()
        self.student.train(self.experiment.compute.recompute)  # Only then does transformers recompute.
        for part in micro_batches(rollouts, self.experiment.compute.micro_batch, self.student.device, advantages):
            losses, measured = self.read(part, rollouts.tokens, random)
            self._accumulate(losses, gradients)
            sums["loss"] += sum(self.arm.losses[name] * value.item() for name, value in losses.items())
            for name, value in measured.items():
                sums[name] += value.item() / rollouts.tokens
        self.student.eval()
        return sums, gradients

    def read(self, part: MicroBatch, tokens: int, random: torch.Generator) -> tuple[Tensors, Tensors]:
        """Let the models read a micro-batch of a batch with so many ``tokens``, and return two tables of scalars.

        They are the arm's losses, shares of the batch's, and "entropy" and "kl" (to the teacher), summed over tokens.
        """
        at_once = self.experiment.compute.tokens_at_once
        noise = torch.rand(part.tokens.shape, generator=random).to(self.device)
        part = replace(part, noise=noise)
        if self.arm.loss == "random_signs":
            part = replace(part, advantages=(noise < 0.5) * 2.0 - 1.0)
        read = part.hidden if at_once else part.logits
        with self.precision():
            ours = read(self.student)
        with torch.no_grad():
            theirs = read(self.teacher) if self.arm.reads_teacher else None
        if not at_once:
            return self._losses(part, ours, theirs, tokens)

        def look(piece: MicroBatch, ours: Tensor, theirs: Tensor | None) -> tuple[Tensors, Tensors]:
            with self.precision():
                logits = logits_of(self.student, ours)
            with torch.no_grad():
                teacher = None if theirs is None else logits_of(self.teacher, theirs)
            return self._losses(piece, logits, teacher, tokens)

        totals: tuple[Tensors, Tensors] = {}, {}
        pieces = list(part.pieces(at_once))
        # The logits of a piece are made again when its gradient is due, so those of two are never there together.
        again = look if len(pieces) == 1 else partial(checkpoint, look, use_reentrant=False, preserve_rng_state=False)
        for rows, piece in pieces:
            found = again(piece, ours[rows], None if theirs is None else theirs[rows])
            for total, values in zip(totals, found, strict=True):
                total |= {name: total.get(name, 0.0) + value for name, value in values.items()}
        return totals

    def _losses(self, part: MicroBatch, logits: Tensor, teacher: Tensor | None, tokens: int) -> tuple[Tensors, Tensors]:
        """Return what :meth:`read` does, of logits (C, T, V); of rollouts at the temperature that they have."""
        if self.writer is not None and self.experiment.temperature != 1:
            logits = logits / self.experiment.temperature
            teacher = None if teacher is None else teacher / self.experiment.temperature
        weights: Tensor | float = 1.0
        with torch.no_grad():
            if chosen := self.arm.tokens:
                key = RANKINGS[chosen.ranking](logits, part.tokens, teacher, part.noise)
                weights = token_weights(key, part.mask, chosen.share, chosen.per_completion)
            sums = self._sums(part, logits, teacher)
        losses = {}
        for name in self.arm.losses:
            per_token = LOSSES[name](logits, part.tokens, teacher, part.advantages, part.mask)
            losses[name] = objectives.token_mean(per_token * weights, part.mask, normalizer=tokens)
        return losses, sums

    def _sums(self, part: MicroBatch, logits: Tensor, teacher: Tensor | None) -> Tensors:
        """Return the entropy, and KL(student || teacher) if there is one, summed over the tokens of a micro-batch."""
        found = {"entropy": objectives.in_pieces(objectives.entropy, logits), "kl": logits.new_zeros(part.mask.shape)}
        if teacher is not None:
            found["kl"] = objectives.in_pieces(objectives.reverse_kl, logits, teacher)
        return {name: values[part.mask].sum() for name, values in found.items()}

    def _accumulate(self, losses: Tensors, gradients: Tensors) -> None:
        """Add the gradients of a micro-batch; those of a mixture are kept apart, to weigh and compare them."""
        if len(losses) == 1:
            next(iter(losses.values())).backward()
            return
        weights = list(self.student.parameters())
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, weights, retain_graph=True)
            whole = torch.cat([gradient.flatten() for gradient in found])
            gradients[name] = gradients[name] + whole if name in gradients else whole

    @torch.no_grad()
    def _mix(self, gradients: Tensors) -> dict[str, float]:
        """Put a mixture's gradients together, and return their norms and cosine; nothing without a mixture."""
        if not gradients:
            return {}
        first, second = gradients.values()
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        mixed: Any = sum(share * gradients[name] for name, share in self.arm.losses.items())
        weights = list(self.student.parameters())
        for weight, gradient in zip(weights, mixed.split([w.numel() for w in weights]), strict=True):
            weight.grad = gradient.view_as(weight)
        cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
        return {f"grad_norm_{name}": norm for name, norm in norms.items()} | {"grad_cosine": cosine}

    def _update(self, step: int) -> None:
        """Let the optimizers make their step, projected and rounded as the arm says."""
        parameters = dict(self.student.named_parameters())
        projected = self.projector.of if self.projector and self.projector.acts_on == "update" else {}
        before = {name: parameters[name].detach().clone() for name in projected}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(step)
            optimizer.step()
        if self.projector:
            self.projector.project_update(parameters, before)
        self.round_weights()

    # --- what the steps work with -------------------------------------------------------------------------------------

    def in_dtype(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a model, or a copy of it in the dtype of the passes: casting once is cheaper than at every token."""
        return model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype).eval()  # type: ignore[arg-type]

    def precision(self) -> torch.autocast:
        """Return the context in which the student's passes compute in their dtype, from weights in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def project(self, start: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Project training from now on; the update from ``start`` to ``weights`` gives the directions."""
        self.projector = Projector(self.arm.projection, start, weights, self.experiment.seed, self.device)

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights to the dtype that the arm stores them in, in place."""
        if self.arm.weight_dtype != "float32":
            for weight in self.student.parameters():
                weight.copy_(weight.to(getattr(torch, self.arm.weight_dtype)))

    @torch.no_grad()
    def update_norm(self) -> float:
        """Return the Frobenius norm of W_t - W_0 over all parameters."""
        squares = [(weight - self.origin[name]).square().sum() for name, weight in self.student.named_parameters()]
        return float(torch.stack(squares).sum().sqrt())

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict:
        """Measure the mean reward, greedy and sampled, on the same held-out prompts for all arms and seeds."""
        prompts = self.held_out(self.experiment.evaluation_prompts)
        result: dict[str, float] = {"step": step, "prompts": len(prompts)}
        student = self.in_dtype(self.student)
        for mode, temperature, samples in (("greedy", 0.0, 1), ("sampled", 1.0, self.experiment.evaluation_samples)):
            rollouts = self.answer(student, prompts, temperature, samples)
            result[mode] = float(score(self.tokenizer, self.task, prompts, rollouts).mean())
        result["cut"] = 1 - float(np.mean(have_ended(self.tokenizer, rollouts)))  # of the sampled ones
        if step == self.recipe.steps:
            result["memory_change"] = self.memory_change()
        return result | self.distance_to_teacher(rollouts)

    def memory_change(self) -> float:
        """Return the share of the weights that one more step would change in bfloat16 if its gradient were zero.

        It is a null for sparsity: what the optimizer's memory of earlier gradients moves by itself.
        """
        student, optimizers = copy.deepcopy((self.student, self.optimizers))
        for weight in student.parameters():
            weight.grad = torch.zeros_like(weight)
        for optimizer in optimizers:
            optimizer.step()
        pairs = zip(student.parameters(), self.student.parameters(), strict=True)
        changed = [int(update_mask(before.detach(), after.detach()).count_nonzero()) for after, before in pairs]
        return sum(changed) / sum(weight.numel() for weight in student.parameters())

    def held_out(self, count: int) -> list[str]:
        """Return the first ``count`` prompts of an evaluation."""
        return self.task.prompts(count, random_numbers(0, "evaluation prompts", 0), evaluation=True)

    def answer(
        self, student: PreTrainedModel, prompts: list[str], temperature: float = 1.0, samples: int = 1
    ) -> Rollouts:
        """Sample completions for each prompt of an evaluation."""
        how: dict[str, Any] = {"max_new_tokens": self.experiment.max_new_tokens, "temperature": temperature}
        how |= {"samples": samples} | {"generator": torch_generator(random_numbers(0, "evaluation rollouts", 0))}
        return sample(student, self.tokenizer, self.task.texts(self.tokenizer, prompts), **how)

    @torch.no_grad()
    def distance_to_teacher(self, rollouts: Rollouts) -> dict:
        """Measure the student's entropy and KL(student || teacher) on its own rollouts, in nats per token."""
        entropy = kl = 0.0
        for part in micro_batches(rollouts, self.experiment.compute.micro_batch, self.student.device):
            with self.precision():
                logits = part.logits(self.student)
            sums = self._sums(part, logits, part.logits(self.teacher) if self.teacher is not None else None)
            entropy += float(sums["entropy"]) / rollouts.tokens
            kl += float(sums["kl"]) / rollouts.tokens
        return {"entropy": entropy, "kl_teacher": kl if self.teacher is not None else None}

    # --- stopping and going on ----------------------------------------------------------------------------------------

    def state(self) -> Tensors:
        """Return weights and optimizer moments, by kind and name."""
        found: Tensors = {}
        for name, weight in self.student.named_parameters():
            found[f"weight.{name}"] = weight
            for optimizer in self.optimizers:
                found |= {f"{kind}.{name}": moment for kind, moment in optimizer.state.get(weight, {}).items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Tensors) -> None:
        """Take back what :meth:`state` returned."""
        weights = dict(self.student.named_parameters())
        groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        owner = {weight: optimizer for optimizer, group in groups for weight in group["params"]}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            weight = weights[name]
            if kind == "weight":
                weight.copy_(tensor)
            else:  # AdamW counts its steps on the CPU.
                owner[weight].state[weight][kind] = tensor.to("cpu" if kind == "step" else weight.device)
