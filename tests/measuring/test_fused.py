"""Fused and stacked weights come out as their matrices, and one update has one set of means however it is stored.

The references are what transformers computes with the same weights, and its own conversion between its formats.
"""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from opdlab.geometry.matrices import describe, identity
from opdlab.geometry.summary import overall_means
from opdlab.measuring.update import measure
from opdlab.models.checkpoints import open_checkpoint

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 8}
GPT = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


def granite():
    return tf.GraniteMoeConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"}, num_local_experts=3)


def llava():
    return tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**VISION))


def qwen_vl():
    rope = {"type": "mrope", "mrope_section": [1, 1], "rope_type": "default"}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 8}
    return tf.Qwen2_5_VLConfig(text_config=TEXT | {"rope_scaling": rope}, vision_config=vision)


FAMILIES = {
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**TEXT, **EXPERTS),
    "mixtral": lambda: tf.MixtralConfig(**TEXT, num_local_experts=3),
    "phimoe": lambda: tf.PhimoeConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"}, num_local_experts=3),
    "gpt_oss": lambda: tf.GptOssConfig(**TEXT | {"intermediate_size": 12}, num_local_experts=3, num_experts_per_tok=2),
    "llama4": lambda: tf.Llama4TextConfig(**TEXT, intermediate_size_mlp=32, num_local_experts=2),
    "granitemoe": granite,
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **TEXT | {"num_hidden_layers": 4}, **EXPERTS, **LINEAR, shared_expert_intermediate_size=12
    ),
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(**TEXT | {"num_hidden_layers": 4}, **LINEAR),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, intermediate_size=24, max_position_embeddings=8),
    "gemma3": lambda: tf.Gemma3Config(text_config=TEXT, vision_config=VISION),
    "llava": llava,
    "qwen2_5_vl": qwen_vl,
}


def make(config, seed=0):
    torch.manual_seed(seed)
    kinds = (tf.AutoModelForCausalLM, tf.AutoModelForImageTextToText)
    kind = kinds["vision_config" in config.to_dict()]
    return kind.from_config(config)


def nudge(model, chosen=lambda name: True):
    """Add noise to the chosen weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if chosen(name):
                weight.add_(0.002 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_both_formats_of_transformers_are_one_model(family, tmp_path):
    """As the hub has it and as transformers 5 has it: the same names, and the same numbers to the last bit."""
    model = make(FAMILIES[family]())
    model.save_pretrained(tmp_path / "hub")
    nudge(model)
    model.save_pretrained(tmp_path / "tuned")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    opened = [open_checkpoint(tmp_path / folder) for folder in ("tuned", "new", "hub")]
    assert opened[0].pieces.keys() == opened[1].pieces.keys() == opened[2].pieces.keys()
    assert all(torch.equal(opened[0].read(name), opened[1].read(name)) for name in opened[0].pieces)
    described = [identity(name, piece.shape) for name, piece in opened[0].pieces.items()]
    blocks = pd.DataFrame(described).query("rows > 1 and cols > 1 and layer >= 0")["block"]
    assert set(blocks) <= {"attention", "mlp", "router", "vision"}, "nothing is left fused"
    same = [measure(tmp_path / "hub", tmp_path / folder).table for folder in ("tuned", "new")]
    pd.testing.assert_frame_equal(*same)


def test_means_do_not_depend_on_how_experts_are_stored(tmp_path):
    """Per expert, stacked, and each fused: written by hand from one set of matrices."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, count = 16, 12, 3

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    gate, up, down = draw(count, inner, hidden), draw(count, inner, hidden), draw(count, hidden, inner)
    mlp, router = "model.layers.0.mlp", {"model.layers.0.mlp.gate.weight": draw(count, hidden)}
    single = {f"{mlp}.experts.{i}.{name}_proj.weight": w[i].clone() for i in range(count)
              for name, w in (("gate", gate), ("up", up), ("down", down))}  # fmt: skip
    mixtral = {
        name.replace("mlp", "block_sparse_moe")
        .replace("gate_proj", "w1")
        .replace("up_proj", "w3")
        .replace("down_proj", "w2"): w
        for name, w in single.items()
    }
    mixtral["model.layers.0.block_sparse_moe.gate.weight"] = router["model.layers.0.mlp.gate.weight"]
    stacked = {f"{mlp}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{mlp}.experts.down_proj": down}
    mixed = torch.stack([gate, up], 2).reshape(count, 2 * inner, hidden).transpose(1, 2).contiguous()
    turned = {f"{mlp}.experts.gate_up_proj": mixed, f"{mlp}.experts.down_proj": down.transpose(1, 2).contiguous()}
    forms = {"qwen3_moe": single | router, "mixtral": mixtral, "stacked": stacked | router, "gpt_oss": turned | router}
    tables = {}
    for family, weights in forms.items():
        for end, change in (("base", 0), ("tuned", 1)):
            folder = tmp_path / f"{family}-{end}"
            folder.mkdir()
            change = {name: w + change * 0.01 * w.sin() for name, w in weights.items()}
            save_file(change, folder / "model.safetensors")
            (folder / "config.json").write_text(f'{{"model_type": "{family}", "hidden_size": {hidden}}}')
        tables[family] = measure(tmp_path / f"{family}-base", tmp_path / f"{family}-tuned").table
    first, *others = (table.sort_values("matrix", ignore_index=True) for table in tables.values())
    for other in others:
        pd.testing.assert_frame_equal(first, other, check_exact=True)
    assert set(first["block"]) == {"mlp", "router"} and len(first) == 3 * count + 1
    w0 = gate[1].double().numpy()
    delta = (gate[1] + 0.01 * gate[1].sin()).double().numpy() - w0
    row = first.set_index("matrix").loc[f"{mlp}.experts.1.gate_proj.weight"]
    singular = np.linalg.svd(delta, compute_uv=False)
    assert row["stable_rank"] == pytest.approx((singular**2).sum() / singular[0] ** 2, rel=1e-12)
    assert overall_means(first).loc["sparsity", "value"] == overall_means(tables["mixtral"]).loc["sparsity", "value"]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (tf.BloomConfig(vocab_size=24, hidden_size=16, n_layer=1, n_head=4), (16, 16)),
        (tf.FalconConfig(**SIZES), (16, 4)),
        (tf.FalconConfig(**SIZES, multi_query=False), (16, 16)),
        (tf.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True), (16, 8)),
        (tf.MptConfig(vocab_size=24, d_model=16, n_layers=1, n_heads=4, max_seq_len=8), (16, 16)),
        (tf.GPTBigCodeConfig(**GPT, n_positions=8), (16, 4)),
        (tf.GPTBigCodeConfig(**GPT, n_positions=8, multi_query=False), (16, 16)),
        (tf.PersimmonConfig(**SIZES, intermediate_size=24), (16, 16)),
    ],
)
def test_query_key_and_value_are_those_of_the_model(config, shape, tmp_path, monkeypatch):
    """What the model hands to its attention is what the split weights compute."""
    config._attn_implementation = "eager"
    model = make(config).eval()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    names = [next(name for name in checkpoint.pieces if name.endswith(f"{part}_proj.weight")) for part in "qkv"]
    q, k, v = (checkpoint.read(name) for name in names)
    assert (len(q), len(k), len(v)) == (shape[0], shape[1], shape[1])
    stored = load_file(tmp_path / "model.safetensors")
    fused = next(w for name, w in stored.items() if describe(name).block == "fused" and w.ndim == 2)
    rows = torch.cat([q, k, v])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, fused.tolist())), "each row once"
    module = next(m for name, m in model.named_modules() if name.endswith(("query_key_value", "Wqkv", "c_attn")))
    attention = next(m for m in model.modules() if module in list(m.children()))
    x = torch.randn(1, 5, 16)
    out = x @ fused.T
    if isinstance(config, tf.MptConfig):
        expected = out.chunk(3, dim=2)
    elif isinstance(config, tf.GPTBigCodeConfig):
        width = [16, 4, 4] if config.multi_query else None
        expected = out.split(width, 2) if width else out.view(1, 5, 4, 12).split(4, dim=3)
    elif isinstance(config, tf.BloomConfig):
        expected = [part.transpose(1, 2) if part.shape[1] == 4 else part for part in attention._reshape(out)]
    else:
        expected = attention._split_heads(out)
    for part, found in zip(expected, (q, k, v), strict=True):
        ours = (x @ found.T).reshape(1, 5, -1)
        theirs = part.reshape(1, 5, -1, 4)
        if theirs.shape[2] * 4 != ours.shape[2]:  # Falcon repeats a key for all queries of its group
            theirs = theirs[:, :, :: theirs.shape[2] * 4 // ours.shape[2]]
        torch.testing.assert_close(ours, theirs.reshape(1, 5, -1))


def test_linear_attention_is_split_as_the_model_does(tmp_path):
    config = FAMILIES["qwen3_next"]()
    model = make(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    layer = next(m for m in model.modules() if isinstance(m, Qwen3NextGatedDeltaNet))
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    for part, theirs in zip("qkvzba", expected, strict=True):
        ours = x @ checkpoint.read(f"model.layers.0.linear_attn.in_proj_{part}.weight").T
        torch.testing.assert_close(ours, theirs.reshape(1, 5, -1))


def test_what_no_rule_splits_is_named_with_its_share(tmp_path):
    """A family that is not known; and experts without a config to say which side is which."""
    query, mlp = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.w1.weight"
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    for name, config, share in ((query, '{"model_type": "qwen", "num_attention_heads": 2}', 0.75), (experts, "", 0.75)):
        other = mlp if name == query else "model.layers.0.mlp.shared_expert.up_proj.weight"
        shape, small = ((48, 16), (16, 16)) if name == query else ((3, 8, 16), (8, 16))
        base = {name: torch.randn(shape), other: torch.randn(small)}
        folder = tmp_path / name
        for end, factor in (("base", 1), ("tuned", 1.01)):
            (folder / end).mkdir(parents=True)
            save_file({key: w * factor for key, w in base.items()}, folder / end / "model.safetensors")
            if config:
                (folder / end / "config.json").write_text(config)
        update = measure(folder / "base", folder / "tuned")
        (left,) = update.left_out
        assert left.name == name and left.share == pytest.approx(share) and "in no mean" in left.reason
        assert f"Left out: {name} (75 % of the layers' parameters)" in repr(update)
        assert update.means.loc["frobenius", "value"] == update.table.set_index("matrix").loc[other, "frobenius"]
