"""What ol.measure does: one set of numbers for an update, whatever form its weights have; and what it returns."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pair_table, path_table
from matplotlib.figure import Figure
from safetensors.torch import save_file

import opdlab as ol
from opdlab import geometry as g
from opdlab.errors import OpdlabError
from opdlab.geometry.summary import means
from opdlab.lab.records import read_tables
from opdlab.measuring.compare import compare
from opdlab.measuring.tensors import Job, measured
from opdlab.measuring.update import load_update, measure
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.folders import load_model

DATA = Path(__file__).resolve().parents[2] / "data"
LAYERS = ("attention", "mlp")


def weights_of(path, dtype=None):
    opened = open_checkpoint(path)
    return {name: opened.read(name).to(dtype) for name in opened.pieces}


@pytest.fixture(scope="module")
def anchor():
    """The update from the toy model's base to its anchor, measured with nothing but their folders."""
    return measure(DATA / "models/tiny-learning/base", DATA / "models/tiny-learning/anchor")


def test_the_toy_model_has_the_resolution_of_its_records():
    shapes = [(128, 128), (128, 384), (384, 128)]
    assert {g.Resolution.of(shape) for shape in shapes} == {
        g.Resolution(k=16, sim_ks=(4, 8, 16), mask_rank=16, alphas=(0.3, 0.5), angle_ks=(4, 8), matched_norm=0.002)
    }


def test_measure_finds_the_record_to_the_last_digit(anchor):
    """The matched principal overlap is 0.1593 here and there, where the command line once said 0.1330."""
    recorded = read_tables(DATA / "records/tiny-learning/sft")["matrices"]
    record = recorded[recorded["seed"] == 0].drop(columns=["arm", "seed"]).reset_index(drop=True)
    assert round(record["principal_overlap_a30_matched"].mean(), 4) == 0.1593
    written = io.StringIO(anchor.table.to_csv(index=False, float_format="%.7g"))
    found = pd.read_csv(written).set_index("matrix").loc[record["matrix"]].reset_index()
    assert len(record.columns) > 90 and set(record) <= set(found)
    pd.testing.assert_frame_equal(found[list(record)], record, check_exact=True, check_dtype=False)


def test_every_row_says_with_which_resolution(anchor):
    rows = anchor.table.dropna(subset="k")
    assert len(rows) == 21 and (rows["matched_norm"] == 0.002).all()
    expected = [g.Resolution.of(shape) for shape in rows[["rows", "cols"]].to_numpy()]
    assert rows["k"].tolist() == [resolution.k for resolution in expected]
    assert rows["mask_rank"].tolist() == [resolution.mask_rank for resolution in expected]


def tables_of(w0s, path, **options):
    steps, ends = zip(*path, strict=True)
    with measured(Job(w0s, ends, steps, **options), processes=1) as tables:
        return tables


def test_the_program_gives_the_numbers_of_the_functions(pair):
    w0s, w1s = (weights_of(path, torch.float32) for path in pair)
    halfway = {name: (w0s[name] + w1s[name]) / 2 for name in w0s}
    path = [(3, halfway), (8, w1s)]
    table, trajectory = tables_of(w0s, path, seed=4, blocks=LAYERS, trajectory_blocks=("attention",))
    pd.testing.assert_frame_equal(table, pair_table(w0s, w1s, seed=4), check_exact=True)
    whole = path_table(w0s, path, seed=4)
    attention = whole[whole["block"] == "attention"].reset_index(drop=True)
    pd.testing.assert_frame_equal(trajectory, attention, check_exact=True, check_like=True)
    _, alone = tables_of(w0s, [(8, w1s)], blocks=LAYERS, trajectory_blocks=LAYERS)
    assert set(alone["step"]) == {8} and len(alone) == 14


def test_an_update_is_the_same_in_every_form(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = measure(*pair).table
    w0s, w1s = map(weights_of, pair)
    save_file(w1s, tmp_path / "tuned.safetensors")
    model = load_model(pair[1], dtype=torch.bfloat16)
    for base, tuned in ((pair[0], w1s), (w0s, w1s), (str(pair[0]), "tuned.safetensors"), (w0s, model)):
        pd.testing.assert_frame_equal(measure(base, tuned).table, expected, check_exact=True)
    # A state dict lists both ends of tied embeddings.
    pd.testing.assert_frame_equal(measure(pair[0], model.state_dict()).table, expected, check_exact=True)
    assert os.listdir(tmp_path) == ["tuned.safetensors"], "nothing is written unless it is asked for"
    assert measure(w0s, model).title.endswith("to the Qwen3ForCausalLM in memory (bfloat16)")


def test_fused_projections_in_memory_are_split(pair):
    """By the module's own configuration, or that of the base."""
    w0s, w1s = (weights_of(path, torch.float32) for path in pair)

    class Model(torch.nn.Module):
        """A model that has gate and up in one matrix."""

        def __init__(self, weights):
            super().__init__()
            self.mlp = torch.nn.Module()
            parts = [weights[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            self.mlp.gate_up_proj = torch.nn.Linear(16, 48, bias=False)
            self.mlp.gate_up_proj.weight.data = torch.cat(parts)

    table = measure(*(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Model(ws)])}) for ws in (w0s, w1s))).table
    assert table["matrix"].tolist() == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    name = "model.layers.0.mlp.up_proj.weight"
    assert table["stable_rank"].iloc[1] == g.stable_rank(w1s[name].double() - w0s[name].double())


def test_an_adapter_on_weights_in_memory(pair, tmp_path):
    w0s = weights_of(pair[0], torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, cols = w0s[name].shape
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    parts = {"A": torch.randn(2, cols), "B": torch.randn(rows, 2)}
    stored = {f"base_model.model.{name[:-7]}.lora_{part}.weight": w for part, w in parts.items()}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    update = measure(w0s, tmp_path)
    moved = update.table[update.table["frobenius"] > 0].set_index("matrix")
    assert list(moved.index) == [name]
    assert moved.loc[name, "frobenius"] == pytest.approx(g.frobenius(parts["B"].double() @ parts["A"].double()))


def test_what_an_update_shows(anchor, tmp_path):
    text, page = repr(anchor), anchor._repr_html_()
    for shown in (text, page):
        assert "base (float32) to anchor (float32)" in shown and "low_overlap_a30" in shown and "at equal norm" in shown
        assert f"{anchor.means.loc['stable_rank', 'null']:.4g}" in shown
    assert "<table" in page and anchor.trajectory.empty
    for column in ("stable_rank", "sparsity", "angle_left_mean_k8_matched", "parameters"):
        assert isinstance(anchor.plot(column), Figure)
    with pytest.raises(
        OpdlabError, match=r"no numbers called 'stable_rnk' to draw: choose a column, such as \['stable"
    ):
        anchor.plot("stable_rnk")
    with pytest.raises(OpdlabError, match="no numbers called 'module'"):
        anchor.plot("module")
    anchor.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["matrices.csv", "report.html", "summary.json"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["groups"]["overall"]["stable_rank"]["value"] == anchor.means.loc["stable_rank", "value"]
    assert repr(load_update(tmp_path / "summary.json")) == text
    with pytest.raises(OpdlabError, match="would be written into the checkpoint"):
        anchor.save(DATA / "models/tiny-learning/anchor")


def test_a_trajectory_is_a_table_and_a_figure(pair, tmp_path):
    w0s, w1s = (weights_of(path, torch.float32) for path in pair)
    halfway = {name: (w0s[name] + w1s[name]) / 2 for name in w0s}
    update = measure(w0s, [halfway, w1s], out=tmp_path)
    assert update.trajectory["step"].tolist() == 14 * [1] + 14 * [2]
    (axis,) = update.plot("stable_rank").axes
    rows = update.trajectory[update.trajectory["block"] == "attention"]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx(rows.groupby("step")["stable_rank"].mean().tolist())
    assert len(axis.lines) == 4, "two blocks, and their nulls"
    assert len(update.plot("nss").axes[0].lines) > 4, "what no trajectory has is drawn matrix by matrix"
    assert sorted(os.listdir(tmp_path)) == ["matrices.csv", "report.html", "summary.json", "trajectory.csv"]
    assert "sim_right_K16_rest" in repr(update)
    shown = json.loads((tmp_path / "summary.json").read_text())["trajectory"][1]
    layers = update.trajectory[update.trajectory["block"].isin(LAYERS)].query("step == 2")
    assert shown["sparsity"] == pytest.approx(np.average(layers["sparsity"], weights=layers["parameters"]))


def test_updates_are_compared_as_they_are(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    w0s = weights_of(pair[0], torch.float32)
    numbers = torch.Generator().manual_seed(1)
    moved = [{n: w + 0.002 * torch.randn(w.shape, generator=numbers) for n, w in w0s.items()} for _ in range(2)]
    updates = [measure(pair[0], one) for one in moved]
    compared = compare(updates, processes=2)
    assert compared.means[["a", "b"]].to_numpy().tolist() == [
        ["the state dict in memory (1)", "the state dict in memory (2)"]
    ]
    for name, weights, update in zip("ab", moved, updates, strict=True):
        save_file(weights, f"{name}.safetensors")
        update.save(name)
    assert abs(compared.means["cosine"].iloc[0]) < 0.05 and "jaccard_permuted" in repr(compared)
    assert "<table" in compared._repr_html_() and sorted(os.listdir()) == ["a", "a.safetensors", "b", "b.safetensors"]
    on_disk = compare([measure(pair[0], f"{name}.safetensors") for name in "ab"])
    columns = ["cosine", "jaccard_matched", "sim_right_K8"]
    pd.testing.assert_frame_equal(on_disk.pairs[columns], compared.pairs[columns])
    with pytest.raises(OpdlabError, match="give two or more results"):
        compare([updates[0], updates[0]])


def test_a_model_of_the_hub_is_fetched(pair, monkeypatch):
    import huggingface_hub

    asked = []
    fetched = {"someone/base-1b": pair[0], "someone/tuned-1b": pair[1]}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or fetched[name])
    assert len(measure("someone/base-1b", "someone/tuned-1b").table) == 24 and asked == list(fetched)


def test_without_a_network_it_says_what_to_do(pair):
    message = (
        "there is no folder nobody/nothing, and the Hugging Face hub did not give .* run 'hf download nobody/nothing"
    )
    with pytest.raises(OpdlabError, match=message):
        measure(pair[0], "nobody/nothing")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({}, "the state dict in memory holds no weights"),
        ({"w": 3}, "w in the state dict in memory is of type int: give names and tensors only"),
        (
            {"layers.0.mlp.up_proj.weight": torch.full((4, 4), float("nan"))},
            "in the state dict in memory has entries that",
        ),
    ],
)
def test_what_is_no_model_in_memory(base, message):
    with pytest.raises(OpdlabError, match=message):
        measure(base, {name: torch.ones(4, 4) for name in base})


W0S = {"model.layers.0.mlp.up_proj.weight": torch.eye(4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure(None, W0S), "^base is a NoneType: give a model folder"),
        (lambda: measure(W0S, None), "^tuned is a NoneType: give a model folder, .* or a list$"),
        (lambda: measure(W0S, {"a folder"}), "^tuned is a set: give a model folder"),
        (lambda: measure(W0S, []), "^tuned is empty: give one checkpoint or more"),
        (lambda: measure(W0S, iter(())), "^tuned is empty: give one checkpoint or more"),
        (lambda: ol.compare("s"), "^updates is 's': give a list of two or more"),
        (lambda: ol.compare(None), "^updates is None: give a list of two or more"),
        (lambda: ol.compare([None, None]), "^updates has a NoneType: give measured updates"),
        (lambda: ol.judge("tiny"), "^records is a str: give what ol.load returns"),
        (lambda: ol.judge(None), "^records is a NoneType: give what ol.load returns"),
        (lambda: measure({"w": torch.arange(9)}, W0S), r"holds no weights \(w is a buffer of int64, not a weight\)"),
        (
            lambda: measure({"h.0.attn.c_attn.weight": torch.ones(8, 24)}, W0S),
            "c_attn.weight holds several matrices; .* or give the module in memory",
        ),
    ],
)
def test_one_sentence_names_the_argument(call, message):
    with pytest.raises(OpdlabError, match=message):
        call()


def test_a_generator_gives_the_checkpoints_in_order():
    moved = [{name: w0 * size for name, w0 in W0S.items()} for size in (2, 3)]
    expected = measure(W0S, moved).trajectory
    pd.testing.assert_frame_equal(measure(W0S, (weights for weights in moved)).trajectory, expected)


def test_a_state_dict_that_training_changed_too_is_said_to_be_the_same_memory():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    before = model.state_dict()
    with torch.no_grad():
        model.layers[0].weight.mul_(2)
    with pytest.raises(OpdlabError, match=r"same weights, being the same memory \(before .* copy .* v\.clone\(\)"):
        measure(before, model)
    with pytest.raises(OpdlabError, match=r"hold the same weights: there is no update"):
        measure({name: weight.clone() for name, weight in before.items()}, model)


def test_means_weigh_sparsity_by_parameters_and_can_be_taken_again():
    table = pd.DataFrame(
        {
            "step": [1, 1, 1, 2],
            "block": ["mlp", "mlp", "attention", "mlp"],
            "k": [1, 2, 3, 4],
            "parameters": [100, 300, 200, 100],
            "sparsity": [1.0, 0.5, 0.25, 0.0],
            "nss": [1.0, float("nan"), 3.0, 4.0],
        }
    )
    by_block = means(table, ["step", "block"])
    assert "k" not in by_block and by_block["matrices"].tolist() == [2, 1, 1]
    assert by_block["nss"].tolist() == [1.0, 3.0, 4.0], "what is undefined does not count"
    again, at_once = means(by_block, ["step"], ["sparsity"]), means(table, ["step"], ["sparsity"])
    pd.testing.assert_frame_equal(again, at_once)
    assert means(table, ())["sparsity"].tolist() == pytest.approx([(100 + 150 + 50) / 700])


def test_geometry_needs_torch_numpy_and_scipy_only():
    code = (
        "import opdlab.geometry, sys; print({'pandas', 'matplotlib', 'transformers', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stderr
