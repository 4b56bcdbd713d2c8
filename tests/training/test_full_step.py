"""The step of large models, on models of their kind that are as small as they can be."""

from dataclasses import replace

import pytest
import torch

from opdlab.lab.budget import SHAPES
from opdlab.lab.grid import PAPER
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.scales import FULL
from opdlab.training.config import Recipe

SCRIPT = "benchmarks/full_step.py"
LESS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
SCALE = replace(
    FULL,
    gpu_only=False,
    budget=replace(
        FULL.budget,
        recipes={name: Recipe(4, prompts=4, samples=1 if name == "sft" else 2) for name in FULL.budget.recipes},
        typical_tokens=(120, 20),
    ),
    compute=replace(FULL.compute, tokens_at_once=30),
)


@pytest.fixture(scope="module")
def large(script, tmp_path_factory):
    large = Laboratory(script.typical(SCALE), tmp_path_factory.mktemp("full"))
    for seed, (name, source) in enumerate((("base", "Qwen/Qwen3-1.7B"), ("teacher", "Qwen/Qwen3-8B"))):
        shape = SHAPES[source] | LESS | {"num_attention_heads": 4, "num_key_value_heads": 2}
        script.write_random_model(large.models / name, shape, seed, torch.device("cpu"))
    (large.models / "anchor").symlink_to(large.models / "base")
    return large


@pytest.mark.parametrize("arm", PAPER)
def test_every_arm_makes_a_step_of_models_like_the_large_ones(arm, script, large, tmp_path):
    found = script.one_step(large, arm, tmp_path)
    assert found["update norm"] > 0 and found["stable rank"] > 0 and found["seconds a step"] > 0
    assert found["planned GB"] > 0 and found["peak GB"] is None, "no GPU, no peak"
