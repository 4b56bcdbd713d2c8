"""Where an update is: its numbers by other means, the published ones by their sources, and what a person sees of it."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from opdlab import geometry as g
from opdlab.lab.records import Records, read_index, read_tables
from opdlab.measuring.shown import beside_noise
from opdlab.measuring.sources import Trajectory
from opdlab.measuring.update import measure
from opdlab.measuring.where import of_seeds, published, published_sizes, standing
from opdlab.training.config import Recipe

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]


def test_every_published_value_has_its_source():
    bibliography = (ROOT / "book/references.bib").read_text()
    table = published()
    for source, arxiv in table[["source", "arxiv"]].drop_duplicates().to_numpy():
        assert re.search(rf"@misc{{{source},[^@]*eprint = {{{arxiv}}}", bibliography), source
    assert table["place"].notna().all() and not table.duplicated(["update", "quantity"]).any()
    # One value, or the two ends of a range.
    assert (table["value"].isna() == table["low"].notna()).all() and (table["low"].isna() == table["high"].isna()).all()
    assert published_sizes()["update"].tolist()[:2] == ["SFT, Qwen3-8B", "OPD, Qwen3-8B"]
    assert list(published_sizes().index) == list(range(1, 13))


def test_the_sizes_of_the_paper_are_those_that_noise_needs():
    w0 = (0.02 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))).bfloat16().double()
    sizes = published_sizes().dropna(subset="high")
    assert len(sizes) == 3
    for row in sizes.itertuples():
        noise = [g.noise_norm(w0, row.sparsity, kind) for kind in ("gaussian", "laplace", "t3")]
        assert [row.low, row.high] == pytest.approx([min(noise), max(noise)], rel=0.15)


def walk(signs: np.ndarray, recipe: Recipe) -> dict[str, float]:
    """Where a run is whose every weight moves by the learning rate in each step, in the direction of its sign."""
    random = torch.Generator().manual_seed(0)
    w0s = {name: 0.05 * torch.randn(40, 30, generator=random, dtype=torch.float64) for name in NAMES}
    rates = [recipe.learning_rate_at(step) for step in range(recipe.steps)]
    way = torch.from_numpy(np.cumsum(signs * np.array(rates)[:, None, None, None], axis=0))
    path = {step: {name: w0s[name] + way[step - 1, i] for i, name in enumerate(NAMES)} for step in (20, 50, 100, 200)}
    lines = [{"step": step, "skipped": False, "grad_norm": step / 100} for step in range(1, recipe.steps + 1)]
    found = measure(w0s, Trajectory(path.values(), path))
    return standing(found.table, found.trajectory, pd.DataFrame(lines), recipe)


def test_a_straight_line_and_a_walk_are_told_apart():
    recipe = Recipe(200, learning_rate=1e-4, schedule="constant", warmup=0, clip=1.0)
    shape, random = (200, len(NAMES), 40, 30), np.random.default_rng(0)
    line = walk(np.broadcast_to(random.choice([-1.0, 1.0], shape[1:]), shape), recipe)
    assert line["coherence"] == pytest.approx(math.sqrt(200)) and line["growth"] == pytest.approx(1)
    assert line["relative_norm"] == pytest.approx(200 * 1e-4 / 0.05, rel=0.03)
    assert line["step_size"] == pytest.approx(1e-4 / 0.05, rel=0.03)
    assert (line["steps"], line["clipped"]) == (200, 0.5)
    noise = walk(random.choice([-1.0, 1.0], shape), recipe)
    assert noise["coherence"] == pytest.approx(1, abs=0.05) and noise["growth"] == pytest.approx(0.5, abs=0.02)
    cosine = walk(random.choice([-1.0, 1.0], shape), Recipe(200, learning_rate=1e-4, schedule="cosine", warmup=20))
    assert cosine["coherence"] == pytest.approx(1, abs=0.05), "the schedule is taken into account"


@pytest.mark.parametrize("folder", sorted(place.parent for place in (ROOT / "data/records").glob("*/runs.csv")))
@pytest.mark.parametrize("arm", ["sft", "rlvr"])
def test_records_of_any_scale_by_other_means(folder, arm):
    runs, tables = recorded(folder, arm)
    found = Records(**tables, evaluations=pd.DataFrame(), runs=runs).where()
    mine = found.table[found.table["update"] == arm].set_index("quantity")
    by_seed = pd.DataFrame([dict(by_hand(folder / arm, run)) for _, run in runs.iterrows()])
    for name, values in by_seed.items():
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        expected = [values.mean(), values.mean() - half, values.mean() + half]
        assert mine.loc[name, ["value", "low", "high"]].tolist() == pytest.approx(expected, rel=1e-4, nan_ok=True), name
    assert set(by_seed) == set(mine.index) - {"low_overlap_a30", "relative_operator_norm"}


def recorded(folder: Path, arm: str) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return the rows of an arm's runs, and its tables."""
    index, tables = read_index(folder), read_tables(folder / arm)
    return index[index["arm"] == arm], {name: tables[name] for name in ("matrices", "trajectory", "history")}


def by_hand(folder: Path, run: pd.Series):
    """Yield the quantities of one run from its files, with numpy alone."""
    files = [pd.read_csv(folder / f"{name}.csv") for name in ("matrices", "trajectory", "history")]
    m, t, h = (table[table["seed"] == run["seed"]] for table in files)
    count, h = m["rows"] * m["cols"], h[~h["skipped"]]
    rates = run["recipe.learning_rate"] * np.minimum(1, h["step"] / run["recipe.warmup"])
    if run["recipe.schedule"] == "cosine":
        rates *= 0.1 + 0.9 * (1 + np.cos(np.pi * (h["step"] - 1) / run["recipe.steps"])) / 2
    rms = [np.sqrt(np.sum(norm**2) / count.sum()) for norm in (m["frobenius"], m["frobenius"] / m["relative_norm"])]
    yield "relative_norm", m["relative_norm"].mean()
    yield "sparsity", np.average(m["sparsity"], weights=count)
    yield "steps", len(h)
    yield "coherence", rms[0] / np.sqrt(np.sum(rates**2))
    yield "step_size", run["recipe.learning_rate"] / rms[1]
    yield "clipped", np.mean(h["grad_norm"] > run["recipe.clip"])
    norms = t.groupby("step").apply(lambda of: np.average(of["frobenius"], weights=of["matrices"]))
    norms = norms[norms.index >= round(0.05 * run["recipe.steps"])]
    yield "growth", stats.linregress(np.log(norms.index), np.log(norms)).slope


def test_other_optimizers_are_not_held_against_adam():
    runs, tables = recorded(next((ROOT / "data/records").glob("*/opd_sgd")).parent, "opd_sgd")
    for found in of_seeds(runs, tables)["opd_sgd"]:
        assert "sparsity" in found and "coherence" not in found


@pytest.fixture(scope="module")
def update():
    """A small update of random weights: four directions of each matrix, in two steps."""
    random = torch.Generator().manual_seed(1)
    w0s = {name: 0.05 * torch.randn(96, 120, generator=random) for name in NAMES}
    parts = {name: torch.randn(96, 4, generator=random) @ torch.randn(4, 120, generator=random) for name in NAMES}
    path = [{name: w0 + size * parts[name] for name, w0 in w0s.items()} for size in (2e-5, 1e-4)]
    return measure(w0s, path)


def test_a_person_who_measures_meets_the_ruler(update, tmp_path):
    table = update.table
    numbers = [
        f"{100 * table[column].mean():.3g} %" for column in ("sparsity_ruler", "sparsity", "low_overlap_a30_ruler")
    ]
    sentences = beside_noise(table)
    assert re.findall(r"[\d.]+ %", " ".join(sentences))[:3] == numbers
    assert update.means.loc["sparsity", "ruler"] == pytest.approx(table["sparsity_ruler"].mean())
    update.save(tmp_path)
    summary, report = (tmp_path / "summary.json").read_text(), (tmp_path / "report.html").read_text()
    for text in (repr(update), update._repr_html_(), summary, report):
        assert all(said in text for said in (*sentences, "ruler", "stable_rank_locked", "sim_right_K16_bf16"))
    assert "12 Qwen3, OPSD" in report and "2606.13657" in report and "Where the update is" in report
    assert beside_noise(measure(update.base, update.path, nulls=False).table) == []


def test_the_ruler_of_an_update_is_what_drawn_noise_leaves(update):
    curve, random = update.ruler, torch.Generator().manual_seed(2)
    assert curve["relative_norm"].is_monotonic_increasing and len(curve) == 24
    for row in curve.iloc[[2, 10, 18]].itertuples():
        unchanged = []
        for name in NAMES:
            w0 = update.base.read(name).numpy()
            noise = torch.randn(w0.shape, generator=random).numpy() * row.relative_norm * np.sqrt(np.mean(w0**2))
            before, after = (torch.from_numpy(w).bfloat16().view(torch.int16) for w in (w0, w0 + noise))
            unchanged.append(float((before == after).double().mean()))
        assert row.sparsity == pytest.approx(np.mean(unchanged), abs=0.01)


def test_where_an_update_is(update):
    found = update.where()
    mine = found.table[found.table["update"] == update.path[-1].path].set_index("quantity")["value"]
    assert mine.to_dict() == pytest.approx(
        {
            name: update.table[name].mean()
            for name in ("relative_norm", "sparsity", "low_overlap_a30", "relative_operator_norm")
        }
    )
    wide = found.wide
    assert (
        wide.loc["OPD, Qwen3-8B", "relative_norm"] == "≈ 0.0026 to 0.0039"
        and wide.loc["JustRL, RLVR", "sparsity"] == "0.347"
    )
    assert (
        wide.index[-1] == update.path[-1].path and wide["sparsity"].iloc[-1] == f"{update.table['sparsity'].mean():.3g}"
    )
    assert "Adam's walk" in repr(found) and "<table" in found._repr_html_()


def test_a_run_with_one_checkpoint_has_no_growth(update):
    recipe = Recipe(1, learning_rate=1e-3, schedule="constant", warmup=0, clip=1.0)
    history = pd.DataFrame({"step": [1], "skipped": [False], "grad_norm": [0.5]})
    alone = measure(update.base, update.path[-1])
    row = alone.where(history, recipe).wide.iloc[-1]
    assert row["steps"] == "1" and row["coherence"] and "growth" not in row


def test_bf16_files_have_one_view():
    random = torch.Generator().manual_seed(1)
    w0s = {name: (0.05 * torch.randn(24, 32, generator=random)).bfloat16() for name in NAMES}
    path = [{name: (w0.float() + size).bfloat16() for name, w0 in w0s.items()} for size in (1e-3, 2e-3)]
    shown = repr(measure(w0s, path))
    assert "The checkpoints hold bfloat16 numbers, so there is this one view" in shown
    assert "stable_rank_locked" in shown and "stable_rank_bf16" not in shown


def test_a_model_without_layers_is_beside_nothing():
    base = {"proj.weight": torch.eye(4), "bias": torch.ones(3)}
    update = measure(base, {name: 1.5 * w for name, w in base.items()})
    assert len(update.where().wide) == len(published()["update"].unique())
