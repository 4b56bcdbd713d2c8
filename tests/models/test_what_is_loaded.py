"""What is measured is what transformers loads, for every layout of a folder, and under whatever names."""

import json
import os
import shutil
from itertools import permutations, product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.measuring.sources import open_all
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.names import plain_name, plain_names

HEAD, EMBEDDING, Q = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def states(tmp_path_factory):
    """The folder of a tied model, and its tensors."""
    folder = tmp_path_factory.mktemp("loaded") / "model"
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SHAPE, **HEADS, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def write(folder, state, name="model.safetensors"):
    save_file({key: weight.clone() for key, weight in state.items()}, folder / name, {"format": "pt"})


def shards(folder, *states, names=None):
    """Write shards and their index, which says that each tensor is in the first of the shards that have it."""
    files = [f"model-{i + 1:05}-of-{len(states):05}.safetensors" for i in range(len(states))]
    for file, state in zip(files, states, strict=True):
        write(folder, state, file)
    weight_map = {key: file for file, state in reversed(list(zip(files, states, strict=True))) for key in state}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map | (names or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def halves(state):
    keys = sorted(state)
    return [{key: state[key] for key in part} for part in (keys[:9], keys[9:])]


def untie(folder, tied):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tied}))


def other(state):
    return {key: weight + 1 for key, weight in state.items()}


def single(folder, state):
    write(folder, state)


def sharded(folder, state):
    shards(folder, *halves(state))


def stale_index(folder, state):
    shards(folder, *halves(other(state)))
    write(folder, state)


def consolidated_beside(folder, state):
    shards(folder, *halves(state))
    write(folder, other(state), "consolidated.safetensors")


def variant_beside(folder, state):
    write(folder, state)
    write(folder, other(state), "model.fp16.safetensors")


def second_set(folder, state):
    shards(folder, *halves(other(state)), {Q: state[Q]})
    shards(folder, *halves(state))


def tied_with_a_copy(folder, state):
    write(folder, state | {HEAD: state[EMBEDDING]})


def tied_with_a_head_of_its_own(folder, state):
    write(folder, state | {HEAD: state[EMBEDDING] + 0.01})


def a_head_that_differs_at_its_end(folder, state):
    head = state[EMBEDDING].clone()
    head[-1, -1] += 1
    write(folder, state | {HEAD: head})


def untied_with_a_head(folder, state):
    untie(folder, False)
    shards(folder, state, {HEAD: state[EMBEDDING] * 2})


def twice_and_equal(folder, state):
    shards(folder, state, {Q: state[Q]})


def twice_and_the_index_names_the_last(folder, state):
    last = "model-00002-of-00002.safetensors"
    shards(folder, state | {Q: state[Q] + 1}, {Q: state[Q]}, names={Q: last})


def buffers_beside(folder, state):
    buffers = {
        "model.layers.0.self_attn.mask": torch.ones(4, 4, dtype=torch.bool),
        "model.layers.0.mlp.tid2eid": torch.arange(6),
        "model.num_batches_tracked": torch.tensor(7),
        "model.freqs_cis": torch.ones(4, dtype=torch.complex64),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    write(folder, state | buffers)


def trainer_state_beside(folder, state):
    write(folder, state)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({}, folder / name)


def in_the_hubs_cache(folder, state):
    sharded(folder, state)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, blobs / path.name)
        os.symlink(f"../blobs/{path.name}", path)


LAYOUTS = [
    single, sharded, stale_index, consolidated_beside, variant_beside, second_set, tied_with_a_copy,
    tied_with_a_head_of_its_own, a_head_that_differs_at_its_end, untied_with_a_head, twice_and_equal,
    twice_and_the_index_names_the_last, buffers_beside, trainer_state_beside, in_the_hubs_cache,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_what_transformers_loads(layout, states, tmp_path):
    model, state = states
    folder = tmp_path / "snapshots" / "model"
    folder.mkdir(parents=True)
    shutil.copy(model / "config.json", folder)
    layout(folder, state)
    found = open_checkpoint(folder)
    expected = dict(transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert found.pieces.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found.read(name), weight), name


def test_what_reading_left_out_is_said(states, tmp_path):
    model, state = states
    shutil.copytree(model, tmp_path / "model")
    buffers_beside(tmp_path / "model", state | {HEAD: state[EMBEDDING]})
    assert open_checkpoint(tmp_path / "model").left_out == {
        "lm_head.weight": "a copy of the embedding",
        "model.layers.0.self_attn.mask": "a buffer of BOOL, not a weight",
        "model.layers.0.mlp.tid2eid": "a buffer of I64, not a weight",
        "model.num_batches_tracked": "a buffer of I64, not a weight",
        "model.freqs_cis": "a buffer of C64, not a weight",
        "model.rotary_emb.inv_freq": "a constant of the model, not a weight",
    }


def test_buffers_stop_no_measurement(states, tmp_path):
    model, state = states
    for name in ("base", "tuned"):
        shutil.copytree(model, tmp_path / name)
        buffers_beside(tmp_path / name, state if name == "base" else state | {Q: state[Q] + 0.01 * torch.randn(32, 32)})
    out = ["--out", str(tmp_path / "out"), "--no-nulls"]
    assert main(["measure", str(tmp_path / "base"), str(tmp_path / "tuned"), *out]) == 0
    assert "tid2eid" not in (tmp_path / "out" / "matrices.csv").read_text()


def test_an_index_decides_which_of_two_is_meant(states, tmp_path):
    """Where transformers takes the last shard that has a tensor, whatever the index says of it."""
    model, state = states
    shutil.copy(model / "config.json", tmp_path)
    shards(tmp_path, state, {Q: state[Q] + 1})
    assert torch.equal(open_checkpoint(tmp_path).read(Q), state[Q])
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(OpdlabError, match=r"model-00001-of-.* both have the tensor .*q_proj\.weight"):
        open_checkpoint(tmp_path)


IN_FRONT = ("module", "base_model.model", "policy", "pretrained_model", "_orig_mod", "_forward_module", "model")
INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def test_names_of_wrapped_models(states):
    names = [*states[1], HEAD]
    for wrappers in (*permutations(IN_FRONT, 3), *permutations(IN_FRONT, 1), ("module", "module")):
        wrapped = [".".join((*wrappers, name)) for name in names]
        assert list(plain_names(wrapped).values()) == names, wrappers
        for first, second in product(INSIDE, INSIDE):
            layers = [
                name.replace(".0.", f".0.{first}.").replace("self_attn.", f"self_attn.{second}.") for name in wrapped
            ]
            assert list(plain_names(layers).values()) == names, (wrappers, first, second)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.w1.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight",
        "score.weight",
        "model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.norm.weight",
        "model.visual.blocks.0.x",
        "gpt_neox.layers.0.attention.dense.weight", "model.decoder.layers.0.fc1.weight", "v_head.summary.weight",
        "model.layers.0.module_list.weight", "my_policy.layers.0.weight", "backbone.layers.0.mixer.in_proj.weight",
    ],
)  # fmt: skip
def test_names_that_nothing_wrapped_stay(name):
    assert plain_name(name) == name


def test_nothing_is_stripped_that_makes_two_names_one(states, tmp_path):
    state = {Q: states[1][Q], f"policy.{Q}": states[1][Q] + 1, "policy.model.norm.weight": torch.ones(32)}
    save_file(state, tmp_path / "both.safetensors")
    found = open_checkpoint(tmp_path / "both.safetensors").whole
    assert found.keys() == {Q, f"policy.{Q}", "model.norm.weight"}


def test_a_real_wrapper(states, tmp_path):
    """A module of one's own around a compiled model, as Lightning saves it, measured against the plain model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(states[0])
    own = torch.nn.Module()
    own.model = torch.compile(model)
    found, expected = open_checkpoint(own.state_dict()), open_checkpoint(states[0])
    assert found.pieces.keys() == expected.pieces.keys()
    assert all(torch.equal(found.read(name), expected.read(name)) for name in found.pieces)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RENAMED = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)
    ),
    "moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SHAPE, **HEADS, num_experts=4, moe_intermediate_size=16)
    ),
    "minimax": lambda: transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(**SHAPE, **HEADS, num_local_experts=4, layer_types=["linear_attention"] * 2)
    ),
}


class Holder(torch.nn.Module):
    """A module of one's own that holds a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("family", RENAMED)
def test_a_module_is_called_as_its_folder_whatever_wraps_it(family, tmp_path):
    model = RENAMED[family]()
    model.save_pretrained(tmp_path)
    saved = open_checkpoint(tmp_path)
    wrapped = [model, torch.nn.DataParallel(model), Holder(model), torch.nn.DataParallel(Holder(model))]
    for module in wrapped:
        found = open_checkpoint(module)
        assert found.pieces.keys() == saved.pieces.keys()
        assert all(found.read(name).equal(saved.read(name)) for name in saved.pieces)
    # Weights in memory that were taken of a module meet it, whichever of the two is wrapped.
    for module, other in product(wrapped[:2], wrapped[:2]):
        before, (after,) = open_all({name: weight.clone() for name, weight in other.state_dict().items()}, [module])
        assert before.pieces.keys() == after.pieces.keys() == saved.pieces.keys()
    assert sum(saved.read(name).numel() for name in saved.pieces) == model.num_parameters()


def test_a_module_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = RENAMED["gpt2"]()
    with pytest.raises(OpdlabError, match=r"wte.weight of the GPT2LMHeadModel in memory is on the meta device: load"):
        open_checkpoint(model)
