"""Plans against what is known of the published models, and against measured steps."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab import budget
from opdlab.lab.budget import DEVICES, check_room, plan_run, plan_table, shape_of
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import read_index
from opdlab.lab.scales import FULL, SCALES
from opdlab.training.rollouts import micro_batches
from opdlab.training.trainer import Trainer


def test_published_models_have_their_published_sizes(tmp_path):
    found = {}
    for scale in ("full", "full-0.6b", "paper"):
        lab = Laboratory.at(scale, tmp_path)
        for name, source in lab.scale.models.pretrained.items():
            found[source.removesuffix("-Base")] = shape_of(name, lab).parameters
    found["smollm2"] = shape_of("base", Laboratory.at("small", tmp_path)).parameters
    assert found == {
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-32B": 32_762_123_264,
        "smollm2": 134_515_008,
    }


@pytest.mark.parametrize(
    ("kind", "options", "cache"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, 2 * 2 * 32),
        ("GPTNeoX", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, 2 * 2 * 32),
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, 2 * 2 * 32),
        (
            "Mistral",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            64,
        ),
    ],
)
def test_any_configuration_has_a_plan(kind, options, cache, tmp_path):
    config = getattr(transformers, f"{kind}Config")(vocab_size=48, **options)
    own = Laboratory.at("tiny", tmp_path)
    config.save_pretrained(own.models / "base")
    shape = shape_of("base", own)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert (shape.layers, shape.width, shape.vocabulary, shape.cache) == (2, 32, 48, cache)


@pytest.fixture
def trainer(lab):
    return Trainer(lab.experiment("opd_full"))


def as_measured(lab, rollouts):
    """Return the laboratory with the lengths that a batch has."""
    prompt = sum(map(len, rollouts.prompts)) / len(rollouts.prompts)
    lengths = (prompt, rollouts.tokens / len(rollouts.completions))
    return replace(lab, scale=replace(lab.scale, budget=replace(lab.scale.budget, typical_tokens=lengths)))


def test_the_arithmetic_of_a_step_is_as_planned(trainer, lab):
    rollouts, _ = trainer.batch(0)
    trainer.batch = lambda step: (rollouts, None)
    with FlopCounterMode(display=False) as counter:
        trainer.step(0)
    plan = plan_run(as_measured(lab, rollouts), "opd_full", DEVICES["cpu"])
    planned = (plan.seconds["student"] + plan.seconds["teacher"]) * DEVICES["cpu"].flops
    # Padding and attention are left out of the plan.
    assert planned < counter.get_total_flops() < 1.5 * planned


def test_the_memory_of_a_step_is_as_planned(trainer, lab):
    rollouts, _ = trainer.batch(0)
    trainer.batch = lambda step: (rollouts, None)
    trainer.step(0)
    plan = plan_run(as_measured(lab, rollouts), "opd_full", DEVICES["cpu"])

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    weights = list(trainer.student.parameters())
    fixed = size(weights) + size(weight.grad for weight in weights)
    fixed += size(value for state in trainer.optimizers[0].state.values() for value in state.values() if value.dim())
    assert plan.memory["weights, gradients, moments"] == fixed
    assert plan.memory["origin"] == size(trainer.origin.values())
    assert plan.memory["teacher"] == size(trainer.teacher.parameters())

    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    part = next(micro_batches(rollouts, lab.scale.compute.micro_batch, torch.device("cpu")))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = trainer.read(part, rollouts.tokens, torch.Generator())
    passing = sum(kept.values()) - size(weights)
    planned = plan.memory["activations"] + plan.memory["logits"]
    assert 0.5 * planned < passing < 2 * planned
    assert losses


def test_a_recorded_run_took_about_as_long_as_planned():
    """On one CPU core: what plans reckon with was not taken from these runs."""
    lab = Laboratory.at("tiny-learning")
    index = read_index(lab.records).query("seed == 0 and device == 'cpu'").set_index("arm")
    assert set(index.index) == set(lab.scale.policy.arms)
    for arm in lab.scale.policy.arms:
        plan = plan_run(lab, arm, DEVICES["cpu"])
        assert 0.5 < plan.steps * sum(plan.seconds.values()) / index.loc[arm, "seconds"] < 2


def test_each_sample_of_an_evaluation_takes_as_long(tmp_path):
    tiny = Laboratory.at("tiny", tmp_path)

    def hours(samples):
        budget = replace(tiny.scale.budget, evaluation_samples=samples)
        return plan_run(replace(tiny, scale=replace(tiny.scale, budget=budget)), "opd", DEVICES["cpu"]).hours

    assert hours(9) - hours(5) == pytest.approx(hours(5) - hours(1)) and hours(5) > hours(1)


def test_logits_in_pieces_hold_memory_down(tmp_path):
    whole = replace(FULL, compute=replace(FULL.compute, tokens_at_once=0))
    pieces, at_once = (plan_run(Laboratory(scale, tmp_path), "opd_full", DEVICES["h100"]) for scale in (FULL, whole))
    assert pieces.memory["logits"] < 0.9 * at_once.memory["logits"]
    assert pieces.peak < 80e9


def test_a_table_of_plans_says_what_each_plan_says(tmp_path):
    full = Laboratory.at("full", tmp_path)
    table = plan_table(full, ("opd", "rlvr"), DEVICES["h100"]).set_index("arm")
    for arm in ("opd", "rlvr"):
        plan = plan_run(full, arm, DEVICES["h100"])
        assert table.loc[arm, ["memory (GB)", "hours"]].tolist() == [plan.peak / 1e9, plan.hours]
        assert plan.stays <= plan.disk


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_can_be_planned(scale, tmp_path, capsys):
    assert main(["plan", "--scale", scale, "--home", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "hours for a seed of each" in out and "opd" in out and "nan" not in out


def test_who_reads_a_plan_may_leave_halfway():
    command = [sys.executable, "-m", "opdlab.cli", "plan", "--scale", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OpdlabError, match=r"scale 'full' needs a GPU.*use --scale small or tiny"):
        check_room(Laboratory.at("full", tmp_path), "opd")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2e9))
    with pytest.raises(OpdlabError, match=r"arm 'opd' at small needs about \d\.\d GB, and 2.0 GB are free"):
        check_room(Laboratory.at("small", tmp_path).on_this_machine(), "opd")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e3))
    assert main(["train", "--arm", "opd", "--seed", "99", "--scale", "tiny"]) == 2
    assert "choose a smaller scale" in capsys.readouterr().err


def test_a_shape_that_nothing_tells(tmp_path):
    fetched = {"base": "someone/model", "teacher": "Qwen/Qwen3-8B"}
    unknown = replace(FULL, models=replace(FULL.models, pretrained=fetched))
    with pytest.raises(OpdlabError, match="shape of 'someone/model' is not known"):
        shape_of("base", Laboratory(unknown, tmp_path))


def test_how_many_runs_go_side_by_side(tmp_path, monkeypatch):
    small = Laboratory.at("small", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for free, expected in ((1e12, 4), (11e9, 2), (1e9, 1)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert budget.processes_for(small) == expected
    monkeypatch.setattr(budget, "find_device", lambda gpu: torch.device("cuda"))
    assert budget.processes_for(small) == 1
