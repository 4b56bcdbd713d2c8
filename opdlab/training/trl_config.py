"""What TRL and accelerate are told: their arguments from a scale, an arm and a seed, as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.lab.grid import Arm, get_arm
from opdlab.lab.scales import Recipe, Scale
from opdlab.training.objectives import CLIP
from opdlab.training.store import Home

#: The name of TRL's trainer and its configuration, without ending, by who writes the sequences and the signal.
TRAINERS = {
    ("task", "cross_entropy"): "SFT",
    ("student", "reverse_kl"): "Distillation",
    ("student", "forward_kl"): "Distillation",
    ("student", "opd_sampled"): "IWOPD",
    ("student", "grpo"): "GRPO",
}
# The entries of an arm that the arguments below account for.
_HEEDED = {"name", "start", "sequences", "signal", "task", "teacher", "budget", "rate"}

# Tokens of context for a prompt, which vLLM makes room for beside the completion.
PROMPT_ROOM = 2048


def trainer_of(arm: Arm) -> str:
    """Return which trainer of TRL an arm is for, a value of :data:`TRAINERS`.

    Raises:
        OpdlabError: if there is none.

    >>> trainer_of(get_arm("opd_full")), trainer_of(get_arm("rlvr"))
    ('Distillation', 'GRPO')
    """
    trainer = TRAINERS.get((arm.sequences, arm.signal))
    unheeded = sorted(set(arm.decisive) - _HEEDED)
    if not trainer or unheeded or not arm.start:
        why = f"sequences of the {arm.sequences} and the signal {arm.signal}" if not trainer else ", ".join(unheeded)
        raise OpdlabError(
            f"TRL has no trainer for arm {arm.name!r} ({why or 'it starts from random weights'}): choose sft, opd, "
            "opd_full or rlvr, or a scale that opdlab's own loop trains"
        )
    return trainer


def configure(scale: Scale, arm_name: str, seed: int, home: Home, processes: int, gpu: bool) -> dict:
    """Return everything that :func:`opdlab.training.trl.run` needs, as JSON values.

    Args:
        scale: gives recipe, task and models. Only one that names an engine samples with vLLM.
        arm_name: what to train.
        seed: of prompts and rollouts.
        home: where the models lie that are not taken from the Hugging Face hub.
        processes: how many take part.
        gpu: whether each has a GPU, or the CPU is used, in float32.

    Raises:
        OpdlabError: if TRL has no trainer for the arm, the scale no recipe, or the processes cannot share the batch.
    """
    arm = get_arm(arm_name)
    trainer = trainer_of(arm)
    if (arm.budget or arm.name) not in scale.recipes:
        raise OpdlabError(
            f"{scale.name} has no recipe for arm {arm.name!r}; it has those of {', '.join(scale.recipes)}"
        )
    recipe = scale.recipe(arm_name)
    return {
        "scale": scale.name,
        "arm": arm.name,
        "seed": seed,
        "task": arm.task or scale.task,
        "recipe": asdict(recipe),
        "max_new_tokens": scale.max_new_tokens,
        "start": _model(arm.start, scale, home),
        "teacher": _model(arm.teacher, scale, home) if arm.listens_to_teacher else None,
        # As in opdlab's loop, the run with seed 0 makes the model that other arms start from.
        "makes": str(home.models(scale) / arm.makes) if arm.makes and seed == 0 else None,
        "snapshots": scale.steps_at(arm_name, scale.snapshots_of(arm_name)),
        "processes": processes,
        "trainer": trainer,
        "arguments": _common(scale, recipe, trainer, seed, processes, gpu) | _special(scale, recipe, arm, trainer),
    }


def _model(name: str, scale: Scale, home: Home) -> str:
    """Return the folder of a model, or its name on the hub if it is from there and has no folder."""
    folder, published = home.models(scale) / name, scale.pretrained.get(name, "")
    return published if "/" in published and not folder.is_dir() else str(folder)


def _common(scale: Scale, recipe: Recipe, trainer: str, seed: int, processes: int, gpu: bool) -> dict:
    """Return the arguments that all trainers have; those of the paper are in its Tables 3 to 5."""
    share, rest = divmod(recipe.sequences, max(1, processes))
    if rest or processes < 1:
        raise OpdlabError(
            f"{processes} processes cannot share a batch of {recipe.sequences} sequences evenly: give --processes a "
            "divisor of it"
        )
    # IWOPD holds the logits of a whole micro-batch, student's and teacher's; the other trainers compute them in parts.
    most = 1 if trainer == "IWOPD" and scale.tokens_at_once else scale.micro_batch
    sequences = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    # The nearest that TRL has a name for, and the paper's own. opdlab.training.trl takes the rates of opdlab's loop:
    # there warm-up begins at its first share, not at 0, and the cosine at the first step, not when warm-up is over.
    schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup" if recipe.warmup else "constant"}
    if recipe.schedule == "cosine":
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    return {
        "max_steps": recipe.steps,
        "per_device_train_batch_size": sequences,
        "gradient_accumulation_steps": share // sequences,
        "learning_rate": recipe.learning_rate,
        **schedule,
        "warmup_steps": recipe.warmup,
        "optim": "adamw_torch",
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        # The paper gives one for RLVR only (Table 5); the other is PyTorch's.
        "adam_epsilon": 1e-15 if trainer == "GRPO" else 1e-8,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "seed": seed,
        "use_cpu": not gpu,
        # Passes in bf16; weights and moments stay float32, as TRL loads a model unless it is told otherwise.
        "bf16": gpu and scale.compute == "bfloat16",
        "gradient_checkpointing": scale.recompute,
        "logging_steps": 1,
        "report_to": "none",
        # The weights are among the snapshots; in a run that goes on from a checkpoint of TRL, the origin would be lost.
        "save_strategy": "no",
    }


def _special(scale: Scale, recipe: Recipe, arm: Arm, trainer: str) -> dict:
    """Return the arguments that one trainer has."""
    if trainer == "SFT":
        # The rows hold tokens and labels already, in the order that opdlab's loop reads them.
        return {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
            "shuffle_dataset": False,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
        }
    rollouts: dict[str, Any] = {"max_completion_length": scale.max_new_tokens, "temperature": scale.temperature}
    rollouts |= {"top_p": 1.0, "top_k": 0, "use_vllm": bool(scale.engine)}
    if scale.engine:
        rollouts |= {
            "vllm_mode": "colocate",
            "vllm_max_model_length": scale.max_new_tokens + PROMPT_ROOM,
            # Its memory is the trainer's while the update is made.
            "vllm_enable_sleep_mode": True,
        }
    if trainer == "Distillation":
        return rollouts | {"shuffle_dataset": False, "beta": 1.0 if arm.signal == "reverse_kl" else 0.0}
    if trainer == "IWOPD":
        # gamma = 0 leaves the plain estimator: -log p_S(token) times the detached log p_T - log p_S.
        objective = {"distillation_objective": "iw_opd", "iw_opd_gamma": 0.0, "lmbda": 1.0, "num_generations": 1}
        return rollouts | objective | {"max_length": None}
    if scale.engine:
        # The paper's ratio is 1. TRL's correction for vLLM's rounding drops whole completions, the long ones first.
        rollouts["vllm_importance_sampling_correction"] = False
    return rollouts | {
        "shuffle_dataset": False,
        "num_generations": recipe.samples,
        "num_iterations": 1,
        "beta": 0.0,
        "epsilon": CLIP[0],
        "epsilon_high": CLIP[1],
        "loss_type": "dapo",
        "scale_rewards": "group",
        "mask_truncated_completions": False,
    }


def accelerate_arguments(config: dict) -> dict:
    """Return the configuration file of ``accelerate launch``: FSDP2, each layer a unit of its own.

    On CPUs accelerate 1.15 starts the processes and then shares nothing among them but gradients (DDP).
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "use_cpu": config["arguments"]["use_cpu"],
        "mixed_precision": "bf16" if config["arguments"]["bf16"] else "no",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": config["processes"],
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            # Else only the first process would read the teacher, whose weights nobody sends to the others.
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
        },
    }
