"""What cannot be measured is refused by its true name, with what turns it into something that can be."""

import json
import pickle
import re
import shutil
import zipfile

import gguf
import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.models.checkpoints import open_checkpoint

LAYER = "model.layers.0.self_attn.q_proj"
UNPICKLED = "the pickle was opened"


class Trap:
    """A pickle that says when it is opened."""

    def __reduce__(self):
        return pytest.fail, (UNPICKLED,)


def trap(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Trap()))


def text(path, content="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def tensors(path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{LAYER}.weight": torch.ones(8, 8)} | more, path)


def folder_of(*names):
    def build(at, tuned):
        for name in names:
            (text if name.endswith(("json", "py", "txt", ".metadata")) else trap)(at / name)
        return at

    return build


def file_of(name, content):
    def build(at, tuned):
        at.mkdir()
        (at / name).write_bytes(content)
        return at / name

    return build


def shard(at, tuned):
    return sorted(tuned.glob("*-of-*.safetensors"))[0]


def index(at, tuned):
    return tuned / "model.safetensors.index.json"


def config(at, tuned):
    return tuned / "config.json"


def outside(names):
    def build(at, tuned):
        tensors(at / "secret" / "x.safetensors")
        weight_map = {f"{LAYER}.weight": names.format(secret=at / "secret")}
        text(at / "model" / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
        return at / "model"

    return build


def renamed(change):
    def build(at, tuned):
        at.mkdir()
        state = {f"{LAYER}.weight": torch.ones(8, 8), f"{LAYER}.bias": torch.ones(8)}
        save_file(change(state), at / "model.safetensors")
        return at

    return build


def a_lack(at, tuned):
    shutil.copytree(tuned, at)
    first = sorted(at.glob("*-of-*.safetensors"))[0]
    state = load_file(first)
    state.pop(sorted(state)[0])
    save_file(state, first)
    return at


def truncated(at, tuned):
    shutil.copytree(tuned, at)
    last = sorted(at.glob("*-of-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-50])
    return at


def below(at, tuned):
    shutil.copytree(tuned, at / "model")
    text(at / "README.md")
    trap(at / "training_args.bin")
    return at


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
VERL = "python -m verl.model_merger merge --backend fsdp --local_dir .*actor --target_dir .*actor/merged"
STATE = "of the state of a trainer: it holds no weights"
PICKLE = "is a pickle, which can run code: where you trust it, convert it"
REFUSED = {
    # Parts of sharded training.
    "verl": (folder_of("actor/model_world_size_2_rank_0.pt", "actor/extra_state_world_size_2_rank_0.pt"), VERL),
    "verl's actor": (folder_of("model_world_size_2_rank_1.pt", "optim_world_size_2_rank_1.pt"), "FSDP: merge"),
    "ZeRO-3": (
        folder_of("global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest", "config.json"),
        "DeepSpeed's ZeRO saved: merge them with 'python zero_to_fp32.py . merged --safe_serialization'",
    ),
    "ZeRO-2": (folder_of("mp_rank_00_model_states.pt", "latest"), "zero_to_fp32"),
    "ZeRO-2 inside": (folder_of("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed's ZeRO"),
    "FSDP": (
        folder_of("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt"),
        "accelerate merge-weights .*pytorch_model_fsdp_0 .*pytorch_model_fsdp_0/merged",
    ),
    "FSDP's optimizer": (folder_of("optimizer_0/__0_0.distcp"), STATE),
    "DCP": (folder_of("__0_0.distcp", ".metadata"), r"torch.distributed \(DCP\).*accelerate merge-weights"),
    "Megatron": (folder_of("common.pt", "__0_0.distcp", "metadata.json"), "Megatron.*convert_torch_dist_to_hf.py"),
    "Megatron, one file for each rank": (folder_of("mp_rank_00/model_optim_rng.pt"), "part of a Megatron checkpoint"),
    "an empty tensor of ZeRO-3": (
        renamed(lambda state: {name: weight[:0].flatten() for name, weight in state.items()}), "zero_to_fp32.py",
    ),
    "FSDP, flat": (renamed(lambda state: {"_flat_param": torch.ones(72)}), "FSDP saved flat .*FULL_STATE_DICT"),
    # The state of a trainer.
    "an optimizer": (file_of("optimizer.pt", b"\x80\x02"), STATE),
    "an optimizer in torch's format": (file_of("optimizer.bin", b"PK\x03\x04"), STATE),
    "arguments": (file_of("training_args.bin", b"PK\x03\x04"), STATE),
    "a scheduler": (file_of("scheduler.pt", b"PK\x03\x04"), STATE),
    "only the state": (folder_of("optimizer.pt", "rng_state_0.pth", "trainer_state.json"), STATE),
    "moments": (renamed(lambda state: {f"{name}.exp_avg": w for name, w in state.items()}), "an optimizer"),
    # Other formats, by their content where their name lies.
    "GGUF": (file_of("model.gguf", b"GGUF\x03"), r"is a GGUF file.*gguf_file='model.gguf'"),
    "GGUF by another name": (file_of("model.safetensors", b"GGUF\x03"), "is a GGUF file"),
    "a folder of GGUF": (folder_of("model-Q4_K_M.gguf", "config.json"), "is a GGUF file"),
    "LFS": (file_of("model.safetensors", POINTER), "is a pointer of Git LFS .*'git lfs pull' in"),
    "a folder of LFS": (lambda at, tuned: file_of("model.safetensors", POINTER)(at, tuned).parent, "git lfs pull"),
    "a web page": (file_of("model.safetensors", b"<!DOCTYPE html><html>"), "is a web page"),
    "Lightning": (file_of("last.ckpt", b"PK\x03\x04"), PICKLE),
    "a pickle by another name": (file_of("model.safetensors", b"PK\x03\x04"), PICKLE),
    "a pickle without an ending": (file_of("weights", b"\x80\x04\x95"), PICKLE),
    "pickled shards": (folder_of("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), PICKLE),
    "Meta's format": (folder_of("consolidated.00.pth", "params.json"), PICKLE),
    "numpy": (file_of("w.npz", b"PK\x03\x04"), "is a file of numpy.*safetensors.numpy"),
    "one array of numpy": (file_of("w", b"\x93NUMPY"), "is a file of numpy"),
    "Keras": (file_of("tf_model.h5", b"\x89HDF"), "another framework than PyTorch"),
    "Flax": (folder_of("flax_model.msgpack", "config.json"), "another framework than PyTorch"),
    "an archive": (file_of("model.tar.gz", b"\x1f\x8b"), "is an archive: unpack it"),
    "NeMo": (file_of("model.nemo", b"model_config.yaml"), "is an archive: unpack it"),
    # Parts of a model folder, and folders around it.
    "a shard": (shard, r"is one of \d+ shards of a model: give its folder, "),
    "an index": (index, "is the list of a model's shards: give its folder, "),
    "a config": (config, "is no weights, but what describes them: give the folder"),
    "a lack": (a_lack, r"model-00001-of-\d+.safetensors lacks .*, which the index says it has: fetch that file again"),
    "a truncated shard": (truncated, r"model-\d+-of-\d+.safetensors is damaged"),
    "an empty folder": (folder_of(), "has no weights: it holds nothing"),
    "a config alone": (folder_of("config.json", "tokenizer.json"), "it holds config.json, tokenizer.json"),
    "the folder above": (below, "has no weights of its own, but folders in it have: give one of them .*/model"),
    "an index to elsewhere": (outside("../secret/x.safetensors"), "names a file outside its folder, ../secret"),
    "an index to an absolute path": (outside("{secret}/x.safetensors"), "names a file outside its folder, /"),
    "an index to a folder below": (outside("sub/x.safetensors"), "names a file outside its folder, sub"),
    "an index by backslashes": (outside("..\\secret\\x.safetensors"), "names a file outside its folder"),
    # Adapters.
    "an adapter's tensors": (
        renamed(lambda state: {f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 8)}),
        "without its adapter_config",
    ),
    "an adapter not merged": (
        renamed(lambda state: {f"{LAYER}.{part}.weight": torch.ones(8, 8) for part in ("base_layer", "lora_A.x")}),
        "a model whose adapter was not merged .*merge_and_unload",
    ),
    "an adapter of pickles": (folder_of("adapter_config.json", "adapter_model.bin"), "adapter_model.bin is a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_its_true_name(case, pair, tmp_path, capsys):
    build, said = REFUSED[case]
    path = build(tmp_path / "brought", pair[1])
    if case == "an empty folder":
        path.mkdir()
    for arguments in ([str(pair[0]), str(path)], [str(path), str(pair[1])]):
        assert main(["measure", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        if "adapter" not in case or arguments[1] == str(path):
            assert re.search(said, error), error
        assert error.count("\n") == 1 and "Traceback" not in error


def codes(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


F8, U8, I8, I32, U32 = torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32, torch.uint32
QUANTISED = {
    "fp8": ("fp8", {"weight": codes(F8, 8, 8), "weight_scale_inv": torch.ones(1, 1)}),
    "bitsandbytes": ("bitsandbytes", {"weight": codes(U8, 32, 1), "weight.absmax": codes(U8, 8)}),
    "gptq": ("gptq", {"qweight": codes(I32, 1, 8), "scales": torch.ones(1, 8)}),
    "awq": ("awq", {"qweight": codes(I32, 8, 1), "qzeros": codes(I32, 1, 1)}),
    "compressed": ("compressed-tensors", {"weight_packed": codes(I32, 8, 1)}),
    "mxfp4": ("mxfp4", {"gate_up_proj_blocks": codes(U8, 2, 8, 1, 16)}),
    "mlx": (None, {"weight": codes(U32, 8, 1), "scales": torch.ones(8, 1)}),
    "int8": (None, {"weight": codes(I8, 8, 8)}),
    "fp8 without a word": (None, {"weight": codes(F8, 8, 8)}),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_models(case, pair, tmp_path, capsys):
    said, state = QUANTISED[case]
    save_file({f"{LAYER}.{name}": weight for name, weight in state.items()}, tmp_path / "model.safetensors")
    config = json.loads((pair[0] / "config.json").read_text()) | (
        {"quantization_config": {"quant_method": said}} if said else {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    by = f" by {said}" if said else ""
    for arguments in ([str(tmp_path), str(pair[1])], [str(pair[0]), str(tmp_path)]):
        assert main(["measure", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert re.search(f"is quantised{by} .*cannot be measured; give the model from before it was quantised", error)


def test_a_config_that_still_says_quantised_stops_nothing(pair, tmp_path):
    """As of models that were dequantised by a script."""
    shutil.copytree(pair[0], tmp_path / "model")
    config = json.loads((pair[0] / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "model").pieces.keys() == open_checkpoint(pair[0]).pieces.keys()


def command_in(error):
    """Run the command that an error names, in this process."""
    code = str(error.value).split('python -c "')[1].split('" and measure ')
    exec(code[0], {})
    return open_checkpoint(code[1].split()[0])


def assert_same(found, folder):
    expected = open_checkpoint(folder)
    assert found.pieces.keys() == expected.pieces.keys()
    assert all(torch.equal(found.read(name).float(), expected.read(name).float()) for name in found.pieces)


def state_of(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


@pytest.mark.parametrize("kind", ["a file", "Lightning", "a tied model", "pytorch_model.bin", "numpy"])
def test_the_commands_that_convert_pickles(kind, pair, tmp_path):
    state, path = state_of(pair[1]), tmp_path / "weights.pt"
    if kind == "Lightning":
        path = tmp_path / "last.ckpt"
        torch.save({"epoch": 3, "state_dict": {f"model.{name}": weight for name, weight in state.items()}}, path)
    elif kind == "numpy":
        path = tmp_path / "weights.npz"
        numpy.savez(path, **{name: weight.float().numpy() for name, weight in state.items()})
    elif kind == "pytorch_model.bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
        shutil.copy(pair[1] / "config.json", tmp_path)
        path = tmp_path
    else:
        tied = {"lm_head.weight": state["model.embed_tokens.weight"]} if kind == "a tied model" else {}
        torch.save(state | tied, path)
    with pytest.raises(OpdlabError) as error:
        open_checkpoint(path)
    assert_same(command_in(error), pair[1])


def test_the_command_that_merges_parts_of_torch(pair, tmp_path):
    from accelerate.utils import merge_fsdp_weights  # what 'accelerate merge-weights' calls

    dcp.save({"model": state_of(pair[1])}, checkpoint_id=tmp_path / "parts", no_dist=True)
    with pytest.raises(OpdlabError, match="accelerate merge-weights") as error:
        open_checkpoint(tmp_path / "parts")
    parts, merged = re.search(r"merge-weights (\S+) (\S+)'", str(error.value)).groups()
    merge_fsdp_weights(parts, merged)
    assert_same(open_checkpoint(merged), pair[1])


def test_the_command_that_converts_gguf(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **shape))
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in model.state_dict().items():
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OpdlabError, match="is a GGUF file") as error:
        open_checkpoint(tmp_path / "small.gguf")
    found = command_in(error)
    assert torch.equal(found.read("model.layers.0.mlp.up_proj.weight"), model.model.layers[0].mlp.up_proj.weight)


def test_the_commands_that_dequantise(tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen3Config(vocab_size=32, num_key_value_heads=2, head_dim=64, **shape)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "fp8")
    state = load_file(tmp_path / "fp8" / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.full((1, 1), 2.0)
    save_file(state, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    described = json.loads((tmp_path / "fp8" / "config.json").read_text())
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(described | {"quantization_config": how}))
    with pytest.raises(OpdlabError, match="is quantised by fp8") as error:
        open_checkpoint(tmp_path / "fp8")
    found = command_in(error)
    for name, piece in found.pieces.items():
        assert piece.dtype == "bfloat16"
        assert torch.equal(found.read(name).float(), state[name].float() * (2 if name.endswith("proj.weight") else 1))


def test_no_pickle_hides_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Trap()))
    with pytest.raises(OpdlabError, match=PICKLE):
        open_checkpoint(tmp_path)
