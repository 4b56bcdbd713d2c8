"""Training: one loop for every arm.

Each step draws prompts, gets completions (worked solutions, the student's rollouts or the teacher's), turns them into
a loss per token by the arm's signal, and makes one AdamW update: strictly on-policy, as in the paper's recipes.
All randomness of a step comes from (seed, purpose, step). So two arms with the same seed see the same prompts, and a
run that was killed goes on bit for bit as if nothing had happened.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from opdlab import objectives
from opdlab.arms import ARMS, Arm
from opdlab.batches import MicroBatch, micro_batches
from opdlab.constraints import Confinement
from opdlab.errors import OpdlabError
from opdlab.models import character_tokenizer, check_same_vocabulary, load_model, load_tokenizer, new_model, save_model
from opdlab.optimizers import load_moments, make_optimizers, moments
from opdlab.processes import cpu_threads
from opdlab.rollouts import Rollouts, encode_prompts, sample
from opdlab.runs import (
    Home,
    Run,
    default_home,
    device_of,
    load_tensors,
    provenance,
    save_tensors,
    switches,
    write_json,
)
from opdlab.scales import Recipe, Scale, get_scale
from opdlab.signals import SIGNALS, token_ranking, token_weights
from opdlab.tasks import TASKS, Task

# Seconds between two checkpoints: what a kill can cost. But saving takes a twentieth of the time at most.
CHECKPOINT_SECONDS = 20.0
_PURPOSES = {"prompts": 0, "rollouts": 1, "evaluation prompts": 2, "evaluation rollouts": 3, "tokens": 4}


def random_numbers(seed: int, purpose: str, step: int) -> np.random.Generator:
    """Return the source of randomness for one purpose at one step."""
    return np.random.default_rng([seed, _PURPOSES[purpose], step])


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Return a torch generator seeded from ``rng``."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def score(
    tokenizer: transformers.PreTrainedTokenizerBase, task: Task, prompts: list[str], rollouts: Rollouts
) -> Tensor:
    """Return the reward of each completion (B,) of ``prompts``, the texts that the rollouts started from.

    A completion without the end of the sequence is cut, and earns nothing.
    """
    ended = [tokens[-1] == tokenizer.eos_token_id for tokens in rollouts.completions]
    texts = tokenizer.batch_decode([tokens[:-1] for tokens in rollouts.completions])
    rewards = [task.reward(prompts[i // rollouts.samples], text) for i, text in enumerate(texts)]
    return torch.tensor([reward if whole else 0.0 for reward, whole in zip(rewards, ended, strict=True)])


class Learner:
    """The models, the task and the optimizer of a run: what one training step works on."""

    def __init__(self, scale: Scale, arm: Arm, recipe: Recipe, task: Task, folder: Path, seed: int):
        """Load the models of ``arm`` from ``folder``."""
        self.scale, self.arm, self.recipe, self.task, self.seed = scale, arm, recipe, task, seed
        self.device = device_of(scale)
        # What the passes compute in. Without a GPU that is float32: few CPUs gain by less.
        self.dtype = getattr(torch, scale.compute) if self.device.type == "cuda" else torch.float32
        if arm.start:
            start = folder / arm.start
            self.tokenizer, self.student = load_tokenizer(start), load_model(start, self.device)
        else:
            self.tokenizer = character_tokenizer()
            self.student = new_model(scale.shapes[arm.name], seed).to(self.device).eval()
        if scale.recompute:
            self.student.gradient_checkpointing_enable()
        self.teacher: transformers.PreTrainedModel | None = None
        if arm.teacher:
            check_same_vocabulary(folder / arm.start, folder / arm.teacher)
            # Nothing is learned here, so nothing is lost by keeping it in what the passes compute in.
            self.teacher = load_model(folder / arm.teacher, self.device, self.dtype)
        self.round_weights()
        self.origin = {name: weight.detach().clone() for name, weight in self.student.named_parameters()}
        writers = {"student": self.student, "teacher": self.teacher, "task": None}
        self.writer = copy.deepcopy(self.student) if arm.sequences == "stale" else writers[arm.sequences]
        self.optimizers = make_optimizers(self.student, recipe, arm.optimizer)
        self.confinement: Confinement | None = None

    def batch(self, step: int) -> tuple[Rollouts, Tensor | None]:
        """Return the sequences of a step, and their rewards (B,) if a student wrote them."""
        recipe = self.recipe
        prompts = self.task.prompts(recipe.prompts, random_numbers(self.seed, "prompts", step))
        if self.writer is None:
            room = self.student.config.max_position_embeddings - self.scale.max_new_tokens
            texts = [self.task.demonstration(prompt) for prompt in prompts]
            solutions = self.tokenizer(texts, add_special_tokens=False).input_ids
            ended = [[*tokens, self.tokenizer.eos_token_id] for tokens in solutions]
            return Rollouts(encode_prompts(self.tokenizer, prompts, room), ended), None
        generator = torch_generator(random_numbers(self.seed, "rollouts", step))
        by_teacher = round(self.arm.teacher_share * len(prompts))
        rollouts = Rollouts([], [])
        for writer, part in ((self.teacher, prompts[:by_teacher]), (self.writer, prompts[by_teacher:])):
            if part:
                rollouts += sample(
                    self.in_dtype(writer),
                    self.tokenizer,
                    part,
                    max_new_tokens=self.scale.max_new_tokens,
                    samples=recipe.samples,
                    temperature=self.scale.temperature,
                    generator=generator,
                )
        if self.writer is self.teacher or by_teacher:
            return rollouts, None
        return rollouts, score(self.tokenizer, self.task, prompts, rollouts)

    def in_dtype(self, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """Return a model, or a copy of it in the dtype of the passes: casting once is cheaper than at every token."""
        return model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype).eval()

    def precision(self) -> torch.autocast:
        """Return the context in which the student's passes compute in their dtype, from weights in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, step: int) -> dict:
        """Make update number ``step`` (counted from 0) and return what the history keeps of it.

        Raises:
            OpdlabError: if the loss is not finite; the weights are then as before the step.
        """
        began = time.process_time()
        arm, student = self.arm, self.student
        rollouts, rewards = self.batch(step)
        advantages = objectives.grpo_advantages(rewards, rollouts.samples) if arm.listens_to_rewards else None
        random = torch_generator(random_numbers(self.seed, "tokens", step))
        loss = entropy = kl = 0.0
        self._zero_gradients()
        student.train(self.scale.recompute)  # Only then does transformers recompute; there is no dropout.
        for part in micro_batches(rollouts, self.scale.micro_batch, student.device, advantages):
            with self.precision():
                logits = part.logits(student)
            with torch.no_grad():
                teacher = part.logits(self.teacher) if arm.listens_to_teacher else None
            losses = self.losses(part, logits, teacher, rollouts.tokens, random)
            self._accumulate(losses)
            with torch.no_grad():
                loss += sum(arm.signals[name] * value.item() for name, value in losses.items())
                entropy += objectives.entropy(logits)[part.mask].sum().item() / rollouts.tokens
                if teacher is not None:
                    kl += objectives.reverse_kl(logits, teacher)[part.mask].sum().item() / rollouts.tokens
        if not np.isfinite(loss):
            raise OpdlabError(
                f"the loss of arm {arm.name!r} is {loss} at step {step + 1}: lower its learning rate "
                f"({self.recipe.learning_rate:g}); the run is kept up to its last checkpoint"
            )
        student.eval()
        shares = self._mix()
        parameters = dict(student.named_parameters())
        if self.confinement and self.confinement.acts_on == "gradient":
            self.confinement.confine_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), self.recipe.clip)
        # A batch whose rewards are all alike says nothing: skip the update, or Adam's momentum would make one.
        skipped = arm.signal == "grpo" and not bool(advantages.any())
        if not skipped:
            self._update(step, parameters)
        return {
            "step": step + 1,
            "loss": loss,
            "accuracy": None if rewards is None else float(rewards.mean()),
            "entropy": entropy,
            "kl_teacher": kl if arm.listens_to_teacher else None,
            "grad_norm": float(norm),
            "update_norm": self.update_norm(),
            "skipped": skipped,
            "tokens": rollouts.tokens,
            "seconds": round(time.process_time() - began, 4),
        } | shares

    def losses(
        self, part: MicroBatch, logits: Tensor, teacher: Tensor | None, tokens: int, random: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the loss of each of the arm's signals, a scalar, as its share of the loss of the whole batch."""
        arm, weights = self.arm, None
        if arm.ranking:
            with torch.no_grad():
                key = token_ranking(arm.ranking, logits, part.tokens, teacher, random)
                weights = token_weights(key, part.mask, arm.token_share, arm.per_completion)
        losses = {}
        for name in arm.signals:
            per_token = SIGNALS[name](logits, part.tokens, teacher, part.advantages, part.mask)
            losses[name] = objectives.token_mean(
                per_token if weights is None else per_token * weights, part.mask, normalizer=tokens
            )
        return losses

    def _zero_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.gradients: dict[str, list[Tensor]] = {}

    def _accumulate(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of a micro-batch; those of a mixture are kept apart, to weigh and compare them."""
        if len(losses) == 1:
            next(iter(losses.values())).backward()
            return
        weights = list(self.student.parameters())
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, weights, retain_graph=True)
            before = self.gradients.get(name)
            self.gradients[name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

    @torch.no_grad()
    def _mix(self) -> dict[str, float]:
        """Put a mixture's gradients together, and return their norms and cosine; nothing without a mixture."""
        if not self.gradients:
            return {}
        vectors = {name: torch.cat([part.flatten() for part in parts]) for name, parts in self.gradients.items()}
        first, second = vectors.values()
        norms = {name: float(vector.norm()) for name, vector in vectors.items()}
        reference = norms[self.arm.signal]
        scales = {name: reference / max(norm, 1e-12) if self.arm.balanced else 1.0 for name, norm in norms.items()}
        for i, weight in enumerate(self.student.parameters()):
            weight.grad = sum(
                share * scales[name] * self.gradients[name][i] for name, share in self.arm.signals.items()
            )
        cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
        return {f"grad_norm_{name}": norm for name, norm in norms.items()} | {"grad_cosine": cosine}

    def _update(self, step: int, parameters: dict[str, Tensor]) -> None:
        """Let the optimizers make their step, confined and rounded as the arm says."""
        strict = self.confinement if self.confinement and self.confinement.acts_on == "update" else None
        before = {name: parameters[name].detach().clone() for name in strict.of} if strict else {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(step)
            optimizer.step()
        if strict:
            strict.confine_update(parameters, before)
        self.round_weights()

    def confine(self, weights: dict[str, Tensor], at_start: bool) -> None:
        """Confine training from now on to what the update from the origin to ``weights`` spans.

        ``at_start`` is False when a stopped run goes on, which keeps its moments in any case.
        """
        constraint = self.arm.constraint
        self.confinement = Confinement(constraint, self.origin, weights, self.seed)
        if constraint.reset and at_start:
            for optimizer in self.optimizers:
                optimizer.state.clear()

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights to the dtype that the arm stores them in, in place."""
        if self.arm.stored != "float32":
            for weight in self.student.parameters():
                weight.copy_(weight.to(getattr(torch, self.arm.stored)))

    @torch.no_grad()
    def update_norm(self) -> float:
        """Return the Frobenius norm of W_t - W_0 over all parameters."""
        squares = [(weight - self.origin[name]).square().sum() for name, weight in self.student.named_parameters()]
        return float(torch.stack(squares).sum().sqrt())

    def evaluate(self, step: int) -> dict:
        """Measure greedy and sampled accuracy on the evaluation prompts, the same for every arm, seed and step."""
        count = self.scale.evaluation_prompts
        prompts = self.task.prompts(count, random_numbers(0, "evaluation prompts", 0), evaluation=True)
        result, student = {"step": step, "prompts": count}, self.in_dtype(self.student)
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            rollouts = sample(
                student,
                self.tokenizer,
                prompts,
                max_new_tokens=self.scale.max_new_tokens,
                temperature=temperature,
                generator=torch_generator(random_numbers(0, "evaluation rollouts", 0)),
            )
            result[mode] = float(score(self.tokenizer, self.task, prompts, rollouts).mean())
        return result | self.distance_to_teacher(rollouts)

    @torch.no_grad()
    def distance_to_teacher(self, rollouts: Rollouts) -> dict:
        """Measure the student's entropy and KL(student || teacher) on its own rollouts, in nats per token."""
        entropy = kl = 0.0
        for part in micro_batches(rollouts, self.scale.micro_batch, self.student.device):
            with self.precision():
                logits = part.logits(self.student)
            entropy += float(objectives.entropy(logits)[part.mask].sum()) / rollouts.tokens
            if self.teacher is not None:
                kl += float(objectives.reverse_kl(logits, part.logits(self.teacher))[part.mask].sum()) / rollouts.tokens
        return {"entropy": entropy, "kl_teacher": kl if self.teacher is not None else None}

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer moments, by name."""
        weights = dict(self.student.named_parameters())
        return {f"weight.{name}": weight for name, weight in weights.items()} | moments(self.optimizers, weights)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        weights = dict(self.student.named_parameters())
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight.{name}"])
        load_moments(self.optimizers, weights, tensors)


def train(
    arm: str,
    seed: int = 0,
    scale: Scale | None = None,
    *,
    home: Home | None = None,
    progress: bool = False,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> Run:
    """Train one arm, or go on where an earlier call was stopped, and return its run.

    Args:
        arm: a name in :data:`opdlab.arms.ARMS`.
        seed: of prompts and rollouts (and of the weights where they start at random).
        scale: the scale; by default that of ``OPDLAB_SCALE``.
        home: where models and runs lie; by default the repository.
        progress: show a bar with step, loss, accuracy and time left.
        on_steps: called with the number of steps done since the call before; first with those of an earlier call.

    Raises:
        OpdlabError: on bad input or a loss that is not finite; what was computed is kept.
        KeyboardInterrupt: on Ctrl-C; the run goes on from its last checkpoint when it is asked for again.
    """
    scale, home = scale or get_scale(), home or default_home()
    run = Run.of(scale, arm, seed, home)
    config, checkpoint = run.config, run.folder / "checkpoint.safetensors"
    if run.finished:
        checkpoint.unlink(missing_ok=True)  # left by a call that was stopped right after the last step
        on_steps(config["recipe"]["steps"])
        return run
    with cpu_threads(scale.threads):
        learner = Learner(scale, ARMS[arm], scale.recipe(arm), TASKS[config["task"]], home.models(scale), seed)
        done = 0
        if not checkpoint.exists():
            write_json(run.folder / "config.json", config)
            write_json(run.folder / "provenance.json", provenance(learner.device))
            run.forget_after(-1)  # of a run killed before its first checkpoint nothing counts, not even step 0
            if "constraint" in config:
                # Until the switch a projected run is its free run: where that one is there, a part of the work is done.
                free = Run.of(scale, ARMS[arm].like, seed, home)
                run.begin_like(free, config["constraint"]["begin"], learner.device)
        if checkpoint.exists():
            tensors, metadata = load_tensors(checkpoint)
            learner.restore(tensors)
            done = int(metadata["step"])
            run.forget_after(done)
        on_steps(done)
        steps = config["recipe"]["steps"]
        bar = tqdm(total=steps, initial=done, desc=f"{arm} seed {seed}", disable=not progress, unit="step")
        accuracy = None

        def evaluate(step: int) -> None:
            nonlocal accuracy
            evaluation = learner.evaluate(step)
            run.append("evaluations", evaluation)
            accuracy = evaluation["sampled"]

        def save(step: int) -> None:
            save_tensors(checkpoint, learner.state(), step=str(step))

        if done == 0 and 0 in config["snapshots"]:
            save_tensors(run.snapshot_path(0), dict(learner.student.named_parameters()))
        if done in config["evaluations"] and done not in {line["step"] for line in run.lines("evaluations")}:
            evaluate(done)
        saved, took = time.monotonic(), 0.0
        begin = config.get("constraint", {}).get("begin", steps)
        parting = switches(arm, scale)
        try:
            for step in range(done, steps):
                if step >= begin and learner.confinement is None:
                    learner.confine(_source_weights(run, scale, home), at_start=step == begin)
                line = learner.step(step)
                done = step + 1
                run.append("history", line)
                if done in config["evaluations"]:
                    evaluate(done)
                if done in config["snapshots"]:
                    save_tensors(run.snapshot_path(done), dict(learner.student.named_parameters()))
                if done in parting:
                    save_tensors(run.state_path(done), learner.state(), step=str(done))
                if done < steps and time.monotonic() - saved > max(CHECKPOINT_SECONDS, 20 * took):
                    began = time.monotonic()
                    save(done)
                    saved = time.monotonic()
                    took = saved - began
                accuracy = line["accuracy"] if line["accuracy"] is not None else accuracy
                shown = {"loss": f"{line['loss']:.3f}", "accuracy": "?" if accuracy is None else f"{accuracy:.0%}"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                on_steps(1)
        finally:
            bar.close()
        checkpoint.unlink(missing_ok=True)
    return run


def _source_weights(run: Run, scale: Scale, home: Home) -> dict[str, Tensor]:
    """Return the weights whose update gives the directions of a projected run: its own, or those of another run."""
    constraint = run.config["constraint"]
    source = run
    if "arm" in constraint:
        source = train(constraint["arm"], constraint["seed"], scale, home=home)
    return source.snapshot(constraint["step"])


def install_model(run: Run, home: Home, scale: Scale, name: str) -> Path:
    """Write the last weights of ``run`` as the Hugging Face folder ``name`` among the models of ``scale``."""
    arm = ARMS[run.config["arm"]["name"]]
    folder = home.models(scale)
    if arm.start:
        model, tokenizer = load_model(folder / arm.start), load_tokenizer(folder / arm.start)
    else:
        model, tokenizer = new_model(scale.shapes[arm.name], run.config["seed"]), character_tokenizer()
    model.load_state_dict(run.snapshot(run.config["recipe"]["steps"]), strict=False)
    save_model(model, tokenizer, folder / name)
    return folder / name
