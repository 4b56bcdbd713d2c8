"""What could make a training step of the lab faster: each idea beside the step as it is, on one thread.

    python benchmarks/lab_step.py                 # about five minutes on one core
    python benchmarks/lab_step.py --steps 5       # less sure, sooner

What each row means, and what came of it: see the README beside this file.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from statistics import median

# Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What an earlier run compiled would be found again, and the compilation look cheap.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from torch import Tensor, nn

from opdlab.lab.laboratory import Laboratory
from opdlab.training.objectives import reverse_kl, token_mean
from opdlab.training.rollouts import MicroBatch, Rollouts, micro_batches, sample
from opdlab.training.trainer import Trainer, random_numbers, torch_generator

Row = tuple[str, float]


def timed(work: Callable[[], object], times: int) -> float:
    """Return the median processor time of ``work`` in milliseconds, after one call that does not count."""
    work()
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(1000 * (time.process_time() - began))
    return median(found)


def pieces(trainer: Trainer, rollouts: Rollouts) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a batch, as a step reads them."""
    return micro_batches(rollouts, trainer.experiment.compute.micro_batch, trainer.student.device)


def student_pass(trainer: Trainer, body: nn.Module, rollouts: Rollouts) -> None:
    """Make the forward and backward pass of a step, with ``body`` in the place of the model's own."""
    own, trainer.student.model = trainer.student.model, body
    for part in pieces(trainer, rollouts):
        logits = part.logits(trainer.student)
        token_mean(reverse_kl(logits, logits.detach().roll(1, 0)), part.mask).backward()
    trainer.student.model = own


def parts(trainer: Trainer, times: int) -> list[Row]:
    """Time the parts of a step of OPD."""
    rollouts, _ = trainer.batch(0)

    @torch.no_grad()
    def teacher() -> None:
        for part in pieces(trainer, rollouts):
            part.logits(trainer.teacher)

    return [
        ("the step", timed(lambda: trainer.step(0), times)),
        ("its rollouts", timed(lambda: trainer.batch(0), times)),
        ("the teacher's logits", timed(teacher, times)),
        (
            "the student, forward and backward",
            timed(lambda: student_pass(trainer, trainer.student.model, rollouts), times),
        ),
    ]


def multiplications(trainer: Trainer, times: int) -> list[Row]:
    """Time the student's matrix products alone, and those of two seeds in one batched product."""
    rollouts, _ = trainer.batch(0)
    sizes = [part.ids.numel() for part in pieces(trainer, rollouts)]
    shapes = [w.shape for name, w in trainer.student.named_parameters() if w.ndim == 2 and "embed" not in name]

    def products(seeds: int, batched: bool) -> Callable[[], None]:
        weights = [torch.randn(seeds, *shape) for shape in shapes]
        inputs = {(rows, m): torch.randn(seeds, rows, m) for rows in sizes for shape in shapes for m in shape}

        def multiply(x: Tensor, w: Tensor) -> None:
            for a, b in ((x, w),) if batched else zip(x, w, strict=True):
                a @ b

        def work() -> None:
            for rows in sizes:
                for w in weights:
                    n, m = w.shape[1:]
                    x, y = inputs[rows, m], inputs[rows, n]
                    multiply(x, w.mT)  # forward
                    multiply(y, w)  # gradient of the inputs
                    multiply(y.mT, x)  # gradient of the weights

        return work

    return [
        ("its matrix products alone", timed(products(1, False), times)),
        ("of two seeds, one after the other", timed(products(2, False), times)),
        ("of two seeds, batched", timed(products(2, True), times)),
    ]


def rollout_ideas(trainer: Trainer, times: int) -> list[Row]:
    """Time the rollouts of one batch and of two in one, and with all caches static."""
    recipe, longest = trainer.recipe, trainer.experiment.max_new_tokens
    prompts = trainer.task.prompts(2 * recipe.prompts, random_numbers(0, "prompts", 0))

    def draw(count: int) -> Callable[[], object]:
        options = {"max_new_tokens": longest, "samples": recipe.samples}
        generator = torch_generator(random_numbers(0, "rollouts", 0))
        return lambda: sample(trainer.student, trainer.tokenizer, prompts[:count], generator=generator, **options)

    def generate(cache: str) -> Callable[[], object]:
        trainer.tokenizer.padding_side = "left"
        inputs = trainer.tokenizer(prompts[: recipe.prompts] * recipe.samples, return_tensors="pt", padding=True)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": longest, "do_sample": True, "cache_implementation": cache}
        return lambda: trainer.student.generate(**inputs, **options)

    return [
        (f"rollouts of {recipe.completions}", timed(draw(recipe.prompts), times)),
        (f"rollouts of {2 * recipe.completions} in one", timed(draw(2 * recipe.prompts), times)),
        ("transformers' generate, dynamic cache", timed(generate("dynamic"), times)),
        ("transformers' generate, static cache", timed(generate("static"), times)),
    ]


def compiled(trainer: Trainer, times: int) -> list[Row]:
    """Time the student's passes with torch.compile, and the compilation."""
    rollouts, _ = trainer.batch(0)
    body = torch.compile(trainer.student.model, dynamic=True)
    began = time.perf_counter()
    student_pass(trainer, body, rollouts)
    seconds = time.perf_counter() - began
    return [
        ("the student, compiled", timed(lambda: student_pass(trainer, body, rollouts), times)),
        ("the compilation", 1000 * seconds),
    ]


def evaluation(trainer: Trainer) -> list[Row]:
    """Time one evaluation."""
    return [("an evaluation", timed(lambda: trainer.evaluate(0), 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="repetitions of each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(Laboratory.at("tiny").experiment("opd"))
    print("| what | ms |\n| --- | ---: |")
    for measure in (parts, multiplications, rollout_ideas, compiled):
        for name, value in measure(trainer, options.steps):
            print(f"| {name} | {value:.0f} |", flush=True)
    for name, value in evaluation(trainer):
        print(f"| {name} | {value:.0f} |", flush=True)


if __name__ == "__main__":
    main()
