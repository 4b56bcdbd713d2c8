"""Every measurement says what was measured, what is in no mean and what was left out: on paper and on the screen."""

import json
import re

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from opdlab.cli import main
from opdlab.measuring.compare import compare
from opdlab.measuring.shown import notes
from opdlab.measuring.sources import LeftOut
from opdlab.measuring.update import load_update, measure


def test_an_ordinary_pair(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["measure", *map(str, pair), "--out", "out", "--processes", "1", "--no-cache", "--no-nulls"]
    assert main(command) == 0
    printed, report = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    summary, table = json.loads((tmp_path / "out" / "summary.json").read_text()), pd.read_csv("out/matrices.csv")
    layers = table[table["block"].isin(["attention", "mlp"])]
    share = 100 * layers["parameters"].sum() / table["parameters"].sum()
    measured, apart = summary["notes"][:2]
    assert measured == (
        f"Measured: {len(table)} tensors of {table['parameters'].sum():,} parameters. "
        f"The means are over the 14 matrices of attention and MLP, with {share:.3g} % of the parameters."
    )
    shares = [float(found) for found in re.findall(r"\(([\d.]+) %\)", apart)]
    assert sum(shares) + share == pytest.approx(100, abs=0.05) and "embedding (" in apart and "norm (" in apart
    assert summary["left_out"] == [] and all(note in printed and note in report for note in summary["notes"])
    assert "ashes: the permuted null" not in report, "without nulls no caption explains them"
    assert repr(load_update(tmp_path / "out" / "summary.json")) in printed


def test_embeddings_are_decomposed_where_they_are_asked_for(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, flag in (("without", []), ("with", ["--embeddings"])):
        command = ["measure", *map(str, pair), "--out", name, "--processes", "1", "--no-cache", *flag]
        assert main(command) == 0
    capsys.readouterr()
    one, two = (pd.read_csv(f"{name}/matrices.csv").set_index("matrix") for name in ("without", "with"))
    name = "model.embed_tokens.weight"
    exact = ["sparsity", "sparsity_absolute", "sparsity_relative", "density", "low_overlap_a30", "low_share_a50"]
    assert one.loc[name, exact].tolist() == two.loc[name, exact].tolist()
    assert one.loc[name, "frobenius"] == pytest.approx(two.loc[name, "frobenius"], rel=1e-12)
    assert pd.isna(one.loc[name, "stable_rank"]) and pd.notna(two.loc[name, "stable_rank"])
    pd.testing.assert_frame_equal(one.drop(name), two.drop(name))


def test_what_did_not_move_and_what_was_left_out_is_counted(pair):
    update = measure(*pair, nulls=False)
    table = update.table.assign(frobenius=0.0)
    left = [LeftOut(f"mtp.{i}", "tuned has it and base does not", 0.02) for i in range(3)]
    left += [LeftOut("buffer", "it holds whole numbers", 0.0)]
    said = notes(table, left)
    assert "14 of them did not move, and count in the sparsity alone" in said[0]
    assert said[2:] == [
        "Left out: buffer (0 % of the parameters): it holds whole numbers.",
        "Left out: 3 tensors, such as mtp.0 (6 % of the parameters): tuned has it and base does not.",
    ]


def test_a_model_without_a_matrix_in_a_layer():
    base = {"proj.weight": torch.eye(4), "bias": torch.ones(3)}
    update = measure(base, {name: 1.5 * w for name, w in base.items()}, nulls=False)
    assert "over nothing, as no matrix is in a layer" in repr(update) and "Empty DataFrame" not in repr(update)


def test_experts_are_drawn_as_mean_and_range(tmp_path):
    """Several matrices of one module in a layer: one line, and what they range over."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(3) for j in range(4)]
    base = {name: torch.randn(8, 8, generator=generator) for name in names}
    save_file({name: w + 0.01 * w.sin() for name, w in base.items()}, tmp_path / "tuned.safetensors")
    measure(base, tmp_path / "tuned.safetensors", out=tmp_path / "out", nulls=False)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "by layer; the mean of a module&#39;s matrices in each layer, and their range" in report


def test_a_comparison_says_what_is_compared(pair, tmp_path):
    updates = [measure(pair[0], pair[1], out=tmp_path / name, nulls=False) for name in ("one", "two")]
    compared = compare([tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    (note,) = compared.notes
    assert note == "Compared are the 14 matrices of attention and MLP; what else was measured is not."
    for text in (repr(compared), (tmp_path / "out" / "compare.html").read_text()):
        assert note in text
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["notes"] == [note]
    assert updates[0].left_out == ()
