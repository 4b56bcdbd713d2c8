"""Planning: what a run will take, from shapes alone: memory, arithmetic, hours and disk.

Nothing is loaded and nothing is run, so the plan of a large model can be made on a laptop. The counts of bytes and of
operations follow from the loop (:mod:`opdlab.training.trainer`); how fast a device makes them is one line per device
(:data:`DEVICES`). ``tests/lab/test_planning.py`` holds the counts against a measured step.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
import transformers

from opdlab.errors import OpdlabError
from opdlab.lab.grid import PAPER, Arm, get_arm
from opdlab.lab.scales import Recipe, Scale
from opdlab.processes import find_device
from opdlab.training.store import Home, kept_steps, partings

GB = 1e9


@dataclass(frozen=True)
class Device:
    """How fast a device works.

    Attributes:
        name: of the device.
        flops: floating-point operations per second that passes over whole batches reach, not the data sheet's.
        bandwidth: bytes per second at which weights are read; one new token for all rows reads them once.
        launch: seconds per layer and new token that Python and the launch of kernels take at least.
        half: whether it computes in the scale's dtype; otherwise in float32.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float
    half: bool


#: An H100 makes 989e12 operations per second in bf16 at best, and 35 % of them in models of a billion parameters, as a
#: rule; its other two numbers are guesses. The CPU is one core of a server without bf16, measured.
DEVICES = {
    "h100": Device("one H100", 0.35 * 989e12, 2.5e12, 0.5e-3, half=True),
    "cpu": Device("one CPU core", 40e9, 10e9, 0.3e-3, half=False),
}

_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960}


def _qwen3(width: int, middle: int, layers: int, heads: int, tied: bool) -> dict:
    return _QWEN3 | {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


#: The shapes of published models, from their configurations on the hub, so that a plan needs no network.
#:
#: :meta hide-value:
SHAPES = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, False),
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        parameters: of all its weights.
        embedded: those of the token embedding, which is looked up and not multiplied, unless it is the output layer.
        layers: of the transformer.
        width: of its hidden states.
        vocabulary: tokens that it knows.
        cache: numbers that one token adds to the cache of keys and values.
    """

    parameters: int
    embedded: int
    layers: int
    width: int
    vocabulary: int
    cache: int

    @property
    def flops(self) -> int:
        """The operations of a forward pass per token, a product and a sum per weight; attention itself is left out."""
        return 2 * (self.parameters - self.embedded)


def new_config(shape: dict) -> transformers.PreTrainedConfig:
    """Return the configuration of a published shape, one of the values of :data:`SHAPES`."""
    fields = dict(shape)
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


@cache
def _measured(config_text: str) -> Shape:
    config = transformers.AutoConfig.for_model(**json.loads(config_text))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        embedded=0 if config.tie_word_embeddings else embedding.numel(),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        cache=2 * config.num_hidden_layers * config.num_key_value_heads * heads,
    )


def shape_of(name: str, scale: Scale, home: Home) -> Shape:
    """Return the shape of a model of a scale, from its folder, or from what it is fetched or made from.

    Raises:
        OpdlabError: if nothing tells.
    """
    folder = home.models(scale) / name
    if (folder / "config.json").is_file():
        return _measured(json.dumps(json.loads((folder / "config.json").read_text())))
    if name in scale.shapes:
        from opdlab.models.folders import new_model  # What the lab builds itself is small.

        return _measured(json.dumps(new_model(scale.shapes[name], 0).config.to_dict()))
    if name not in scale.pretrained:
        return shape_of(scale.maker_of(name).start, scale, home)
    source = scale.pretrained[name]
    known = SHAPES.get(source.removesuffix("-Base"))
    if known is None:
        raise OpdlabError(f"the shape of {source!r} is not known: put its folder into {folder.parent}")
    return _measured(json.dumps(known))


@dataclass(frozen=True)
class Plan:
    """What one run takes: bytes, operations, seconds.

    Attributes:
        arm: which.
        memory: bytes, by what for; "rollouts" and the two of the passes are not there together.
        flops: operations of one step, by what for.
        seconds: of one step on the device, by what for.
        steps: in the run.
        evaluations: how many times accuracy is measured, and the seconds of one.
        disk: bytes that lie there at once: snapshots, a checkpoint, and what projected runs go on from.
        stays: bytes of these that are there when the run is recorded. All runs from one model share its start.
    """

    arm: str
    memory: dict[str, float]
    flops: dict[str, float]
    seconds: dict[str, float]
    steps: int
    evaluations: tuple[int, float]
    disk: float
    stays: float

    @property
    def peak(self) -> float:
        """The bytes at the peak of a step, when it writes or when it learns."""
        passing = self.memory["activations"] + self.memory["logits"]
        rollouts = self.memory["rollouts"]
        return sum(self.memory.values()) - passing - rollouts + max(passing, rollouts)

    @property
    def hours(self) -> float:
        """The hours of the whole run, without the measurement of its geometry."""
        return (self.steps * sum(self.seconds.values()) + self.evaluations[0] * self.evaluations[1]) / 3600


def plan_run(scale: Scale, arm_name: str, home: Home, device: Device) -> Plan:
    """Plan one run, with prompts and completions of the scale's typical lengths.

    Args:
        scale: at which scale.
        arm_name: of which arm.
        home: where its models may lie already, whose shapes are then taken from there.
        device: what it would run on, one of :data:`DEVICES`.

    Raises:
        OpdlabError: if there is no such arm, or a shape is not known.
    """
    arm, recipe, (prompt_tokens, new_tokens) = get_arm(arm_name), scale.recipe(arm_name), scale.typical_tokens
    student = shape_of(arm.start or arm.name, scale, home)
    teacher = shape_of(arm.teacher, scale, home) if arm.teacher else None
    writes = {"task": None, "teacher": teacher}.get(arm.sequences, student)
    width = 2 if device.half and scale.compute == "bfloat16" else 4  # bytes of what passes compute in
    per_prompt = prompt_tokens + recipe.samples * new_tokens  # each prompt is read once for all its completions
    packed, written = recipe.prompts * per_prompt, recipe.sequences * new_tokens

    flops = {"student": (8 if scale.recompute else 6) / 2 * student.flops * packed}
    seconds = {"student": flops["student"] / device.flops}
    if writes:
        flops["rollouts"] = writes.flops * (written + recipe.prompts * prompt_tokens)
        seconds["rollouts"] = _generation(writes, recipe.sequences, new_tokens, width, device)
    if teacher and arm.listens_to_teacher:
        flops["teacher"] = teacher.flops * packed
        seconds["teacher"] = flops["teacher"] / device.flops
    # Weights, gradients and both moments are read, and all but the gradients written.
    seconds["optimizer"] = 28 * student.parameters / device.bandwidth

    count = scale.evaluation_prompts
    read = (student.flops + (teacher.flops if teacher else 0)) * count * (prompt_tokens + new_tokens)
    evaluation = 2 * _generation(student, count, new_tokens, width, device)
    evaluation += read / device.flops
    snapshots = scale.steps_at(arm_name, scale.snapshots_of(arm_name))
    states = 3 * len(partings(arm_name, scale))  # weights and both moments
    return Plan(
        arm=arm_name,
        memory=_memory(scale, recipe, arm, student, teacher, width, per_prompt, prompt_tokens + new_tokens),
        flops=flops,
        seconds=seconds,
        steps=recipe.steps,
        evaluations=(1 + len(scale.evaluations_of(arm_name)), evaluation),
        disk=4.0 * student.parameters * (len(snapshots) + 1 + 3 + states),
        stays=4.0 * student.parameters * (len(kept_steps(arm_name, scale)) - 1),
    )


def _generation(model: Shape, rows: int, new_tokens: int, width: int, device: Device) -> float:
    """Return the seconds of writing: each new token is bound by arithmetic, by reading weights, or by launching."""
    arithmetic = model.flops * rows / device.flops
    return new_tokens * max(arithmetic, width * model.parameters / device.bandwidth, model.layers * device.launch)


def _memory(
    scale: Scale,
    recipe: Recipe,
    arm: Arm,
    student: Shape,
    teacher: Shape | None,
    width: int,
    per_prompt: int,
    length: int,
) -> dict[str, float]:
    """Return the bytes at the peak of a step, by what for."""
    rows = max(1, scale.micro_batch // recipe.samples)
    in_batch = min(rows, recipe.prompts) * per_prompt
    completions = min(max(scale.micro_batch, recipe.samples), recipe.sequences)
    at_once = min(scale.tokens_at_once, completions * length) if scale.tokens_at_once else in_batch
    # A layer keeps about 34 numbers per token and unit of width (2205.05198, Eq. 2, without dropout).
    kept = (student.layers + 34 if scale.recompute else 34 * student.layers) * student.width
    memory = {
        "rollouts": 0.0,
        "weights, gradients, moments": 16.0 * student.parameters,
        "origin": 4.0 * student.parameters,
        "activations": float(width * kept * in_batch),
        # Logits, their softmax, and the gradients of both; the teacher's beside them.
        "logits": 4.0 * student.vocabulary * at_once * (4 + 2 * arm.listens_to_teacher),
    }
    if teacher:
        memory["teacher"] = float(width * teacher.parameters)
    if arm.sequences != "task":
        writer = teacher if teacher and arm.sequences == "teacher" else student
        copy = width * student.parameters if width < 4 and writer is student else 0
        memory["rollouts"] = copy + float(width * writer.cache * recipe.sequences * length)
    return memory


def plan_table(scale: Scale, home: Home, arms: tuple[str, ...], device: Device) -> pd.DataFrame:
    """Return the plans of some arms, one row each: memory, disk (and what stays on it), operations of a step, hours.

    Args:
        scale: at which scale.
        home: as for :func:`plan_run`.
        arms: of which arms.
        device: what they would run on.
    """
    rows = []
    for arm in arms:
        plan = plan_run(scale, arm, home, device)
        rows.append(
            {
                "arm": arm,
                "memory (GB)": plan.peak / GB,
                "of which": max(plan.memory, key=plan.memory.__getitem__),
                "TFLOP a step": sum(plan.flops.values()) / 1e12,
                "seconds a step": sum(plan.seconds.values()),
                "steps": plan.steps,
                "hours": plan.hours,
                "disk (GB)": plan.disk / GB,
                "stays (GB)": plan.stays / GB,
            }
        )
    return pd.DataFrame(rows)


def check_device(scale: Scale, home: Home) -> None:
    """Refuse a scale that this machine is not for, before anything is fetched.

    Raises:
        OpdlabError: if the scale needs a GPU and there is none.
    """
    if scale.gpu_only and find_device(scale.gpu).type == "cpu":
        needed = max(plan_run(scale, arm, home, DEVICES["h100"]).peak for arm in scale.recorded)
        raise OpdlabError(
            f"the scale {scale.name!r} needs a GPU with about {needed / GB:.0f} GB, and there is none here: use "
            f"--scale small or tiny; 'opdlab plan --scale {scale.name}' says what a run takes"
        )


def check_room(scale: Scale, arm: str, home: Home) -> None:
    """Refuse a run that will not fit, before anything is loaded.

    Raises:
        OpdlabError: as :func:`check_device`, or if the run needs more memory than the device has.
    """
    check_device(scale, home)
    device = find_device(scale.gpu)
    needed = plan_run(scale, arm, home, DEVICES["cpu" if device.type == "cpu" else "h100"]).peak
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if needed > free:
        raise OpdlabError(
            f"arm {arm!r} at {scale.name} needs about {needed / GB:.1f} GB, and {free / GB:.1f} GB are free: end other "
            f"programs, or choose a smaller scale; 'opdlab plan --scale {scale.name}' says what for"
        )


def processes_for(scale: Scale, home: Home) -> int:
    """Return how many runs of a scale go side by side here: one on a GPU, or as many as cores and memory allow."""
    if find_device(scale.gpu).type != "cpu":
        return 1
    largest = max(plan_run(scale, arm, home, DEVICES["cpu"]).peak for arm in PAPER)
    return max(1, min(os.cpu_count() or 1, int(_free_memory() // largest) if largest else 1))


def _free_memory() -> float:
    """Return the bytes that are free for a program, as Linux tells it; elsewhere no limit is known."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return 1e18
