"""LoRA adapters, added to the weights of their base as they are read, by the rules of PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models.files import read_json
from opdlab.models.names import HEAD, canonical_name, embedding_of, is_turned, plain_names
from opdlab.models.pieces import Checkpoint, Piece, pieces_of, read_stored, refuse_foreign

_LORA = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
# Two copies of a module, the one trained and the one before, which PEFT stores where the vocabulary was resized.
_COPY = re.compile(r"(?P<module>.+)\.(?P<copy>modules_to_save|original_module)(?:\.default)?\.(?P<end>\w+)")
# The options of PEFT's LoRA that leave an update a product of two matrices, added to the base. An adapter that sets any
# other option is refused: what that option does, only the PEFT that knows it can say.
_PLAIN = re.compile(
    "task_type|peft_type|peft_version|auto_mapping|base_model_name_or_path|revision|inference_mode|r|lora_alpha|"
    "target_modules|exclude_modules|layers_to_transform|layers_pattern|rank_pattern|alpha_pattern|use_rslora|"
    "lora_dropout|fan_in_fan_out|bias|modules_to_save|init_lora_weights|(?:eva|loftq|corda|lora_ga|runtime)_config|"
    "megatron_config|megatron_core|qalora_group_size"
)
# Initialisations that leave the base as it is; with others, B A is not added to the weights of the base.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Adapters that leave the weights of a model as they are; an activated LoRA, which acts on some tokens, does so too.
_WEIGHTLESS = ("PROMPT", "PREFIX", "P_TUNING", "CPT", "CARTRIDGE")
_MERGE = (
    'merge it with python -c "from transformers import AutoModelForCausalLM as M; from peft import PeftModel as P; '
    "P.from_pretrained(M.from_pretrained('{base}', dtype='float32'), '{0}').merge_and_unload()"
    ".save_pretrained('{0}-merged')\" and measure {0}-merged"
)


def with_adapter(folder: Path, base: Checkpoint | None) -> dict[str, Piece]:
    """Return the whole tensors of ``base`` with the update of the adapter in ``folder`` added.

    Tensors that the adapter stores whole, such as ``modules_to_save``, take the place of those of the base.

    Raises:
        OpdlabError: if the adapter is no plain LoRA, does not fit the base, or the base is missing.
    """
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if base is None:
        origin = config.get("base_model_name_or_path") or "it was trained on"
        raise OpdlabError(
            f"{folder} is an adapter, which only means something on its base: give the base first, as in "
            f"'opdlab measure BASE {folder}' with the base {origin}"
        )
    if not file.is_file():
        refuse_foreign(sorted(folder.glob("*.bin")))
        raise OpdlabError(f"{folder} has no adapter_model.safetensors: fetch or save the adapter again")
    _check_plain(folder, base.path, config)
    stored = pieces_of(file)
    if not stored:
        raise OpdlabError(f"{file} holds no tensors: save or fetch the adapter again")
    pieces, updates = dict(base.whole), dict[str, dict[str, Piece]]()
    called = {canonical_name(name): name for name in pieces}  # one version of transformers may have saved each
    saved = config.get("modules_to_save") or []
    for key, name in _trained(stored, saved):
        whole = name.replace(".base_layer.", ".")
        whole = called.get(canonical_name(whole), whole)
        if found := _LORA.fullmatch(name):
            updates.setdefault(found["module"], {})[found["side"]] = stored[key]
        elif whole in pieces or _among(saved, whole.rpartition(".")[0]):
            headless = HEAD not in map(canonical_name, pieces)
            if headless and whole == embedding_of(pieces) and ".base_layer." not in name:
                pieces[HEAD] = pieces[whole]  # PEFT leaves a head that was tied to the embedding as it was.
            pieces[whole] = stored[key]
        elif whole != HEAD:  # of a tied head, whose update is refused below
            how = _MERGE.format(folder, base=base.path)
            raise OpdlabError(f"{file} has {key}, which is not part of a plain LoRA adapter: {how}")
    for module, parts in updates.items():
        name = called.get(canonical_name(f"{module}.weight"), f"{module}.weight")
        pieces[name] = _updated(file, module, name, parts, pieces.get(name), base, config)
    return pieces


def _trained(stored: Collection[str], saved: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the plain names by those in the file, without what tells copies of a module that is saved whole apart."""
    for key, name in plain_names(stored).items():
        found = _COPY.fullmatch(name)
        if not found or not _among(saved, found["module"]):
            yield key, name
        elif found["copy"] == "modules_to_save":
            yield key, f"{found['module']}.{found['end']}"


def _check_plain(folder: Path, base: Path | str, config: dict) -> None:
    kind = str(config.get("peft_type", "LORA"))
    start = config.get("init_lora_weights", True)
    odd = [f"peft_type {kind}"] if kind != "LORA" else []
    odd += [f"init_lora_weights {start}"] if start not in _PLAIN_STARTS else []
    odd += sorted(option for option, value in config.items() if value and not _PLAIN.fullmatch(option))
    if odd:
        apart = config.get("alora_invocation_tokens") or any(word in kind for word in _WEIGHTLESS)
        how = "it cannot be merged with weights" if apart else _MERGE.format(folder, base=base)
        raise OpdlabError(f"{folder} is not a plain LoRA adapter ({', '.join(odd)}): {how}")


def _updated(
    file: Path, module: str, name: str, parts: dict[str, Piece], origin: Piece | None, base: Checkpoint, config: dict
) -> Piece:
    if len(parts) != 2:
        lacks = "lora_B" if "A" in parts else "lora_A"
        raise OpdlabError(f"{file} lacks {lacks} of {module}: fetch the adapter again")
    if origin is None:
        tied = ", whose head is its embedding," if name == HEAD and embedding_of(base.whole) else ""
        raise OpdlabError(
            f"{file.parent} changes {name}, which {base.path}{tied} does not have as one matrix: give its own base, or "
            f"{_MERGE.format(file.parent, base=base.path)}"
        )
    a, b = parts["A"], parts["B"]
    turned = ".lora_embedding_" in a.stored or is_turned(name, base.config)
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
    if not fits or (b.shape[0], a.shape[1]) != (origin.shape[::-1] if turned else origin.shape):
        raise OpdlabError(f"{a.stored} in {file} does not fit {name} {origin.shape} of {base.path}: give its own base")
    scaling = _scaling(config, file, module, a.shape[0])
    take = partial(_merged, file=file, a=a.stored, b=b.stored, scaling=scaling, turned=turned)
    return origin.part(origin.shape, take)


def _scaling(config: dict, file: Path, module: str, rank: int) -> float:
    def of(pattern: str, default: float) -> float:
        said = (config.get(pattern) or {}).items()
        return next((value for key, value in said if re.match(rf"(.*\.)?({key})$", module)), default)

    try:
        alpha, said = of("alpha_pattern", config.get("lora_alpha", 8)), of("rank_pattern", config.get("r", 8))
        if not _is_targeted(config, module):
            raise OpdlabError(f"{file} changes {module}, which is none of its config's target_modules: restore the two")
        if said == rank:
            return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
    except (TypeError, AttributeError, re.error) as problem:
        beside = f"the adapter_config.json beside {file}"
        raise OpdlabError(f"{beside} cannot be understood ({problem}): restore it") from problem
    raise OpdlabError(f"{module} in {file} has rank {rank}, and adapter_config.json says {said}: give its own config")


def _is_targeted(config: dict, module: str) -> bool:
    """Return whether PEFT would load the update of a module."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if _among(config.get("exclude_modules") or [], module):
        return False
    if targets is None or targets == "all-linear":
        return True
    if layers is None or isinstance(targets, str):
        return _among(targets, module)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
    layer = next((int(found[1]) for found in numbers if found), None)
    return _among(targets, module) and layer in (layers if isinstance(layers, list) else [layers])


def _among(said: str | Collection[str], module: str) -> bool:
    """Return whether a module is one of those that an option names: by a pattern, or by the ends of their names."""
    if isinstance(said, str):
        return bool(re.fullmatch(said, module))
    return any(f".{module}".endswith(f".{end}") for end in said)


def _merged(tensor: Tensor, file: Path, a: str, b: str, scaling: float, turned: bool) -> Tensor:
    # In float64, because rounding, as in a saved merged model, would destroy the low rank of the update.
    update = scaling * (read_stored(file, b).double() @ read_stored(file, a).double())
    return tensor.double() + (update.T if turned else update)
