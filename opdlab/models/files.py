"""Write files whole: under a temporary name first, then moved into place, so a killed program leaves none half done."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opdlab.errors import OpdlabError

# What is taken of a model on the hub; its folders, and what Mistral calls consolidated, have the same weights again.
MODEL_FILES, OTHER_FORMATS = ["*.json", "*.safetensors", "*.txt", "*.jinja"], ["*/*", "consolidated*"]
# OWNER/NAME, perhaps with @REVISION; the name of a file is no model of the hub.
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+(?<!\.safetensors)(?<!\.bin)(?<!\.pt)(?<!\.pth))(?:@([\w./-]+))?")


def cache_folder() -> Path:
    """Return the folder of fetched models and of decompositions (safe to delete): ``OPDLAB_CACHE``, or a default."""
    folder = os.environ.get("OPDLAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opdlab")
    return Path(folder).expanduser()


def local_folder(source: str | Path) -> Path:
    """Return the folder of a model on this machine; one on the Hugging Face hub is fetched first.

    On the hub it is called OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit.

    Raises:
        OpdlabError: if there is neither, with how to fetch it where there is a network.
    """
    path, found = Path(source).expanduser(), _ON_HUB.fullmatch(str(source))
    if path.exists() or not found:
        return path
    from huggingface_hub import snapshot_download  # imported late: few ask for it

    name, revision = found.groups()
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=OTHER_FORMATS)
        return Path(folder)
    except Exception as problem:
        why, at = str(problem).splitlines()[0], f" --revision {revision}" if revision else ""
        raise OpdlabError(
            f"there is no folder {source}, and the Hugging Face hub did not give a model of that name ({why}): where "
            f"there is a network run 'hf download {name}{at} --local-dir FOLDER', and give that folder"
        ) from problem


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, then move the file it wrote to ``path``, making folders as needed.

    Raises:
        OpdlabError: if the disk is full or the folder is not writable; ``path`` is then left unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as problem:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem):
            raise OpdlabError(f"the disk is full: {path} was not written; make room and run it again") from problem
        raise OpdlabError(f"{path} cannot be written ({problem}); choose a folder that can be") from problem


def link_or_copy(path: Path, source: Path) -> None:
    """Make ``path`` a hard link to the file ``source``, or a copy where there are none; raises as :func:`write_whole`.

    The files of a run are replaced, never modified in place, so writing to one name does not change the other.
    """

    def link(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    if not (path.exists() and path.samefile(source)):  # Moving one name of a file onto another name of it does nothing.
        write_whole(path, link)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, with NaN and infinity as null; raises as :func:`write_whole` does."""
    write_text(path, json.dumps(_defined(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; raises as :func:`write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text))


def _defined(value: object) -> object:
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors, and text as metadata, to a safetensors file; raises as :func:`write_whole` does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        OpdlabError: if the file is missing, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        what = f"{path} is missing, truncated or not a safetensors file"
        raise OpdlabError(f"{what}: delete its run folder and train again") from problem


def tensors_digest(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of the tensors in a snapshot: equal if they agree bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(path)[0].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
