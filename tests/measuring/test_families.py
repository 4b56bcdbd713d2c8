"""Twelve families go through ``opdlab measure``, and through the callback in a real Trainer; NumPy is the reference."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)

from opdlab.cli import main
from opdlab.measuring.callback import GeometryCallback
from opdlab.measuring.update import measure
from opdlab.models.folders import with_weights

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS, EXPERTS = {"head_dim": 8}, {"num_experts_per_tok": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8, "projection_dim": 16, "model_type": "clip_vision_model"}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LLAVA = {"vision_config": VISION, "text_config": SHAPE | {"model_type": "llama"}, "image_token_index": 63}
#: The configuration of each, and for some of the matrices that ``opdlab measure`` names where a file has them.
LAYER, STORED = "model.layers.1.", "model.layers.1."
FAMILIES = {
    "llama": (SHAPE, {f"{LAYER}self_attn.k_proj": lambda w: w[f"{LAYER}self_attn.k_proj.weight"]}),
    "qwen3": (
        SHAPE | HEADS | {"tie_word_embeddings": True},
        {f"{LAYER}mlp.down_proj": lambda w: w[f"{LAYER}mlp.down_proj.weight"]},
    ),
    "gemma2": (SHAPE | HEADS, {f"{LAYER}mlp.up_proj": lambda w: w[f"{LAYER}mlp.up_proj.weight"]}),
    "gemma3_text": (SHAPE | HEADS, {f"{LAYER}self_attn.o_proj": lambda w: w[f"{LAYER}self_attn.o_proj.weight"]}),
    "phi3": (
        SHAPE,
        {
            f"{LAYER}self_attn.k_proj": lambda w: w[f"{LAYER}self_attn.qkv_proj.weight"][32:48],
            f"{LAYER}mlp.up_proj": lambda w: w[f"{LAYER}mlp.gate_up_proj.weight"][48:],
        },
    ),
    "gpt2": (
        GPT2,
        {
            "transformer.h.1.attn.v_proj": lambda w: w["transformer.h.1.attn.c_attn.weight"].T[64:],
            "transformer.h.1.mlp.c_fc": lambda w: w["transformer.h.1.mlp.c_fc.weight"].T,
        },
    ),
    "qwen3_moe": (
        SHAPE | HEADS | EXPERTS | {"moe_intermediate_size": 16, "num_experts": 4},
        {f"{LAYER}mlp.experts.3.up_proj": lambda w: w[f"{LAYER}mlp.experts.3.up_proj.weight"]},
    ),
    "mixtral": (
        SHAPE | EXPERTS | {"num_local_experts": 4},
        {f"{LAYER}mlp.experts.2.up_proj": lambda w: w[f"{LAYER}block_sparse_moe.experts.2.w3.weight"]},
    ),
    "gpt_oss": (
        SHAPE | HEADS | EXPERTS | {"num_local_experts": 4},
        {
            f"{LAYER}mlp.experts.2.up_proj": lambda w: w[f"{LAYER}mlp.experts.gate_up_proj"][2, :, 1::2].T,
            f"{LAYER}mlp.experts.2.down_proj": lambda w: w[f"{LAYER}mlp.experts.down_proj"][2].T,
        },
    ),
    "mamba": (
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16},
        {"model.layers.1.mixer.in_proj": lambda w: w["backbone.layers.1.mixer.in_proj.weight"]},
    ),
    "t5": (
        T5,
        {"decoder.block.1.layer.1.EncDecAttention.k": lambda w: w["decoder.block.1.layer.1.EncDecAttention.k.weight"]},
    ),
    "llava": (LLAVA, {f"{LAYER}mlp.up_proj": lambda w: w["language_model.model.layers.1.mlp.up_proj.weight"]}),
}
CLASSES = {"t5": AutoModelForSeq2SeqLM, "llava": AutoModelForImageTextToText}


@pytest.fixture(scope="session", params=FAMILIES)
def trained(request, tmp_path_factory):
    """Of a family: its name, the folder of a random model, and a folder with snapshots and the model after training."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = CLASSES.get(name, AutoModelForCausalLM).from_config(AutoConfig.for_model(name, **FAMILIES[name][0]))
    model.save_pretrained(folder / "base")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (16, 12))]
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 4}
    args = TrainingArguments(folder / "run", per_device_train_batch_size=4, learning_rate=3e-3, **options)
    trainer = Trainer(model, args=args, train_dataset=data)
    snapshots = {"snapshots": str(folder / "snapshots"), "snapshot_steps": [2, 4]}
    matrices = r"attn|attention|mlp|mixer\..*_proj|DenseReluDense"
    trainer.add_callback(GeometryCallback(trainer, every=2, k=2, matrices=matrices, **snapshots))
    trainer.train()
    model.save_pretrained(folder / "end")
    logged = [entry for entry in trainer.state.log_history if "geometry/relative_norm" in entry][-1]
    return name, folder, logged


def weights(folder):
    return {name: weight.double().numpy() for name, weight in load_file(folder / "model.safetensors").items()}


def relative_norm(w0, w1):
    return np.linalg.norm(w1 - w0) / np.linalg.norm(w0)


def in_bf16(w):
    """Round to the nearest of eight bits, ties to even, as bf16 stores numbers."""
    bits = w.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def test_the_end_of_a_family_is_measured(trained):
    name, folder, _ = trained
    found = measure(folder / "base", folder / "end", nulls=False).table.set_index("matrix")
    before, after = weights(folder / "base"), weights(folder / "end")
    # Nothing is lost: the rows are all parameters of the files, and the whole update.
    assert found["parameters"].sum() == sum(w.size for w in before.values())
    whole = np.sqrt(sum(np.sum((after[stored] - w) ** 2) for stored, w in before.items()))
    assert np.linalg.norm(found["frobenius"]) == pytest.approx(whole, rel=1e-12)
    for matrix, take in FAMILIES[name][1].items():
        w0, w1 = take(before), take(after)
        row = found.loc[f"{matrix}.weight"]
        assert (row["rows"], row["cols"]) == w0.shape
        assert row["relative_norm"] == pytest.approx(relative_norm(w0, w1), rel=1e-12)
        assert row["sparsity"] == np.mean(in_bf16(w0) == in_bf16(w1))
        assert row["stable_rank"] == pytest.approx(np.sum((w1 - w0) ** 2) / np.linalg.norm(w1 - w0, 2) ** 2, rel=1e-9)


def test_the_snapshots_of_a_family_are_what_transformers_saves(trained):
    _, folder, _ = trained
    last, end = load_file(folder / "snapshots" / "step-000004.safetensors"), load_file(folder / "end/model.safetensors")
    assert last.keys() == end.keys() and all(last[name].equal(weight) for name, weight in end.items())
    kinds = [json.loads((folder / where / "config.json").read_text())["model_type"] for where in ("snapshots", "end")]
    assert kinds[0] == kinds[1]


def test_the_callback_says_what_the_snapshots_say(trained, tmp_path, capsys):
    name, folder, logged = trained
    command = ["measure", f"{folder / 'base'}", "--trajectory", f"{folder / 'snapshots'}", "--no-nulls"]
    assert main([*command, "--out", f"{tmp_path}"]) == 0
    found = pd.read_csv(tmp_path / "matrices.csv")
    followed = found[found["block"].isin(["mixer"] if name == "mamba" else ["attention", "mlp"])]
    assert logged["geometry/relative_norm"] == pytest.approx(followed["relative_norm"].mean(), rel=1e-6)
    assert logged["geometry/sparsity"] == pytest.approx(followed["sparsity"].mean(), rel=1e-6)
    assert logged["geometry/stable_rank"] == pytest.approx(followed["stable_rank"].mean(), rel=1e-6)
    assert pd.read_csv(tmp_path / "trajectory.csv")["step"].unique().tolist() == [2, 4]
    assert "relative_norm" in capsys.readouterr().out


def test_snapshots_are_read_without_their_configuration_and_loaded_again(trained, tmp_path):
    """A file alone is taken for the base's model; a model is given weights by either of its names."""
    name, folder, _ = trained
    if name not in ("phi3", "mixtral", "gpt_oss"):
        pytest.skip("its matrices are stored one by one")
    save_file(load_file(folder / "end" / "model.safetensors"), tmp_path / "alone.safetensors")
    found = measure(folder / "base", tmp_path / "alone.safetensors", nulls=False).table
    pd.testing.assert_frame_equal(found, measure(folder / "base", folder / "end", nulls=False).table)
    model, last = (AutoModelForCausalLM.from_pretrained(folder / where) for where in ("base", "end"))
    for called in (load_file(folder / "end" / "model.safetensors"), dict(last.named_parameters())):
        given = dict(with_weights(model, called).named_parameters())
        assert all(given[name].equal(weight) for name, weight in last.named_parameters())
