"""What does an update cost in forgetting, for its size? Seen on the short tasks, which the base was pretrained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import hypot

import pandas as pd
import torch
from torch import Tensor

from opdlab.geometry import frobenius
from opdlab.lab.analyses.runset import Analysis, Part, RunSet, Weights, add, put, to_norms
from opdlab.models.folders import context_length
from opdlab.training.objectives import forward_kl
from opdlab.training.rollouts import Rollouts, encode_completions, encode_prompts, micro_batches
from opdlab.training.trainer import Trainer, score


class Exam:
    """Held-out prompts of the short tasks and their demonstrations, for any weights of the student's shape."""

    def __init__(self, runs: RunSet):
        """Write the demonstrations."""
        experiment = replace(runs.lab.experiment("sft", runs.seed), task=runs.lab.tasks["short_tasks"])
        self.trainer = Trainer(experiment)
        self.prompts = self.trainer.held_out(experiment.evaluation_prompts)
        tokenizer, room = self.trainer.tokenizer, context_length(self.trainer.student.config)
        solutions = [experiment.task.demonstration(prompt) for prompt in self.prompts]
        written = Rollouts(encode_prompts(tokenizer, self.prompts, room), encode_completions(tokenizer, solutions))
        self.tokens = written.tokens
        self.parts = list(micro_batches(written, experiment.compute.micro_batch, self.trainer.device))

    @torch.no_grad()
    def take(self, weights: Weights) -> tuple[float, list[Tensor]]:
        """Return greedy accuracy, and the logits (C, T, V) along the demonstrations of each micro-batch, in float64."""
        put(weights, self.trainer)
        answers = self.trainer.answer(self.trainer.student, self.prompts, temperature=0.0)
        right = score(self.trainer.tokenizer, self.trainer.task, self.prompts, answers)
        return float(right.mean()), [part.logits(self.trainer.student).double() for part in self.parts]

    def kl(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """Return the mean KL(before || after) per token of the demonstrations, in nats, of two lists of logits."""
        found = zip(self.parts, before, after, strict=True)
        return sum(float(forward_kl(now, then)[part.mask].sum()) for part, then, now in found) / self.tokens


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per arm: what its update costs on held-out prompts of the short tasks.

    Columns: ``relative_norm`` of the update, over all weights; ``accuracy_before``, greedy, where the arm starts;
    ``accuracy`` at its end, and how much of it is ``lost``; ``kl``, from the next token where it starts to that at its
    end, along the demonstrations, in nats per token; and ``lost_per_norm`` and ``kl_per_norm``, over the relative norm.
    All but the first two again with _noise, of Gaussian noise in the place of the update, as large tensor by tensor:
    one draw per seed, the same for all arms. A small update has a KL that grows with the square of its norm, so that
    updates of different sizes are best compared by their ratios to noise.
    """
    exam, rows = Exam(runs), []
    for arm in parts[0].arms:
        origin, update = runs.weights(arm, 0.0), runs.update(arm)
        random = torch.Generator().manual_seed(runs.seed)
        draw = {name: torch.randn(update[name].shape, generator=random).double() for name in sorted(update)}
        accuracy, before = exam.take(origin)
        norm = hypot(*map(frobenius, update.values())) / hypot(*map(frobenius, origin.values()))
        row: dict[str, object] = {"arm": arm, "relative_norm": norm, "accuracy_before": accuracy}
        for which, change in (("", update), ("_noise", to_norms(draw, update))):
            then, after = exam.take(add(origin, (1.0, change)))
            lost, kl = accuracy - then, exam.kl(before, after)
            row |= {f"accuracy{which}": then, f"lost{which}": lost, f"kl{which}": kl}
            row |= {
                f"{cost}_per_norm{which}": paid / norm if norm else None for cost, paid in (("lost", lost), ("kl", kl))
            }
        rows.append(row)
    return pd.DataFrame(rows)


RETENTION = Analysis("retention", "what an update costs in forgetting, for its size", measure)
