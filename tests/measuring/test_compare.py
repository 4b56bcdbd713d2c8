"""Comparing updates: the same numbers as the functions, what unrelated updates show, and bad input."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from opdlab import geometry as g
from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.measuring.compare import compare
from opdlab.measuring.update import measure
from opdlab.models.checkpoints import open_checkpoint


@pytest.fixture(scope="module")
def results(pair, tmp_path_factory):
    """Measurements of two updates from one base, and of the first at half its size."""
    folder = tmp_path_factory.mktemp("results")
    base = open_checkpoint(pair[0])
    w0s = {name: base.read(name).float() for name in base.pieces}
    torch.manual_seed(1)
    tuned = {"first": {name: w + 0.002 * torch.randn_like(w) for name, w in w0s.items()}}
    tuned["second"] = {name: w + 0.002 * torch.randn_like(w) for name, w in w0s.items()}
    tuned["half"] = {name: (w + tuned["first"][name]) / 2 for name, w in w0s.items()}
    for name, weights in tuned.items():
        save_file(weights, folder / f"{name}.safetensors")
        measure(pair[0], folder / f"{name}.safetensors", out=folder / name)
    return folder


def test_pairs_are_those_of_the_functions(pair, results, tmp_path):
    files = [results / name / "summary.json" for name in ("first", "second", "half")]
    compared = compare(files, out=tmp_path, processes=2)
    models, pairs = compared.models, compared.pairs
    assert list(dict.fromkeys(models.columns.get_level_values(0))) == ["first", "second", "half"]
    name = "model.layers.1.mlp.up_proj.weight"
    w0 = open_checkpoint(pair[0]).read(name).double()
    w1, w2 = (load_file(results / f"{which}.safetensors")[name].double() for which in ("first", "second"))
    masks = g.update_mask(w0, w1), g.update_mask(w0, w2)
    expected = {
        "cosine": g.cosine(w1 - w0, w2 - w0),
        "jaccard": g.jaccard(*masks),
        "jaccard_independent": g.independent_jaccard(g.density(masks[0]), g.density(masks[1])),
        "sim_right_K8": g.sim_k(g.top_right(w1 - w0, 8), g.top_right(w2 - w0, 8)),
        "sim_left_K8": g.sim_k(g.top_left(w1 - w0, 8), g.top_left(w2 - w0, 8)),
        "sim_right_random_K8": 8 / 16,
        "sim_left_random_K8": 8 / 24,
    }
    norm = 0.002 * g.frobenius(w0)
    equal = [g.update_mask(w0, g.norm_matched(w0, w, norm)) for w in (w1, w2)]
    expected["jaccard_matched"] = g.jaccard(*equal)
    row = pairs[(pairs["a"] == "first") & (pairs["b"] == "second")].set_index("matrix").loc[name]
    assert {column: row[column] for column in expected} == pytest.approx(expected)
    means = compared.means.set_index(["a", "b"])
    # The same direction at half the size: the same subspaces, and at equal norm the same mask.
    half = means.loc["first", "half"]
    assert half[["cosine", "sim_right_K16", "sim_left_K16", "jaccard_matched"]].min() > 0.999
    assert half["jaccard_permuted_matched"] < 0.9
    # Unrelated updates: what the baselines say.
    other = means.loc["first", "second"]
    assert abs(other["cosine"]) < 0.05
    assert other["jaccard_matched"] == pytest.approx(other["jaccard_permuted_matched"], abs=0.03)
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["pairs"][0]["cosine"] == pytest.approx(other["cosine"])
    report = (tmp_path / "compare.html").read_text()
    assert report.count("<figure>") == 1 and "http" not in report
    assert len(pd.read_csv(tmp_path / "pairs.csv")) == 3 * 14 and not (tmp_path / "rows.jsonl").exists()


def test_models_without_nulls_have_their_own_size_only(pair, results, tmp_path):
    measure(pair[0], results / "first.safetensors", out=tmp_path / "plain", nulls=False)
    models = compare([results / "second", tmp_path / "plain"]).models
    assert ("first", "at equal norm") not in models.columns and ("second", "at equal norm") in models.columns


def test_updates_that_share_no_matrix(pair, tmp_path):
    """One moved a query, the other a value; and both by one direction only, as small adapters do."""
    base = open_checkpoint(pair[0])
    weights = {name: base.read(name).float() for name in base.pieces}
    line = 0.05 * torch.outer(torch.ones(16), torch.randn(16, generator=torch.Generator().manual_seed(0)))
    for name in ("q", "v"):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        save_file(weights | {key: weights[key] + line[: len(weights[key])]}, tmp_path / f"{name}.safetensors")
        measure(pair[0], tmp_path / f"{name}.safetensors", out=tmp_path / name)
    means = compare([tmp_path / "q", tmp_path / "v"], out=tmp_path / "out").means.iloc[0]
    assert means[["cosine", "sim_right_K4"]].isna().all() and means["jaccard"] == 0
    written = json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=pytest.fail)
    assert written["pairs"][0]["cosine"] is None


def test_names_are_told_apart(results, tmp_path):
    summary = json.loads((results / "first" / "summary.json").read_text())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        (tmp_path / name / "matrices.csv").write_bytes((results / "first" / "matrices.csv").read_bytes())
    assert [label for label, *_ in compare([tmp_path / "a", tmp_path / "b"]).updates] == ["a", "b"]


def test_bad_input_is_one_sentence(pair, results, tmp_path):
    first = results / "first"
    (tmp_path / "no.json").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "summary.json").write_bytes((first / "summary.json").read_bytes())
    pd.read_csv(first / "matrices.csv").tail(9).to_csv(other / "matrices.csv", index=False)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "summary.json").write_bytes((first / "summary.json").read_bytes())
    table = pd.read_csv(first / "matrices.csv")
    table.assign(frobenius=2 * table["frobenius"]).to_csv(moved / "matrices.csv", index=False)
    for paths, message in (
        ([first], "give two or more results"),
        ([first, first / "summary.json"], "give two or more results"),
        ([first, tmp_path / "no.json"], "no.json is no summary.json of 'opdlab measure'"),
        ([first, tmp_path / "nothing"], "nothing is no summary.json of 'opdlab measure'"),
        ([first, other], "other has other matrices than .*, such as .*: compare models of one architecture"),
        ([first, moved], "first.safetensors or .*base has changed since it was measured: measure it again"),
    ):
        with pytest.raises(OpdlabError, match=message):
            compare(paths, out=tmp_path / "out")
        assert not (tmp_path / "out" / "pairs.csv").exists()


def test_the_command(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [str(results / name / "summary.json") for name in ("first", "second")]
    assert main(["compare", *files, "--processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert "jaccard_permuted" in printed and "geometry-compare/pairs.csv" in printed
    assert main(["compare", files[0]]) == 2
    assert "give two or more results" in capsys.readouterr().err
