"""Record the scale in the making. It can be stopped, and the same command goes on:

    python scripts/record_regime.py [--arm ARM ...] [--analysis ANALYSIS ...] [--seed SEED ...]

The claims that runs and analyses will be judged by are written into the records. A seed from 100 on is a pilot: no
verdict uses it, and its record lies under runs/pilot.
"""

import argparse
from pathlib import Path

import torch

from opdlab.claims.regime import CLAIMS
from opdlab.claims.rules import digests
from opdlab.lab.laboratory import Laboratory, default_root
from opdlab.lab.regime import REGIME, REGIME_ARMS, REGIME_TASKS
from opdlab.lab.scheduler import build, plan
from opdlab.models.folders import load_model, load_tokenizer, save_model


def provide_young_anchor(folder: Path) -> None:
    """Put the anchor of the first laboratory, which has half learned the skill, among the models, in bfloat16."""
    first = default_root() / "data/models/tiny/anchor"
    if not folder.is_dir():
        save_model(load_model(first, dtype=torch.bfloat16), load_tokenizer(first), folder)


def main() -> None:
    """Record what was asked for, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", action="append", choices=REGIME.policy.arms)
    parser.add_argument("--analysis", action="append", choices=REGIME.policy.analyses)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    pilot = any(seed >= 100 for seed in options.seed or ())
    root = default_root() / "runs/pilot" if pilot else default_root()
    lab = Laboratory(REGIME, root, dict(REGIME_ARMS), dict(REGIME_TASKS), digests(CLAIMS))
    provide_young_anchor(lab.models / "young")
    everything = not (options.arm or options.analysis)
    arms, analyses = (REGIME.policy.arms, REGIME.policy.analyses) if everything else (options.arm, options.analysis)
    jobs = plan(lab, tuple(arms or ()), tuple(options.seed or ()), analyses=tuple(analyses or ()))
    build(jobs, lab, processes=options.processes)


if __name__ == "__main__":
    main()
