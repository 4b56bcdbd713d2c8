"""Do the gradients of chosen tokens, other writers and other objectives vary in the same directions, on one batch?

The paper explains why its controls change little by a subspace that the gradients of all tokens share: their second
moment E[g gᵀ] stays what it was when tokens are left out (2606.07082, section 6). It shows no measurement of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from opdlab.geometry import describe, sim_k, weight_matrices
from opdlab.lab.analyses.runset import SIM_KS, Analysis, Part, RunSet
from opdlab.training import objectives
from opdlab.training.rollouts import Rollouts, micro_batches
from opdlab.training.trainer import Trainer, random_numbers, torch_generator

#: The arms whose losses are compared with that of OPD on all tokens, where a scale records them.
LOSSES = (
    "opd", "opd_full", "rlvr", "sft_matched", "opd_top25", "opd_random25", "opd_first30", "opd_last30",
    "opd_teacher100", "opd_sequence_mean", "opd_sign", "opd_forward",
)  # fmt: skip
Moments = dict[str, Tensor]


def second_moments(losses: Iterator[Tensor], matrices: dict[str, Tensor]) -> tuple[Moments, Moments]:
    """Return the means of gᵀ g (n, n) and of g (m, n), the gradients of ``losses``, for each of ``matrices`` (m, n).

    The losses are scalars, one per completion.
    """
    squares = {name: torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64) for name, w in matrices.items()}
    means = {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in matrices.items()}
    count = 0
    for loss in losses:
        count += 1
        if loss.requires_grad:
            for name, found in zip(matrices, torch.autograd.grad(loss, list(matrices.values())), strict=True):
                gradient = found.double()
                squares[name] += gradient.T @ gradient
                means[name] += gradient
    return {n: s / count for n, s in squares.items()}, {n: m / count for n, m in means.items()}


def _losses(trainer: Trainer, random_signs: bool) -> Iterator[Tensor]:
    """Yield the loss of each completion of the first batch, or what it would be if each token's credit were a coin."""
    random = torch_generator(random_numbers(trainer.experiment.seed, "tokens", 0))
    rollouts, rewards = trainer.batch(0)
    advantages = None
    if trainer.arm.reads_rewards and rewards is not None:
        advantages = objectives.grpo_advantages(rewards, rollouts.samples)
    for i, completion in enumerate(rollouts.completions):
        alone = Rollouts([rollouts.prompts[i // rollouts.samples]], [completion])
        own = None if advantages is None else advantages[i : i + 1]
        (part,) = micro_batches(alone, 1, trainer.student.device, own)
        if random_signs:
            logps = objectives.token_logps(part.logits(trainer.student), part.tokens)
            credits = torch.randint(2, logps.shape, generator=random).to(logps.device) * 2.0 - 1.0
            yield objectives.token_mean(objectives.policy_gradient(logps, credits), part.mask)
        else:
            (loss,) = trainer.read(part, int(part.mask.sum()), random)[0].values()
            yield loss


def _moments(runs: RunSet, arm: str, seed: int, random_signs: bool = False) -> tuple[Moments, Moments]:
    # Another seed is another batch, at the anchor of this one.
    trainer = Trainer(replace(runs.lab.experiment(arm, runs.seed), seed=seed))
    matrices = weight_matrices(dict(trainer.student.named_parameters()))
    return second_moments(_losses(trainer, random_signs), matrices)


def measure(runs: RunSet, parts: Sequence[Part]) -> pd.DataFrame:
    """Return one row per loss and matrix: how its gradients compare with those of OPD.

    The gradients are those of single completions of the first batch, at the anchor. Columns: ``arm``, Sim_K of the top
    right subspaces of E[gᵀ g], the share of its trace in OPD's top-K subspace (``energy_K``), both at random, and the
    cosine of the mean gradients. Besides the losses of arms: "opd, another batch", that of the next seed at the same
    anchor, and "random signs", OPD with each token's credit drawn from {-1, 1}.
    """
    names = {arm: (arm, runs.seed, False) for arm in GRADIENTS.arms_at(runs.lab)}
    names |= {"opd, another batch": ("opd", runs.later(), False), "random signs": ("opd", runs.seed, True)}
    found = {name: _moments(runs, *of) for name, of in names.items()}
    squares, means = found["opd"]
    bases = {name: _directions(square) for name, square in squares.items()}
    rows = []
    for arm, (other_squares, other_means) in found.items():
        for name, square in other_squares.items():
            basis, n = _directions(square), len(square)
            row = {"arm": arm, **describe(name)._asdict(), "parameters": means[name].numel()}
            row["cosine"] = float(cosine_similarity(means[name].flatten(), other_means[name].flatten(), dim=0))
            for k in SIM_KS:
                top = bases[name][:, :k]
                row[f"sim_right_K{k}"] = sim_k(top, basis[:, :k])
                row[f"energy_K{k}"] = float((top.T @ square @ top).trace() / square.trace())
                row[f"sim_right_random_K{k}"] = k / n
            rows.append(row)
    return pd.DataFrame(rows)


def _directions(square: Tensor) -> Tensor:
    """Return the eigenvectors (n, n), those of the largest eigenvalues first; NaN where there is no gradient at all."""
    vectors = torch.linalg.eigh(square).eigenvectors.flip(1)
    return vectors if square.any() else torch.full_like(vectors, torch.nan)


GRADIENTS = Analysis(
    "gradients", "whether the gradients of other tokens and losses share OPD's directions", measure, LOSSES,
    later=(("opd", 1),), keys=("arm",), trained=False,
)  # fmt: skip
