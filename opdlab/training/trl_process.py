"""One process of a run by TRL, as ``accelerate launch`` starts it (:mod:`opdlab.training.trl`).

It gives TRL's trainer what opdlab's own loop has: the same tokens of the same prompts, sampling that no model folder
has a say in, one end of the sequence, learning rates, batches that are skipped, and streams of random numbers for each
step, so that a stopped run goes on as if nothing had happened.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from importlib import import_module
from operator import add
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from opdlab.errors import OpdlabError, exit_status
from opdlab.models.files import sync, write_text, write_whole
from opdlab.models.folders import common_tokens, context_length, load_model
from opdlab.training.config import Experiment
from opdlab.training.objectives import grpo_advantages
from opdlab.training.opening import Model, drop_nothing, encode_alike, load_student
from opdlab.training.rollouts import Rollouts, encode_completions, encode_prompts
from opdlab.training.store import alone
from opdlab.training.trainer import random_numbers, score

#: Given the trainer, the folder of its run and the steps of the snapshots, returns a callback that writes them.
Callback = Callable[[transformers.Trainer, Path, tuple[int, ...]], transformers.TrainerCallback]
#: Turns prompts into token ids.
Encode = Callable[[Sequence[str]], list[list[int]]]

#: The log of a finished run, which is written last; and what is written last into a checkpoint.
FINISHED, WHOLE = "trainer_state.json", "whole"
#: How many checkpoints a run writes in all. One is kept, and what a stop costs is at most such a part of the run.
CHECKPOINTS = 50


def run(path: Path) -> None:
    """Train what was written into ``path``, or go on from the last checkpoint beside it.

    Raises:
        OpdlabError: if a model cannot be opened, student and teacher have different vocabularies, a reward fails,
            weights are no longer finite, or another process trains the run.
    """
    # What launch wrote on this machine a moment ago.
    config, experiment, callback = pickle.loads(path.read_bytes())
    folder = path.parent
    # Of all processes of a run the first holds the lock.
    with nullcontext() if os.environ.get("RANK", "0") != "0" else alone(folder):
        done = last_checkpoint(folder)
        trainer = _make_trainer(config, experiment, callback, folder, done)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{done}") if done else None)
        if trainer.is_world_process_zero():
            write_whole(folder / FINISHED, lambda temporary: trainer.state.save_to_json(str(temporary)))
            drop_checkpoints(folder)


def last_checkpoint(folder: Path) -> int:
    """Return the step of the last checkpoint in a run's folder that is whole, or 0."""
    return max((int(mark.parent.name.partition("-")[2]) for mark in folder.glob(f"checkpoint-*/{WHOLE}")), default=0)


def drop_checkpoints(folder: Path, kept: int = 0) -> None:
    """Delete the checkpoints in a run's folder, but for the one after the step ``kept``."""
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{kept}":
            shutil.rmtree(checkpoint)


def _make_trainer(
    config: dict, experiment: Experiment, callback: Callback, folder: Path, done: int = 0
) -> transformers.Trainer:
    """Return the trainer of a configuration, with data, models and callbacks, for the steps after ``done``."""
    name = config["trainer"]
    library = library_of(name)
    # First of all, as it joins the processes and says which device is whose.
    settings = getattr(library, f"{name}Config")(output_dir=str(folder), **config["arguments"])
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    tokenizer, student, teacher, encode = _open(experiment, bool(config["teacher"]), dtype)
    if config["arguments"].get("use_vllm"):
        with settings.main_process_first():
            student.name_or_path = str(_for_vllm(student, folder / "start"))
    options: dict[str, Any] = {"args": settings, "processing_class": tokenizer}
    options["train_dataset"] = _rows(experiment, name, tokenizer, encode, done)
    if teacher:
        options["teacher_model"] = teacher
    if name == "GRPO":
        options["reward_funcs"] = _reward(experiment, tokenizer)
    elif name == "IWOPD":
        options["data_collator"] = partial(_collate, tokenizer, encode)
    trainer = _trainer_class(library, name, experiment, encode)(student, **options)
    trainer.add_callback(_Steps(trainer, experiment, folder))  # before the other, which writes snapshots
    trainer.add_callback(callback(trainer, folder, experiment.kept[1:]))
    return trainer


def _open(
    experiment: Experiment, taught: bool, dtype: torch.dtype
) -> tuple[transformers.PreTrainedTokenizerBase, Model, Any, Encode]:
    """Return tokenizer, student and teacher (or None), made ready for TRL, and what turns prompts into token ids."""
    arm, task = experiment.arm, experiment.task
    tokenizer, student = load_student(experiment)
    room = context_length(student.config) - experiment.max_new_tokens
    first = task.prompts(min(2, experiment.recipe.prompts), random_numbers(experiment.seed, "prompts", 0))
    encode_alike(experiment, tokenizer, first, room)
    teacher = load_model(arm.teacher.folder, dtype=dtype) if arm.teacher and taught else None
    drop_nothing(student)
    # Where the two differ, IWOPD takes a sampled padding token at the end of a completion for padding.
    tokenizer.pad_token = tokenizer.eos_token
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # Nothing else of the folder's own, such as a penalty for repetition, may change what is sampled.
    student.generation_config = transformers.GenerationConfig(**ends)
    models = [student, teacher] if teacher else [student]
    count, size = common_tokens(models, tokenizer), student.config.get_text_config().vocab_size
    if teacher and teacher.config.get_text_config().vocab_size != size:
        teacher.resize_token_embeddings(size, mean_resizing=False)
    for model in models if count < size else ():
        _hide_padding(model, count, dtype)
    return tokenizer, student, teacher, lambda prompts: encode_prompts(tokenizer, task.texts(tokenizer, prompts), room)


def _hide_padding(model: Model, count: int, dtype: torch.dtype) -> None:
    """Leave what is no token without probability, by a bias: TRL reads weights and bias of the output layer itself."""
    layer = model.get_output_embeddings()
    if layer.bias is not None:
        raise OpdlabError(
            f"{model.name_or_path} has {len(layer.weight)} logits for {count} tokens and a bias on them, which TRL "
            "cannot be told to leave out: train it with opdlab's own loop"
        )
    bias = torch.zeros(len(layer.weight), dtype=dtype)
    bias[count:] = -1e4
    del layer.bias  # to be no weight, but a buffer that is not saved
    layer.register_buffer("bias", bias, persistent=False)


def library_of(name: str) -> Any:
    """Return the part of TRL with the trainer called ``name``, a value of :data:`opdlab.training.trl.TRAINERS`."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return import_module("trl.experimental.iw_opd" if name == "IWOPD" else "trl")


def _for_vllm(student: Model, folder: Path) -> Path:
    """Return a folder of links to the student's files, but for its generation config, which vLLM reads by itself."""
    student.generation_config.save_pretrained(folder)
    for file in Path(str(student.name_or_path)).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return folder


def _trainer_class(library: Any, name: str, experiment: Experiment, encode: Encode) -> type:
    """Return TRL's trainer, with what opdlab must have otherwise."""
    recipe = experiment.recipe
    trainer: Any = getattr(library, f"{name}Trainer")

    class Own(trainer):
        """With opdlab's learning rates, of which TRL's schedules are some steps off, and the tokens of its prompts."""

        def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
            at = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(at, lambda step: recipe.learning_rate_at(step) / recipe.learning_rate)
            return self.lr_scheduler

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
            return encode(prompts), None, {}

    class InOrder(Own):
        """With prompts in order, and a loss averaged over the tokens of the batch, as ``IWOPDTrainer`` has neither."""

        loss_is_scaled_for_ga = True

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)
            sampler.shuffle = False
            return sampler

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            # The number of tokens that comes in is of the data set, where there are no completions yet.
            tokens = sum((part["labels"] != -100).sum() for part in self._buffered_inputs)
            # A share of all: the gradients of the processes are averaged.
            tokens = self.accelerator.gather(tokens).sum() / self.accelerator.num_processes
            return super().compute_loss(model, inputs, return_outputs, tokens)

    class Rewarded(Own):
        """With opdlab's advantages, exactly 0 where all rewards of a prompt are alike."""

        def _calculate_rewards(self, *batch: Any) -> Tensor:
            rewards = super()._calculate_rewards(*batch)  # of all processes
            self.advantages = grpo_advantages(rewards[:, 0], recipe.samples)
            return rewards

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            parts = self.advantages.split(len(batch["advantages"]))
            return batch | {"advantages": parts[self.accelerator.process_index]}

    return {"IWOPD": InOrder, "GRPO": Rewarded}.get(name, Own)


class _Steps(transformers.TrainerCallback):
    """What opdlab's loop does at a step, and TRL's trainers do not."""

    def __init__(self, trainer: transformers.Trainer, experiment: Experiment, folder: Path):
        self.trainer, self.experiment, self.folder = trainer, experiment, folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the step's own streams of random numbers."""
        seed = random_numbers(self.experiment.seed, "rollouts", state.global_step).integers(2**31)
        transformers.set_seed(int(seed) + args.process_index)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip a batch whose rewards say nothing: without gradients, neither weights nor moments are touched."""
        advantages = getattr(self.trainer, "advantages", None)
        if advantages is not None and not advantages.any():
            kwargs["model"].zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse weights that are not finite, before they are written anywhere, and say when to write a checkpoint."""
        weights = kwargs["model"].parameters()
        parts = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
        wrong = torch.stack([(~part.isfinite()).sum() for part in parts]).sum()
        if self.trainer.accelerator.gather(wrong).any():
            raise OpdlabError(
                f"weights of {self.experiment.title!r} are not finite after step {state.global_step}: lower its "
                f"learning rate ({self.experiment.recipe.learning_rate:g}); the run is kept up to its last checkpoint"
            )
        every = max(1, state.max_steps // CHECKPOINTS)
        control.should_save = state.global_step % every == 0 and state.global_step < state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that the checkpoint is whole once all processes have written their part, and delete the one before."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            for path in checkpoint.rglob("*"):
                sync(path)  # Trainer leaves that to the system, and the mark must not be there before.
            write_text(checkpoint / WHOLE, "")
            drop_checkpoints(self.folder, kept=state.global_step)


def _rows(
    experiment: Experiment, trainer: str, tokenizer: transformers.PreTrainedTokenizerBase, encode: Encode, done: int = 0
) -> Any:
    """Return the ``datasets.Dataset``: the prompts of the step after ``done`` as opdlab's loop sees them, and so on.

    A row is drawn when it is asked for: a prompt, repeated for all trainers but GRPO as often as it is sampled; or for
    SFT the tokens of prompt and solution, with labels on the solution only.
    """
    import datasets

    task, recipe = experiment.task, experiment.recipe
    repeats = 1 if trainer == "GRPO" else recipe.samples
    a_step = recipe.prompts * repeats

    @lru_cache(maxsize=2)
    def prompts_of(step: int) -> list[str]:
        return task.prompts(recipe.prompts, random_numbers(experiment.seed, "prompts", step))

    def draw(batch: dict[str, list[int]]) -> dict[str, list]:
        prompts = [prompts_of(number // a_step)[number % a_step // repeats] for number in batch["number"]]
        if trainer != "SFT":
            return {"prompt": prompts}
        before = encode(prompts)
        after = encode_completions(tokenizer, [task.demonstration(prompt) for prompt in prompts])
        labels = [[-100] * len(prompt) + solution for prompt, solution in zip(before, after, strict=True)]
        return {"input_ids": list(map(add, before, after)), "labels": labels}

    return datasets.Dataset.from_dict({"number": range(done * a_step, recipe.steps * a_step)}).with_transform(draw)


def _reward(experiment: Experiment, tokenizer: transformers.PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """Return the reward function that ``GRPOTrainer`` calls: the task's, and 0 for a completion that did not end."""

    def accuracy(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return score(tokenizer, experiment.task, prompts, Rollouts([[]] * len(prompts), completion_ids)).tolist()

    return accuracy


def _collate(
    tokenizer: transformers.PreTrainedTokenizerBase, encode: Encode, examples: list[dict[str, str]]
) -> dict[str, Tensor]:
    """Make a batch of rows for ``IWOPDTrainer``, which by itself would write prompts by a chat template."""
    encoded = tokenizer.pad({"input_ids": encode([example["prompt"] for example in examples])}, return_tensors="pt")
    return {"prompts": encoded.input_ids, "prompt_attention_mask": encoded.attention_mask} | dict(encoded)


if __name__ == "__main__":
    sys.exit(exit_status("opdlab.training.trl_process", lambda: run(Path(sys.argv[1]))))
