"""One step of each arm on randomly initialised models of published shapes: does it fit, and how fast is it?

    python benchmarks/full_step.py --scale full --out full.json      # on a GPU of 80 GB; 25 GB of disk, ten minutes
    python benchmarks/full_step.py --scale full-0.6b --arms opd sft

No hub is needed: the shapes are those of the models that the scale names (opdlab.lab.budget.SHAPES), the weights are
random, and the prompts are those of the laboratory, one token per character. A random model never ends a completion, so
each has all the tokens that are typical of the scale. Beside what is measured stands what 'opdlab plan' says.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import transformers
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.geometry import measure_matrix
from opdlab.lab.budget import DEVICES, GB, SHAPES, check_room, plan_run
from opdlab.lab.grid import PAPER
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import SCALES, Scale
from opdlab.lab.tasks import RUNNING_SUM
from opdlab.models.files import load_tensors, save_tensors, write_json
from opdlab.models.folders import character_tokenizer, save_model
from opdlab.processes import find_device, provenance
from opdlab.training.trainer import Trainer


def write_random_model(folder: Path, shape: dict, seed: int, device: torch.device) -> None:
    """Write a model with random weights, in bfloat16 as published ones are, and the laboratory's tokenizer."""
    torch.manual_seed(seed)
    with torch.device(device):
        config = transformers.AutoConfig.for_model(**shape)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_model(model, character_tokenizer(), folder)


def typical(scale: Scale) -> Scale:
    """Return the scale with completions as long as is typical of it, and the task of the laboratory."""
    completion = scale.budget.typical_tokens[1]
    budget = replace(scale.budget, max_new_tokens=completion, typical_tokens=(12, completion))
    return replace(scale, task=RUNNING_SUM.name, budget=budget)


def one_step(lab: Laboratory, arm: str, scratch: Path) -> dict:
    """Make two steps of an arm, the second of which counts, a snapshot and a measurement of one matrix of each kind."""
    device = find_device(lab.scale.compute.gpu)
    check_room(lab, arm)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(lab.experiment(arm))
    draw = trainer.batch

    def batch(step: int):
        rollouts, rewards = draw(step)
        # Random models earn nothing, and RLVR would skip the step.
        return rollouts, None if rewards is None else torch.arange(float(len(rewards))) % 2

    trainer.batch = batch
    trainer.step(0)
    began = time.perf_counter()
    line = trainer.step(1)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    began = time.perf_counter()
    save_tensors(scratch / "step.safetensors", dict(trainer.student.named_parameters()))
    saving = time.perf_counter() - began
    began = time.perf_counter()
    ends = load_tensors(scratch / "step.safetensors")[0]
    chosen = [name for name in ends if ".layers.0." in name and ends[name].dim() == 2]
    table = pd.DataFrame([measure_matrix(name, trainer.origin[name], ends[name].to(device)) for name in chosen])
    plan = plan_run(lab, arm, DEVICES["cpu" if device.type == "cpu" else "h100"])
    return {
        "arm": arm,
        "loss": line["loss"],
        "update norm": line["update_norm"],
        "stable rank": float(table["stable_rank"].mean()),
        "seconds a step": seconds,
        "planned seconds": sum(plan.seconds.values()),
        "tokens/s": line["tokens"] / seconds,
        "peak GB": None if peak is None else peak / GB,
        "planned GB": plan.peak / GB,
        "snapshot s": saving,
        "measuring a layer s": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [name for name, scale in SCALES.items() if scale.models.pretrained]
    parser.add_argument("--scale", choices=choices, default="full")
    parser.add_argument("--arms", nargs="+", default=PAPER, help="default: the paper's and the controls")
    parser.add_argument("--out", type=Path, help="write what was measured to this JSON file too")
    options = parser.parse_args()
    scale = typical(SCALES[options.scale])
    device, pretrained, rows = find_device(scale.compute.gpu), scale.models.pretrained, []
    with tempfile.TemporaryDirectory() as scratch:
        lab = Laboratory(scale, Path(scratch))
        for seed, name in enumerate(("base", "teacher")):
            source = pretrained.get(name) or pretrained["base"]
            write_random_model(lab.models / name, SHAPES[source.removesuffix("-Base")], seed, device)
        (lab.models / "anchor").symlink_to(lab.models / "base")
        for arm in tqdm(options.arms, unit="arm"):
            rows.append(one_step(lab, arm, Path(scratch)))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if options.out:
        write_json(options.out, {"scale": options.scale, "provenance": provenance(device), "steps": rows})


if __name__ == "__main__":
    try:
        main()
    except OpdlabError as problem:
        raise SystemExit(f"error: {problem}") from None
