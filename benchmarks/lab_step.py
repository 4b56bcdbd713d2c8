"""What could make a training step of the lab faster: each idea beside the step as it is, on one thread.

    python benchmarks/lab_step.py                 # about five minutes on one core
    python benchmarks/lab_step.py --steps 5       # less sure, sooner

What each row means, and what came of it: see the README beside this file.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

# Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What an earlier run compiled would be found again, and the compilation look cheap.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from torch import Tensor, nn

from opdlab.lab.analyses import Study
from opdlab.lab.scales import TINY
from opdlab.training.objectives import reverse_kl, token_mean
from opdlab.training.rollouts import Rollouts, micro_batches, sample
from opdlab.training.store import default_home
from opdlab.training.trainer import Learner, random_numbers, torch_generator

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


def student_pass(learner: Learner, body: nn.Module, rollouts: Rollouts) -> None:
    """Make the forward and backward pass of a step, with ``body`` in the place of the model's own."""
    own, learner.student.model = learner.student.model, body
    for part in micro_batches(rollouts, learner.scale.micro_batch, learner.student.device):
        logits = part.logits(learner.student)
        token_mean(reverse_kl(logits, logits.detach().roll(1, 0)), part.mask).backward()
    learner.student.model = own


def parts(learner: Learner, times: int) -> list[Row]:
    """Time the parts of a step of OPD."""
    rollouts, _ = learner.batch(0)

    @torch.no_grad()
    def teacher() -> None:
        for part in micro_batches(rollouts, learner.scale.micro_batch, learner.student.device):
            part.logits(learner.teacher)

    return [
        ("the step", timed(lambda: learner.step(0), times)),
        ("its rollouts", timed(lambda: learner.batch(0), times)),
        ("the teacher's logits", timed(teacher, times)),
        (
            "the student, forward and backward",
            timed(lambda: student_pass(learner, learner.student.model, rollouts), times),
        ),
    ]


def multiplications(learner: Learner, times: int) -> list[Row]:
    """Time the student's matrix products alone, and those of two seeds in one batched product."""
    rollouts, _ = learner.batch(0)
    sizes = [part.ids.numel() for part in micro_batches(rollouts, learner.scale.micro_batch, learner.student.device)]
    shapes = [w.shape for name, w in learner.student.named_parameters() if w.ndim == 2 and "embed" not in name]

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


def rollout_ideas(learner: Learner, times: int) -> list[Row]:
    """Time the rollouts of one batch and of two in one, and with all caches static."""
    recipe = learner.recipe
    prompts = learner.task.prompts(2 * recipe.prompts, random_numbers(0, "prompts", 0))

    def draw(count: int) -> Callable[[], object]:
        options = {"max_new_tokens": TINY.max_new_tokens, "samples": recipe.samples}
        generator = torch_generator(random_numbers(0, "rollouts", 0))
        return lambda: sample(learner.student, learner.tokenizer, prompts[:count], generator=generator, **options)

    def generate(cache: str) -> Callable[[], object]:
        learner.tokenizer.padding_side = "left"
        inputs = learner.tokenizer(prompts[: recipe.prompts] * recipe.samples, return_tensors="pt", padding=True)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": TINY.max_new_tokens, "do_sample": True, "cache_implementation": cache}
        return lambda: learner.student.generate(**inputs, **options)

    return [
        (f"rollouts of {recipe.sequences}", timed(draw(recipe.prompts), times)),
        (f"rollouts of {2 * recipe.sequences} in one", timed(draw(2 * recipe.prompts), times)),
        ("transformers' generate, dynamic cache", timed(generate("dynamic"), times)),
        ("transformers' generate, static cache", timed(generate("static"), times)),
    ]


def compiled(learner: Learner, times: int) -> list[Row]:
    """Time the student's passes with torch.compile, and the compilation."""
    rollouts, _ = learner.batch(0)
    body = torch.compile(learner.student.model, dynamic=True)
    began = time.perf_counter()
    student_pass(learner, body, rollouts)
    seconds = time.perf_counter() - began
    return [
        ("the student, compiled", timed(lambda: student_pass(learner, body, rollouts), times)),
        ("the compilation", 1000 * seconds),
    ]


def evaluation(learner: Learner) -> list[Row]:
    """Time one evaluation."""
    return [("an evaluation", timed(lambda: learner.evaluate(0), 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="repetitions of each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learner = Study(TINY, default_home(), 0).learner("opd_short")
    print("| what | ms |\n| --- | ---: |")
    for measure in (parts, multiplications, rollout_ideas, compiled):
        for name, value in measure(learner, options.steps):
            print(f"| {name} | {value:.0f} |", flush=True)
    for name, value in evaluation(learner):
        print(f"| {name} | {value:.0f} |", flush=True)


if __name__ == "__main__":
    main()
