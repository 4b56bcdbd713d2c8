"""Measuring checkpoints on disk: the same numbers as in memory, resumable, cached, and clear about bad input."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from opdlab import geometry as g
from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.geometry.summary import overall_means
from opdlab.measuring import update as program
from opdlab.measuring.compare import compare
from opdlab.measuring.sources import find_trajectory, step_of
from opdlab.measuring.tensors import Job, base_svd, resumable_map
from opdlab.measuring.update import measure
from opdlab.models.checkpoints import open_checkpoint
from opdlab.processes import workers


@pytest.fixture(scope="module")
def measured(pair, tmp_path_factory):
    """The table of the pair, and the folder of its results."""
    out = tmp_path_factory.mktemp("measured")
    return measure(pair[0], pair[1], out=out, processes=2).table, out


def test_tables_are_those_of_the_functions(pair, measured):
    table, out = measured[0].set_index("matrix"), measured[1]
    base, tuned = map(open_checkpoint, pair)
    assert list(table.index) == list(base.pieces)
    name = "model.layers.1.mlp.down_proj.weight"
    w0, w1 = base.read(name), tuned.read(name)
    expected = g.measure_matrix(name, w0, w1, g.Resolution.of(w0.shape))
    assert {column: table.loc[name, column] for column in expected} == pytest.approx(expected, nan_ok=True)
    norm = table.loc["model.norm.weight"]
    assert norm["block"] == "norm" and pd.isna(norm["stable_rank"]) and norm["rows"] == 16
    assert table.loc["model.embed_tokens.weight", "block"] == "embedding"
    written = pd.read_csv(out / "matrices.csv").set_index("matrix")
    assert written["stable_rank"].tolist() == pytest.approx(table["stable_rank"].tolist(), nan_ok=True)
    assert not (out / "rows.jsonl").exists()
    report = (out / "report.html").read_text()
    assert report.count("<figure>") == 4 and "stable_rank" in report and "http" not in report


def test_the_summary_names_its_weighting(measured):
    table, out = measured
    summary = json.loads((out / "summary.json").read_text())["groups"]
    layers = table[table["block"].isin(["attention", "mlp"])]
    overall = summary["overall"]
    assert overall["tensors"] == len(layers) == 14
    share = (layers["sparsity"] * layers["parameters"]).sum() / layers["parameters"].sum()
    assert overall["sparsity"]["value"] == pytest.approx(share)
    assert overall["sparsity"]["weighting"] == "per parameter"
    rank = overall["stable_rank"]
    assert rank["value"] == pytest.approx(layers["stable_rank"].mean()) and rank["weighting"] == "per matrix"
    assert rank["ratio"] == pytest.approx(rank["value"] / rank["null"])
    assert {"attention", "mlp", "embedding", "norm", "attention.q_proj", "mlp.up_proj"} <= summary.keys()
    assert "null" not in summary["norm"]["sparsity"]


def test_rounded_weights_are_said_to_be(pair, measured, tmp_path):
    *_, note = json.loads((measured[1] / "summary.json").read_text())["notes"]
    assert "stored in bfloat16, so their rounding is part of the update" in note
    assert note in (measured[1] / "report.html").read_text()
    base = open_checkpoint(pair[0])
    adapter = replace(open_checkpoint(pair[1]), path=tmp_path)
    wide = open_checkpoint({name: base.read(name).float() for name in base.pieces})
    (tmp_path / "adapter_config.json").write_text("{}")
    expected = json.loads((measured[1] / "summary.json").read_text())["notes"][:-1]
    for tuned in (wide, adapter):
        assert program.Update(base, (tuned,), measured[0], pd.DataFrame(), 0, "cpu").notes == expected


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is asked of Linux")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    m, n = 100_000, 128
    w0 = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    for name, w in (("base", w0), ("tuned", w0 + 1e-3 * torch.randn(m, n))):
        save_file({"model.embed_tokens.weight": w.bfloat16()}, tmp_path / f"{name}.safetensors")
    used = []
    for embeddings in (True, False):
        with workers(1) as pool:
            ends = tmp_path / "base.safetensors", (tmp_path / "tuned.safetensors",)
            job = Job(*ends, (1,), embeddings=embeddings)
            used.append(pool.submit(peak_memory, job, "model.embed_tokens.weight").result())
    # Half a matrix is the files' own pages, which the system takes back when it needs them.
    assert used[0] < 6.5 * 8 * m * n + 2**28, "six float64 matrices, and 256 MB of which the libraries need most"
    assert used[1] < 8 * m * n + 2**27, "an embedding is read some rows at a time"


def peak_memory(job, name):
    """Return how many bytes measuring a tensor takes beyond what the process has already."""
    # A process inherits its parent's peak; this forgets it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    job.measure(name)
    return _memory("VmHWM") - before


def _memory(what):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[what].split()[0])


def test_without_nulls(pair):
    table = measure(*pair, nulls=False).table
    assert not [column for column in table if column.endswith(("_null", "_matched"))]


def test_stopped_work_goes_on(pair, measured, tmp_path):
    whole, _ = measured
    opened = open_checkpoint(pair[0])
    job = Job(pair[0], pair[1:], (1,))
    stopped = tmp_path / "stopped"
    with resumable_map(job.measure, {}, job.identity(), [job.base], out=stopped) as found:
        assert found == {} and (stopped / "rows.jsonl").exists()
    rows = {name: job.measure(name)["row"] | {"frobenius": 7.0} for name in list(opened.pieces)[:3]}
    lines = [{"name": name, "found": {"row": row, "trajectory": []}} for name, row in rows.items()]
    (stopped / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "model.la')
    table = measure(pair[0], pair[1:], out=stopped).table
    assert (table["frobenius"].head(3) == 7).all(), "rows that were there are not measured again"
    pd.testing.assert_frame_equal(table.tail(-3), whole.tail(-3))
    with pytest.raises(OpdlabError, match="holds another measurement: choose another with --out"):
        measure(pair[0], pair[1:], out=stopped, seed=1)
    assert pd.read_csv(stopped / "matrices.csv")["frobenius"].iloc[0] == 7


def test_the_cache_holds_decompositions_by_content(pair, tmp_path):
    cold = measure(pair[0], pair[1:], out=tmp_path / "a", cache=tmp_path / "cache").table
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 14
    warm = measure(pair[0], pair[1:], out=tmp_path / "b", cache=tmp_path / "cache").table
    pd.testing.assert_frame_equal(cold, warm)
    assert sorted((tmp_path / "cache").glob("*.safetensors")) == files
    # A cache only saves time: a broken entry is computed anew, and one that cannot be kept is not.
    files[0].write_bytes(files[0].read_bytes()[:-40])
    pd.testing.assert_frame_equal(cold, measure(pair[0], pair[1:], out=tmp_path / "c", cache=tmp_path / "cache").table)
    (tmp_path / "file").write_text("")
    pd.testing.assert_frame_equal(cold, measure(pair[0], pair[1:], out=tmp_path / "d", cache=tmp_path / "file").table)


def test_a_trajectory_adds_the_way_there(pair, measured, tmp_path):
    base, tuned = (open_checkpoint(path) for path in pair)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    halfway = {name: ((base.read(name).float() + tuned.read(name).float()) / 2) for name in base.pieces}
    save_file({name: base.read(name) for name in base.pieces}, folder / "step-000.safetensors")
    save_file(halfway, folder / "step-050.safetensors")
    (folder / "checkpoint-200").mkdir()
    save_file({name: tuned.read(name) for name in tuned.pieces}, folder / "checkpoint-200" / "model.safetensors")
    (folder / "tensorboard-1").mkdir()
    path = find_trajectory(folder)
    assert [step_of(checkpoint) for checkpoint in path] == [50, 200]
    table = measure(pair[0], path, out=tmp_path / "out").table
    pd.testing.assert_frame_equal(table, measured[0])
    trajectory = pd.read_csv(tmp_path / "out" / "trajectory.csv")
    assert trajectory["step"].tolist() == 14 * [50] + 14 * [200]
    name = "model.layers.0.mlp.up_proj.weight"
    rows = trajectory[trajectory["matrix"] == name]
    expected = g.measure_matrix_trajectory(name, base.read(name), [halfway[name], tuned.read(name)])
    for column, values in expected.items():
        assert rows[column].tolist() == pytest.approx(values, nan_ok=True)
    assert (tmp_path / "out" / "report.html").read_text().count("<figure>") == 5
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [line["step"] for line in summary["trajectory"]] == [50, 200]
    assert summary["trajectory"][0]["sim_right_K16_interval"] is None, "there is no interval before the first"
    with pytest.raises(OpdlabError, match="there are no checkpoints in"):
        find_trajectory(tmp_path / "out")
    (folder / "checkpoint-300").mkdir()
    (folder / "checkpoint-300" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(OpdlabError, match=r"pytorch_model\.bin is a pickle"):
        measure(pair[0], find_trajectory(folder), out=tmp_path / "pickled")


def variant(pair, folder, change):
    state = {name: open_checkpoint(pair[0]).read(name) for name in open_checkpoint(pair[0]).pieces}
    change(state)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return folder


def test_a_copy_of_tied_embeddings_is_left_out(pair, measured, tmp_path):
    tuned = open_checkpoint(pair[1])
    state = {name: tuned.read(name).clone() for name in tuned.pieces}
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "tuned.safetensors")
    table = measure(pair[0], [tmp_path / "tuned.safetensors"], out=tmp_path / "out").table
    pd.testing.assert_frame_equal(table, measured[0])
    # On the way, too: here the last checkpoint stores the copy and the one before does not.
    base = tmp_path / "base.safetensors"
    start = open_checkpoint(pair[0])
    first = {name: start.read(name).clone() for name in start.pieces}
    save_file(first | {"lm_head.weight": first["model.embed_tokens.weight"].clone()}, base)
    path = [pair[1], tmp_path / "tuned.safetensors"]
    assert "lm_head.weight" not in set(measure(base, path, out=tmp_path / "way").table["matrix"])


def test_copies_that_came_apart_are_two_matrices():
    """As training changes both names of a tied model's state dict; a model that had the copy had this head."""
    embedding = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    before = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    after = {name: weight + i for i, (name, weight) in enumerate(before.items(), 1)}
    for base, tuned, sizes in ((before, after, [6.0, 12.0]), (after, before, [6.0, 12.0])):
        update = measure(base, tuned)
        found = update.table.set_index("matrix").loc[list(before), "frobenius"]
        assert found.tolist() == pytest.approx(sizes, rel=1e-6) and not update.left_out


def test_means_count_only_what_is_defined_on_both_sides():
    table = pd.DataFrame(
        {
            "block": "mlp",
            "parameters": [1, 1, 1, 1, 1],
            "stable_rank": [1.0, 2.0, float("nan"), float("nan"), float("inf")],
            "stable_rank_null": [2.0, 3.5, 100.0, 100.0, 100.0],
        }
    )
    row = overall_means(table).loc["stable_rank"]
    assert (row["value"], row["null"], row["ratio"]) == pytest.approx((1.5, 2.75, 1.5 / 2.75))
    assert row["z"] == pytest.approx(-1.25 / 0.25)


def test_a_killed_process_is_one_sentence(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "Job", DyingJob)
    with pytest.raises(OpdlabError, match="was killed, perhaps for lack of memory: use fewer --processes"):
        measure(pair[0], pair[1:], out=tmp_path / "out", processes=2)


class DyingJob(Job):
    """A job whose process is killed."""

    def measure(self, name):
        """End this process as a kill would."""
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_did_not_move_is_counted(pair, tmp_path):
    """One matrix of attention moves: the others count in the sparsity, and have no null at equal norm."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned = variant(pair, tmp_path / "tuned", lambda state: state.update({name: state[name] + 0.01}))
    table = measure(pair[0], [tuned], out=tmp_path / "out").table
    overall = json.loads((tmp_path / "out" / "summary.json").read_text())["groups"]["overall"]
    layers = table[table["block"].isin(["attention", "mlp"])]
    unchanged = np.average(layers["sparsity"], weights=layers["parameters"])
    assert overall["sparsity"]["value"] == pytest.approx(unchanged) and unchanged > 0.8
    assert overall["sparsity"]["defined"] == 14 and overall["stable_rank"]["defined"] == 1
    moved = layers.set_index("matrix").loc[name]
    assert overall["sparsity"]["at equal norm"] == pytest.approx(moved["sparsity_matched"])


@pytest.mark.parametrize("moved", ["model.embed_tokens.weight", "model.norm.weight"])
def test_an_update_outside_the_layers(pair, tmp_path, moved):
    tuned = variant(pair, tmp_path / "tuned", lambda state: state.update({moved: state[moved] + 0.01}))
    measure(pair[0], [tuned], out=tmp_path / "out")
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


def test_weights_of_other_shapes(pair, tmp_path):
    """A gate of one row, a vector of attention, an unused buffer: each measured as far as it goes."""
    others = {
        "model.layers.0.mlp.shared_expert_gate.weight": torch.ones(1, 16),
        "model.layers.0.self_attn.sinks": torch.ones(8),
        "model.embeddings.position_ids": torch.arange(5),
    }
    base = variant(pair, tmp_path / "base", lambda state: state.update(others))
    shift = {name: tensor + 0.1 for name, tensor in others.items() if tensor.is_floating_point()}
    for name in ("one", "two"):
        change = others | shift | {"model.layers.0.mlp.up_proj.weight": torch.randn(24, 16)}
        tuned = variant(pair, tmp_path / name, lambda state, change=change: state.update(change))
        table = measure(base, [tuned], out=tmp_path / f"out-{name}").table.set_index("matrix")
    assert table.loc["model.layers.0.self_attn.sinks", "block"] == "other"
    assert table.loc["model.layers.0.mlp.shared_expert_gate.weight", "sparsity"] == 0
    compared = compare([tmp_path / "out-one", tmp_path / "out-two"])
    assert len(compared.pairs) == 14
    means = compared.means.iloc[0]
    assert means["cosine_matrices"] == 1 and means["sim_right_random_K16"] == 1


def test_the_cache_tells_dtypes_apart(tmp_path):
    bits = torch.randint(1, 2**14, (12, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        w0 = bits.view(dtype)
        found, expected = base_svd(w0, 2, tmp_path), g.svd(w0)
        assert torch.allclose(found.s, expected.s)


def test_two_checkpoints_of_one_step(tmp_path):
    for name in ("checkpoint-5", "epoch-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(OpdlabError, match="are of one step"):
        find_trajectory(tmp_path)


def test_what_cannot_be_compared(pair, tmp_path):
    base = pair[0]
    same = variant(pair, tmp_path / "same", lambda state: None)
    query = "model.layers.1.self_attn.q_proj.weight"
    fewer = variant(pair, tmp_path / "fewer", lambda state: state.pop(query))
    wider = variant(pair, tmp_path / "wider", lambda state: state.update({"model.norm.weight": torch.zeros(9)}))
    broken = variant(pair, tmp_path / "broken", lambda state: state["model.norm.weight"].fill_(float("nan")))
    for i, (tuned, message) in enumerate(
        (
            (base, "are the same checkpoint"),
            (same, "hold the same weights"),
            (fewer, f"1 matrices of the layers are in one of them only, such as {query} in .*base"),
            (wider, r"model.norm.weight is \(16,\) in .*base and \(9,\) in .*wider"),
            (broken, "model.norm.weight in .*broken has entries that are not finite"),
        )
    ):
        with pytest.raises(OpdlabError, match=message):
            measure(base, [tuned], out=tmp_path / str(i))
        assert not (tmp_path / str(i) / "matrices.csv").exists()
    with pytest.raises(OpdlabError, match=r"device 'nowhere' cannot be used here \(.*\): give cpu"):
        measure(base, pair[1:], out=tmp_path / "out", device="nowhere")
    with pytest.raises(OpdlabError, match="would be written into the checkpoint"):
        measure(base, pair[1:], out=pair[1])
    for path, processes, said in (([], 1, "tuned is empty"), (pair[1:], 0, "processes is 0; expected 1 or more")):
        with pytest.raises(OpdlabError, match=said):
            measure(base, path, out=tmp_path / "out", processes=processes)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OpdlabError, match="cannot be written"):
        measure(pair[0], pair[1:], out=blocked)


@pytest.mark.parametrize("name", ["summary.json", "report.html", "job.json", "matrices.csv", "compare.html"])
def test_files_of_somebody_else_are_not_overwritten(name, tmp_path):
    w0s, out = {"layers.0.mlp.up_proj.weight": torch.eye(4)}, tmp_path / "out"
    moved = [{key: w0 * size for key, w0 in w0s.items()} for size in (2, 3)]
    updates = [measure(w0s, one, out=out) for one in moved]  # over its own results it may write
    compare(updates, out=out)
    compare(updates, out=out)
    (tmp_path / name).write_text('{"theirs": 1}')
    for call in (partial(measure, w0s, moved[0]), partial(compare, updates)):
        with pytest.raises(OpdlabError, match=f"{name} is no result of opdlab: choose another folder"):
            call(out=tmp_path)
    assert (tmp_path / name).read_text() == '{"theirs": 1}' and len(list(tmp_path.iterdir())) == 2


def test_the_command(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPDLAB_CACHE", str(tmp_path / "cache"))
    assert main(["measure", str(pair[0]), str(pair[1]), "--processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert "stable_rank" in printed and "at equal norm" in printed and "geometry-tuned/matrices.csv" in printed
    assert main(["measure", str(pair[0])]) == 2
    assert "either checkpoints, or --trajectory" in capsys.readouterr().err
    assert main(["measure", str(pair[0]), "nowhere"]) == 2
    assert "there is no checkpoint nowhere" in capsys.readouterr().err
