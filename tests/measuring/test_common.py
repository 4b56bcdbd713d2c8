"""What two checkpoints have in common is measured; what is left out is said; other layers are refused."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from opdlab.errors import OpdlabError
from opdlab.measuring.compare import compare
from opdlab.measuring.update import measure as measure_all

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

measure = partial(measure_all, nulls=False)  # in less time


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A base with a head of its own, and what was tuned from it."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, tie_word_embeddings=False))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.002 * torch.randn_like(weight))
    model.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture(scope="module")
def whole(untied):
    """The update when both sides have everything."""
    return measure(untied / "base", untied / "tuned")


@pytest.fixture
def variant(untied, tmp_path):
    """Makes a copy of a checkpoint with other tensors or configuration."""

    def make(name, change=None, end="tuned", **config):
        folder = tmp_path / name
        shutil.copytree(untied / end, folder)
        weights = load_file(folder / "model.safetensors")
        save_file((change(weights) if change else weights) or weights, folder / "model.safetensors")
        found = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(found))
        return folder

    return make


def assert_same_layers(update, whole):
    """The means, and the row of every matrix of the layers, are those of the whole."""
    pd.testing.assert_frame_equal(update.means, whole.means)
    ours, theirs = (one.table.query("layer >= 0").set_index("matrix") for one in (update, whole))
    pd.testing.assert_frame_equal(ours.loc[theirs.index], theirs[list(ours)])


def left(update):
    return {one.name: one for one in update.left_out}


def test_other_numbers_of_rows(untied, whole, variant):
    """A vocabulary that was padded, on either side: the rows that both have, against numpy."""

    def pad(weights):
        for name in (EMBEDDING, HEAD):
            weights[name] = torch.cat([weights[name], torch.ones(8, 16)])

    longer = variant("longer", pad)
    update = measure(untied / "base", longer)
    assert_same_layers(update, whole)
    assert len(update.table) == len(whole.table)
    row = update.table.set_index("matrix").loc[EMBEDDING]
    w0, w1 = (load_file(untied / end / "model.safetensors")[EMBEDDING].double().numpy() for end in ("base", "tuned"))
    assert row["frobenius"] == pytest.approx(np.linalg.norm(w1 - w0), rel=1e-12) and row["rows"] == 24
    assert left(update)[EMBEDDING].reason == "longer has 32 rows, and 24 are in common"
    total = sum(w.numel() for w in load_file(longer / "model.safetensors").values())
    assert left(update)[EMBEDDING].share == 8 * 16 / total
    back = measure(longer, untied / "base", embeddings=True)
    assert back.table.set_index("matrix").loc[EMBEDDING, "frobenius"] == pytest.approx(row["frobenius"])
    assert pd.notna(back.table.set_index("matrix").loc[EMBEDDING, "stable_rank"])


@pytest.mark.parametrize(
    ("dropped", "added"),
    [
        ([], {"mtp.layers.0.mlp.up_proj.weight": (24, 16), "mtp.fc.weight": (16, 32)}),
        ([HEAD], {"score.weight": (1, 16)}),
        ([], {"v_head.summary.weight": (1, 16), "v_head.summary.bias": (1,)}),
        ([], {"model.visual.blocks.0.attn.qkv.weight": (48, 16), "visual.merger.mlp.0.weight": (16, 16)}),
        ([], {"model.layers.0.self_attn.rotary_emb.scale": (4,)}),
    ],
)
def test_what_one_side_alone_has_is_left_out_and_said(dropped, added, untied, whole, variant, tmp_path):
    def change(weights):
        kept = {name: w for name, w in weights.items() if name not in dropped}
        return kept | {name: torch.ones(shape) for name, shape in added.items()}

    update = measure(untied / "base", variant("other", change), out=tmp_path / "out")
    assert_same_layers(update, whole)
    assert len(left(update)) >= len(dropped) + len(added)
    assert all("does not" in one.reason for one in update.left_out)
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert saved["left_out"] == [one._asdict() for one in update.left_out]
    for note in saved["notes"]:
        assert note in repr(update) and note in (tmp_path / "out" / "report.html").read_text()
    assert any("Left out: " in note and "%" in note for note in saved["notes"])
    # The other way round.
    assert left(measure(variant("back", change), untied / "base")).keys() == left(update).keys()


def test_layers_that_predict_further_ahead_are_no_layers_of_the_trunk(untied, whole, variant):
    """DeepSeek appends them to the layers, and transformers drops them: its config says where they begin."""

    def append(weights):
        extra = {name.replace("layers.1.", "layers.2."): w + 1 for name, w in weights.items() if "layers.1." in name}
        return weights | extra | {"model.layers.2.eh_proj.weight": torch.ones(16, 32)}

    more = variant("more", append, "base", num_nextn_predict_layers=1)
    update = measure(more, untied / "tuned")
    assert_same_layers(update, whole)
    assert all(name.startswith("mtp.layers.0.") for name in left(update))
    both = measure(more, variant("also", append, num_nextn_predict_layers=1))
    assert_same_layers(both, whole)
    assert set(both.table.query("layer >= 0").query("block == 'mtp'")["layer"]) == {0}


def test_a_tied_head_is_the_embedding(untied, variant):
    """One side ties its embeddings, and the other trained a head: that is an update of the embedding's copy."""
    tied = variant(
        "tied", lambda weights: {n: w for n, w in weights.items() if n != HEAD}, "base", tie_word_embeddings=True
    )
    row = measure(tied, untied / "tuned").table.set_index("matrix").loc[HEAD]
    w0 = load_file(tied / "model.safetensors")[EMBEDDING].double().numpy()
    w1 = load_file(untied / "tuned" / "model.safetensors")[HEAD].double().numpy()
    assert row["frobenius"] == pytest.approx(np.linalg.norm(w1 - w0), rel=1e-12)
    body = variant(
        "body", lambda weights: {n: w for n, w in weights.items() if n != HEAD}, architectures=["Qwen3Model"]
    )
    assert left(measure(untied / "base", body))[HEAD].reason == "base has it and body does not"


def test_a_text_only_export_of_a_vision_language_model(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**SIZES), vision_config=tf.CLIPVisionConfig(**vision))
    model = tf.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    text = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad():
        text.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    text.save_pretrained(tmp_path / "text")
    update = measure(tmp_path / "base", tmp_path / "text")
    moved = update.table[update.table["frobenius"] > 0]
    assert moved["matrix"].tolist() == [QUERY]
    weight = text.model.layers[0].self_attn.q_proj.weight.detach().double().numpy()
    assert moved["frobenius"].item() == pytest.approx(np.linalg.norm(weight - weight / 1.01), rel=1e-6)
    assert set(name.split(".")[0] for name in left(update)) == {"vision_tower", "multi_modal_projector"}


def test_on_the_way_too(untied, whole, variant):
    """A trajectory of checkpoints of which one lacks the head, and one has a longer vocabulary."""
    longer = variant("checkpoint-1", lambda w: w | {EMBEDDING: torch.cat([w[EMBEDDING], torch.ones(8, 16)])})
    headless = variant("checkpoint-2", lambda w: {n: x for n, x in w.items() if n != HEAD})
    update = measure(untied / "base", [longer, headless, untied / "tuned"])
    assert left(update).keys() == {EMBEDDING, HEAD} and HEAD not in set(update.table["matrix"])
    assert_same_layers(update, whole)


def test_other_layers_are_refused_with_the_true_reason(untied, variant):
    torch.manual_seed(0)
    deeper = variant(
        "deeper", lambda w: w | {n.replace("s.1.", "s.2."): x.clone() for n, x in w.items() if "s.1." in n}
    )
    wider = variant("wider", lambda w: w | {QUERY: torch.ones(32, 16)})
    fewer = variant("fewer", lambda w: {n: x for n, x in w.items() if n != QUERY})
    norm = variant("norm", lambda w: w | {"model.norm.weight": torch.ones(9)})
    alien = variant("alien", lambda w: {"moments": torch.ones(3)})
    for tuned, message in (
        (deeper, "base has 2 layers and .*deeper has 3: give a model and what was tuned from it"),
        (wider, rf"{QUERY} is \(16, 16\) in .*base and \(32, 16\) in .*wider: give a model"),
        (
            fewer,
            f"different architectures: 1 matrices of the layers are in one of them only, such as {QUERY} in .*base",
        ),
        (norm, r"model.norm.weight is \(16,\) in .*base and \(9,\) in .*norm"),
        (alien, "base has 2 layers and .*alien has 0"),
    ):
        with pytest.raises(OpdlabError, match=message):
            measure(untied / "base", tuned)


def test_adapters_of_a_small_rank_are_compared_at_their_rank(untied, tmp_path):
    """Each pair at the largest K that both updates have; and that their bases differ is said."""
    shutil.copytree(untied / "base", tmp_path / "again")
    base = load_file(untied / "base" / "model.safetensors")
    shutil.copytree(untied / "base", tmp_path / "moved")
    save_file(base | {QUERY: base[QUERY] + 0.01}, tmp_path / "moved" / "model.safetensors")
    generator, updates = torch.Generator().manual_seed(0), []
    for name, rank, origin in (
        ("low", 4, untied / "base"),
        ("also", 4, untied / "base"),
        ("full", 16, tmp_path / "again"),
        ("other", 16, tmp_path / "moved"),
    ):

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tuned = {key: w.double() for key, w in base.items()}
        for key, w in tuned.items():
            if "layers" in key and w.ndim > 1:
                w += 0.01 * draw(len(w), rank) @ draw(rank, w.shape[1])
        (tmp_path / name).mkdir()
        save_file(tuned, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes((untied / "base" / "config.json").read_bytes())
        updates.append(measure(origin, tmp_path / name, out=tmp_path / f"out-{name}"))
    compared = compare([updates[0], updates[1]], out=tmp_path / "two")
    assert compared.means["sim_right_K4"].notna().all() and len(compared.notes) == 1
    # What is stored twice is one base; what differs in a weight is not.
    assert len(compare([updates[0], updates[2]]).notes) == 1
    compared = compare([*updates[:2], updates[3]])
    means = compared.means.set_index(["a", "b"])
    assert means.loc[("low", "also"), "sim_right_K4"] == pytest.approx(
        compared.pairs.query("b == 'also'")["sim_right_K4"].mean()
    )
    assert "different bases: low from" in repr(compared) and "other from" in compared.notes[1]
