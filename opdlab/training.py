"""Training: one loop for every arm.

Each step draws prompts, gets completions (worked solutions, the student's rollouts or the teacher's), turns them into
a loss per token by the arm's signal, and makes one AdamW update: strictly on-policy, as in the paper's recipes.
All randomness of a step comes from (seed, purpose, step). So two arms with the same seed see the same prompts, and a
run that was killed goes on bit for bit as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab import objectives
from opdlab.arms import ARMS, SIGNALS, Arm
from opdlab.batches import micro_batches
from opdlab.errors import OpdlabError
from opdlab.models import character_tokenizer, check_same_vocabulary, load_model, load_tokenizer, new_model, save_model
from opdlab.rollouts import Rollouts, encode_prompts, sample
from opdlab.runs import Home, Run, default_home, load_tensors, provenance, save_tensors, write_json
from opdlab.scales import Recipe, Scale, get_scale
from opdlab.tasks import TASKS, Task

# Seconds between two checkpoints: what a kill can cost.
CHECKPOINT_SECONDS = 20.0
_PURPOSES = {"prompts": 0, "rollouts": 1, "evaluation prompts": 2, "evaluation rollouts": 3}


def random_numbers(seed: int, purpose: str, step: int) -> np.random.Generator:
    """Return the source of randomness for one purpose at one step."""
    return np.random.default_rng([seed, _PURPOSES[purpose], step])


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Return a torch generator seeded from ``rng``."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def score(tokenizer: PreTrainedTokenizerBase, task: Task, prompts: list[str], rollouts: Rollouts) -> Tensor:
    """Return the reward of each completion (B,) of ``prompts``, the texts that the rollouts started from."""
    texts = tokenizer.batch_decode(rollouts.completions)
    return torch.tensor([task.reward(prompts[i // rollouts.samples], text) for i, text in enumerate(texts)])


class Learner:
    """The models, the task and the optimizer of a run: what one training step works on."""

    def __init__(self, scale: Scale, arm: Arm, recipe: Recipe, task: Task, folder: Path, seed: int):
        """Load the models of ``arm`` from ``folder``."""
        self.scale, self.arm, self.recipe, self.task, self.seed = scale, arm, recipe, task, seed
        if arm.start:
            start = folder / arm.start
            self.tokenizer, self.student = load_tokenizer(start), load_model(start)
        else:
            self.tokenizer, self.student = character_tokenizer(), new_model(scale.shapes[arm.name], seed).eval()
        self.teacher: PreTrainedModel | None = None
        if arm.has_teacher:
            check_same_vocabulary(folder / arm.start, folder / "teacher")
            self.teacher = load_model(folder / "teacher")
        self.origin = {name: weight.detach().clone() for name, weight in self.student.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=0.0, betas=recipe.betas, weight_decay=recipe.weight_decay
        )

    def batch(self, step: int) -> tuple[Rollouts, Tensor | None]:
        """Return the sequences of a step, and their rewards (B,) if the student wrote them."""
        recipe = self.recipe
        prompts = self.task.prompts(recipe.prompts, random_numbers(self.seed, "prompts", step))
        if self.arm.sequences == "task":
            room = self.student.config.max_position_embeddings - self.scale.max_new_tokens
            solutions = self.tokenizer([self.task.demonstration(prompt) for prompt in prompts]).input_ids
            return Rollouts(encode_prompts(self.tokenizer, prompts, room), solutions), None
        rollouts = sample(
            self.student if self.arm.sequences == "student" else self.teacher,
            self.tokenizer,
            prompts,
            max_new_tokens=self.scale.max_new_tokens,
            samples=recipe.samples,
            temperature=self.scale.temperature,
            generator=torch_generator(random_numbers(self.seed, "rollouts", step)),
        )
        if self.arm.sequences == "teacher":
            return rollouts, None
        return rollouts, score(self.tokenizer, self.task, prompts, rollouts)

    def step(self, step: int) -> dict:
        """Make update number ``step`` (counted from 0) and return what the history keeps of it.

        Raises:
            OpdlabError: if the loss is not finite; the weights are then as before the step.
        """
        began = time.perf_counter()
        rollouts, rewards = self.batch(step)
        advantages = objectives.grpo_advantages(rewards, rollouts.samples) if self.arm.signal == "grpo" else None
        signal, listens = SIGNALS[self.arm.signal], self.arm.listens_to_teacher
        loss = entropy = kl = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(rollouts, self.scale.micro_batch, self.student.device, advantages):
            logits = part.logits(self.student)
            with torch.no_grad():
                teacher = part.logits(self.teacher) if listens else None
            per_token = signal(logits, part.tokens, teacher, part.advantages)
            part_loss = objectives.token_mean(per_token, part.mask, normalizer=rollouts.tokens)
            part_loss.backward()
            with torch.no_grad():
                loss += part_loss.item()
                entropy += objectives.entropy(logits)[part.mask].sum().item() / rollouts.tokens
                if teacher is not None:
                    kl += objectives.reverse_kl(logits, teacher)[part.mask].sum().item() / rollouts.tokens
        if not np.isfinite(loss):
            raise OpdlabError(
                f"the loss of arm {self.arm.name!r} is {loss} at step {step + 1}: lower its learning rate "
                f"({self.recipe.learning_rate:g}); the run is kept up to its last checkpoint"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        # A batch whose rewards are all alike says nothing: skip the update, or Adam's momentum would make one.
        skipped = advantages is not None and not bool(advantages.any())
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(step)
            self.optimizer.step()
        return {
            "step": step + 1,
            "loss": loss,
            "accuracy": None if rewards is None else float(rewards.mean()),
            "entropy": entropy,
            "kl_teacher": kl if listens else None,
            "grad_norm": float(norm),
            "update_norm": self.update_norm(),
            "skipped": skipped,
            "tokens": rollouts.tokens,
            "seconds": round(time.perf_counter() - began, 4),
        }

    @torch.no_grad()
    def update_norm(self) -> float:
        """Return the Frobenius norm of W_t - W_0 over all parameters."""
        squares = [(weight - self.origin[name]).square().sum() for name, weight in self.student.named_parameters()]
        return float(torch.stack(squares).sum().sqrt())

    def evaluate(self, step: int) -> dict:
        """Measure greedy and sampled accuracy on the evaluation prompts, the same for every arm, seed and step."""
        count = self.scale.evaluation_prompts
        prompts = self.task.prompts(count, random_numbers(0, "evaluation prompts", 0), evaluation=True)
        result = {"step": step, "prompts": count}
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            rollouts = sample(
                self.student,
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
            logits = part.logits(self.student)
            entropy += float(objectives.entropy(logits)[part.mask].sum()) / rollouts.tokens
            if self.teacher is not None:
                kl += float(objectives.reverse_kl(logits, part.logits(self.teacher))[part.mask].sum()) / rollouts.tokens
        return {"entropy": entropy, "kl_teacher": kl if self.teacher is not None else None}

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer moments, by name."""
        tensors = {}
        for name, weight in self.student.named_parameters():
            tensors[f"weight.{name}"] = weight
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                if self.optimizer.state[weight]:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[weight][moment]
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        for name, weight in self.student.named_parameters():
            weight.copy_(tensors[f"weight.{name}"])
            if f"step.{name}" in tensors:
                self.optimizer.state[weight] = {
                    moment: tensors[f"{moment}.{name}"].to(weight.device if moment != "step" else "cpu")
                    for moment in ("exp_avg", "exp_avg_sq", "step")
                }


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with ``count`` CPU threads, and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    if run.finished:
        on_steps(run.config["recipe"]["steps"])
        return run
    config, checkpoint = run.config, run.folder / "checkpoint.safetensors"
    with cpu_threads(scale.threads):
        learner = Learner(scale, ARMS[arm], scale.recipes[arm], TASKS[config["task"]], home.models(scale), seed)
        done = 0
        if checkpoint.exists():
            tensors, metadata = load_tensors(checkpoint)
            learner.restore(tensors)
            done = int(metadata["step"])
            run.forget_after(done)
        else:
            write_json(run.folder / "config.json", config)
            write_json(run.folder / "provenance.json", provenance())
            run.forget_after(-1)  # of a run killed before its first checkpoint nothing counts, not even step 0
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

        if done == 0:
            if 0 in config["snapshots"]:
                save_tensors(run.snapshot_path(0), dict(learner.student.named_parameters()))
            evaluate(0)
        saved = time.monotonic()
        try:
            for step in range(done, steps):
                line = learner.step(step)
                done = step + 1
                run.append("history", line)
                if done in config["evaluations"]:
                    evaluate(done)
                if done in config["snapshots"]:
                    save_tensors(run.snapshot_path(done), dict(learner.student.named_parameters()))
                if done < steps and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save(done)
                    saved = time.monotonic()
                accuracy = line["accuracy"] if line["accuracy"] is not None else accuracy
                bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy="?" if accuracy is None else f"{accuracy:.0%}")
                bar.update()
                on_steps(1)
        finally:
            bar.close()
        checkpoint.unlink(missing_ok=True)
    return run


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
