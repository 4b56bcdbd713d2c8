"""What a run takes: memory, hours and disk, from shapes alone, so that a large model can be planned on a laptop.

Tests hold bytes and operations against a measured step of :mod:`opdlab.training.trainer`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import NamedTuple

import pandas as pd
import psutil
import torch
import transformers

from opdlab.errors import OpdlabError
from opdlab.lab.grid import PAPER
from opdlab.lab.laboratory import Laboratory
from opdlab.models.files import read_json
from opdlab.models.folders import new_model
from opdlab.processes import find_device

GB = 1e9


class Device(NamedTuple):
    """How fast a device works."""

    name: str
    flops: float  #: operations a second that passes over whole batches reach, not the data sheet's
    bandwidth: float  #: bytes a second at which weights are read; one new token for all rows reads them once
    launch: float  #: seconds per layer and new token that Python and the launch of kernels take at least
    half: bool  #: whether it computes in the scale's dtype, or in float32


#: An H100 makes 989e12 operations a second in bf16 at best, and as a rule 35 % of them in models of a billion
#: parameters; its other two numbers are guesses. The CPU is one core of a server without bf16, measured, and then of
#: one with it.
DEVICES = {
    "h100": Device("one H100", 0.35 * 989e12, 2.5e12, 0.5e-3, half=True),
    "cpu": Device("one CPU core", 40e9, 10e9, 0.3e-3, half=False),
    "cpu-bf16": Device("one CPU core with bfloat16", 105e9, 10e9, 0.3e-3, half=True),
}


def device_of(lab: Laboratory, gpu: bool) -> Device:
    """Return the device that a scale is computed on with or without a ``gpu``."""
    return DEVICES["h100" if gpu else "cpu" if lab.scale.compute.cpu_dtype == "float32" else "cpu-bf16"]


_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
#: The shapes of published models, from their configurations on the hub, so that a plan needs no network.
#:
#: :meta hide-value:
SHAPES = {
    name: dict(zip(_FIELDS, fields, strict=True))
    for name, *fields in (
        ("Qwen/Qwen3-0.6B", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, True),
        ("Qwen/Qwen3-1.7B", "qwen3", 2048, 6144, 28, 16, 8, 128, 151936, 40960, True),
        ("Qwen/Qwen3-8B", "qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, False),
        ("Qwen/Qwen3-32B", "qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 40960, False),
        ("smollm2", "llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, True),
    )
}


class Shape(NamedTuple):
    """The size of a model, or of none."""

    parameters: int = 0
    flops: int = 0  #: of a forward pass per token, a product and a sum per weight, attention itself left out
    layers: int = 0
    width: int = 0
    vocabulary: int = 0
    cache: int = 0  #: numbers that one token adds to the cache of keys and values


def shape_of(name: str, lab: Laboratory) -> Shape:
    """Return the shape of a scale's model, from its folder or its source; raises an OpdlabError if neither tells."""
    models, file = lab.scale.models, lab.models / name / "config.json"
    if file.is_file():
        return _measured(json.dumps(read_json(file)))
    if name in models.shapes:
        return _measured(new_model(models.shapes[name], 0).config.to_json_string())
    if name not in models.pretrained:
        return shape_of(lab.maker_of(name)[0].start, lab)
    known = SHAPES.get(models.pretrained[name].removesuffix("-Base"))
    if known is None:
        raise OpdlabError(f"the shape of {models.pretrained[name]!r} is not known: put its folder into {lab.models}")
    return _measured(json.dumps(known))


@cache
def _measured(config_text: str) -> Shape:
    config = transformers.AutoConfig.for_model(**json.loads(config_text)).get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # Embeddings are looked up and not multiplied, unless they are the output layer too.
    multiplied = model.num_parameters(exclude_embeddings=not config.tie_word_embeddings)
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    # Where heads do not share keys and values, or choose their width, the configuration has no word for it.
    head, cached_heads = (getattr(config, name, None) for name in ("head_dim", "num_key_value_heads"))
    cached = 2 * layers * (cached_heads or heads) * (head or width // heads)
    return Shape(model.num_parameters(), 2 * multiplied, layers, width, config.vocab_size, cached)


class Plan(NamedTuple):
    """What one run takes."""

    memory: dict[str, float]  #: bytes, by what for; "rollouts" are not there together with activations and logits
    peak: float  #: bytes at the peak of a step, when it writes or when it learns
    seconds: dict[str, float]  #: of one step on the device, by what for
    steps: int
    hours: float  #: of the whole run with its evaluations, without the measurement of its geometry
    disk: float  #: bytes that lie there at once, of snapshots, a checkpoint, and what projected runs branch off from
    stays: float  #: bytes of these once the run is recorded. All runs from one model share its start.


def plan_run(lab: Laboratory, name: str, device: Device) -> Plan:
    """Plan one run of an arm, with prompts and completions of the scale's typical lengths; raises as its parts do."""
    named, experiment = lab.arm(name), lab.experiment(name)
    recipe, compute, (prompt, new) = experiment.recipe, experiment.compute, lab.scale.budget.typical_tokens
    student = shape_of(named.start or name, lab)
    teacher = shape_of(named.teacher, lab) if named.teacher else Shape()
    reader = teacher if named.arm.reads_teacher else Shape()
    writer = {"task": Shape(), "teacher": teacher}.get(named.arm.rollouts_by, student)

    size = 2 if device.half and compute.dtype == "bfloat16" else 4  # bytes of a number that passes compute
    in_batch = min(max(1, compute.micro_batch // recipe.samples), recipe.prompts) * (prompt + recipe.samples * new)
    logits = min(max(compute.micro_batch, recipe.samples), recipe.completions) * (prompt + new)
    logits = min(compute.tokens_at_once, logits) if compute.tokens_at_once else in_batch
    # A layer keeps about 34 numbers per token and unit of width (2205.05198, Eq. 2, without dropout).
    kept = (student.layers + 34 if compute.recompute else 34 * student.layers) * student.width
    copy = size * student.parameters if size < 4 and writer is student else 0  # of the weights, to write with
    memory = {
        "rollouts": copy + float(size * writer.cache * recipe.completions * (prompt + new)),
        "weights, gradients, moments": 16.0 * student.parameters,
        "origin": 4.0 * student.parameters,
        "activations": float(size * kept * in_batch),
        # Logits, their softmax, and the gradients of both; the teacher's beside them.
        "logits": 4.0 * logits * (4 * student.vocabulary + 2 * reader.vocabulary),
        "teacher": float(size * teacher.parameters),
    }
    peak = sum(memory.values()) - min(memory["activations"] + memory["logits"], memory["rollouts"])

    def writing(model: Shape, rows: int) -> float:
        """Return the seconds of writing: a new token is bound by arithmetic, by reading weights, or by launching."""
        arithmetic, reading = model.flops * rows / device.flops, size * model.parameters / device.bandwidth
        return new * max(arithmetic, reading, model.layers * device.launch)

    packed = float(recipe.prompts * (prompt + recipe.samples * new))  # a prompt is read once for all its completions
    seconds = {
        "rollouts": writing(writer, recipe.completions),
        "student": (4 if compute.recompute else 3) * student.flops * packed / device.flops,
        "teacher": reader.flops * packed / device.flops,
        # Weights, gradients and both moments are read, and all but the gradients written.
        "optimizer": 28 * student.parameters / device.bandwidth,
    }
    count, samples = experiment.evaluation_prompts, experiment.evaluation_samples
    evaluating = (student.flops + teacher.flops) * count * (prompt + samples * new) / device.flops
    evaluating += writing(student, count) + writing(student, count * samples)
    hours = (recipe.steps * sum(seconds.values()) + (1 + len(experiment.evaluations)) * evaluating) / 3600

    states = 1 + len(lab.branch_steps(name))  # of weights and both moments
    disk = 4.0 * student.parameters * (len(experiment.snapshots) + 1 + 3 * states)
    stays = 4.0 * student.parameters * (len(lab.kept_steps(name)) - 1)
    return Plan(memory, peak, seconds, recipe.steps, hours, disk, stays)


def plan_table(lab: Laboratory, arms: tuple[str, ...], device: Device) -> pd.DataFrame:
    """Return the plans of some arms, one row each: memory, steps, hours, disk and what stays on it."""
    plans = pd.DataFrame([plan_run(lab, arm, device) for arm in arms])
    table = {"arm": arms, "memory (GB)": plans["peak"] / GB, "steps": plans["steps"], "hours": plans["hours"]}
    return pd.DataFrame(table | {"disk (GB)": plans["disk"] / GB, "stays (GB)": plans["stays"] / GB})


def check_room(lab: Laboratory, *arms: str) -> None:
    """Raise an OpdlabError if a scale needs a device, or a run of an arm memory, that is not there."""
    scale, device = lab.scale, find_device(lab.scale.compute.gpu)
    if scale.gpu_only and device.type == "cpu":
        raise OpdlabError(
            f"the scale {scale.name!r} needs a GPU, and there is none here: use --scale small or tiny; 'opdlab plan "
            f"--scale {scale.name}' says how much memory it needs"
        )
    scale.compute.dtype_on(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    for arm in arms:
        needed = plan_run(lab, arm, device_of(lab, device.type != "cpu")).peak
        if needed > free:
            raise OpdlabError(
                f"arm {arm!r} at {scale.name} needs about {needed / GB:.1f} GB, and {free / GB:.1f} GB are free: end "
                f"other programs, or choose a smaller scale; 'opdlab plan --scale {scale.name}' says what for"
            )


def processes_for(lab: Laboratory) -> int:
    """Return how many runs of a scale go side by side here: one on a GPU, or as many as cores and memory allow."""
    if find_device(lab.scale.compute.gpu).type != "cpu":
        return 1
    largest = max(plan_run(lab, arm, device_of(lab, gpu=False)).peak for arm in PAPER if arm in lab.arms)
    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available // largest)))
