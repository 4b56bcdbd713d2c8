"""One run of TRL: ``accelerate launch -m opdlab.training.trl RUN/config.json`` starts this in each process.

The configuration is that of :func:`opdlab.training.trl_config.configure`; snapshots and the trainer's log are written
beside it. TRL is imported when it is used, so that this module can be read without it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from opdlab.errors import exit_status
from opdlab.lab.scales import Recipe
from opdlab.lab.tasks import TASKS
from opdlab.measuring.callback import GeometryCallback
from opdlab.models.files import load_tensors
from opdlab.models.folders import check_same_vocabulary, load_model, load_tokenizer, save_model
from opdlab.training.rollouts import Rollouts, encode_completions, encode_prompts
from opdlab.training.trainer import random_numbers, score

if TYPE_CHECKING:
    import datasets

# How often the geometry of attention is logged in a run: at 8 billion weights a measurement takes minutes.
MEASUREMENTS = 10


def run(path: Path) -> None:
    """Train what the configuration in ``path`` says, and write the model that the run makes, if it makes one.

    Raises:
        OpdlabError: if a model cannot be opened, or student and teacher have different vocabularies.
    """
    config = json.loads(path.read_text())
    trainer = make_trainer(config, path.parent)
    trainer.train()
    trainer.save_state()
    if config["makes"] and not Path(config["makes"]).exists() and trainer.is_world_process_zero():
        # From the last snapshot, which is whole: of the model at hand each process has a part.
        snapshot = path.parent / "snapshots" / f"step-{max(config['snapshots']):06d}.safetensors"
        start = local_folder(config["start"])
        model = load_model(start)
        model.load_state_dict(load_tensors(snapshot)[0], strict=False)
        save_model(model, load_tokenizer(start), Path(config["makes"]))


def make_trainer(config: dict, folder: Path) -> transformers.Trainer:
    """Return the trainer of a configuration, with data, models and callback, which writes into ``folder``."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    name, recipe = config["trainer"], recipe_of(config)
    kind, settings = _classes(name, recipe)
    # First of all, as it joins the processes and says which device is whose.
    settings = settings(output_dir=str(folder), **config["arguments"])
    start = local_folder(config["start"])
    tokenizer, student = load_tokenizer(start), load_model(start)
    options = {"args": settings, "processing_class": tokenizer, "train_dataset": rows(config, tokenizer, student)}
    if config["teacher"]:
        teacher = local_folder(config["teacher"])
        check_same_vocabulary(start, teacher)
        options["teacher_model"] = load_model(teacher, dtype=torch.bfloat16 if settings.bf16 else torch.float32)
    if name == "GRPO":
        options["reward_funcs"] = reward(config, tokenizer)
    elif name == "IWOPD":
        options["data_collator"] = _prompts_of(tokenizer)
    trainer = kind(student, **options)
    every = max(1, recipe.steps // MEASUREMENTS)
    trainer.add_callback(
        GeometryCallback(trainer, every=every, snapshots=folder / "snapshots", snapshot_steps=config["snapshots"])
    )
    return trainer


def recipe_of(config: dict) -> Recipe:
    """Return the recipe in a configuration."""
    return Recipe(**config["recipe"] | {"betas": tuple(config["recipe"]["betas"])})


def local_folder(source: str) -> Path:
    """Return the folder of a model, downloaded if it has a name on the hub."""
    if Path(source).is_absolute():
        return Path(source)
    from huggingface_hub import snapshot_download  # Unlike opdlab.models.fetch, it lets only one process download.

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"]))


def _classes(name: str, recipe: Recipe) -> tuple[type, type]:
    """Return TRL's trainer, with what opdlab must have otherwise, and its configuration."""
    library = import_module("trl.experimental.iw_opd" if name == "IWOPD" else "trl")
    trainer: Any = getattr(library, f"{name}Trainer")

    class Scheduled(trainer):
        """With the learning rates of opdlab's loop, of which TRL's schedules are some steps off."""

        def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: recipe.learning_rate_at(step) / recipe.learning_rate
            )
            return self.lr_scheduler

    class InOrder(Scheduled):
        """With prompts in order, and a loss averaged over the tokens of the batch; ``IWOPDTrainer`` offers neither."""

        loss_is_scaled_for_ga = True

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)
            sampler.shuffle = False
            return sampler

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # The number that comes in is of the data set, where there are no completions yet.
            tokens = sum((part["labels"] != -100).sum() for part in self._buffered_inputs)
            # A share of all: the gradients of the processes are averaged.
            tokens = self.accelerator.gather(tokens).sum() / self.accelerator.num_processes
            return super().compute_loss(model, inputs, return_outputs, tokens)

    return InOrder if name == "IWOPD" else Scheduled, getattr(library, f"{name}Config")


def rows(
    config: dict, tokenizer: transformers.PreTrainedTokenizerBase, student: transformers.PreTrainedModel
) -> datasets.Dataset:
    """Return the data set: the prompts of step 0 as opdlab's loop sees them, those of step 1, and so on.

    A row is drawn when it is asked for. It is a prompt, which GRPO repeats by itself and the others find as often as it
    is sampled; or for SFT the tokens of prompt and solution, with labels on the solution only.
    """
    import datasets

    task, recipe = TASKS[config["task"]], recipe_of(config)
    repeats = 1 if config["trainer"] == "GRPO" else recipe.samples
    a_step = recipe.prompts * repeats
    room = student.config.max_position_embeddings - config["max_new_tokens"]

    @lru_cache(maxsize=2)
    def prompts_of(step: int) -> list[str]:
        return task.prompts(recipe.prompts, random_numbers(config["seed"], "prompts", step))

    def draw(batch: dict[str, list[int]]) -> dict[str, list]:
        prompts = [prompts_of(number // a_step)[number % a_step // repeats] for number in batch["number"]]
        if config["trainer"] != "SFT":
            return {"prompt": prompts}
        before = encode_prompts(tokenizer, prompts, room)
        after = encode_completions(tokenizer, [task.demonstration(prompt) for prompt in prompts])
        pairs = list(zip(before, after, strict=True))
        return {
            "input_ids": [prompt + solution for prompt, solution in pairs],
            "labels": [[-100] * len(prompt) + solution for prompt, solution in pairs],
        }

    return datasets.Dataset.from_dict({"number": range(recipe.steps * a_step)}).with_transform(draw)


def reward(config: dict, tokenizer: transformers.PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """Return the reward function that ``GRPOTrainer`` calls: the task's, and 0 for a completion that did not end."""
    task = TASKS[config["task"]]

    def accuracy(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return score(tokenizer, task, prompts, Rollouts([[]] * len(prompts), completion_ids)).tolist()

    return accuracy


def _prompts_of(tokenizer: transformers.PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]]], dict[str, Tensor]]:
    """Return what makes a batch of rows for ``IWOPDTrainer``, whose own would write prompts by a chat template."""

    def collate(examples: list[dict[str, str]]) -> dict[str, Tensor]:
        prompts = [example["prompt"] for example in examples]
        encoded = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        return {"prompts": encoded.input_ids, "prompt_attention_mask": encoded.attention_mask} | dict(encoded)

    return collate


if __name__ == "__main__":
    sys.exit(exit_status("opdlab.training.trl", lambda: run(Path(sys.argv[1]))))
