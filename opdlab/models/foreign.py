"""What people bring that is no checkpoint to measure: what each thing is, and what turns it into one.

Nothing here is opened beyond its first bytes: pickles can run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from opdlab.errors import OpdlabError

_PICKLE = "a pickle, which can run code"
_MODEL = (
    'where you trust it, convert it with python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}/safetensors')\" and measure {folder}/safetensors"
)
_TORCH = (
    "where you trust it, convert it with python -c \"import torch, safetensors.torch as s; w = torch.load('{path}', "
    "'cpu', weights_only=True); s.save_file({{k: v.clone() for k, v in w.get('state_dict', w).items()}}, "
    "'{stem}.safetensors')\" and measure "
)
_GGUF = (
    'give the model that it was made from, or convert it with python -c "from transformers import '
    "AutoModelForCausalLM as M; m = M.from_pretrained('{folder}', gguf_file='{name}'); m.hf_quantizer = None; "
    "m.config.quantization_config = None; m.save_pretrained('{stem}')\" and measure {stem}"
)
_NUMPY = (
    'if its arrays are weights, convert it with python -c "import numpy, safetensors.numpy as s; '
    "s.save_file(dict(numpy.load('{path}')), '{stem}.safetensors')\" and measure {stem}.safetensors"
)
_ZERO = (
    "merge them with 'python zero_to_fp32.py . merged --safe_serialization', in the folder that has zero_to_fp32.py, "
    "and measure merged"
)
_SAFETENSORS = re.compile(rb".{4}\x00{4}{", re.DOTALL)  # the length of its header, and the header
_STATE = "it holds no weights: give the folder that the model itself was saved in"


class _Kind(NamedTuple):
    """A kind of file."""

    names: str  #: a pattern of its name, or of its folder's and its own
    starts: tuple[bytes, ...]  #: what it begins with, whatever its name
    what: str
    remedy: str


# Of the kinds of which there are files, the first one says most.
_KINDS = (
    _Kind(
        "", (b"version https://git-lfs",), "a pointer of Git LFS in the place of a file",
        "fetch the file with 'git lfs pull' in {folder}",
    ),
    _Kind("", (b"<!DOCTYPE", b"<!doctype", b"<html"), "a web page, not the file that was asked for", "fetch it again"),
    _Kind(
        r"model_world_size_\d+_rank_\d+\.pt", (), "a part of a model that verl saved with FSDP",
        "merge the parts with 'python -m verl.model_merger merge --backend fsdp --local_dir {folder} "
        "--target_dir {folder}/merged' and measure {folder}/merged",
    ),
    _Kind(
        r"zero_to_fp32\.py|[^/]*(?:zero_pp|mp)_rank_.*_states\.pt", (), "a part of what DeepSpeed's ZeRO saved", _ZERO,
    ),
    _Kind(
        r"common\.pt|model_optim_rng\.pt", (), "a part of a Megatron checkpoint",
        "convert it with the tool of what trained it, such as slime's 'python tools/convert_torch_dist_to_hf.py "
        "--input-dir {folder} --output-dir merged --origin-hf-dir BASE', and measure merged",
    ),
    _Kind(
        r"(?!optim)[^/]*/[^/]*\.distcp", (), "a part of a checkpoint of torch.distributed (DCP), as FSDP saves them",
        "merge the parts with 'accelerate merge-weights {folder} {folder}/merged' and measure {folder}/merged",
    ),
    _Kind(
        r"(?:optimizer|scheduler|scaler|rng_state.*|training_args|trainer_state|extra_state.*|optim_world.*)"
        r"\.(?:pt|pth|bin|json)|optim[^/]*/[^/]*\.distcp", (), "of the state of a trainer", _STATE,
    ),
    _Kind(r"[^/]*\.gguf", (b"GGUF",), "a GGUF file, made for llama.cpp", _GGUF),
    _Kind(r"[^/]*\.npz", (b"\x93NUMPY",), "a file of numpy", _NUMPY),
    _Kind(
        r"[^/]*\.(?:h5|hdf5|keras|msgpack|onnx|tflite|pb)", (b"\x89HDF",), "a model of another framework than PyTorch",
        "load it where it was trained, and save its weights with safetensors.numpy.save_file",
    ),
    _Kind(
        r"[^/]*\.(?:zip|tar|gz|tgz|zst|7z|nemo)", (b"\x1f\x8b", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd"), "an archive",
        "unpack it, and give the folder of the model",
    ),
    _Kind(r"pytorch_model(?:-\d+-of-\d+)?\.bin", (), _PICKLE, _MODEL),
    _Kind(r"adapter_model\.bin", (), _PICKLE, _TORCH + "{folder}"),
    _Kind(
        r"[^/]*\.(?:bin|pt|pth|ckpt|pkl|pickle)", (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        _PICKLE, _TORCH + "{stem}.safetensors",
    ),
    _Kind(r"[^/]*index\.json", (), "the list of a model's shards", "give its folder, {folder}"),
    _Kind(r"[^/]*\.json", (), "no weights, but what describes them", "give the folder of a model's weights"),
)  # fmt: skip

# Tensors that no model has, by their names, and what holds them.
_TENSORS = (
    (
        r"\.base_layer\.", "a model whose adapter was not merged",
        "load it with PEFT, call merge_and_unload(), and then save_pretrained()",
    ),
    (
        r"\.lora_|\.hada_|\.lokr_|\.oft_|\.ia3_|\.vera_|token_adapter", "an adapter without its adapter_config.json",
        "give the folder that has both",
    ),
    (r"flat_param", "a model that FSDP saved flat", "save it with StateDictType.FULL_STATE_DICT"),
    (r"\.exp_avg(_sq)?$|^state\.\d+\.", "the state of an optimizer", _STATE),
)  # fmt: skip

# The codes of quantised weights; integers may also be counters, tables or masks, which stop nothing.
_CODES = re.compile(r"(?:F|float)[468].*|(?:[IU]|u?int)(?:8|16|32)")
_CODED = re.compile(r"weight|_blocks$|W_q|codes")
# What transformers calls the config that turns a quantised model into one with weights, by its quant_method.
_DEQUANTISE = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def refuse_foreign(files: Iterable[Path]) -> None:
    """Raise, saying what they are, if one of the files is of a kind that is known and cannot be measured."""
    starts = {file: start for file in files if file.is_file() and not _SAFETENSORS.match(start := _start(file))}
    for kind in _KINDS:
        for file, start in starts.items():
            if re.search(rf"/(?:{kind.names})$", file.absolute().as_posix()) or start.startswith(kind.starts):
                where = {"path": file, "folder": file.parent, "name": file.name, "stem": file.with_suffix("")}
                raise OpdlabError(f"{file} is {kind.what}: {kind.remedy.format(**where)}")


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(32)
    except OSError:
        return b""


def refuse_tensors(path: Path | str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise, saying what it is, if a checkpoint has tensors that are not the weights of a model."""
    for name, shape in shapes.items():
        if name.endswith(".weight") and shape == (0,):
            raise OpdlabError(f"{path} is what DeepSpeed's ZeRO left of a model (its {name} is empty): {_ZERO}")
    for pattern, what, remedy in _TENSORS:
        for name in shapes:
            if re.search(pattern, name):
                raise OpdlabError(f"{path} is {what} (it has {name}): {remedy}")


def refuse_quantised(path: Path | str, name: str, dtype: str, config: dict) -> None:
    """Raise if a tensor holds the codes of a quantised weight: the difference of two codes is no update."""
    said = config.get("quantization_config") or config.get("quantization")
    floats = dtype.lower().startswith("f")
    if not _CODES.fullmatch(dtype) or not (said or floats or _CODED.search(name)):
        return
    method = str(said.get("quant_method", "")) if isinstance(said, dict) else ""
    remedy = "give the model from before it was quantised"
    if method in _DEQUANTISE:
        remedy += (
            f', or dequantise it with python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained('
            f"'{path}', dtype='bfloat16', quantization_config=t.{_DEQUANTISE[method]}(dequantize=True))"
            f".save_pretrained('{path}-bf16', save_original_format=False)\" and measure {path}-bf16"
        )
    of = f" by {method}" if method else ""
    raise OpdlabError(f"{path} is quantised{of} ({name} is {dtype}): quantised weights cannot be measured; {remedy}")
