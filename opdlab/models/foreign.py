"""Refuse what people bring that is no checkpoint to measure, and say what it is: foreign.toml lists the kinds.

Nothing here is opened beyond its first bytes: pickles can run code.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from opdlab.errors import OpdlabError

_SAFETENSORS = re.compile(rb".{4}\x00{4}{", re.DOTALL)  # the length of its header, and the header
_KNOWN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))

# The codes of quantised weights; integers may also be counters, tables or masks, which stop nothing.
_CODES = re.compile(r"(?:F|float)[468].*|(?:[IU]|u?int)(?:8|16|32)")
_CODED = re.compile(r"weight|_blocks$|W_q|codes")
# What transformers calls the config that turns a quantised model into one with weights, by its quant_method.
_DEQUANTISE = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def refuse_foreign(files: Iterable[Path]) -> None:
    """Raise, saying what they are, if one of the files is of a kind that is known and cannot be measured."""
    starts = {file: start for file in files if file.is_file() and not _SAFETENSORS.match(start := _start(file))}
    for kind in _KNOWN["files"]:
        begins = tuple(begin.encode("latin-1") for begin in kind.get("starts", ()))
        for file, start in starts.items():
            if re.search(rf"/(?:{kind.get('names', '')})$", file.absolute().as_posix()) or start.startswith(begins):
                where = {"path": file, "folder": file.parent, "name": file.name, "stem": file.with_suffix("")}
                common = {key: remedy.format(**where) for key, remedy in _KNOWN["remedies"].items()}
                raise OpdlabError(f"{file} is {kind['what']}: {kind['remedy'].format(**where, **common)}")


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(32)
    except OSError:
        return b""


def refuse_tensors(path: Path | str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise, saying what it is, if a checkpoint has tensors that are not the weights of a model."""
    remedies = _KNOWN["remedies"]
    for name, shape in shapes.items():
        if name.endswith(".weight") and shape == (0,):
            left = f"what DeepSpeed's ZeRO left of a model (its {name} is empty)"
            raise OpdlabError(f"{path} is {left}: {remedies['zero']}")
    for kind in _KNOWN["tensors"]:
        for name in shapes:
            if re.search(kind["names"], name):
                raise OpdlabError(f"{path} is {kind['what']} (it has {name}): {kind['remedy'].format(**remedies)}")


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
