"""The nulls keep what they should and destroy the rest; the tables are made of the functions tested elsewhere."""

import re
from dataclasses import replace
from itertools import pairwise
from math import isnan

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pair_table, path_table
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opdlab import geometry as g
from opdlab.errors import OpdlabError

torch.set_num_threads(1)
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SETTINGS = g.Resolution(k=3, sim_ks=(2, 4), mask_rank=3, alphas=(0.3, 0.5), angle_ks=(2,))
MODULES = {"self_attn.q_proj": (8, 8), "self_attn.o_proj": (8, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}

seeds = st.integers(0, 2**31 - 1)
small_shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))
norms_of_walks = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0, size: float = 1.0, layers: int = 2) -> dict[str, torch.Tensor]:
    """A state dict like that of Qwen3, float32, with what the measurements must leave out."""
    draw = generator(seed)
    shapes = {f"model.layers.{i}.{m}.weight": shape for i in range(layers) for m, shape in MODULES.items()}
    shapes |= {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8), "model.norm.weight": (8,)}
    shapes |= {"model.layers.0.self_attn.q_norm.weight": (4,), "model.layers.0.self_attn.q_proj.bias": (8,)}
    return {name: size * torch.randn(*shape, generator=draw) for name, shape in shapes.items()}


def moved(w0s: dict, seed: int, size: float) -> dict:
    noise = model(seed, size, layers=sum(name.endswith("up_proj.weight") for name in w0s))
    return {name: w0 + noise[name] for name, w0 in w0s.items()}


def walk_sim(norms: list[float], shape: tuple[int, int], k: int, draw: torch.Generator) -> g.Similarity:
    """Sim_K of a random walk to its end: what a shared history gives without any preferred direction."""
    return g.similarity_to_end(list(g.random_walk(norms, shape, draw)), k)


# --- nulls ------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(small_shapes, seeds, seeds)
def test_a_permuted_update_keeps_its_entries(shape, seed: int, seed_order: int):
    delta = torch.randint(-1000, 1000, shape, generator=generator(seed)).double()
    permuted = g.permute(delta, generator(seed_order))
    assert torch.equal(permuted.flatten().sort().values, delta.flatten().sort().values)
    assert g.frobenius(permuted) == pytest.approx(g.frobenius(delta))
    assert torch.equal(permuted, g.permute(delta, generator(seed_order)))


def test_permuting_destroys_the_geometry():
    w0 = torch.randn(60, 60, generator=generator())
    w1 = w0 + torch.outer(*torch.randn(2, 60, generator=generator(1)))
    permuted = w0 + g.permute(w1 - w0, generator())
    assert g.stable_rank(w1 - w0) < 1.001
    assert g.stable_rank(permuted - w0) > 5
    low = g.low_magnitude_mask(w0, 0.3)
    only_low = torch.where(low, w0 + 0.01, w0)
    assert g.overlap(low, g.update_mask(w0, only_low)) == 1
    # What is left of the overlap is that a step of 0.01 shows on small weights more often.
    assert 0.3 < g.overlap(low, g.update_mask(w0, w0 + g.permute(only_low - w0, generator()))) < 0.6


@PROPERTY
@given(norms_of_walks, small_shapes, seeds)
def test_random_walk_has_the_given_steps(norms: list[float], shape, seed: int):
    walk = torch.stack(list(g.random_walk(norms, shape, generator(seed))))
    steps = walk.diff(dim=0, prepend=torch.zeros(1, *shape))
    assert walk.shape == (len(norms), *shape)
    # The difference of two sums loses what the larger of them rounds off.
    assert torch.linalg.matrix_norm(steps).tolist() == pytest.approx(norms, abs=1e-12 * max(norms) * len(norms))


@PROPERTY
@given(norms_of_walks, small_shapes, seeds, st.integers(1, 2), st.sampled_from([1e-3, 1.0, 1e3]))
def test_random_walk_sim(norms: list[float], shape, seed: int, k: int, scale: float):
    left, right = walk_sim(norms, shape, k, generator(seed))
    assert len(left) == len(right) == len(norms)
    assert all(0 <= sim <= 1 for sim in left + right)
    assert [left[-1], right[-1]] == pytest.approx([1, 1])
    assert (left, right) == walk_sim(norms, shape, k, generator(seed))
    scaled = walk_sim([scale * norm for norm in norms], shape, k, generator(seed))
    # Only ratios of the norms count; nearly equal singular values amplify the rounding.
    assert scaled.left == pytest.approx(left, abs=1e-4) and scaled.right == pytest.approx(right, abs=1e-4)


def test_random_walk_sim_depends_on_shared_history_alone():
    early = walk_sim([1.0, 0.1], (40, 40), 4, generator()).right[0]
    late = walk_sim([0.1, 1.0], (40, 40), 4, generator()).right[0]
    assert early > 0.7 and late < 0.4
    still = walk_sim([0.0, 1.0], (40, 40), 4, generator())
    assert isnan(still.left[0]) and isnan(still.right[0]) and still.right[1] == pytest.approx(1)
    assert walk_sim([1.0, 1.0], (40, 40), 4, generator(1)) != walk_sim([1.0, 1.0], (40, 40), 4, generator(2))


@PROPERTY
@given(small_shapes, seeds, st.floats(0, 1e3))
def test_norm_matched(shape, seed: int, norm: float):
    w0, delta = torch.randn(2, *shape, dtype=torch.float64, generator=generator(seed))
    matched = g.norm_matched(w0, w0 + delta, norm) - w0
    assert g.frobenius(matched) == pytest.approx(norm, rel=1e-9, abs=1e-12)
    assert torch.allclose(matched * g.frobenius(delta), norm * delta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_noise_mask_is_what_noise_shows(dtype):
    w0 = torch.randn(40, 30, generator=generator(3)).to(dtype).double()
    noise = torch.randn(40, 30, generator=generator(4)).double()
    for size in (1e-4, 1e-3, 1e-2):
        shown = g.update_mask(w0, w0 + size * noise)
        found = g.noise_mask(w0, int(shown.sum()), generator(4))
        # They may differ where a sum lands exactly between two numbers of the grid.
        assert (found != shown).sum() <= 2
    assert g.noise_mask(w0, 0, generator()).sum() == 0
    with pytest.raises(OpdlabError, match="count is -1"):
        g.noise_mask(w0, -1, generator())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g.random_walk([], (3, 3), generator()), r"norms is \[\]"),
        (lambda: g.random_walk([1.0, -1.0], (3, 3), generator()), "none below 0"),
        (lambda: g.random_walk([float("nan")], (3, 3), generator()), "norms has 1 entries that are NaN"),
        (lambda: g.random_walk([1.0], (3, 0), generator()), r"shape\[1\] is 0"),
        (lambda: walk_sim([1.0], (3, 3), 4, generator()), "k is 4; expected a whole number from 1 to 3"),
        (lambda: g.norm_matched(torch.ones(2), torch.ones(2), 1.0), "w1 equals w0"),
        (lambda: g.norm_matched(torch.ones(2), torch.zeros(2), -1.0), "norm is -1.0"),
        (lambda: g.permute(torch.tensor([float("inf")]), generator()), "delta has 1"),
    ],
)
def test_errors_name_the_argument(call, message: str):
    with pytest.raises(OpdlabError, match=message):
        call()


# --- names ------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, 200), st.sampled_from(["", "model.", "model.language_model."]), st.sampled_from(sorted(MODULES)))
def test_describe(layer: int, prefix: str, module: str):
    described = g.describe(f"{prefix}layers.{layer}.{module}.weight")
    block = "attention" if module.startswith("self_attn") else "mlp"
    assert described == (layer, module.split(".")[1], block)


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("model.embed_tokens.weight", (-1, "embed_tokens", "embedding")),
        ("lm_head.weight", (-1, "lm_head", "head")),
        ("model.norm.weight", (-1, "norm", "norm")),
        ("model.layers.3.input_layernorm.weight", (3, "input_layernorm", "norm")),
        ("model.layers.3.self_attn.q_proj.bias", (3, "q_proj", "bias")),
        ("model.layers.3.self_attn.q_norm.weight", (3, "q_norm", "norm")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (3, "up_proj", "mlp")),
        ("transformer.h.3.attn.q_proj.weight", (3, "q_proj", "attention")),
        ("transformer.wte.weight", (-1, "wte", "embedding")),
        ("model.layers.3.adapter.weight", (3, "adapter", "other")),
    ],
)
def test_describe_everything_else(name: str, described: tuple):
    assert g.describe(name) == described


@pytest.mark.parametrize("module", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_fused_matrices_are_not_measured_as_one(module: str):
    name = f"model.layers.3.{module}.weight"
    assert g.describe(name).block == "fused"
    with pytest.raises(OpdlabError, match="several matrices side by side"):
        g.weight_matrices({name: torch.zeros(4, 4)})


@PROPERTY
@given(st.integers(1, 3), seeds)
def test_weight_matrices(layers: int, seed: int):
    weights = model(seed, layers=layers)
    chosen = g.weight_matrices(weights)
    assert list(chosen) == [f"model.layers.{i}.{m}.weight" for i in range(layers) for m in MODULES]
    assert g.weight_matrices(chosen).keys() == chosen.keys()


# --- tables -----------------------------------------------------------------------------------------------------------


RANKS = ["stable_rank", "effective_rank", "effective_rank_squared", "top_energy", "hill"]


def test_columns_of_a_pair():
    table = pair_table(model(), moved(model(), 1, 0.01), SETTINGS)
    identity = ["matrix", "layer", "module", "block", "rows", "cols", "parameters"]
    ranks = [*RANKS, *(f"{rank}_null" for rank in RANKS), "stable_rank_gaussian"]
    energy = [f"energy_{side}{random}" for side in ("left", "right", "both") for random in ("", "_random")]
    rules = ["sparsity", "sparsity_absolute", "sparsity_relative", "density", "nss"]
    angles = [f"angle_{side}_{value}" for side in ("left", "right") for value in ("mean", "median", "max")]
    angles += [f"angle_{side}_mean_k2" for side in ("left", "right")]
    masks = [(m, f"a{a}") for a in (30, 50) for m in ("principal", "low", "principal_only")]
    overlaps = [f"{m}_overlap_{a}{null}" for null in ("", "_null") for m, a in masks]
    matched = [f"{column}_matched" for column in (*rules, *angles, *overlaps)]
    noise = [f"{m}_overlap_{a}_{kind}" for m, a in masks for kind in ("noise", "ruler")] + ["sparsity_ruler"]
    ends = [column for m, a in masks for column in (f"{m}_overlap_{a}_top", f"{m}_share_{a}")]
    sizes = ["frobenius", "relative_norm", "relative_operator_norm"]
    resolution = ["k", "mask_rank", "matched_norm"]
    assert list(table)[: len(identity)] == identity
    assert sorted(table) == sorted(
        identity + resolution + sizes + ranks + energy + rules + angles + overlaps + matched + noise + ends
    )
    assert len(table) == 8 and not table.isna().any(axis=None)
    name = "model.layers.1.mlp.up_proj.weight"
    fast = g.measure_matrix(name, model()[name], moved(model(), 1, 0.01)[name], SETTINGS, nulls=False)
    row = table.set_index("matrix").loc[name]
    assert not any("_null" in column or "matched" in column for column in fast)
    assert all(row[column] == value for column, value in fast.items())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seeds, st.integers(-3, 0), st.sampled_from([0.125, 4.0]))
def test_pair_rows_are_the_functions(seed: int, power: int, scale: float):
    w0s = model(seed)
    w1s = moved(w0s, seed + 1, 10.0**power)
    table = pair_table(w0s, w1s, SETTINGS, seed=seed)
    name = "model.layers.1.mlp.up_proj.weight"
    w0, w1 = w0s[name].double(), w1s[name].double()
    row = table.set_index("matrix").loc[name]
    visible = g.update_mask(w0, w1)
    assert row.sparsity == g.bf16_sparsity(w0, w1) and row.density == g.density(visible)
    assert row.nss == pytest.approx(g.spectral_drift(w0, w1)) and row.nss <= row.relative_norm
    assert row.angle_left_max == pytest.approx(float(g.rotation(w0, w1, 3).left[-1]))
    assert row.angle_right_median == pytest.approx(float(g.rotation(w0, w1, 3).right[1]))
    assert row.low_overlap_a30 == pytest.approx(g.overlap(g.low_magnitude_mask(w0, 0.3), visible), nan_ok=True)
    assume(visible.any())
    for suffix in ("", "_matched"):
        low, high = g.feasible_range(0.5, row[f"density{suffix}"])
        for mask in ("principal", "low"):
            assert low - 1e-12 <= row[f"{mask}_overlap_a50{suffix}"] <= high + 1e-12
    equal_size = g.norm_matched(w0, w1, SETTINGS.matched_norm * g.frobenius(w0))
    assert row.nss_matched == pytest.approx(g.spectral_drift(w0, equal_size))
    assert row.sparsity_matched == g.bf16_sparsity(w0, equal_size)
    low, visible = g.low_magnitude_mask(w0, 0.3), g.update_mask(w0, equal_size)
    assert row.low_overlap_a30_matched == pytest.approx(g.overlap(low, visible), nan_ok=True)
    operator_norms = [float(g.singular_values(matrix)[0]) for matrix in (w1 - w0, w0)]
    assert row.relative_operator_norm == pytest.approx(operator_norms[0] / operator_norms[1])
    assert row.sparsity_ruler == pytest.approx(g.noise_sparsity(w0, row.relative_norm))
    largest = g.largest_entries(w1 - w0, round(0.1 * w0.numel()))
    assert row.low_overlap_a30_top == g.overlap(low, largest)
    # A matrix has the same row whatever else is measured, from scratch or from a decomposition.
    alone = pd.Series(g.measure_matrix(name, w0s[name], w1s[name], SETTINGS, seed, g.svd(w0s[name])))
    pd.testing.assert_series_equal(alone, row[alone.index].astype(float), check_names=False)
    # A power of two changes the norm alone, and what is held against an absolute tolerance.
    scaled = pair_table(*({n: scale * w for n, w in ws.items()} for ws in (w0s, w1s)), SETTINGS, seed)
    scaled["frobenius"] /= scale
    free = [column for column in table if "absolute" not in column]
    pd.testing.assert_frame_equal(scaled[free], table[free])


def test_a_pair_without_update():
    table = pair_table(model(), model(), SETTINGS)
    assert (table.sparsity == 1).all() and (table.density == 0).all() and (table.nss == 0).all()
    assert (table.angle_left_max < 1e-12).all() and (table.angle_right_max < 1e-12).all()
    undefined = [c for c in table if "overlap" in c or c in RANKS] + ["stable_rank_null", "energy_left", "nss_matched"]
    assert table[undefined].isna().all(axis=None)


def test_columns_of_a_trajectory():
    w0s = model()
    table = path_table(w0s, [(step, moved(w0s, step, 0.01 * step)) for step in (1, 5, 9)], SETTINGS)
    identity = ["step", "matrix", "layer", "module", "block", "rows", "cols", "parameters"]
    size = ["frobenius", "interval_norm", "interval_stable_rank", "sparsity"]
    sims = [
        f"sim_{side}_K{k}{kind}" for k in (2, 4) for side in ("right", "left") for kind in ("", "_rest", "_interval")
    ]
    seen = [*size, *RANKS, *sims]
    nulls = [f"{column}_null" for column in (*RANKS, *(sim for sim in sims if sim.endswith(("K2", "K4"))))]
    views = [
        f"{column}_{view}" for view in ("bf16", "locked") for column in seen if f"{column}_{view}" != "sparsity_bf16"
    ]
    random = ["sim_random_K2", "sim_random_K4"]
    assert sorted(table) == sorted([*identity, "k", "mask_rank", "relative_norm", *seen, *nulls, *random, *views])
    assert table.step.tolist() == 8 * [1] + 8 * [5] + 8 * [9]
    assert table.matrix.tolist() == 3 * list(g.weight_matrices(w0s))
    rest = [column for column in table if "_rest" in column]
    between = [column for column in table if "_interval" in column]  # and not interval_norm
    assert not table.drop(columns=rest + between).isna().any(axis=None)
    assert (table[between].isna().all(axis=1) == (table.step == 1)).all(), "before the first interval there is none"
    assert (table[rest].isna().all(axis=1) == (table.step == 9)).all(), "after the last snapshot nothing is left"


def bf16(weights: dict) -> dict:
    return {name: w.bfloat16().float() for name, w in weights.items()}


def test_the_bf16_view_is_the_trajectory_of_rounded_checkpoints():
    w0s = model()
    path = [(step, moved(w0s, step, 0.01)) for step in (1, 5, 9)]
    table = path_table(w0s, path, SETTINGS)
    rounded = path_table(bf16(w0s), [(step, bf16(weights)) for step, weights in path], SETTINGS)
    for column in (column for column in table if column.endswith("_bf16")):
        pd.testing.assert_series_equal(table[column], rounded[column])
        # Where checkpoints are stored in bfloat16, there is one view only.
        pd.testing.assert_series_equal(rounded[column], rounded[column.removesuffix("_bf16")], check_names=False)


def test_an_update_that_is_locked_is_its_locked_null():
    w0s = bf16(model())
    end = moved(w0s, 1, 0.01)
    path = [(step, {name: w0 + (step / 9) ** 0.5 * (end[name] - w0) for name, w0 in w0s.items()}) for step in (1, 4, 9)]
    table = path_table(w0s, path, SETTINGS)
    for column in (column.removesuffix("_locked") for column in table if column.endswith("_locked")):
        seen = table["sparsity" if column == "sparsity" else f"{column}_bf16"]
        pd.testing.assert_series_equal(seen, table[f"{column}_locked"], check_names=False, rtol=2e-3, atol=2e-3)
    # Unrounded it has one rank and one subspace throughout; rounding widens the small ones.
    by_step = table.groupby("step").mean(numeric_only=True)
    assert by_step.stable_rank.max() == pytest.approx(by_step.stable_rank.min(), rel=1e-4)
    assert by_step.sim_right_K4.min() > 0.999
    assert by_step.sim_right_K4_bf16.iloc[0] < by_step.sim_right_K4_bf16.iloc[1] < by_step.sim_right_K4_bf16.iloc[2]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 4))
def test_trajectory_rows_are_the_functions(seed: int, count: int):
    w0s = model(seed)
    path = [w0s]
    for i in range(count):
        path.append(moved(path[-1], seed + i + 1, 0.01))
    snapshots = [(10 * i, weights) for i, weights in enumerate(path) if i]
    table = path_table(w0s, snapshots, SETTINGS, seed)
    last = table[table.step == 10 * count].reset_index(drop=True)
    pair = pair_table(w0s, path[-1], SETTINGS)
    for column in ("matrix", "frobenius", "relative_norm", "sparsity", *RANKS):
        pd.testing.assert_series_equal(last[column], pair[column])
    sims = table[[c for c in table if c.startswith("sim_")]]
    assert ((sims >= 0) & (sims <= 1) | sims.isna()).all(axis=None)
    for column in (c for c in sims if not re.search("rest|interval|random", c)):
        assert last[column].tolist() == pytest.approx(8 * [1.0])
    name = "model.layers.0.mlp.down_proj.weight"
    rows = table[table.matrix == name]
    deltas = [weights[name].double() - w0s[name].double() for weights in path[1:]]
    assert rows.sim_left_K2.tolist() == pytest.approx(g.similarity_to_end(deltas, 2).left)
    assert rows.sim_right_K4.tolist() == pytest.approx(g.similarity_to_end(deltas, 4).right)
    rest = path[-1][name].double() - path[1][name].double()
    expected = g.sim_k(g.top_left(deltas[0], 2), g.top_left(rest, 2))
    assert rows.sim_left_K2_rest.iloc[0] == pytest.approx(expected, nan_ok=True)
    steps = [g.frobenius(b[name].double() - a[name].double()) for a, b in pairwise(path)]
    assert rows.interval_norm.tolist() == pytest.approx(steps)
    intervals = [b[name].double() - a[name].double() for a, b in pairwise(path)]
    assert rows.interval_stable_rank.tolist() == pytest.approx([g.stable_rank(interval) for interval in intervals])
    expected = [g.sim_k(g.top_right(a, 2), g.top_right(b, 2)) for a, b in pairwise(intervals)]
    assert rows.sim_right_K2_interval.tolist() == pytest.approx([float("nan"), *expected], nan_ok=True)
    assert (rows.sim_random_K4 == 4 / 12).all()
    alone = path_table({name: w0s[name]}, [(t, {name: w[name]}) for t, w in snapshots], SETTINGS, seed)
    pd.testing.assert_frame_equal(alone, rows.reset_index(drop=True))
    if count > 1:
        other = path_table(w0s, snapshots, SETTINGS, seed + 1)
        assert not other.sim_right_K2_null.equals(table.sim_right_K2_null)
        assert other.sim_right_K2.equals(table.sim_right_K2)


def test_a_trajectory_that_starts_at_the_origin():
    w0s = model()
    table = path_table(w0s, [(0, w0s), (1, moved(w0s, 1, 0.01))], SETTINGS)
    first, last = table[table.step == 0], table[table.step == 1]
    undefined = [c for c in table if c.startswith(("sim_right", "sim_left", "stable_rank", "interval_stable"))]
    assert first[undefined].isna().all(axis=None)
    # Nothing is left after the last, and the interval before the first has no direction.
    assert not last[[c for c in undefined if not re.search("_rest|_interval", c)]].isna().any(axis=None)
    assert (first.frobenius == 0).all() and (first.sparsity == 1).all()


def test_overall_sparsity_is_that_of_all_weights_together():
    w0s = model()
    w1s = moved(w0s, 1, 0.003)
    together = [torch.cat([w.flatten() for w in g.weight_matrices(ws).values()]) for ws in (w0s, w1s)]
    table = pair_table(w0s, w1s, SETTINGS)
    overall = np.average(table["sparsity"], weights=table["parameters"])
    assert overall == pytest.approx(g.bf16_sparsity(*together))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("w1", "message"),
    [
        (torch.full((12, 8), float("nan")), "has 96 entries that are NaN"),
        (torch.ones(8, 12), r"has shape \(8, 12\); expected that of NAME in w0, \(12, 8\)"),
        # Which would fit by broadcasting.
        (torch.ones(1, 8), r"has shape \(1, 8\)"),
    ],
)
def test_errors_name_the_matrix(w1, message: str):
    w0, message = model()[NAME], message.replace("NAME", NAME)
    with pytest.raises(OpdlabError, match=f"{NAME} in w1 {message}"):
        g.measure_matrix(NAME, w0, w1, SETTINGS)
    with pytest.raises(OpdlabError, match=rf"{NAME} in w_ts\[1\] {message}"):
        g.measure_matrix_trajectory(NAME, w0, [w0, w1], SETTINGS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: pair_table(w, w, replace(SETTINGS, k=9)), r"k is 9; expected 8 at most, as model.layers.0"),
        (lambda w: pair_table(w, w, replace(SETTINGS, mask_rank=9)), "mask_rank is 9"),
        (
            lambda w: path_table(w, [(1, w)], replace(SETTINGS, sim_ks=(2, 9))),
            r"sim_ks\[1\] is 9; expected 8",
        ),
        (lambda w: g.weight_matrices({"lm_head.weight": torch.ones(2, 2)}), "no matrix named"),
        (lambda w: replace(SETTINGS, k=0), "k is 0; expected a whole number of 1 or more"),
        (lambda w: replace(SETTINGS, alphas=(0.3, 30)), r"alphas\[1\] is 30; expected a share"),
        (lambda w: replace(SETTINGS, sim_ks=(0,)), r"sim_ks\[0\] is 0"),
    ],
)
def test_tables_refuse(call, message: str):
    with pytest.raises(OpdlabError, match=message):
        call(model())


def test_noise_of_zero_moves_a_weight_last(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.tensor([1.0, 0.0, -0.0, -1.0]))
    mask = g.noise_mask(torch.tensor([1.0, 1e-3, 1e-3, 1.0]), 2, torch.Generator())
    assert mask.tolist() == [True, False, False, True]
