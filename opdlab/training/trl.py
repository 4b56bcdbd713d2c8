"""Training on many GPUs: an experiment run by TRL's trainers, under ``accelerate launch`` (FSDP2).

``opdlab train --engine trl`` writes what they are told into the run's folder, prints the command and runs it: each
process is this module as a program. The snapshots are put together from all GPUs.

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
- keeps the whole teacher on each GPU, 64 GB for 32 billion weights in bf16, and measures no accuracy.

A run's folder has the key of its experiment and the number of processes in its name. A stopped run goes on from its
last checkpoint, of which it writes fifty in all and keeps one; as in opdlab's loop, bit for bit, but for what vLLM
samples. The tests run on CPUs in float32. On GPUs, in bf16 and with vLLM this has not been run yet.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

from opdlab.errors import OpdlabError, exit_status
from opdlab.models.files import sync, write_json, write_text, write_whole
from opdlab.processes import find_device
from opdlab.training.arms import changed_fields
from opdlab.training.config import Experiment
from opdlab.training.loop import install_model
from opdlab.training.objectives import grpo_advantages
from opdlab.training.opening import link_for_vllm, open_for_trl
from opdlab.training.rollouts import Rollouts, encode_completions
from opdlab.training.store import Run, alone
from opdlab.training.trainer import check_finite, random_numbers, score

#: The first word of TRL's trainer and its configuration, by who writes the completions and the loss.
TRAINERS = {
    ("task", "cross_entropy"): "SFT", ("student", "opd_sampled"): "IWOPD", ("student", "grpo"): "GRPO",
    ("student", "reverse_kl"): "Distillation", ("student", "forward_kl"): "Distillation",
}  # fmt: skip
#: The log of a finished run, which is written last; and what is written last into a checkpoint.
FINISHED, WHOLE = "trainer_state.json", "whole"
#: How many checkpoints a run writes in all. One is kept, and what a stop costs is at most such a part of the run.
CHECKPOINTS = 50
_Trainer: Any = transformers.Trainer  # of whose methods TRL's trainers have more


def configure(experiment: Experiment, processes: int | None = None, *, gpu: bool, vllm: bool) -> dict:
    """Return what TRL is told, as JSON values; without ``gpu`` each process uses the CPU, in float32.

    By default there is a process for each GPU here, or on a machine without any for each of eight.

    Raises:
        OpdlabError: if TRL has no trainer for the arm, or the processes cannot share the batch.
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
    if processes is None:
        processes = torch.cuda.device_count() or (8 if gpu else 1)
    share, rest = divmod(experiment.recipe.completions, max(1, processes))
    if rest or processes < 1:
        raise OpdlabError(
            f"{processes} processes cannot share a batch of {experiment.recipe.completions} completions evenly: give "
            "--processes a divisor of it"
        )
    return {
        "arm": experiment.title, "seed": experiment.seed, "task": experiment.task.name, "trainer": trainer,
        "recipe": asdict(experiment.recipe), "snapshots": list(experiment.kept[1:]), "processes": processes,
        "start": arm.student.folder, "teacher": arm.teacher.folder if arm.teacher and arm.reads_teacher else None,
        "arguments": _arguments(experiment, trainer, share, gpu, vllm),
    }  # fmt: skip


def _arguments(experiment: Experiment, trainer: str, share: int, gpu: bool, vllm: bool) -> dict[str, Any]:
    """Return the trainer's arguments, for a share of the batch; those of the paper are in its Tables 3 to 5."""
    recipe, compute, room = experiment.recipe, experiment.compute, experiment.max_new_tokens
    # IWOPD holds the logits of a whole micro-batch, student's and teacher's; the other trainers compute them in parts.
    most = 1 if trainer == "IWOPD" and compute.tokens_at_once else compute.micro_batch
    per_device = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    found: dict[str, Any] = {
        "max_steps": recipe.steps, "learning_rate": recipe.learning_rate, "warmup_steps": recipe.warmup,
        # The nearest that TRL has a name for, and the paper's own; opdlab's are in `_Own.create_scheduler`.
        "lr_scheduler_type": "constant_with_warmup" if recipe.warmup else "constant",
        "per_device_train_batch_size": per_device, "gradient_accumulation_steps": share // per_device,
        "optim": "adamw_torch", "adam_beta1": recipe.betas[0], "adam_beta2": recipe.betas[1],
        "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.clip, "seed": experiment.seed,
        # The paper gives one for RLVR only (Table 5); the other is PyTorch's.
        "adam_epsilon": 1e-15 if trainer == "GRPO" else 1e-8,
        "shuffle_dataset": False, "use_cpu": not gpu, "gradient_checkpointing": compute.recompute,
        # Passes in bf16; weights and moments stay float32, as TRL loads a model unless it is told otherwise.
        "bf16": compute.dtype_on(torch.device("cuda" if gpu else "cpu")) == torch.bfloat16,
        # Checkpoints are written when `_Own` says so, and the data of a run that goes on begin where it stopped.
        "save_strategy": "no", "ignore_data_skip": True, "logging_steps": 1, "report_to": "none",
    }  # fmt: skip
    if recipe.schedule == "cosine":
        found |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    if trainer == "SFT":  # whose rows hold tokens and labels already
        found |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        return found | {"max_length": None, "train_sampling_strategy": "sequential"}
    found |= {"max_completion_length": room, "temperature": experiment.temperature, "top_p": 1.0, "top_k": 0}
    found["use_vllm"] = vllm
    if vllm:
        # Asleep, its memory is the trainer's while the update is made; 2048 tokens are for the prompt.
        found |= {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_max_model_length": room + 2048}
    if trainer == "Distillation":
        return found | {"beta": 1.0 if experiment.arm.loss == "reverse_kl" else 0.0}
    if trainer == "IWOPD":
        del found["shuffle_dataset"]  # which is none of its fields
        # gamma = 0 leaves the plain estimator: -log p_S(token) times the detached log p_T - log p_S.
        found |= {"distillation_objective": "iw_opd", "iw_opd_gamma": 0.0, "lmbda": 1.0, "num_generations": 1}
        return found | {"max_length": None}
    if vllm:
        # The paper's ratio is 1. TRL's correction for vLLM's rounding drops whole completions, the long ones first.
        found["vllm_importance_sampling_correction"] = False
    found |= {"num_generations": recipe.samples, "num_iterations": 1, "mask_truncated_completions": False}
    return found | {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "scale_rewards": "group"}


def accelerate_arguments(config: dict) -> dict:
    """Return the configuration of ``accelerate launch``: FSDP2 in units of layers, which 1.15 makes DDP on CPUs."""
    arguments = config["arguments"]
    return {
        "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "distributed_type": "FSDP",
        "num_processes": config["processes"], "use_cpu": arguments["use_cpu"],
        "mixed_precision": "bf16" if arguments["bf16"] else "no",
        "fsdp_config": {
            "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False, "fsdp_state_dict_type": "FULL_STATE_DICT",
            # Else only the first process would read the teacher, whose weights nobody sends to the others.
            "fsdp_cpu_ram_efficient_loading": False, "fsdp_activation_checkpointing": False,
        },
    }  # fmt: skip


def check_ready(config: dict) -> None:
    """Raise an OpdlabError if TRL or vLLM is not installed, or this machine has too few GPUs."""
    if not importlib.util.find_spec("trl"):
        raise OpdlabError("the engine trl is not installed: pip install 'opdlab[trl]'")
    arguments, gpus = config["arguments"], torch.cuda.device_count()
    if not arguments["use_cpu"] and gpus < config["processes"]:
        raise OpdlabError(
            f"{config['arm']!r} needs {config['processes']} CUDA GPUs, and this machine has {gpus}: run it where they "
            "are, or only write its configuration with --dry-run"
        )
    if arguments.get("use_vllm") and not importlib.util.find_spec("vllm"):
        raise OpdlabError(f"{config['arm']!r} samples with vLLM, which is not installed: pip install 'trl[vllm]'")


def launch(
    experiment: Experiment, config: dict, root: Path, callback: Callable, *, produces: Path | None, dry_run: bool
) -> None:
    """Train an experiment with TRL, or go on where an earlier call was stopped, and say where its files are.

    Args:
        experiment: with models in folders.
        config: what TRL is told, of :func:`configure`.
        root: the folder of all runs.
        callback: given the trainer, its folder and steps, returns what measures it and writes snapshots after them.
        produces: folder of the model that the run makes, if it makes one.
        dry_run: only write the configuration and print the command.

    Raises:
        OpdlabError: if a model is missing, or training fails.
    """
    name = f"{experiment.title}-seed{experiment.seed}"
    with suppress(OpdlabError) if dry_run else nullcontext():  # then without the key, if its models are not here
        name = experiment.folder
    run = Run(experiment, root, root / f"{name}-trl{config['processes']}")
    print(f"run folder: {run.folder}")
    if (run.folder / FINISHED).exists():
        print("finished before; delete the folder to train it again")
    else:
        command = write(config, experiment, callback, run.folder)
        print(shlex.join(command), flush=True)
        if dry_run:
            return
        if not any(run.folder.glob(f"checkpoint-*/{WHOLE}")):
            run.begin(find_device(not config["arguments"]["use_cpu"]))
        if status := subprocess.run(command).returncode:
            raise OpdlabError(f"training ended with status {status}; what went wrong is said above")
    drop_checkpoints(run.folder)  # left by a call that was stopped right after the last step
    if produces and not produces.exists():
        install_model(run, produces)
    print(f"to measure it: opdlab measure {experiment.arm.student.folder} --trajectory {run.folder / 'snapshots'}")


def write(config: dict, experiment: Experiment, callback: Callable, folder: Path) -> list[str]:
    """Write a run's files and return the words of its command."""
    write_json(folder / "trl.json", config)
    write_json(folder / "accelerate.json", accelerate_arguments(config))
    packed = pickle.dumps((config, experiment, callback))
    write_whole(folder / "run.pickle", lambda temporary: temporary.write_bytes(packed))
    program = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    options = ["--config_file", f"{folder / 'accelerate.json'}", "-m", "opdlab.training.trl"]
    return [program, "launch", *options, f"{folder / 'run.pickle'}"]


def run(path: Path) -> None:
    """Train what was written into ``path``, or go on from the last checkpoint beside it, as one process of all.

    Raises what :func:`opdlab.training.loop.train` does, and an OpdlabError if weights are no longer finite.
    """
    config, experiment, callback = pickle.loads(path.read_bytes())  # what launch wrote on this machine a moment ago
    folder = path.parent
    with alone(folder) if os.environ.get("RANK", "0") == "0" else nullcontext():  # the first process holds the lock
        done = max((int(mark.parent.name.split("-")[1]) for mark in folder.glob(f"checkpoint-*/{WHOLE}")), default=0)
        trainer = _make_trainer(config, experiment, folder, done)
        trainer.add_callback(trainer)  # before the other, which writes snapshots
        trainer.add_callback(callback(trainer, folder, experiment.kept[1:]))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{done}") if done else None)
        if trainer.is_world_process_zero():
            write_whole(folder / FINISHED, lambda temporary: trainer.state.save_to_json(str(temporary)))
            drop_checkpoints(folder)


def drop_checkpoints(folder: Path, kept: int = 0) -> None:
    """Delete the checkpoints in a run's folder, but for the one after the step ``kept``."""
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{kept}":
            shutil.rmtree(checkpoint)


def _make_trainer(config: dict, experiment: Experiment, folder: Path, done: int) -> Any:
    """Return the trainer of a configuration, with models and data, for the steps after ``done``."""
    name, task = config["trainer"], experiment.task
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    library = importlib.import_module("trl.experimental.iw_opd" if name == "IWOPD" else "trl")
    # First of all, as it joins the processes and says which device is whose.
    settings = getattr(library, f"{name}Config")(output_dir=str(folder), **config["arguments"])
    first = task.prompts(min(2, experiment.recipe.prompts), random_numbers(experiment.seed, "prompts", 0))
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    tokenizer, student, teacher, encode = open_for_trl(experiment, first, dtype, taught=bool(config["teacher"]))
    if config["arguments"].get("use_vllm"):
        with settings.main_process_first():
            student.name_or_path = str(link_for_vllm(student, folder / "start"))

    def accuracy(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return score(tokenizer, task, prompts, Rollouts([[]] * len(prompts), completion_ids)).tolist()

    def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:  # by itself IWOPD would use a chat template
        encoded = tokenizer.pad({"input_ids": encode([row["prompt"] for row in rows])}, return_tensors="pt")
        return {"prompts": encoded.input_ids, "prompt_attention_mask": encoded.attention_mask} | dict(encoded)

    rows = _rows(experiment, name, tokenizer, encode, done)
    options: dict[str, Any] = {"args": settings, "processing_class": tokenizer, "train_dataset": rows}
    special: dict[str, dict[str, Any]] = {"GRPO": {"reward_funcs": accuracy}, "IWOPD": {"data_collator": collate}}
    options |= special.get(name, {}) | ({"teacher_model": teacher} if teacher else {})
    own = {"IWOPD": _InOrder, "GRPO": _Rewarded}.get(name, _Own)
    trainer: Any = type("Trainer", (own, getattr(library, f"{name}Trainer")), {})(student, **options)
    trainer.experiment, trainer.encode = experiment, encode
    return trainer


def _rows(experiment: Experiment, trainer: str, tokenizer: Any, encode: Callable, done: int) -> Any:
    """Return the ``datasets.Dataset``: the prompts of the step after ``done`` as opdlab's loop sees them, and so on.

    A row is drawn when it is asked for: a prompt, repeated as often as it is sampled, which GRPO does by itself; or for
    SFT the tokens of prompt and solution, with labels on the solution only.
    """
    import datasets

    task, recipe = experiment.task, experiment.recipe
    repeats = 1 if trainer == "GRPO" else recipe.samples
    a_step = recipe.prompts * repeats

    @lru_cache(maxsize=2)
    def pairs_of(step: int) -> list[tuple[str, str]]:
        prompts = task.prompts(recipe.prompts, random_numbers(experiment.seed, "prompts", step))
        solutions = task.demonstrations(prompts, random_numbers(experiment.seed, "authors", step))
        return list(zip(prompts, solutions, strict=True))

    def draw(batch: dict[str, list[int]]) -> dict[str, list]:
        pairs = [pairs_of(number // a_step)[number % a_step // repeats] for number in batch["number"]]
        prompts, solutions = [prompt for prompt, _ in pairs], [solution for _, solution in pairs]
        if trainer != "SFT":
            return {"prompt": prompts}
        rows = list(zip(encode(prompts), encode_completions(tokenizer, solutions), strict=True))
        return {"input_ids": [a + b for a, b in rows], "labels": [[-100] * len(a) + b for a, b in rows]}

    return datasets.Dataset.from_dict({"number": range(done * a_step, recipe.steps * a_step)}).with_transform(draw)


class _Own(_Trainer, transformers.TrainerCallback):
    """A trainer of TRL with what opdlab's loop does at a step, some of it as its own callback."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Return opdlab's learning rates, of which TRL's schedules are some steps off."""
        at, recipe = optimizer or self.optimizer, self.experiment.recipe
        self.lr_scheduler = LambdaLR(at, lambda step: recipe.learning_rate_at(step) / recipe.learning_rate)
        return self.lr_scheduler

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return self.encode(prompts), None, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the step's own streams of random numbers."""
        seed = random_numbers(self.experiment.seed, "rollouts", state.global_step).integers(2**31)
        transformers.set_seed(int(seed) + args.process_index)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse weights that are not finite, before they are written anywhere, and say when to write a checkpoint."""
        parts = [part.to_local() if hasattr(part, "to_local") else part for part in kwargs["model"].parameters()]
        total = self.accelerator.gather(torch.stack([part.detach().sum() for part in parts])).sum()
        check_finite(self.experiment, {"the sum of the weights": float(total)}, state.global_step)
        every = max(1, state.max_steps // CHECKPOINTS)
        control.should_save = state.global_step % every == 0 and state.global_step < state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that the checkpoint is whole once all processes have written their part, and delete the one before."""
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for path in checkpoint.rglob("*"):
                sync(path)  # Trainer leaves that to the system, and the mark must not be there before.
            write_text(checkpoint / WHOLE, "")
            drop_checkpoints(checkpoint.parent, kept=state.global_step)


class _InOrder(_Own):
    """With prompts in order, and a loss averaged over the tokens of the batch, as ``IWOPDTrainer`` has neither."""

    loss_is_scaled_for_ga = True

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        sampler.shuffle = False
        return sampler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        # The number that comes in is of the data set. This is a share of all, as processes average their gradients.
        tokens = sum((part["labels"] != -100).sum() for part in self._buffered_inputs)
        tokens = self.accelerator.gather(tokens).sum() / self.accelerator.num_processes
        return super().compute_loss(model, inputs, return_outputs, tokens)


class _Rewarded(_Own):
    """With opdlab's advantages, exactly 0 where all rewards of a prompt are alike."""

    def _calculate_rewards(self, *batch: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*batch)  # of all processes
        self.advantages = grpo_advantages(rewards[:, 0], self.experiment.recipe.samples)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        parts = self.advantages.split(len(batch["advantages"]))
        return batch | {"advantages": parts[self.accelerator.process_index]}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip a batch whose rewards say nothing: without gradients, neither weights nor moments are touched."""
        if not self.advantages.any():
            kwargs["model"].zero_grad()


if __name__ == "__main__":
    sys.exit(exit_status("opdlab.training.trl", lambda: run(Path(sys.argv[1]))))
