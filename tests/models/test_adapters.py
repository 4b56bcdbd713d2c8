"""Adapters against PEFT, which loads each again and merges it: the same weights, or a refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from opdlab.errors import OpdlabError
from opdlab.geometry.summary import means, of_layers, trajectory_means
from opdlab.measuring.update import measure
from opdlab.models.checkpoints import open_checkpoint

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
MODELS = {
    "qwen3": Qwen3Config(**SMALL, **HEADS, tie_word_embeddings=False),
    "tied": Qwen3Config(**SMALL, **HEADS, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL | {"num_hidden_layers": 12}, **HEADS, attention_bias=True),
    "gpt2": GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16),
    "phi3": Phi3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "llava": LlavaConfig(vision_config=VISION, text_config=LlamaConfig(**SMALL, **HEADS), image_token_index=47),
    "t5": T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4),
    "moe": Qwen3MoeConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, **EXPERTS),
}
KINDS = {"llava": AutoModelForImageTextToText, "t5": AutoModelForSeq2SeqLM}


def load(base, **options):
    return KINDS.get(base.name, AutoModelForCausalLM).from_pretrained(base, **options)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        KINDS.get(name, AutoModelForCausalLM).from_config(config).save_pretrained(folder / name)
    return folder


def make_adapter(base, folder, kind=peft.LoraConfig, **config):
    """Save an adapter of the model in ``base``, with random entries, as PEFT does."""
    torch.manual_seed(1)
    default = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    default |= {"lora_alpha": 8, "init_lora_weights": False} if kind is peft.LoraConfig else {}
    model = peft.get_peft_model(load(base), kind(**default | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad or "lora_" in name:
                weight.copy_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({change(name): weight for name, weight in load_file(path).items()}, path)


def assert_as_peft_merges(base, adapter, tmp_path, moved=1):
    merged = peft.PeftModel.from_pretrained(load(base, dtype=torch.float64), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    origin, expected = open_checkpoint(base), open_checkpoint(tmp_path / "merged")
    found = open_checkpoint(adapter, origin)
    assert found.pieces.keys() == expected.pieces.keys()
    changed = 0
    for name in expected.pieces:
        weight, w0 = found.read(name).double(), origin.read(name) if name in origin.pieces else None
        torch.testing.assert_close(weight, expected.read(name), rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        changed += w0 is None or not torch.equal(weight, w0.double())
    assert changed >= moved


LAST = r".*\.layers\.1\..*(q_proj|v_proj)$"
EQUAL = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha by module": {"alpha_pattern": {"q_proj": 100}},
    "alpha by a dotted name": {"alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    "alpha by a pattern with an end": {"alpha_pattern": {LAST: 128}},
    "rank and alpha by a pattern with an end": {"rank_pattern": {LAST: 6}, "alpha_pattern": {LAST: 128}},
    "alpha by the beginning": {"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 64}},
    "a beginning that matches nothing": {"alpha_pattern": {"^q_proj": 100}},
    "a pattern with both": {"alpha_pattern": {r"^model\.layers\.\d\.mlp\.down_proj$": 3}},
    "a wrapped name": {"alpha_pattern": {"base_model.model.model.layers.0.self_attn.q_proj": 9}},
    "two keys that match": {"alpha_pattern": {"q_proj": 16, "layers.0.self_attn.q_proj": 64}},
    "alternatives": {"alpha_pattern": {"q_proj|v_proj": 32}},
    "a group inside": {"alpha_pattern": {r"layers\.(0|2)\.self_attn\.q_proj": 32}},
    "an inner name is no end": {"alpha_pattern": {"self_attn": 32, "proj": 64}},
    "ranks and rslora": {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 8}},
    "all linear": {"target_modules": "all-linear"},
    "targets by a pattern": {"target_modules": r".*\.[01]\..*(q|up)_proj"},
    "some layers": {"layers_to_transform": [1]},
    "one layer of a pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "some modules left out": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "left out by a pattern": {"exclude_modules": r".*\.1\..*"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "a head saved whole": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "a rank of one": {"r": 1},
    "a fractional alpha": {"lora_alpha": 1.5},
    "layers 1 and 11": {"base": "llama", "alpha_pattern": {"1.self_attn.q_proj": 64}, "bias": "lora_only"},
    "all biases": {"base": "llama", "bias": "all"},
    "conv1d of gpt2": {"base": "gpt2", "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d and embeddings": {"base": "gpt2", "target_modules": ["c_proj", "wte"]},
    "fused projections": {"base": "phi3", "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    "embeddings of a tied model": {"base": "tied", "target_modules": ["embed_tokens", "q_proj"]},
    "a head of a tied model saved whole": {"base": "tied", "modules_to_save": ["lm_head"]},
    "embeddings of a tied model saved whole": {"base": "tied", "modules_to_save": ["embed_tokens"]},
    "both of a tied model saved whole": {"base": "tied", "modules_to_save": ["embed_tokens", "lm_head"]},
    "several towers": {"base": "llava", "alpha_pattern": {r".*language_model\.layers\.1.*": 3}},
    "encoder and decoder": {"base": "t5", "target_modules": ["q", "v", "wi"]},
    "attention of a mixture of experts": {"base": "moe", "target_modules": ["q_proj", "o_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("case", EQUAL)
def test_as_peft_merges(case, bases, tmp_path):
    config = dict(EQUAL[case])
    base = bases / config.pop("base", "qwen3")
    assert_as_peft_merges(base, make_adapter(base, tmp_path / "adapter", **config), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_half_precision(dtype, bases, tmp_path):
    adapter = make_adapter(bases / "qwen3", tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(path).items()}, path)
    assert_as_peft_merges(bases / "qwen3", adapter, tmp_path)


@pytest.mark.parametrize("base", ["qwen3", "tied"])
def test_new_tokens_with_embedding_and_head_saved_whole(base, bases, tmp_path):
    """PEFT loads such an adapter on a base of the same size only, and stores three copies of both."""
    model = load(bases / base)
    model.resize_token_embeddings(53, mean_resizing=False)
    both = ["embed_tokens", "lm_head"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=both))
    for name, weight in model.named_parameters():
        weight.data += 0.1 * torch.randn_like(weight) * ("modules_to_save" in name)
    model.save_pretrained(tmp_path / "adapter")
    found = open_checkpoint(tmp_path / "adapter", open_checkpoint(bases / base))
    trained = dict(model.named_parameters())
    for name, begins in (("lm_head", ""), ("model.embed_tokens", "model.")):
        weight = trained[f"base_model.model.{begins}{both[begins == '']}.modules_to_save.default.weight"]
        assert torch.equal(found.read(f"{name}.weight"), weight)


WRAPPERS = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "distributed": lambda name: f"module.{name}",
    "compiled and distributed": lambda name: f"_orig_mod.module.{name}",
    "checkpointed layers": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "with the adapter's name": lambda name: name.replace("lora_A.", "lora_A.default.").replace("_B.", "_B.default."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrapped_adapters(wrapper, bases, tmp_path):
    plain, wrapped = (make_adapter(bases / "qwen3", tmp_path / name) for name in ("plain", "wrapped"))
    rename(wrapped, WRAPPERS[wrapper])
    base = open_checkpoint(bases / "qwen3")
    expected, found = open_checkpoint(plain, base), open_checkpoint(wrapped, base)
    assert found.pieces.keys() == expected.pieces.keys()
    assert all(torch.equal(found.read(name), expected.read(name)) for name in found.pieces)


def test_experts_stored_one_by_one(bases, tmp_path):
    """As transformers 4 and other trainers save them; PEFT stacks them when it loads them."""
    adapter = make_adapter(bases / "moe", tmp_path / "adapter", target_modules=["q_proj"])
    path, update = adapter / "adapter_model.safetensors", {}
    for name, weight in open_checkpoint(bases / "moe").whole.items():
        if ".experts." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            update[f"{module}.lora_A.weight"] = 0.05 * torch.randn(4, weight.shape[1])
            update[f"{module}.lora_B.weight"] = 0.05 * torch.randn(weight.shape[0], 4)
    save_file(load_file(path) | update, path)
    edit_config(adapter, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert_as_peft_merges(bases / "moe", adapter, tmp_path, moved=2 * 4 * 3)


PLAIN = "is not a plain LoRA adapter"
REFUSED = {
    "dora": ({"use_dora": True}, f"{PLAIN} .use_dora.: merge it with python -c"),
    "pissa": ({"init_lora_weights": "pissa"}, f"{PLAIN} .init_lora_weights pissa"),
    "pissa with iterations": ({"init_lora_weights": "pissa_niter_4"}, f"{PLAIN} .init_lora_weights pissa_niter_4"),
    "olora": ({"init_lora_weights": "olora"}, f"{PLAIN} .init_lora_weights olora"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 2]]}, f"{PLAIN} .layer_replication"),
    "single tokens": ({"trainable_token_indices": [1, 2]}, f"{PLAIN} .trainable_token_indices"),
    "biases of the adapter": ({"base": "llama", "lora_bias": True}, f"{PLAIN} .lora_bias"),
    "activated": ({"alora_invocation_tokens": [5]}, f"{PLAIN} .alora_invocation_tokens.: it cannot be merged"),
    "stacked experts": (
        {"base": "moe", "target_parameters": ["mlp.experts.down_proj"]}, f"{PLAIN} .target_parameters",
    ),
    "loha": ({"kind": peft.LoHaConfig}, f"{PLAIN} .peft_type LOHA"),
    "lokr": ({"kind": peft.LoKrConfig}, f"{PLAIN} .peft_type LOKR"),
    "the head of a tied model": (
        {"base": "gpt2", "target_modules": ["c_attn", "lm_head"]}, "whose head is its embedding, does not have",
    ),
    "two ranks that match": (
        {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 3}}, "has rank 2, and adapter_config.json says 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, bases, tmp_path):
    config, message = REFUSED[case]
    base = bases / config.get("base", "qwen3")
    adapter = make_adapter(base, tmp_path / "adapter", **{key: config[key] for key in config.keys() - {"base"}})
    with pytest.raises(OpdlabError, match=message):
        open_checkpoint(adapter, open_checkpoint(base))


def test_the_means_are_those_of_what_moved(bases, tmp_path):
    adapter = make_adapter(bases / "llama", tmp_path / "lora", target_modules=["q_proj"])
    update = measure(bases / "llama", [adapter, adapter], nulls=False)
    layers = of_layers(update.table)
    moved = layers[layers["frobenius"] > 0]
    assert 0 < len(moved) < len(layers)
    for column in ("relative_norm", "frobenius", "density", "nss", "stable_rank", "angle_left_mean"):
        assert update.means.loc[column, "value"] == pytest.approx(moved[column].mean()), column
    over_all = (layers["sparsity"] * layers["parameters"]).sum() / layers["parameters"].sum()
    assert update.means.loc["sparsity", "value"] == pytest.approx(over_all)
    last = trajectory_means(update.trajectory).iloc[-1]
    assert [last["relative_norm"], last["sparsity"]] == pytest.approx([moved["relative_norm"].mean(), over_all])
    of_blocks = means(layers, ["block"]).set_index("block")
    assert of_blocks.loc["mlp", ["relative_norm", "matrices"]].tolist() == [0, 3 * layers["layer"].nunique()]
    assert update.title == "llama (float32) to lora (an adapter, added in float64)"


def test_what_the_config_does_not_ask_for_is_not_added(bases, tmp_path):
    base, adapter = bases / "qwen3", make_adapter(bases / "qwen3", tmp_path / "adapter")
    for changes, message in (
        ({"target_modules": ["q_proj"]}, "which is none of its config's target_modules"),
        ({"layers_to_transform": [0]}, "which is none of its config's target_modules"),
        ({"a_new_kind_of_adapter": {"x": 1}}, f"{PLAIN} .a_new_kind_of_adapter"),
        ({"peft_type": "PROMPT_TUNING"}, f"{PLAIN} .peft_type PROMPT_TUNING.*it cannot be merged"),
    ):
        saved = json.loads((adapter / "adapter_config.json").read_text())
        edit_config(adapter, **changes)
        with pytest.raises(OpdlabError, match=message):
            open_checkpoint(adapter, open_checkpoint(base))
        edit_config(adapter, **saved | {"a_new_kind_of_adapter": None})


@pytest.mark.parametrize(
    ("config", "moved"),
    [
        ({"use_dora": True}, 2 * 3),
        ({"init_lora_weights": "pissa"}, 2 * 3),
        ({"kind": peft.LoHaConfig}, 2 * 3),
        ({"base": "moe", "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, 2 + 2 * 4),
    ],
)
def test_the_command_that_merges(config, moved, bases, tmp_path):
    base = bases / config.get("base", "qwen3")
    adapter = make_adapter(base, tmp_path / "adapter", **{key: config[key] for key in config.keys() - {"base"}})
    origin = open_checkpoint(base)
    with pytest.raises(OpdlabError) as refused:
        open_checkpoint(adapter, origin)
    exec(str(refused.value).split('python -c "')[1].split('"')[0])
    merged = open_checkpoint(f"{adapter}-merged")
    assert sum(not torch.equal(origin.read(name), merged.read(name)) for name in origin.pieces) == moved
    assert merged.dtypes == "float32"


def test_the_base_comes_first_and_is_named(bases, tmp_path):
    adapter = make_adapter(bases / "qwen3", tmp_path / "adapter")
    with pytest.raises(OpdlabError, match=r"is an adapter.*give the base first.*with the base .*qwen3"):
        open_checkpoint(adapter)
