"""Tokens per second of one OPD step, split into its parts, beside TRL's DistillationTrainer doing the same work.

    python benchmarks/opd_step.py                        # three cases, a few minutes on one core
    python benchmarks/opd_step.py --cases tiny-64 --steps 20 --out result.json

What is the same on both sides, what is timed and how tokens are counted: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# As many OpenMP threads as asked for, and no hub: both are read when torch and transformers are imported.
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--cases", nargs="+", help="of tiny-64, tiny-128, wide-64, wide-128 (default: the first three)")
parser.add_argument("--steps", type=int, default=10, help="timed steps on each side of each case (default: 10)")
parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default: 1)")
parser.add_argument("--clock", choices=("cpu", "wall"), help="default: cpu on one thread, else wall")
parser.add_argument("--out", type=Path, help="also write everything that was measured to this JSON file")
if __name__ == "__main__":
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import numpy as np
import torch
from torch.nn.utils import clip_grad
from tqdm import tqdm

from opdlab.arms import ARMS
from opdlab.models import character_tokenizer, load_model, load_tokenizer, new_model, save_model
from opdlab.runs import default_home
from opdlab.scales import TINY, Recipe, Scale
from opdlab.tasks import TASKS
from opdlab.training import Learner, random_numbers

PARTS = ("rollout", "teacher", "student", "optimizer", "rest")
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
# Steps of each side before the clock counts.
WARM_UP = 2
# AdamW does all its work, but the students stay as they are: completions are as long in the last step as in the first.
LEARNING_RATE = 1e-9
INSTALL_TRL = "TRL is not installed, so there is nothing to compare with: pip install -e .[parity] (Python >= 3.11)"

_WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
_WIDE |= {"head_dim": 64, "max_position_embeddings": 128}
# No models of this size come with the lab. A student that writes sums of the usual length is trained in a minute; what
# the teacher says does not matter to the clock, so its weights are random.
WIDE = replace(
    TINY,
    name="wide",
    models="wide",
    shapes={"base": _WIDE | {"num_hidden_layers": 2}, "teacher": _WIDE | {"num_hidden_layers": 3}},
    recipes=TINY.recipes | {"base": Recipe(60, 16, 1, 1e-3, "cosine", 5, (0.9, 0.95))},
)


@dataclass(frozen=True)
class Case:
    """Models of a scale, and a batch of ``prompts`` x ``samples`` sequences."""

    scale: Scale
    prompts: int
    samples: int

    @property
    def recipe(self) -> Recipe:
        recipe = self.scale.recipes["opd_full"]
        return replace(recipe, prompts=self.prompts, samples=self.samples, learning_rate=LEARNING_RATE)

    def draw(self, step: int) -> list[str]:
        """Return the prompts of a step, those that Learner draws."""
        return TASKS[self.scale.task].prompts(self.prompts, random_numbers(0, "prompts", step))


CASES = {
    f"{scale.name}-{prompts * 4}": Case(scale, prompts, 4)
    for scale, prompts in ((TINY, 16), (TINY, 32), (WIDE, 16), (WIDE, 32))
}


class Stopwatch:
    """Adds up the seconds of a step by part, on both clocks. A part within a part counts for the outer one."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.note: dict = {}
        self._depth = 0

    @staticmethod
    def _now() -> dict[str, float]:
        return {name: read() for name, read in CLOCKS.items()}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._depth += 1
        began = self._now()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for clock, now in self._now().items():
                    self._seconds[clock][name] += now - began[clock]

    def begin(self) -> None:
        """Begin a step."""
        self._seconds, self.note, self._began = defaultdict(Counter), {}, self._now()

    def end(self) -> None:
        """End a step; what no part has counted is the rest."""
        for clock, now in self._now().items():
            whole = now - self._began[clock]
            self._seconds[clock]["rest"] = whole - sum(self._seconds[clock].values())
            self._seconds[clock]["step"] = whole
        self.steps.append({clock: dict(parts) for clock, parts in self._seconds.items()} | self.note)

    def wrap(self, owner: object, name: str, part: str, note: Callable[[object], dict] | None = None) -> None:
        """Let ``owner.name`` count as ``part`` from now on, and keep what ``note`` says about its result."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            if not hasattr(self, "_seconds"):  # before the first step
                return function(*args, **kwargs)
            with self.part(part):
                result = function(*args, **kwargs)
            self.note |= note(result) if note else {}
            return result

        setattr(owner, name, timed)

    def wrap_models(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        # TRL calls the body without the output head, so it is the body that is timed on both sides.
        self.wrap(student.base_model, "forward", "student")
        self.wrap(teacher.base_model, "forward", "teacher")


@contextmanager
def whoever_calls(watch: Stopwatch) -> Iterator[None]:
    """Time the functions of torch that both sides call."""
    saved = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    watch.wrap(torch.Tensor, "backward", "student")
    watch.wrap(torch.nn.utils, "clip_grad_norm_", "optimizer")
    try:
        yield
    finally:
        torch.Tensor.backward, torch.nn.utils.clip_grad_norm_ = saved


assert torch.nn.utils.clip_grad_norm_ is clip_grad.clip_grad_norm_
