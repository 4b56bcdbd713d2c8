"""Training on many GPUs: an experiment run by TRL's trainers, under ``accelerate launch`` (FSDP2).

``opdlab train --engine trl`` writes what they are told into the run's folder, prints the command and runs it: each
process is then :mod:`opdlab.training.trl_process`. The snapshots are put together from all GPUs.

============  ==============================================  =======================================================
arm           trainer                                         loss
============  ==============================================  =======================================================
sft           ``SFTTrainer``                                  cross-entropy of the completion
opd_full      ``DistillationTrainer``, beta = 1               KL(student || teacher) over the whole vocabulary
opd_forward   ``DistillationTrainer``, beta = 0               KL(teacher || student), likewise
opd           ``trl.experimental`` ``IWOPDTrainer``, gamma 0  the paper's: a policy gradient on the sampled token
rlvr          ``GRPOTrainer``                                 GRPO, averaged over tokens ("dapo"), no KL, 0.2 and 0.28
============  ==============================================  =======================================================

No trainer samples from the teacher (matched SFT), and none chooses tokens, mixes objectives, projects training or
rounds the weights. From the same completions comes the same update as in opdlab's own loop, of which TRL sees the
prompts in the same order (``tests/training/test_engines.py``). But TRL

- samples from random streams of its own, so the completions are others;
- has the paper's epsilon of Adam for RLVR, 1e-15, where opdlab's loop has 1e-8: some per cent of a first step;
- in bf16 under FSDP2 adds up the gradients of different GPUs in bf16, and only those of micro-batches in float32;
- keeps the whole teacher on each GPU: 64 GB for 32 billion weights in bf16;
- measures no accuracy.

A run's folder has the key of its experiment and the number of processes in its name. A stopped run goes on from its
last checkpoint, of which it writes fifty in all and keeps one; as in opdlab's loop, bit for bit, but for what vLLM
samples. The tests run on CPUs in float32. On GPUs, in bf16 and with vLLM this has not been run yet.
"""

from __future__ import annotations

import pickle
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from opdlab.errors import OpdlabError
from opdlab.models.files import write_json, write_whole
from opdlab.processes import find_device
from opdlab.training.arms import changed_fields
from opdlab.training.config import Experiment
from opdlab.training.loop import install_model
from opdlab.training.store import Run
from opdlab.training.trl_process import FINISHED, Callback, drop_checkpoints, last_checkpoint

#: The first word of TRL's trainer and its configuration, by who writes the completions and the loss.
TRAINERS = {
    ("task", "cross_entropy"): "SFT", ("student", "opd_sampled"): "IWOPD", ("student", "grpo"): "GRPO",
    ("student", "reverse_kl"): "Distillation", ("student", "forward_kl"): "Distillation",
}  # fmt: skip


# --- what TRL and accelerate are told ---------------------------------------------------------------------------------


def trainer_of(experiment: Experiment) -> str:
    """Return which trainer of TRL an experiment is for, a value of :data:`TRAINERS`.

    Raises:
        OpdlabError: if there is none.
    """
    arm = experiment.arm
    trainer = TRAINERS.get((arm.rollouts_by, arm.loss))
    unheeded = sorted({*changed_fields(arm), *(["projection"] if arm.projection else [])} - {"rollouts_by", "loss"})
    if not trainer or unheeded or arm.student.shape:
        why = f"rollouts by the {arm.rollouts_by} and the loss {arm.loss}" if not trainer else ", ".join(unheeded)
        raise OpdlabError(
            f"TRL has no trainer for {experiment.title!r} ({why or 'it starts from random weights'}): choose sft, opd, "
            "opd_full or rlvr, or a scale that opdlab's own loop trains"
        )
    return trainer


def configure(experiment: Experiment, processes: int | None = None, *, gpu: bool, vllm: bool) -> dict:
    """Return what TRL is told, as JSON values; without ``gpu`` each process uses the CPU, in float32.

    By default there is a process for each GPU here, or on a machine without any for each of eight.

    Raises:
        OpdlabError: if TRL has no trainer for the arm, or the processes cannot share the batch.
    """
    trainer, arm = trainer_of(experiment), experiment.arm
    if processes is None:
        processes = torch.cuda.device_count() or (8 if gpu else 1)
    return {
        "arm": experiment.title, "seed": experiment.seed, "task": experiment.task.name, "trainer": trainer,
        "recipe": asdict(experiment.recipe), "snapshots": list(experiment.kept[1:]), "processes": processes,
        "start": arm.student.folder, "teacher": arm.teacher.folder if arm.teacher and arm.reads_teacher else None,
        "arguments": _common(experiment, trainer, processes, gpu) | _special(experiment, trainer, vllm),
    }  # fmt: skip


def _common(experiment: Experiment, trainer: str, processes: int, gpu: bool) -> dict:
    """Return the arguments that all trainers have; those of the paper are in its Tables 3 to 5."""
    recipe, compute = experiment.recipe, experiment.compute
    share, rest = divmod(recipe.completions, max(1, processes))
    if rest or processes < 1:
        raise OpdlabError(
            f"{processes} processes cannot share a batch of {recipe.completions} completions evenly: give --processes "
            "a divisor of it"
        )
    # IWOPD holds the logits of a whole micro-batch, student's and teacher's; the other trainers compute them in parts.
    most = 1 if trainer == "IWOPD" and compute.tokens_at_once else compute.micro_batch
    per_device = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    # The nearest that TRL has a name for, and the paper's own. The rates are those of opdlab's loop (``_classes``):
    # there warm-up begins at its first share, not at 0, and the cosine at the first step, not when warm-up is over.
    schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup" if recipe.warmup else "constant"}
    if recipe.schedule == "cosine":
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    return schedule | {
        "max_steps": recipe.steps, "learning_rate": recipe.learning_rate, "warmup_steps": recipe.warmup,
        "per_device_train_batch_size": per_device, "gradient_accumulation_steps": share // per_device,
        "optim": "adamw_torch", "adam_beta1": recipe.betas[0], "adam_beta2": recipe.betas[1],
        "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.clip,
        # The paper gives one for RLVR only (Table 5); the other is PyTorch's.
        "adam_epsilon": 1e-15 if trainer == "GRPO" else 1e-8,
        "seed": experiment.seed, "use_cpu": not gpu, "gradient_checkpointing": compute.recompute,
        # Passes in bf16; weights and moments stay float32, as TRL loads a model unless it is told otherwise.
        "bf16": compute.dtype_on(torch.device("cuda" if gpu else "cpu")) == torch.bfloat16,
        # Checkpoints are written when trl_process says so, and the data of a run that goes on begin where it stopped.
        "save_strategy": "no", "ignore_data_skip": True, "logging_steps": 1, "report_to": "none",
    }  # fmt: skip


def _special(experiment: Experiment, trainer: str, vllm: bool) -> dict:
    """Return the arguments that one trainer has."""
    recipe, room = experiment.recipe, experiment.max_new_tokens
    in_order: dict[str, Any] = {"shuffle_dataset": False}
    if trainer == "SFT":
        # The rows hold tokens and labels already.
        as_they_are = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        return in_order | as_they_are | {"max_length": None, "train_sampling_strategy": "sequential"}
    rollouts: dict[str, Any] = {"max_completion_length": room, "temperature": experiment.temperature}
    rollouts |= {"top_p": 1.0, "top_k": 0, "use_vllm": vllm}
    if vllm:
        # Asleep, its memory is the trainer's while the update is made; 2048 tokens are for the prompt.
        rollouts |= {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_max_model_length": room + 2048}
    if trainer == "Distillation":
        return rollouts | in_order | {"beta": 1.0 if experiment.arm.loss == "reverse_kl" else 0.0}
    if trainer == "IWOPD":
        # gamma = 0 leaves the plain estimator: -log p_S(token) times the detached log p_T - log p_S.
        objective = {"distillation_objective": "iw_opd", "iw_opd_gamma": 0.0, "lmbda": 1.0, "num_generations": 1}
        return rollouts | objective | {"max_length": None}
    if vllm:
        # The paper's ratio is 1. TRL's correction for vLLM's rounding drops whole completions, the long ones first.
        rollouts["vllm_importance_sampling_correction"] = False
    rollouts |= {"num_generations": recipe.samples, "num_iterations": 1, "mask_truncated_completions": False}
    objective = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"}
    return rollouts | in_order | objective | {"scale_rewards": "group"}


def accelerate_arguments(config: dict) -> dict:
    """Return the configuration of ``accelerate launch``: FSDP2 in units of layers, which 1.15 makes DDP on CPUs."""
    fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True}
    fsdp |= {"fsdp_offload_params": False, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    # Else only the first process would read the teacher, whose weights nobody sends to the others.
    fsdp |= {"fsdp_cpu_ram_efficient_loading": False, "fsdp_activation_checkpointing": False}
    arguments = config["arguments"]
    precision = {"use_cpu": arguments["use_cpu"], "mixed_precision": "bf16" if arguments["bf16"] else "no"}
    machine = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0}
    machine |= {"distributed_type": "FSDP", "num_processes": config["processes"]}
    return machine | precision | {"fsdp_config": fsdp}


# --- starting it ------------------------------------------------------------------------------------------------------


def launch(
    experiment: Experiment,
    config: dict,
    root: Path,
    callback: Callback,
    *,
    produces: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Train an experiment with TRL, or go on where an earlier call was stopped, and say where its files are.

    Args:
        experiment: with models in folders.
        config: what TRL is told, of :func:`configure`.
        root: the folder of all runs.
        callback: makes what measures the run on its way and writes its snapshots.
        produces: folder of the model that the run makes, if it makes one.
        dry_run: only write the configuration and print the command.

    Raises:
        OpdlabError: if a model is missing, or training fails.
    """
    for model in (experiment.arm.student, experiment.arm.teacher):
        if model and not dry_run and not Path(model.folder).is_dir():
            raise OpdlabError(f"there is no model in {model.folder}: make it first, or give the folder of another")
    run = Run(experiment, root, root / f"{_name(experiment, dry_run)}-trl{config['processes']}")
    print(f"run folder: {run.folder}")
    if (run.folder / FINISHED).exists():
        print("finished before; delete the folder to train it again")
    else:
        command = write(config, experiment, callback, run.folder)
        print(shlex.join(command), flush=True)
        if dry_run:
            return
        if not last_checkpoint(run.folder):
            run.begin(find_device(not config["arguments"]["use_cpu"]))
        if status := subprocess.run(command).returncode:
            raise OpdlabError(f"training ended with status {status}; what went wrong is said above")
    drop_checkpoints(run.folder)  # left by a call that was stopped right after the last step
    if produces and not produces.exists():
        install_model(run, produces)
    print(f"to measure it: opdlab measure {experiment.arm.student.folder} --trajectory {run.folder / 'snapshots'}")


def _name(experiment: Experiment, dry_run: bool) -> str:
    """Return the name of an experiment's folder, without the key if its models need not be here and are not."""
    try:
        return experiment.folder
    except OpdlabError:
        if not dry_run:
            raise
        return f"{experiment.title}-seed{experiment.seed}"


def write(config: dict, experiment: Experiment, callback: Callback, folder: Path) -> list[str]:
    """Write what the processes need into a run's folder, and return the words of the command that trains.

    Raises:
        OpdlabError: if the task cannot be handed to other processes.
    """
    write_json(folder / "trl.json", config)
    write_json(folder / "accelerate.json", accelerate_arguments(config))
    try:
        packed = pickle.dumps((config, experiment, callback))
    except (pickle.PicklingError, AttributeError) as problem:
        what = f"task {experiment.task.name!r} cannot be handed to other processes ({problem})"
        raise OpdlabError(f"{what}: put its reward in a module") from problem
    write_whole(folder / "run.pickle", lambda temporary: temporary.write_bytes(packed))
    program = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    options = ["--config_file", f"{folder / 'accelerate.json'}", "-m", "opdlab.training.trl_process"]
    return [program, "launch", *options, f"{folder / 'run.pickle'}"]


def check_ready(config: dict) -> None:
    """Check that this machine has what the command needs.

    Raises:
        OpdlabError: if programs or GPUs are missing.
    """
    if not find_spec("trl"):
        raise OpdlabError("the engine trl is not installed: pip install 'opdlab[trl]'")
    arguments, gpus = config["arguments"], torch.cuda.device_count()
    if not arguments["use_cpu"] and gpus < config["processes"]:
        raise OpdlabError(
            f"{config['arm']!r} needs {config['processes']} CUDA GPUs, and this machine has {gpus}: run it where they "
            "are, or only write its configuration with --dry-run"
        )
    if arguments.get("use_vllm") and not find_spec("vllm"):
        raise OpdlabError(f"{config['arm']!r} samples with vLLM: pip install 'trl[vllm]'")
