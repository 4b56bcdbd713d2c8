"""Tokens per second of one OPD step, split into its parts, beside TRL's DistillationTrainer doing the same work.

    python benchmarks/opd_step.py                        # three cases, a few minutes on one core
    python benchmarks/opd_step.py --cases tiny-own --steps 20 --out result.json
    python benchmarks/opd_step.py --cases small-16x4 --steps 3     # SmolLM2, after 'opdlab models --scale small'

What is the same on both sides, what is timed and how tokens are counted: see the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Read when torch and transformers are imported: one thread unless --threads says more, and no model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging

from opdlab.errors import OpdlabError
from opdlab.lab.laboratory import Laboratory, default_root
from opdlab.lab.scales import SMALL, TINY, Scale
from opdlab.models.files import write_json
from opdlab.models.folders import load_model, load_tokenizer, new_model, save_model
from opdlab.processes import find_device
from opdlab.training.config import Experiment, Recipe
from opdlab.training.rollouts import Rollouts
from opdlab.training.trainer import Trainer, random_numbers

PARTS = ("rollout", "teacher", "student", "optimizer", "rest")


def wall() -> float:
    """Return the time on the clock, once a GPU has done all that it was told to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"cpu": time.process_time, "wall": wall}
# Steps of either side before its clock counts.
WARM_UP = 2
# AdamW does all its work, but the student stays as it is: its completions are as long at the end as at the start.
LEARNING_RATE = 1e-9

_WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
_WIDE |= {"intermediate_size": 1536, "max_position_embeddings": 128}
# The lab has no models of this size. The student is trained for half a minute, until its completions are as long as
# real ones. What the teacher says takes the same time whatever it is, so its weights are random.
WIDE = replace(
    TINY,
    name="wide",
    models=replace(
        TINY.models,
        folder="wide",
        shapes={"base": _WIDE | {"num_hidden_layers": 2}, "teacher": _WIDE | {"num_hidden_layers": 3}},
    ),
    # Activations of 64 such rows do not fit the cache, and glibc maps them anew each time; TRL gets the same 16 rows.
    compute=replace(TINY.compute, micro_batch=16),
    budget=replace(
        TINY.budget, recipes=TINY.budget.recipes | {"base": Recipe(60, 16, 1, 1e-3, "cosine", 5, (0.9, 0.95))}
    ),
)


@dataclass(frozen=True)
class Case:
    """The models of a scale, and a batch of ``prompts`` x ``samples`` completions."""

    scale: Scale
    prompts: int
    samples: int

    def experiment(self, root: Path) -> Experiment:
        """Return what both sides do, with the models in ``root``."""
        of = Laboratory(self.scale, root).on_this_machine().experiment("opd_full")
        batch = {"prompts": self.prompts, "samples": self.samples}
        return replace(of, recipe=replace(of.recipe, learning_rate=LEARNING_RATE, **batch))


def own(scale: Scale) -> tuple[int, int]:
    """Return the batch that the scale's recipe has."""
    recipe = Laboratory(scale, default_root()).recipe("opd_full")
    return recipe.prompts, recipe.samples


# Called after the models and the batch.
CASES = {
    f"{scale.name}-{name}": Case(scale, *batch)
    for scale in (TINY, WIDE, SMALL)
    for name, batch in (("16x4", (16, 4)), ("own", own(scale)))
}
DEFAULT_CASES = ("tiny-16x4", "tiny-own", "wide-16x4")

# --- the clocks -------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds of each step by part. A part within a part counts for the outer one."""

    def __init__(self) -> None:
        self.steps: dict[str, list[dict]] = defaultdict(list)
        self.step: dict = {}
        self._depth = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = {clock: read() for clock, read in CLOCKS.items()}
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for clock, read in CLOCKS.items():
                    self.step[clock, name] = self.step.get((clock, name), 0.0) + read() - began[clock]

    def begin(self) -> None:
        self.step = {("began", clock): read() for clock, read in CLOCKS.items()}

    def note(self, **counts: float) -> None:
        """Add to the counts of the step."""
        for name, count in counts.items():
            self.step[name] = self.step.get(name, 0) + count

    def end(self, side: str) -> None:
        for clock, read in CLOCKS.items():
            whole = read() - self.step.pop(("began", clock))
            counted = sum(self.step.setdefault((clock, part), 0.0) for part in PARTS)
            self.step |= {(clock, "step"): whole, (clock, "rest"): whole - counted}
        self.steps[side].append(self.step)

    def wrap(self, owner: object, name: str, part: str, note: Callable[[object], dict] | None = None) -> None:
        """Count the calls of ``owner.name`` as ``part`` from now on, and what ``note`` finds in the results."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            with self.part(part):
                result = function(*args, **kwargs)
            if note:
                self.note(**note(result))
            return result

        setattr(owner, name, timed)

    def wrap_models(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Count the bodies, for TRL goes around the models' own ``forward`` and applies their heads in its loss."""
        self.wrap(student.base_model, "forward", "student")
        self.wrap(teacher.base_model, "forward", "teacher")


class TimedTrainer(Trainer):
    """A trainer whose copies are not wrapped, or they would call the model that they are copies of."""

    def in_dtype(self, model: PreTrainedModel) -> PreTrainedModel:
        found = super().in_dtype(model)
        if found is not model:
            found.base_model.__dict__.pop("forward", None)
        return found


# --- the sides --------------------------------------------------------------------------------------------------------

OURS, IN_FLOAT32 = "opdlab", "opdlab, float32"


def our_side(of: Experiment, watch: Stopwatch, side: str = OURS) -> Callable[[int], None]:
    """Return the function that makes one of our steps."""
    trainer = TimedTrainer(of)

    def note(result: tuple[Rollouts, Tensor]) -> dict:
        rollouts, _ = result
        prompts = torch.tensor([len(ids) for ids in rollouts.prompts])
        completions = torch.tensor([len(ids) for ids in rollouts.completions]).reshape(len(prompts), -1)
        total = rollouts.tokens + int(prompts.sum()) * rollouts.samples
        arithmetic = flops(trainer.student, trainer.teacher, prompts, completions)
        return {"completion": rollouts.tokens, "total": total} | arithmetic

    watch.wrap(trainer, "batch", "rollout", note)
    watch.wrap_models(trainer.student, trainer.teacher)
    watch.wrap(trainer.optimizers[0], "step", "optimizer")

    def step(number: int) -> None:
        watch.begin()
        line = trainer.step(number)
        watch.note(kl=line["loss"])
        watch.end(side)

    return step


def train_with_trl(of: Experiment, scratch: str, watch: Stopwatch, steps: int, between: Callable[[int], None]) -> None:
    """Let TRL make ``steps`` steps in its own loop, and call ``between`` after each with the step's number."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Timed(DistillationTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            watch.note(kl=loss.item())
            return loss

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            watch.wrap(optimizer, "step", "optimizer")

        def on_step_begin(self, *args, **kwargs):
            watch.begin()

        def on_step_end(self, args, state, control, **kwargs):
            watch.end("TRL")
            between(state.global_step - 1)

    def note(batch: dict[str, Tensor]) -> dict:
        completion, prompt = (int(batch[f"{name}_mask"].sum()) for name in ("completion", "prompt"))
        return {"completion": completion, "total": completion + prompt}

    recipe, task, start = of.recipe, of.task, of.arm.student.folder
    micro_batch = min(of.compute.micro_batch, recipe.completions)
    prompts = [task.prompts(recipe.prompts, random_numbers(0, "prompts", step)) for step in range(steps)]
    device = find_device(of.compute.gpu)
    half = of.compute.dtype_on(device) == torch.bfloat16
    student = load_model(start)
    teacher = load_model(of.arm.teacher.folder, dtype=torch.bfloat16 if half else torch.float32)
    trainer = Timed(
        model=student,
        teacher_model=teacher,
        processing_class=load_tokenizer(start),
        train_dataset=Dataset.from_dict(
            {"prompt": [prompt for batch in prompts for prompt in batch for _ in range(recipe.samples)]}
        ),
        args=DistillationConfig(
            # The same work.
            max_steps=steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=recipe.completions // micro_batch,
            shuffle_dataset=False,
            max_completion_length=of.max_new_tokens,
            temperature=of.temperature,
            beta=1.0,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=recipe.betas[0],
            adam_beta2=recipe.betas[1],
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            use_cpu=device.type == "cpu",
            bf16=half,
            # Nothing beside it.
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            output_dir=scratch,
        ),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    watch.wrap(trainer, "_prepare_inputs", "rollout", note)
    watch.wrap_models(student, teacher)
    trainer.train()


def measure(of: Experiment, steps: int, bar: tqdm) -> Stopwatch:
    """Let the sides take turns, ``steps`` each after the warm-up; on a CPU, passes in bfloat16 and in float32."""
    watch = Stopwatch()
    ours = [our_side(of, watch)]
    if of.compute.differs_between_processors(find_device(of.compute.gpu)):
        whole = replace(of, compute=replace(of.compute, cpu_dtype="float32"))
        ours.append(our_side(whole, watch, IN_FLOAT32))

    def turn(number: int) -> None:
        for step in ours:
            step(number)
        bar.update()

    # What both sides call in torch.
    shared = [(torch.Tensor, "backward", "student"), (torch.nn.utils, "clip_grad_norm_", "optimizer")]
    originals = [getattr(owner, name) for owner, name, _ in shared]
    for owner, name, part in shared:
        watch.wrap(owner, name, part)
    try:
        if find_spec("trl"):
            with tempfile.TemporaryDirectory() as scratch:
                train_with_trl(of, scratch, watch, WARM_UP + steps, turn)
        else:
            for number in range(WARM_UP + steps):
                turn(number)
    finally:
        for (owner, name, _), original in zip(shared, originals, strict=True):
            setattr(owner, name, original)
    return watch


# --- what the arithmetic alone would take -----------------------------------------------------------------------------


def forward_flops(model: PreTrainedModel, prompts: Tensor, completions: Tensor) -> float:
    """Return the operations of a forward pass over prompts (R,) and their completions (R, S) of these lengths.

    Each token once, and a prompt once for all its completions.
    """
    config = model.config
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * heads
    tokens = prompts.sum() + completions.sum()
    pairs = prompts.square().sum() / 2 + (prompts[:, None] * completions + completions.square() / 2).sum()
    # Two a weight and token; and scores and values, each two an entry, for each pair of positions.
    return float(2 * weights * tokens + 4 * attention * pairs)


def flops(student: PreTrainedModel, teacher: PreTrainedModel, prompts: Tensor, completions: Tensor) -> dict:
    """Return the operations of each part of a step; nothing is predicted from the last token of a completion."""
    forward = forward_flops(student, prompts, completions - 1)
    return {
        "rollout flops": forward,
        "teacher flops": forward_flops(teacher, prompts, completions - 1),
        "student flops": 3 * forward,
    }


def matmul_rate(of: Experiment, clock: str) -> float:
    """Return the best FLOP/s of this device on products of the size of a feed-forward layer, in the passes' dtype."""
    shape = json.loads((Path(of.arm.student.folder) / "config.json").read_text())
    device = find_device(of.compute.gpu)
    kind = {"device": device, "dtype": of.compute.dtype_on(device)}
    rows, width, inner = 1024, shape["hidden_size"], shape["intermediate_size"]
    left, right = torch.randn(rows, width, **kind), torch.randn(width, inner, **kind)
    out, best = torch.empty(rows, inner, **kind), float("inf")
    for _ in range(50):
        began = CLOCKS[clock]()
        for _ in range(4):
            torch.mm(left, right, out=out)
        best = min(best, CLOCKS[clock]() - began)
    return 4 * 2 * rows * width * inner / best


# --- the report -------------------------------------------------------------------------------------------------------


def make_wide_models(root: Path, bar: tqdm) -> None:
    """Write the wide student and teacher into ``root``."""
    lab = Laboratory(WIDE, root)
    # On the task itself, and not on the short tasks of pretraining.
    trainer = Trainer(replace(lab.experiment("base"), task=lab.tasks[WIDE.task]))
    for step in range(trainer.recipe.steps):
        trainer.step(step)
        bar.update()
    save_model(trainer.student, trainer.tokenizer, lab.models / "anchor")
    save_model(new_model(WIDE.models.shapes["teacher"], seed=1), trainer.tokenizer, lab.models / "teacher")


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def summary(steps: list[dict], clock: str) -> dict:
    """Return seconds by part, tokens and tokens per second of some steps."""
    seconds = {part: quartiles([step[clock, part] for step in steps]) for part in (*PARTS, "step")}
    counts = {name: float(np.mean([step[name] for step in steps])) for name in ("completion", "total", "kl")}
    rates = {
        f"{name} per second": quartiles([step[name] / step[clock, "step"] for step in steps])
        for name in ("completion", "total")
    }
    return {"seconds": seconds} | counts | rates


def named(step: dict) -> dict:
    """Return ``step`` with keys that JSON knows."""
    return {" ".join(key) if isinstance(key, tuple) else key: value for key, value in step.items()}


def rows(name: str, case: dict) -> Iterator[str]:
    """Write the lines of a case in the table."""
    for side, result in case["sides"].items():
        seconds = result["seconds"]
        parts = " | ".join(f"{1000 * seconds[part]['median']:.0f}" for part in PARTS)
        step, rate = seconds["step"], result["completion per second"]["median"]
        other = case["sides"].get("TRL", result)["completion per second"]["median"]
        times = f"{rate / other:.2f}" if "TRL" in case["sides"] else ""
        yield (
            f"| {name} | {side} | {parts} | {1000 * step['median']:.0f} ({1000 * step['low']:.0f}-"
            f"{1000 * step['high']:.0f}) | {result['completion']:.0f} + {result['total'] - result['completion']:.0f} | "
            f"{rate:.0f} | {result['total per second']['median']:.0f} | {times} | {result['kl']:.3f} |"
        )
    bound = case["bound"]
    parts = " | ".join(f"{1000 * bound[part]:.0f}" if part in bound else "" for part in PARTS)
    yield (
        f"| {name} | arithmetic, {case['GFLOP']:.1f} GFLOP at {case['GFLOP/s']:.0f}/s | {parts} | "
        f"{1000 * sum(bound.values()):.0f} | | | | | |"
    )
    ours = case["sides"][OURS]["seconds"]["step"]["median"]
    yield f"| {name} | arithmetic / step of opdlab | | | | | | {sum(bound.values()) / ours:.0%} | | | | | |"


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=DEFAULT_CASES, metavar="CASE", help=" ".join(CASES)
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps of either side in each case (default: 10)")
    parser.add_argument("--micro-batch", type=int, help="rows in a forward pass of both sides (default: the scale's)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, help="for the table (default: cpu on one thread, otherwise wall)")
    parser.add_argument("--out", type=Path, help="write all that was measured to this JSON file too")
    options = parser.parse_args()
    clock = options.clock or ("cpu" if options.threads == 1 and not torch.cuda.is_available() else "wall")
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's own, about transformers 6

    packages = ["opdlab", "torch", "transformers", "numpy"] + (["trl"] if find_spec("trl") else [])
    report = {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "threads": options.threads,
        "clock": clock,
        "load before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "cases": {},
    }
    wide = any(CASES[name].scale is WIDE for name in options.cases)
    total = len(options.cases) * (WARM_UP + options.steps) + wide * WIDE.budget.recipes["base"].steps
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=total, unit="step") as bar:
        for name in options.cases:
            case = CASES[name]
            root = Path(scratch) if case.scale is WIDE else default_root()
            lab = Laboratory(case.scale, root)
            if case.scale is WIDE and not (lab.models / "teacher").exists():
                bar.set_description("training the wide student")
                make_wide_models(root, bar)
            lab.model_folder("anchor")  # says what to do if there is none
            of = case.experiment(root)
            if options.micro_batch:
                of = replace(of, compute=replace(of.compute, micro_batch=options.micro_batch))
            bar.set_description(name)
            rate = matmul_rate(of, clock)
            steps = measure(of, options.steps, bar).steps
            steps = {side: steps[side][WARM_UP:] for side in sorted(steps, reverse=True)}
            operations = {part: float(np.median([step[f"{part} flops"] for step in steps[OURS]])) for part in PARTS[:3]}
            report["cases"][name] = {
                "prompts": case.prompts,
                "samples": case.samples,
                "micro_batch": of.compute.micro_batch,
                "GFLOP": sum(operations.values()) / 1e9,
                "GFLOP/s": rate / 1e9,
                "bound": {part: count / rate for part, count in operations.items()},
                "sides": {side: summary(taken, clock) for side, taken in steps.items()},
                "steps": {side: [named(step) for step in taken] for side, taken in steps.items()},
            }
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"{report['gpu'] or report['processor']}, {options.threads} thread(s), {versions}\n")
    print(f"Milliseconds of {clock} time a step, medians of {options.steps} steps.\n")
    head = ["case", "side", *PARTS, "step (quartiles)", "tokens: completion + prompt"]
    head += ["completion tokens/s", "all tokens/s", "x TRL", "KL, nats/token"]
    print("| " + " | ".join(head) + " |\n| --- | --- |" + " --: |" * (len(head) - 2))
    for name, case in report["cases"].items():
        print(*rows(name, case), sep="\n")
    for name, case in report["cases"].items():
        if IN_FLOAT32 in case["sides"]:
            half, whole = (case["sides"][side]["completion per second"]["median"] for side in (OURS, IN_FLOAT32))
            print(f"\n{name}: in bfloat16 {half / whole:.2f} times as many completion tokens a second as in float32.")
    if "trl" not in report["versions"]:
        print("\nTRL is not installed, so there is nothing to compare with: pip install -e .[trl]")
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    try:
        main()
    except OpdlabError as problem:
        raise SystemExit(f"error: {problem}") from None
