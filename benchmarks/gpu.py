"""All that is to be tried on a GPU, one after the other, with what each took:

    python benchmarks/gpu.py --out gpu                     # 15 minutes on a GPU of 80 GB
    python benchmarks/gpu.py --out gpu --scale smoke       # the same calls on any machine, in minutes

First the tests that skip without a GPU. Then a step of OPD with SmolLM2, beside TRL's where TRL is installed; runs of
SmolLM2 at their full recipe, several side by side on the one device, under OUT/home; and a step of each arm with models
of the shapes of Qwen3-0.6B and 1.7B. Every part writes OUT/NAME.log, and OUT/gpu.json says how it ended and how long it
took. SmolLM2 is looked for in data/models/small; anchor and teacher are trained first if they are not there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from opdlab.lab.laboratory import default_root
from opdlab.models.files import write_json
from opdlab.processes import find_device, provenance

ROOT = Path(__file__).resolve().parent.parent


def parts(scale: str, out: Path, processes: int, seeds: int) -> dict[str, list[str]]:
    """Return the commands by name, as they follow ``python``."""
    arms = [word for arm in ("opd", "rlvr", "sft_matched") for word in ("--arm", arm)]
    several = [*arms, *(word for seed in range(seeds) for word in ("--seed", str(seed))), "--processes", str(processes)]
    step = ["benchmarks/opd_step.py", "--out", str(out / "step.json"), "--clock", "wall", "--cases"]
    case = ["tiny-own", "--steps", "2"] if scale == "smoke" else ["small-16x4", "--steps", "5"]
    found = {
        "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/lab/test_real_models.py", "-k", "a_gpu"],
        "step": [*step, *case],
        "runs": ["-m", "opdlab.cli", "record", "--scale", scale, "--home", str(out / "home"), *several],
    }
    shapes = ["benchmarks/full_step.py", "--scale", "full-0.6b", "--out", str(out / "shapes.json")]
    return found if scale == "smoke" else found | {"shapes": shapes}


def main() -> None:
    """Run the parts, and write down how each ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, numbers and runs")
    parser.add_argument("--scale", choices=("small", "smoke"), default="small")
    parser.add_argument("--processes", type=int, default=3, help="runs side by side (default: 3)")
    parser.add_argument("--seeds", type=int, default=1, help="of each arm (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of tests, step, runs and shapes")
    options = parser.parse_args()
    out = options.out.resolve()
    home = out / "home" / "data"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "models").exists():  # runs of a GPU are no records of a CPU's scale, but start from its models
        (home / "models").symlink_to(default_root() / "data/models")
    has_gpu, ended = torch.cuda.is_available(), {}
    environment = os.environ | {"OPDLAB_DEVICE": "cuda" if has_gpu else "cpu", "HF_HUB_OFFLINE": "1"}
    for name, command in parts(options.scale, out, options.processes, options.seeds).items():
        if options.only and name not in options.only:
            continue
        began = time.perf_counter()
        with open(out / f"{name}.log", "w") as log:
            ran = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log)
        status = ran.returncode
        ended[name] = {"status": status, "seconds": round(time.perf_counter() - began, 1), "command": command}
        print(f"{name}: {'done' if status == 0 else f'ended with {status}'} in {ended[name]['seconds']} s", flush=True)
        write_json(out / "gpu.json", {"provenance": provenance(find_device(has_gpu)), "parts": ended})
    sys.exit(any(part["status"] for part in ended.values()))


if __name__ == "__main__":
    main()
