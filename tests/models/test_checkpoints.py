"""Checkpoints of every layout that trainers leave behind, and of every kind that is broken."""

import json
from math import isnan

import pytest
import torch
from conftest import SMALL_SHAPE
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

from opdlab import geometry as g
from opdlab.errors import OpdlabError
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.folders import new_model

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model():
    return new_model(SMALL_SHAPE, 0)


def assert_holds(checkpoint, state):
    assert checkpoint.pieces.keys() == state.keys()
    for name, weight in state.items():
        assert tuple(weight.shape) == checkpoint.pieces[name].shape
        assert torch.equal(checkpoint.read(name), weight)


@pytest.mark.parametrize("size", ["5GB", "8KB"])
@pytest.mark.parametrize("index", [True, False])
def test_folders_single_and_sharded(model, size, index, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=size)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "8KB")
    assert_holds(open_checkpoint(tmp_path), dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_single_files(model, dtype, tmp_path):
    state = {f"_orig_mod.{name}": weight.to(dtype) for name, weight in model.named_parameters()}
    save_file(state, tmp_path / "step.safetensors")
    assert_holds(open_checkpoint(tmp_path / "step.safetensors"), {n[10:]: w for n, w in state.items()})


def test_what_is_no_weight_is_left_out_and_layers_are_counted(tmp_path):
    names = [f"module._orig_mod.layers.{i}.mlp.up_proj.weight" for i in (0, 10, 2)]
    state = {name: torch.ones(2, 3) for name in names}
    save_file(state | {"layers.0.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"moment": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.pieces) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2, 10)]
    assert checkpoint.dtypes == "float32"


def test_tied_embeddings_come_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(tmp_path), state)


def rotary_free(config, cls):
    torch.manual_seed(0)
    return cls(config)


def test_fused_projections_of_phi3(tmp_path):
    config = Phi3Config(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = rotary_free(config, Phi3ForCausalLM)
    model.save_pretrained(tmp_path)
    checkpoint, layer = open_checkpoint(tmp_path), model.model.layers[0]
    q, k, v = (checkpoint.read(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qkv")
    assert q.shape == (16, 16) and k.shape == v.shape == (8, 16)
    assert torch.equal(torch.cat([q, k, v]), layer.self_attn.qkv_proj.weight)
    gate, up = (checkpoint.read(f"model.layers.0.mlp.{x}_proj.weight") for x in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), layer.mlp.gate_up_proj.weight)


def test_fused_projections_of_gpt_neox(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    model = rotary_free(config, GPTNeoXForCausalLM)
    model.save_pretrained(tmp_path)
    checkpoint, attention = open_checkpoint(tmp_path), model.gpt_neox.layers[0].attention
    x = torch.randn(5, 16)
    fused = torch.nn.functional.linear(x, attention.query_key_value.weight).view(5, 4, 3, 4)
    for i, part in enumerate("qkv"):
        weight = checkpoint.read(f"gpt_neox.layers.0.attention.{part}_proj.weight")
        torch.testing.assert_close(x @ weight.T, fused[:, :, i].reshape(5, 16))


def test_gpt2_is_turned_to_outputs_by_inputs(tmp_path):
    model = rotary_free(GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=8), GPT2LMHeadModel)
    model.save_pretrained(tmp_path)
    checkpoint, block = open_checkpoint(tmp_path), model.transformer.h[0]
    prefix = next(name for name in checkpoint.pieces if name.endswith("attn.q_proj.weight")).split("attn.")[0]
    x = torch.randn(5, 16)
    with torch.no_grad():
        q, k, v = (block.attn.c_attn(x) - block.attn.c_attn.bias).split(16, dim=-1)
    for part, expected in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(x @ checkpoint.read(f"{prefix}attn.{part}_proj.weight").T, expected)
    assert checkpoint.read(f"{prefix}mlp.c_fc.weight").shape == checkpoint.pieces[f"{prefix}mlp.c_fc.weight"].shape
    assert checkpoint.pieces[f"{prefix}mlp.c_fc.weight"].shape == (64, 16)


def adapter(folder, config=None, **tensors):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora(module="self_attn.q_proj", rows=16, cols=16):
    prefix = f"base_model.model.model.layers.0.{module}"
    return {f"{prefix}.lora_A.weight": torch.randn(2, cols), f"{prefix}.lora_B.weight": torch.randn(rows, 2)}


@pytest.mark.parametrize(
    ("config", "scaling"),
    [({}, 4), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"k_proj|q_proj": 3}}, 1.5)],
)
def test_adapters_are_merged_with_their_base(model, config, scaling, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tensors = lora()
    a, b = tensors.values()
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(adapter(tmp_path / "adapter", config, **tensors), base)
    update = tuned.read(Q) - base.read(Q).double()
    torch.testing.assert_close(update, scaling * (b.double() @ a.double()))
    decomposed = g.svd(update)
    assert decomposed.rank == 2 and isnan(g.hill(decomposed, 3)), "the update keeps its rank"
    same = base.pieces.keys() - {Q}
    assert all(torch.equal(tuned.read(name), base.read(name)) for name in same)


def broken(folder, kind):
    """Make a checkpoint in ``folder`` that cannot be measured."""
    base = folder / "base"
    new_model(SMALL_SHAPE, 0).save_pretrained(base, max_shard_size="8KB")
    path = base
    first = sorted(base.glob("*.safetensors"))[0]
    if kind == "absent":
        path = folder / "nowhere"
    elif kind == "shard":
        first.unlink()
    elif kind == "shard without index":
        (base / "model.safetensors.index.json").unlink()
        first.unlink()
    elif kind == "truncated":
        first.write_bytes(first.read_bytes()[:-100])
    elif kind == "index":
        (base / "model.safetensors.index.json").write_text("{")
    elif kind == "pickle":
        path = folder / "pickled"
        path.mkdir()
        torch.save({}, path / "pytorch_model.bin")
    elif kind == "twice":
        path = folder / "twice"
        path.mkdir()
        for name in "ab":
            save_file({Q: torch.zeros(2, 2)}, path / f"{name}.safetensors")
    elif kind == "adapter alone":
        path = adapter(folder / "adapter", **lora())
    elif kind == "fused without config":
        path = folder / "fused.safetensors"
        save_file({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(6, 2)}, path)
    elif kind == "a pickled file":
        path = folder / "weights.pt"
        torch.save({}, path)
    elif kind == "empty":
        path = folder / "empty.safetensors"
        save_file({"h.0.attn.bias": torch.ones(2, 2)}, path)
    return path


def test_an_adapter_on_a_fused_projection_is_split_with_it(tmp_path):
    torch.manual_seed(0)
    fused = {"model.layers.0.self_attn.qkv_proj.weight": torch.randn(32, 16)}
    (tmp_path / "base").mkdir()
    save_file(fused, tmp_path / "base" / "model.safetensors")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "phi3"} | heads))
    tensors = lora("self_attn.qkv_proj", 32)
    a, b = tensors.values()
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(adapter(tmp_path / "adapter", **tensors), base)
    merged = next(iter(fused.values())).double() + 4 * b.double() @ a.double()
    found = [tuned.read(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    assert [len(part) for part in found] == [16, 8, 8]
    torch.testing.assert_close(torch.cat(found), merged)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[]", "config.json is missing or damaged .*list"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 3}}', "has no weight_map"),
    ],
)
def test_json_of_another_kind(file, text, message, tmp_path):
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / file).write_text(text)
    with pytest.raises(OpdlabError, match=message):
        open_checkpoint(tmp_path)


def test_fused_rows_that_do_not_split(tmp_path):
    save_file({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(48, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", "num_attention_heads": 5}))
    with pytest.raises(OpdlabError, match=r"qkv_proj\.weight has 48 rows, which its config\.json would split into 15"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "there is no checkpoint .*nowhere"),
        ("shard", r"lacks 1 of \d+ shards: fetch model-00001-of-"),
        ("shard without index", r"lacks 1 of \d+ shards: fetch model-00001-of-"),
        ("truncated", "model-00001-of-.* is damaged or not a safetensors file"),
        ("index", "index.json is missing or damaged"),
        ("pickle", "pytorch_model.bin is a pickle"),
        ("twice", "a.safetensors and .*b.safetensors both have the tensor .*q_proj.weight"),
        ("adapter alone", "is an adapter.*give the base first"),
        ("fused without config", "qkv_proj.weight holds several matrices.*config.json"),
        ("a pickled file", "weights.pt is a pickle"),
        ("empty", "empty.safetensors holds no weights"),
    ],
)
def test_broken_checkpoints(kind, message, tmp_path):
    with pytest.raises(OpdlabError, match=message):
        open_checkpoint(broken(tmp_path, kind))


def test_entries_that_are_not_finite(tmp_path):
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "x.safetensors")
    with pytest.raises(OpdlabError, match=r"a in .*x.safetensors has entries that are not finite"):
        open_checkpoint(tmp_path / "x.safetensors").read("a")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, lora(), "not a plain LoRA adapter"),
        ({"init_lora_weights": "pissa"}, lora(), "not a plain LoRA adapter"),
        ({}, lora("self_attn.z_proj"), "z_proj.weight, which .*base does not have as one matrix"),
        ({}, lora(cols=99), r"does not fit model.layers.0.self_attn.q_proj.weight \(16, 16\)"),
        ({}, {"base_model.model.x.lora_B.weight": torch.zeros(2, 2)}, "lacks lora_A of x"),
        ({}, {}, "holds no tensors: save or fetch the adapter again"),
        ({"r": 64}, lora(), "has rank 2, and adapter_config.json says 64"),
        ({"lora_alpha": "four"}, lora(), "adapter_config.json beside .* cannot be understood"),
        ({"alpha_pattern": {"*": 3}}, lora(), "adapter_config.json beside .* cannot be understood"),
        ({}, {"base_model.model.lm_head.modules_to_save.weight": torch.zeros(2, 2)}, "not part of a plain LoRA"),
    ],
)
def test_adapters_that_cannot_be_merged(config, tensors, message, model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(OpdlabError, match=message):
        open_checkpoint(adapter(tmp_path / "adapter", config, **tensors), open_checkpoint(tmp_path / "base"))
