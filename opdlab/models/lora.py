"""LoRA adapters, added to the weights of their base as they are read."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models.formats import header, read_json
from opdlab.models.pieces import Checkpoint, Piece, read_stored

_LORA = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def with_adapter(folder: Path, base: Checkpoint | None) -> dict[str, Piece]:
    """Return the whole tensors of ``base`` with the update of the adapter in ``folder`` added.

    Raises:
        OpdlabError: if the adapter is no plain LoRA, does not fit the base, or the base is missing.
    """
    if base is None:
        raise OpdlabError(f"{folder} is an adapter, which only means something on its base: give the base first")
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if not file.is_file():
        raise OpdlabError(f"{folder} has no adapter_model.safetensors (pickled adapters are refused)")
    # Some LoRA initialisations change the base itself, so adding B A to the original weights would be wrong.
    plain = config.get("init_lora_weights", True) in (True, False, "gaussian", "eva")
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out") or not plain:
        raise OpdlabError(f"{folder} is not a plain LoRA adapter: merge it with PEFT and measure the merged model")
    stored = {name: shape for name, shape, _ in header(file)}
    if not stored:
        raise OpdlabError(f"{file} changes no weight: it is no LoRA adapter")
    pieces = dict(base.whole)
    for key, shape in stored.items():
        found = _LORA.fullmatch(key)
        if not found:
            raise OpdlabError(f"{file} has {key}, which is not part of a plain LoRA adapter: merge it with PEFT first")
        if found["part"] == "B":
            if key.replace("lora_B", "lora_A") not in stored:
                raise OpdlabError(f"{file} has {key} without its lora_A: fetch the adapter again")
            continue
        name, b = f"{found['name']}.weight", key.replace("lora_A", "lora_B")
        if name not in pieces:
            raise OpdlabError(
                f"{folder} changes {name}, which {base.path} does not have as one matrix: give its own base, or merge "
                "it with PEFT first"
            )
        origin, other = pieces[name], stored.get(b, (0, 0))
        if len(shape) != 2 or len(other) != 2 or (other[0], shape[1], shape[0]) != (*origin.shape, other[1]):
            raise OpdlabError(f"{key} in {file} does not fit {name} {origin.shape} of {base.path}: give its own base")
        scaling = _scaling(config, file, name, shape[0])
        pieces[name] = origin.part(origin.shape, partial(_merged, file=file, a=key, b=b, scaling=scaling))
    return pieces


def _scaling(config: dict, file: Path, name: str, rank: int) -> float:
    def of(pattern: str, default: float) -> float:
        said = (config.get(pattern) or {}).items()
        return next((value for key, value in said if re.search(rf"(^|\.)({key})\.weight$", name)), default)

    try:
        alpha, said = of("alpha_pattern", config.get("lora_alpha", rank)), of("rank_pattern", config.get("r", rank))
        if said == rank:
            return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
    except (TypeError, AttributeError, re.error) as problem:
        beside = f"the adapter_config.json beside {file}"
        raise OpdlabError(f"{beside} cannot be understood ({problem}): restore it") from problem
    raise OpdlabError(f"{name} in {file} has rank {rank}, and adapter_config.json says {said}: give its own config")


def _merged(tensor: Tensor, file: Path, a: str, b: str, scaling: float) -> Tensor:
    # In float64, because rounding, as in a saved merged model, would destroy the low rank of the update.
    return tensor.double() + scaling * (read_stored(file, b).double() @ read_stored(file, a).double())
