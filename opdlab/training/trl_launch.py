"""Starting TRL: what a run needs is checked, its two files are written, and ``accelerate launch`` does the rest."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from opdlab.errors import OpdlabError
from opdlab.lab.scales import Scale
from opdlab.models.files import write_json
from opdlab.training.store import Home
from opdlab.training.trl_config import accelerate_arguments, configure

# GPUs that a scale for many of them is configured for on a machine without any.
GPUS = 8


def launch(
    scale: Scale, arm: str, seed: int, home: Home, *, processes: int | None = None, dry_run: bool = False
) -> None:
    """Train an arm with TRL, and say where its files are.

    Args:
        scale: the scale; one that names an engine needs GPUs.
        arm: one that TRL has a trainer for.
        seed: of prompts and rollouts.
        home: where models and runs lie.
        processes: how many take part; by default one for each GPU here.
        dry_run: only write the configuration and print the command.

    Raises:
        OpdlabError: if TRL cannot train the arm, something is missing here, or training fails.
    """
    processes = processes or torch.cuda.device_count() or (GPUS if scale.engine else 1)
    config = configure(
        scale, arm, seed, home, processes, gpu=bool(scale.engine) or (scale.gpu and torch.cuda.is_available())
    )
    folder = home.runs(scale) / f"{arm}-seed{seed}-trl"
    print(f"run folder: {folder}")
    if (folder / "trainer_state.json").exists():
        print("finished before; delete the folder to train it again")
        return
    if not dry_run:
        check_ready(config, scale)
    command = write(config, folder)
    print(shlex.join(command), flush=True)
    if dry_run:
        return
    try:
        status = subprocess.run(command).returncode
    except KeyboardInterrupt:
        raise OpdlabError("stopped; the same command trains from the start again") from None
    if status:
        raise OpdlabError(f"training ended with status {status}; what went wrong is said above")
    print(f"to measure it: opdlab measure {config['start']} --trajectory {folder / 'snapshots'}")


def write(config: dict, folder: Path) -> list[str]:
    """Write the two files into a run's folder and return the command that trains, as its words."""
    write_json(folder / "config.json", config)
    write_json(folder / "accelerate.json", accelerate_arguments(config))
    program = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    files = folder / "accelerate.json", folder / "config.json"
    return [program, "launch", "--config_file", str(files[0]), "-m", "opdlab.training.trl", str(files[1])]


def check_ready(config: dict, scale: Scale) -> None:
    """Check that this machine has what the command needs.

    Raises:
        OpdlabError: if programs, GPUs or a model are missing.
    """
    if not find_spec("trl"):
        raise OpdlabError("the engine trl is not installed: pip install 'opdlab[trl]'")
    gpus, wanted = torch.cuda.device_count(), config["processes"]
    if not config["arguments"]["use_cpu"] and gpus < wanted:
        raise OpdlabError(
            f"arm {config['arm']!r} at {scale.name} ({scale.summary}) needs {wanted} CUDA GPUs, and this machine has "
            f"{gpus}: run it where they are, or only write its configuration with --dry-run"
        )
    if config["arguments"].get("use_vllm") and not find_spec("vllm"):
        raise OpdlabError(f"arm {config['arm']!r} at {scale.name} samples with vLLM: pip install 'trl[vllm]'")
    for source in filter(None, (config["start"], config["teacher"])):
        if Path(source).is_absolute() and not Path(source).is_dir():
            by = "models"
            if scale.engine:
                by = f"train --arm {scale.maker_of(Path(source).name).name} --engine {scale.engine}"
            raise OpdlabError(f"there is no model in {source}: run 'opdlab {by} --scale {scale.name}' first")
