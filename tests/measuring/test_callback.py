"""The callback logs what the functions say, where the trainer logs, and refuses what it cannot measure."""

import pytest
import torch
from conftest import SMALL_SHAPE
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from opdlab import geometry as g
from opdlab.errors import OpdlabError
from opdlab.measuring.callback import GeometryCallback
from opdlab.measuring.sources import find_trajectory
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.files import load_tensors
from opdlab.models.folders import new_model


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a small model on sequences that mean nothing."""
    tokens = torch.randint(0, 10, (16, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_steps": 2}
    args = TrainingArguments(tmp_path, max_steps=5, per_device_train_batch_size=4, learning_rate=1e-3, **options)
    return Trainer(new_model(SMALL_SHAPE, 0), args=args, train_dataset=data)


def geometry(trainer):
    return [entry for entry in trainer.state.log_history if "geometry/stable_rank" in entry]


def test_it_logs_what_the_functions_say(trainer):
    origin = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.add_callback(GeometryCallback(trainer, every=2, k=4))
    trainer.train()
    logged = geometry(trainer)
    assert [entry["step"] for entry in logged] == [2, 4, 5], "every second step, and the last"
    assert "geometry/sim_right_K4" not in logged[0], "there is no measurement before the first"
    names = [
        name for name in origin if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
    ]
    now = dict(trainer.model.named_parameters())
    expected = {
        "stable_rank": [g.stable_rank(now[name].double() - origin[name].double()) for name in names],
        "relative_norm": [g.relative_norm(origin[name], now[name]) for name in names],
        "sparsity": [g.bf16_sparsity(origin[name], now[name]) for name in names],
        "sparsity_ruler": [g.noise_sparsity(origin[name], g.relative_norm(origin[name], now[name])) for name in names],
    }
    for key, values in expected.items():
        assert logged[-1][f"geometry/{key}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert 0.2 < logged[-1]["geometry/sim_right_K4"] <= 1 and 0.2 < logged[-1]["geometry/sim_left_K4"] <= 1
    assert logged[-1]["geometry/seconds"] > 0


def test_the_trainer_goes_on_logging_its_loss(trainer):
    trainer.args.logging_strategy, trainer.args.logging_steps = "steps", 2
    trainer.add_callback(GeometryCallback(trainer, every=2, k=4))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    assert [entry["step"] for entry in geometry(trainer)] == [2, 4, 5]


def test_a_matrix_that_has_not_moved_has_no_direction(trainer):
    trainer.args.learning_rate = 0.0
    trainer.add_callback(GeometryCallback(trainer, every=2, k=4, matrices="mlp"))
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "geometry/seconds" in entry][-1]
    assert entry["geometry/sparsity"] == 1 and entry["geometry/relative_norm"] == 0
    assert "geometry/stable_rank" not in entry and "geometry/sim_right_K4" not in entry


class Stop(TrainerCallback):
    """Ends training early."""

    def on_step_end(self, args, state, control, **_):
        """Stop after three steps."""
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("patience", [None, 1])
def test_the_last_step_is_measured_before_the_best_weights_are_put_back(trainer, tmp_path, patience):
    """A growing loss is sought, at a large learning rate, so that the best weights are early ones."""
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 5, "learning_rate": 3e-3}
    options |= {"eval_strategy": "epoch", "save_strategy": "epoch", "per_device_train_batch_size": 16}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    args, data = TrainingArguments(tmp_path / "best", **options), trainer.train_dataset
    origin = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer = Trainer(trainer.model, args=args, train_dataset=data, eval_dataset=data)
    trainer.add_callback(GeometryCallback(trainer, every=9, k=4, matrices="q_proj"))
    if patience:
        trainer.add_callback(EarlyStoppingCallback(patience))
    trainer.train()
    (entry,), end = geometry(trainer), trainer.state.global_step
    assert entry["step"] == end == (2 if patience else 5) and trainer.state.best_model_checkpoint.endswith("-1")
    last = open_checkpoint(tmp_path / "best" / f"checkpoint-{end}")
    sizes = [g.relative_norm(origin[name], last.read(name)) for name in origin if "q_proj" in name]
    assert entry["geometry/relative_norm"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-6)


def test_a_training_that_diverges_is_named_by_its_step(trainer):
    class Break(TrainerCallback):
        """Breaks a weight."""

        def on_step_end(self, args, state, control, model, **_):
            """Break it at the second step."""
            if state.global_step == 2:
                model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")

    trainer.add_callback(Break())
    trainer.add_callback(GeometryCallback(trainer, every=3, k=4))
    with pytest.raises(OpdlabError, match=r"^at step 3 .*k_proj.weight has .* NaN .*lower its learning rate$"):
        trainer.train()


def test_snapshots_after_the_end_are_said_at_the_start(trainer, tmp_path):
    trainer.add_callback(GeometryCallback(trainer, k=4, snapshots=tmp_path / "s", snapshot_steps=[2, 9, 7]))
    with pytest.warns(UserWarning, match=r"ends at step 5, so there will be no snapshots of .* \[7, 9\]"):
        trainer.train()
    assert [path.name for path in find_trajectory(tmp_path / "s")] == ["step-000002.safetensors"]


def test_snapshots_are_whole_and_can_be_measured(trainer, tmp_path):
    snapshots = tmp_path / "snapshots"
    trainer.add_callback(GeometryCallback(trainer, every=5, k=4, snapshots=snapshots, snapshot_steps=[2, 5]))
    trainer.train()
    assert [path.name for path in find_trajectory(snapshots)] == ["step-000002.safetensors", "step-000005.safetensors"]
    last = load_tensors(snapshots / "step-000005.safetensors")[0]
    weights = dict(trainer.model.named_parameters())
    assert last.keys() == weights.keys() and all(last[name].equal(weight) for name, weight in weights.items())


def test_training_that_stops_early_or_freezes(trainer):
    trainer.add_callback(GeometryCallback(trainer, every=2, k=4))
    trainer.add_callback(Stop())
    for weight in trainer.model.model.layers[0].parameters():
        weight.requires_grad_(False)
    trainer.train()
    assert [entry["step"] for entry in geometry(trainer)] == [2, 3]


def test_adapters_are_not_weights(trainer):
    layer = trainer.model.model.layers[0].self_attn.q_proj
    trainer.model.requires_grad_(False)
    layer.lora_A = torch.nn.Linear(16, 4)
    trainer.add_callback(GeometryCallback(trainer, k=4))
    with pytest.raises(OpdlabError, match="an adapter is measured once it is saved"):
        trainer.train()


def test_what_it_refuses(trainer):
    for options, message in (
        ({"every": 0}, "every is 0, k 16 and snapshot_steps"),
        ({"every": 2.5}, "every is 2.5, k 16 and snapshot_steps"),
        ({"matrices": "nothing"}, "no trained matrix has a name with 'nothing'"),
        ({"k": 16}, "k is 16, more than a side of model.layers.0.self_attn.k_proj.weight"),
    ):
        with pytest.raises(OpdlabError, match=message):
            trainer.add_callback(GeometryCallback(trainer, **options))
            trainer.train()
        trainer.remove_callback(GeometryCallback)
    with pytest.raises(OpdlabError, match="trainer is a NoneType; expected transformers' Trainer"):
        GeometryCallback(None)
    for options, message in (
        ({"snapshots": "here", "snapshot_steps": [2, 0]}, r"snapshot_steps \[2, 0\]: give whole numbers from 1"),
        ({"snapshots": "here", "snapshot_steps": [2.5]}, r"snapshot_steps \[2.5\]"),
        ({"snapshots": "here", "snapshot_steps": "all"}, "snapshot_steps all"),
        ({"snapshots": "here", "snapshot_steps": 5}, "snapshot_steps 5"),
        ({"snapshots": "here"}, "give a folder and steps, or neither"),
        ({"snapshot_steps": [5]}, "give a folder and steps, or neither"),
    ):
        with pytest.raises(OpdlabError, match=message):
            GeometryCallback(trainer, **options)


def test_a_resumed_run_goes_on_unmeasured(trainer, tmp_path):
    """As one that a queue starts again: its first weights are gone, and its snapshots are as good as before."""
    trainer.train()
    snapshots = str(tmp_path / "snapshots")
    trainer.add_callback(GeometryCallback(trainer, k=4, snapshots=snapshots, snapshot_steps=range(1, 9)))
    trainer.args.max_steps = 6
    with pytest.warns(UserWarning, match="resumes at step 5.*measure BASE --trajectory DIR"):
        trainer.train(resume_from_checkpoint=True)
    assert not geometry(trainer)
    assert [path.name for path in find_trajectory(tmp_path / "snapshots")] == ["step-000006.safetensors"]


def test_weights_in_parts_are_refused_by_name(trainer):
    """What DeepSpeed and FSDP1 leave in a process: parameters that are empty, or flat."""
    for weight in trainer.model.parameters():
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    with pytest.raises(OpdlabError, match=r"ZeRO-3 of DeepSpeed, .* leaves .*embed_tokens.weight.*train with ZeRO-2"):
        begin(trainer, trainer.model)
    flat = torch.nn.Module()
    flat._fsdp_wrapped_module = torch.nn.Linear(4, 4)
    with pytest.raises(OpdlabError, match=r"FSDP1, leaves .* of weight.*fsdp_version 2"):
        begin(trainer, flat)


def begin(trainer, model, **options):
    callback = GeometryCallback(trainer, **{"k": 4} | options)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    return callback


def test_without_float64_on_the_device_the_cpu_computes(trainer, monkeypatch):
    """Emulates MPS: a weight that is there has no float64, and so has what is copied there."""
    callback = begin(trainer, trainer.model, matrices="q_proj")
    name, weight = next(callback._weights(trainer.model))
    expected = callback._measure(name, weight + 1)
    found = callback._measure(name, (weight + 1).as_subclass(OnMps))
    assert expected["relative_norm"] == found["relative_norm"] > 0


class OnMps(torch.Tensor):
    """A tensor that says it is on MPS, where there is no float64."""

    @property
    def device(self):
        """Apple's GPU."""
        return torch.device("mps")

    def cpu(self):
        """Leave it."""
        return self.as_subclass(torch.Tensor)

    def double(self):
        """Fail as MPS does."""
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


def test_weights_in_parts_are_put_together(trainer, tmp_path):
    """As FSDP2 leaves them, but here the only process has all parts."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), trainer.model
        whole = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
        model.tie_weights()
        callback = begin(trainer, model, matrices="q_proj|mlp", snapshots=tmp_path, snapshot_steps=[3])
        assert all(
            type(weight) is torch.Tensor and weight.equal(whole[name]) for name, weight in callback._weights(model)
        )
        trainer.state.global_step = 3
        callback._snapshot(trainer.state, model)
        found = load_tensors(tmp_path / "step-000003.safetensors")[0]
        assert found.keys() == whole.keys() and all(found[name].equal(weight) for name, weight in whole.items())
    finally:
        distributed.destroy_process_group()
