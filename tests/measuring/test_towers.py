"""Models of several towers, of encoder and decoder, and without attention: what the means are of, and what is apart."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from opdlab.cli import main
from opdlab.geometry.matrices import describe
from opdlab.geometry.summary import apart
from opdlab.measuring.update import measure

TEXT = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


def save_pair(model, folder, chosen=lambda name: True, scale=0.002):
    """Save a model, and what noise on the chosen weights made of it."""
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if chosen(name):
                weight.add_(scale * torch.randn_like(weight))
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def bf16_sparsity(pair, names):
    """The share of weights that round to the same bfloat16, over all of them together, by numpy alone."""
    ends = [load_file(end / "model.safetensors") for end in pair]
    rounded = [
        np.concatenate([w[name].numpy().ravel() for name in names]).astype(np.float32).view(np.uint32).astype(np.uint64)
        for w in ends
    ]
    low, high = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 for bits in rounded)
    return float((low == high).mean())


def test_a_frozen_tower_is_not_in_the_means(tmp_path, monkeypatch, capsys):
    config = tf.Gemma3Config(text_config=TEXT | {"head_dim": 4}, vision_config=VISION)
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(config)
    pair = save_pair(model, tmp_path, lambda name: "language_model" in name)
    monkeypatch.chdir(tmp_path)
    assert main(["measure", *map(str, pair), "--out", "out", "--processes", "1", "--no-cache", "--no-nulls"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    stored = load_file(pair[0] / "model.safetensors")
    names = [name for name, w in stored.items() if "language_model" in name and "layers" in name and w.ndim == 2]
    overall = summary["groups"]["overall"]
    assert overall["tensors"] == len(names) == 14
    assert overall["sparsity"]["value"] == pytest.approx(bf16_sparsity(pair, names), rel=1e-12)
    assert summary["groups"]["vision"]["sparsity"]["value"] == 1
    report = (tmp_path / "out" / "report.html").read_text()
    said = "14 matrices of attention and MLP of the language model"
    for text in (printed, report, " ".join(summary["notes"])):
        assert said in text and "vision (" in text
    assert "apart from the means" in printed and "apart from the means" in report
    assert "Apart from the means, vision" not in report, "what did not move is not drawn"


def test_a_tower_that_moved_is_drawn_apart(tmp_path):
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**VISION))
    torch.manual_seed(0)
    pair = save_pair(tf.LlavaForConditionalGeneration(config), tmp_path)
    update = measure(*pair, out=tmp_path / "out", nulls=False)
    assert apart(update.table).loc["vision", "matrices"] == 3 * 6
    assert "Apart from the means, vision" in (tmp_path / "out" / "report.html").read_text()
    assert set(update.table.query("block == 'vision'")["layer"]) == {0, 1, 2}
    assert set(update.table.query("block == 'projector'")["module"]) == {"linear_1", "linear_2"}


def test_the_tower_of_audio(tmp_path):
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
    config = tf.Qwen2AudioConfig(text_config=tf.Qwen2Config(**TEXT), audio_config=audio)
    torch.manual_seed(0)
    pair = save_pair(tf.Qwen2AudioForConditionalGeneration(config), tmp_path)
    update = measure(*pair, nulls=False)
    assert apart(update.table).loc["audio", "matrices"] == 6
    assert update.means.loc["frobenius", "value"] == pytest.approx(
        update.table[update.table["block"].isin(["attention", "mlp"])]["frobenius"].mean()
    )


def test_encoder_and_decoder_have_their_layers_numbered(tmp_path):
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=24, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=4, num_heads=4)
    pair = save_pair(tf.T5ForConditionalGeneration(config), tmp_path)
    table = measure(*pair, nulls=False).table.set_index("matrix")
    assert table.loc["decoder.block.3.layer.1.EncDecAttention.q.weight", ["layer", "block"]].tolist() == [
        3,
        "attention",
    ]
    assert table.loc["encoder.block.2.layer.1.DenseReluDense.wo.weight", ["layer", "block"]].tolist() == [2, "mlp"]
    bias = table.loc["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert bias["block"] == "bias" and bias["cols"] == 1
    inside = table[table["block"].isin(["attention", "mlp"])]
    assert len(inside) == 3 * 6 + 4 * 10 and set(inside["layer"]) == {0, 1, 2, 3}


def test_a_model_without_attention_has_the_means_of_what_there_is(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=2, state_size=4)
    pair = save_pair(tf.MambaForCausalLM(config), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["measure", *map(str, pair), "--out", "out", "--processes", "1", "--no-cache", "--no-nulls"]) == 0
    printed, report = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    said = "the 8 matrices of the layers, as this model has no attention and no MLP"
    for text in (printed, report, " ".join(summary["notes"])):
        assert said in text
    stored = load_file(pair[0] / "model.safetensors")
    names = [name for name, w in stored.items() if name.endswith("proj.weight") and w.ndim == 2]
    assert summary["groups"]["overall"]["sparsity"]["value"] == pytest.approx(bf16_sparsity(pair, names), rel=1e-12)
    assert "<img" in report and "conv1d" in printed


def test_a_hybrid_has_the_means_of_attention_and_mlp(tmp_path):
    torch.manual_seed(0)
    config = tf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])
    pair = save_pair(tf.Lfm2ForCausalLM(config), tmp_path)
    update = measure(*pair, nulls=False)
    assert set(update.table.query("block == 'mixer'")["module"]) == {"in_proj", "out_proj"}
    assert apart(update.table).index.tolist() == ["mixer"] and "mixer (" in repr(update)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.router.weight", "router"),
        ("model.layers.0.feed_forward.router.weight", "router"),
        ("model.layers.0.mlp.gate.wg.weight", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "mlp"),
        ("model.layers.0.mlp.experts.down_proj_bias", "bias"),
        ("model.layers.0.ffn.experts.mlp.w1", "stacked"),
        ("model.layers.0.mixer.A_log", "other"),
        ("model.layers.0.mixer.q_proj.weight", "attention"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision"),
        ("visual.merger.mlp.0.weight", "vision"),
        ("visual.blocks.0.norm1.weight", "norm"),
        ("talker.model.layers.0.mlp.up_proj.weight", "audio"),
        ("v_head.summary.weight", "head"),
        ("score.weight", "head"),
        ("shared.weight", "embedding"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("backbone.blocks.0.mlstm_layer.q.weight", "attention"),
        ("backbone.blocks.0.mlstm_layer.out_proj.weight", "attention"),
        ("backbone.blocks.0.mlstm_layer.multihead_norm.weight", "norm"),
        ("model.embedding_norm.weight", "norm"),
    ],
)
def test_blocks(name, block):
    assert describe(name).block == block
