"""Record a scale in the making. It can be stopped, and the same command goes on:

    python scripts/record_regime.py [--scale SCALE] [--arm ARM ...] [--analysis ANALYSIS ...] [--seed SEED ...]

The claims that runs and analyses will be judged by are written into the records. A seed from 100 on is a pilot: no
verdict uses it, and its record lies under runs/pilot. Where one anchor serves all seeds, pilots start from it too. With
--steps, arms are only tried for so many steps, at seed 100 by default, and what came of it is printed:

    python scripts/record_regime.py --scale small-regime --arm opd --steps 40
"""

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import pandas as pd

from opdlab.claims.paper import CLAIMS
from opdlab.claims.rules import digests
from opdlab.errors import exit_status
from opdlab.geometry import bf16_sparsity, frobenius, relative_norm, weight_matrices
from opdlab.lab.laboratory import Laboratory, default_root
from opdlab.lab.scheduler import all_models, build, plan
from opdlab.lab.small_regime import SMALL_REGIME, SMALL_REGIME_ARMS, SMALL_REGIME_TASKS
from opdlab.processes import computes_in_bfloat16
from opdlab.training.config import Experiment

IN_THE_MAKING = {SMALL_REGIME.name: (SMALL_REGIME, SMALL_REGIME_ARMS, SMALL_REGIME_TASKS)}


def laboratory(name: str, root: Path) -> Laboratory:
    """Return the laboratory of a scale in the making."""
    scale, arms, tasks = IN_THE_MAKING[name]
    if not computes_in_bfloat16():  # The records of a scale are of one kind: what is there in bfloat16 is made again.
        scale = replace(scale, compute=replace(scale.compute, cpu_dtype="float32"))
    return Laboratory(scale, root, dict(arms), dict(tasks), digests(CLAIMS))


def pilots_of(lab: Laboratory) -> Laboratory:
    """Return the laboratory of pilots, with the same models where seeds have none of their own."""
    pilots = replace(lab, root=lab.root / "runs/pilot")
    if not lab.scale.models.per_seed and not pilots.models.is_symlink():
        lab.models.mkdir(parents=True, exist_ok=True)
        pilots.models.parent.mkdir(parents=True, exist_ok=True)
        pilots.models.symlink_to(lab.models, target_is_directory=True)
    return pilots


def tried(lab: Laboratory, arm: str, seed: int, steps: int) -> pd.DataFrame:
    """Train some steps of an arm, and return how far it came after a quarter, a half and all of them.

    The size of the update relative to the weights and the share of these that bfloat16 shows unchanged, both in percent
    and means over the matrices; C, the root mean square of the update over that of Adam's walk on noise, whose steps
    are as long as the learning rate; and in evaluations the KL to the teacher in nats per token, and accuracy.
    """

    def shorter(experiment: Experiment) -> Experiment:
        recipe = replace(experiment.recipe, steps=steps)
        return replace(experiment, recipe=recipe, evaluations=(steps,), snapshots=recipe.steps_at((0.25, 0.5, 1.0)))

    run = lab.train(arm, seed, change=shorter, progress=True)
    recipe, w0s, rows = run.experiment.recipe, weight_matrices(run.snapshot(0)), []
    for step in run.experiment.kept[1:]:
        pairs = [(w0s[name], w1) for name, w1 in weight_matrices(run.snapshot(step)).items()]
        squares = sum(frobenius(w1.double() - w0.double()) ** 2 for w0, w1 in pairs)
        walk = sum(recipe.learning_rate_at(i) ** 2 for i in range(step)) * sum(w0.numel() for w0, _ in pairs)
        rows.append({
            "step": step, "norm %": 100 * mean(relative_norm(*pair) for pair in pairs),
            "unchanged %": 100 * mean(bf16_sparsity(*pair) for pair in pairs), "C": (squares / walk) ** 0.5,
        })  # fmt: skip
    evaluations = pd.DataFrame(run.lines("evaluations"))[["step", "kl_teacher", "greedy", "sampled"]]
    return evaluations.merge(pd.DataFrame(rows), on="step", how="outer")


def main() -> None:
    """Record what was asked for, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=IN_THE_MAKING, default=SMALL_REGIME.name)
    parser.add_argument("--arm", action="append")
    parser.add_argument("--analysis", action="append")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--steps", type=int, help="try the arms for so many steps, and record nothing")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    lab = laboratory(options.scale, default_root())
    seeds = tuple(options.seed or ((100,) if options.steps else ()))
    if any(seed >= 100 for seed in seeds):
        if not lab.scale.models.per_seed:  # where the record will find them, too
            build(plan(lab, (), models=all_models(lab)), lab, record=False, processes=options.processes)
        lab = pilots_of(lab)
    arms, analyses = tuple(options.arm or ()), tuple(options.analysis or ())
    if not (arms or analyses):
        arms, analyses = lab.scale.policy.arms, lab.scale.policy.analyses
    if options.steps:
        asked = list(product(arms, seeds))
        models = tuple(dict.fromkeys(folder for arm, seed in asked for folder in lab.models_of(arm, seed)))
        build(plan(lab, (), models=models), lab, record=False, processes=options.processes)
        for arm, seed in asked:
            print(f"{arm}, seed {seed}\n{tried(lab, arm, seed, options.steps).to_string(index=False)}")
    else:
        build(plan(lab, arms, seeds, analyses=analyses), lab, processes=options.processes)


if __name__ == "__main__":
    sys.exit(exit_status("record_regime", main))
