"""Write files whole: under a temporary name, then moved into place once they are on the disk.

So a killed program, or a loss of power, leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
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
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise OpdlabError(
            f"{path} cannot be written ({problem}): make room on the disk or choose another folder, and run it again"
        ) from problem


def sync(path: Path) -> None:
    """Wait until what a file holds, or which names a folder has, is on the disk, where it outlives a loss of power."""
    harmless = (OSError,) if path.is_dir() else ()  # Not all systems open folders.
    with suppress(*harmless):
        opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def only_process(folder: Path, does: str) -> Iterator[None]:
    """Let one process at a time into the ``with`` block on a folder; when it ends, even by a kill, another may.

    The system holds the lock, on the file "lock" in the folder, and lets it go with the process.

    Raises:
        OpdlabError: if another process is there, called what it ``does``, or the folder is not writable.
    """
    with _writing(folder / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    with os.fdopen(lock):  # which closes it
        try:
            _lock(lock)
        except (BlockingIOError, PermissionError) as problem:
            raise OpdlabError(f"another process {does} in {folder}: wait until it ends, or stop it") from problem
        except OSError:
            pass  # This file system has no locks.
        yield


def _lock(opened: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


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


def read_json(path: Path, remedy: str = "restore it") -> dict:
    """Return the object in a JSON file, or raise an OpdlabError with a ``remedy`` if it is missing or damaged."""
    try:
        return {**json.loads(path.read_text("utf-8"))}  # A list is not a mapping.
    except (OSError, ValueError, TypeError) as problem:
        raise OpdlabError(f"{path} is missing or damaged ({problem}): {remedy}") from problem


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, with NaN and infinity as null; raises as :func:`write_whole` does."""
    write_text(path, json.dumps(_defined(value), indent=1, allow_nan=False) + "\n")


def append_json(path: Path, line: dict) -> None:
    """Add a line to a file of JSON lines, or raise an OpdlabError if it cannot be written."""
    with _writing(path), open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; raises as :func:`write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))


def _defined(value: object) -> object:
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors, and text as metadata, to a safetensors file; raises as :func:`write_whole` does.

    Their digest is written too, by which :func:`load_tensors` finds a file whose bytes have changed.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata["digest"] = tensors_digest(tensors)
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file, or raise an OpdlabError if it is missing or damaged."""
    remedy = "delete its run folder and train again"
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        raise OpdlabError(f"{path} is missing, truncated or not a safetensors file: {remedy}") from problem
    if metadata.get("digest") not in (None, tensors_digest(tensors)):
        raise OpdlabError(f"{path} is damaged, as its digest tells: {remedy}")
    return tensors, metadata


def content_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of the bytes of a tensor, on whatever device it is."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return the first 16 hex digits of the SHA-256 of tensors and their names: equal if they agree bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
