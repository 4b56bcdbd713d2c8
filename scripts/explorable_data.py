"""What the pictures that move show, taken from the runs of seed 0 at the scale tiny; make_explorables.py writes it.

All is of one matrix, the value projection of the middle layer, chosen before any was seen. Where a picture computes in
the reader's browser it has the first 64 rows and columns of it; their updates are stored in 16 bits an entry, and what
the picture shows is exact for the stored ones.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.errors import OpdlabError
from opdlab.geometry import (
    describe,
    frobenius,
    permute,
    sim_k,
    svd,
    top_right,
    weight_matrices,
)
from opdlab.geometry.measure import generator_of
from opdlab.lab import plots
from opdlab.lab.grid import ARMS as GRID
from opdlab.lab.laboratory import Laboratory
from opdlab.models.folders import load_model, load_tokenizer
from opdlab.training.objectives import grpo_advantages, token_logps
from opdlab.training.rollouts import sample

BLOCK = 64  # rows and columns of the block
K = 8  # directions, an eighth of the block, as in opdlab.geometry.Resolution
ALPHA = 0.3  # of the low-magnitude mask, the paper's
# Relative norms of the slider over sizes: 20 a decade, so that 0.1 % and 1 % are among them.
SIZES = [float(f"{10 ** (i / 20 - 4):.3g}") for i in range(6, 54)]
SHUFFLED = "opd_shuffled"
ARMS = ("sft", "opd", "rlvr", "sft_matched", "random_signs")
FROM_ANCHOR = ARMS[1:]
COLOURS = {**plots.COLOURS, SHUFFLED: "#888888"}
MARKERS = {**plots.MARKERS, SHUFFLED: "X"}
SHUFFLED_LABEL = "OPD, shuffled"
# What a picture shows, in words that stand on it.
WHOLE_SHOWN = "the value projection of the middle layer"
PART_SHOWN = f"the first {BLOCK} rows and columns of the value projection of the middle layer"
SEED = "seed 0"
TOP = 5  # tokens that are shown of a distribution


class Runs:
    """The runs that the pictures are made from, and the matrix that they show."""

    def __init__(self, lab: Laboratory):
        """Raise an OpdlabError if a run is not there."""
        self.lab = lab
        for arm in ARMS:
            if not lab.run(arm).finished:
                raise OpdlabError(f"there is no run of {arm} at {lab.scale.name}: run opdlab record first")
        values = [name for name in weight_matrices(lab.run("opd").snapshot(0)) if describe(name).module == "v_proj"]
        self.matrix = values[len(values) // 2]

    def origin(self, arm: str) -> Tensor:
        """Return the matrix before the first step, in float64."""
        return self.lab.run(arm).snapshot(0)[self.matrix].double()

    def path(self, arm: str) -> list[Tensor]:
        """Return the updates so far at all snapshots."""
        run, origin = self.lab.run(arm), self.origin(arm)
        return [run.snapshot(step)[self.matrix].double() - origin for step in run.experiment.kept[1:]]

    def progress(self, arm: str) -> list[float]:
        """Return at which shares of the training the snapshots were taken."""
        experiment = self.lab.run(arm).experiment
        return [step / experiment.recipe.steps for step in experiment.kept[1:]]


def look(arm: str) -> dict[str, str]:
    """Return how an arm is drawn."""
    label = SHUFFLED_LABEL if arm == SHUFFLED else GRID[arm].label
    return {"name": arm, "label": label, "colour": COLOURS[arm], "marker": MARKERS[arm]}


def base64(numbers: np.ndarray) -> str:
    """Return numbers of a fixed width, row by row and the lowest byte first, in base64."""
    return b64encode(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).decode()


def rounded(weights: Tensor) -> Tensor:
    """Return weights as a bfloat16 file holds them, in float64."""
    return weights.float().to(torch.bfloat16).double()


# --- the block: for the pictures of the size and of bf16 ------------------------------------------------------------


def blocks(runs: Runs) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return, by arm, origin and update of the block as they are stored, and the unit that the update is stored in."""
    found = {}
    for arm in ARMS:
        origin, update = rounded(runs.origin(arm))[:BLOCK, :BLOCK], runs.path(arm)[-1][:BLOCK, :BLOCK]
        found[arm] = (origin, update)
    origin, update = found["opd"]
    found[SHUFFLED] = (origin, permute(update, generator_of(0, runs.matrix)))
    stored = {}
    for arm, (origin, update) in found.items():
        # A power of two, so that multiplying by it is exact, and such that the largest entry is near 2^15.
        unit = 2.0 ** (math.frexp(float(update.abs().max()))[1] - 15)
        stored[arm] = (origin, (update / unit).half().double() * unit, unit)
    return stored


def weights_data(runs: Runs) -> dict:
    """Return origins and updates of the block, and the course of the norms over training."""
    arms, origins = [], {}
    for arm, (origin, update, unit) in blocks(runs).items():
        where = "base" if arm == "sft" else "anchor"
        origins[where] = base64(origin.bfloat16().view(torch.int16).numpy())
        entry = look(arm) | {"origin": where, "unit": unit, "update": base64((update / unit).half().numpy())}
        if arm in FROM_ANCHOR:
            norms = [frobenius(so_far) for so_far in runs.path(arm)]
            entry["course"] = [norm / norms[-1] for norm in norms]
        arms.append(entry)
    return {
        "matrix": runs.matrix,
        "shown": f"{PART_SHOWN}; {SEED}",
        "block": BLOCK,
        "k": K,
        "alpha": ALPHA,
        "sizes": SIZES,
        "progress": runs.progress("opd"),
        "origins": origins,
        "arms": arms,
    }


# --- the token ------------------------------------------------------------------------------------------------------


def likeliest(tokenizer: PreTrainedTokenizerBase, logits: Tensor) -> list[list]:
    """Return the tokens with the largest probabilities, and these."""
    top = logits.softmax(-1).topk(TOP)
    return [
        [tokenizer.decode([i]), round(p, 6)] for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def token_data(runs: Runs) -> dict:
    """Return completions of one prompt by the anchor, with the log-probabilities of each token under both models.

    It is the first prompt of which some completions are right and others wrong.
    """
    lab = runs.lab
    experiment = lab.experiment("opd")
    student, teacher = (load_model(lab.model_folder(name)) for name in ("anchor", "teacher"))
    tokenizer, task, samples = load_tokenizer(lab.model_folder("anchor")), experiment.task, experiment.recipe.samples
    for seed in range(1000):
        prompt = task.draw(np.random.default_rng(seed))
        generator = torch.Generator().manual_seed(seed)
        rollouts = sample(
            student, tokenizer, [prompt], max_new_tokens=experiment.max_new_tokens, samples=samples, generator=generator
        )
        texts = tokenizer.batch_decode(rollouts.completions, skip_special_tokens=True)
        rewards = torch.tensor([task.reward(prompt, text) for text in texts])
        if 0 < rewards.sum() < samples:
            break
    advantages = grpo_advantages(rewards, samples)
    completions = []
    for completion, reward, advantage in zip(rollouts.completions, rewards, advantages, strict=True):
        ids = torch.tensor([rollouts.prompts[0] + completion])
        with torch.inference_mode():
            logits = [model(ids).logits[:, len(rollouts.prompts[0]) - 1 : -1].double() for model in (student, teacher)]
        logps = [token_logps(some, torch.tensor([completion]))[0].tolist() for some in logits]
        tokens = [
            {
                "token": tokenizer.decode([token]),
                "student": logps[0][t],
                "teacher": logps[1][t],
                "student_top": likeliest(tokenizer, logits[0][0, t]),
                "teacher_top": likeliest(tokenizer, logits[1][0, t]),
            }
            for t, token in enumerate(completion)
        ]
        completions.append({"reward": float(reward), "rlvr": float(advantage), "tokens": tokens})
    return {
        "prompt": prompt,
        "answer": task.score.right(prompt),
        "end": tokenizer.eos_token,
        "completions": completions,
    }


# --- the subspace over training -------------------------------------------------------------------------------------


def views(runs: Runs, arm: str) -> dict[str, list[Tensor]]:
    """Return the updates so far in float32, between bfloat16 checkpoints, and of the locked null between these."""
    origin, path = runs.origin(arm), runs.path(arm)
    start, end = rounded(origin), path[-1]
    sizes = [frobenius(update) / frobenius(end) for update in path]
    return {
        "float32": path,
        "bf16": [rounded(origin + update) - start for update in path],
        "locked": [rounded(torch.add(origin, end, alpha=size)) - start for size in sizes],
    }


def subspace_data(runs: Runs) -> dict:
    """Return, by arm and view, Sim_K to the end at each snapshot, and the squared cosines that it is the mean of."""
    arms = []
    for arm in ARMS:
        of_arm = look(arm)
        for view, path in views(runs, arm).items():
            bases = [top_right(svd(update, k=K), K) for update in path]
            squares = torch.stack([(basis.T @ bases[-1]).square() for basis in bases])  # (T, K, K)
            of_arm[view] = {
                "sim": [sim_k(basis, bases[-1]) for basis in bases],
                "squares": base64((squares * 255).round().to(torch.uint8).numpy()),
            }
        arms.append(of_arm)
    about = {"matrix": runs.matrix, "shown": f"{WHOLE_SHOWN}; {SEED}", "k": K, "progress": runs.progress("opd")}
    return about | {"arms": arms}


DATA = {"weights": weights_data, "token": token_data, "subspace": subspace_data}


def recorded_runs() -> Runs:
    """Return the runs in the repository, or in OPDLAB_HOME."""
    return Runs(Laboratory.at("tiny"))


def script_of(name: str, runs: Runs) -> str:
    """Return the text of the script with the data of this name."""
    data = json.dumps(DATA[name](runs), separators=(",", ":"), ensure_ascii=False)
    head = "// Written by scripts/make_explorables.py, which says what it is."
    return f"{head}\n(globalThis.explorables ??= {{ data: {{}} }}).data.{name} = {data};\n"
