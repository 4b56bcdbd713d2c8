"""The checkpoints of an update: where they are, whether they belong together, and their steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.models.checkpoints import Source, open_checkpoint
from opdlab.models.files import local_folder
from opdlab.models.pieces import Checkpoint


def open_all(base: Source, path: Source | Sequence[Source]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """Open a base and one or more checkpoints after it; models of the hub are fetched first.

    Raises:
        OpdlabError: as :func:`opdlab.models.checkpoints.open_checkpoint` does, or if a model cannot be fetched.
    """
    several: Sequence[Any] = path if isinstance(path, (list, tuple)) else [path]
    opened = _open(base)
    return opened, tuple(_open(source, opened) for source in several)


def _open(source: Source, base: Checkpoint | None = None) -> Checkpoint:
    return open_checkpoint(local_folder(source) if isinstance(source, (str, Path)) else source, base)


def name_of(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint, for titles."""
    path = checkpoint.path
    if isinstance(path, Path) and path.parent.name == "snapshots":  # of a run, or in the hub's cache
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name.removesuffix(".safetensors") if isinstance(path, Path) else path


def place_of(checkpoint: Checkpoint) -> str:
    """Return where a checkpoint is, as results name it."""
    return str(checkpoint.path.resolve()) if isinstance(checkpoint.path, Path) else checkpoint.path


def check_apart(out: Path | None, checkpoints: Iterable[Checkpoint]) -> None:
    """Raise if results would be written into one of the checkpoints."""
    if out and str(out.resolve()) in map(place_of, checkpoints):
        raise OpdlabError(f"the results would be written into the checkpoint {out}: choose another folder with --out")


def step_of(path: Path) -> int | None:
    """Return the last number in a checkpoint's name, its step.

    >>> step_of(Path("run/checkpoint-500")), step_of(Path("snapshots/step-000040.safetensors")), step_of(Path("final"))
    (500, 40, None)
    """
    numbers = re.findall(r"\d+", path.name.removesuffix(".safetensors"))
    return int(numbers[-1]) if numbers else None


def steps_of(path: Sequence[Path | str]) -> tuple[int, ...]:
    """Return the step of each checkpoint: those in their names, if they ascend, or else 1, 2, 3 ...

    >>> steps_of([Path("run/checkpoint-50"), Path("run/checkpoint-100")]), steps_of([Path("early"), Path("late")])
    ((50, 100), (1, 2))
    """
    named = [step for place in path if isinstance(place, Path) and (step := step_of(place)) is not None]
    ascending = len(named) == len(path) and named == sorted(set(named))
    return tuple(named) if ascending else tuple(range(1, len(path) + 1))


def find_trajectory(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, by step; step 0, the origin itself, is left out.

    Raises:
        OpdlabError: if there is none.
    """
    # A checkpoint without weights, or with pickled ones, is listed too, and refused by name when it is opened.
    kinds = ("*.safetensors", "*.bin", "*config.json")
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in inside if path.suffix == ".safetensors" or any(any(path.glob(kind)) for kind in kinds)]
    found = sorted(filter(step_of, found), key=lambda path: step_of(path) or 0)
    if not found:
        held = ", ".join(path.name for path in inside[:4]) or "nothing"
        raise OpdlabError(
            f"there are no checkpoints in {folder}, which holds {held}: give the folder with checkpoint-<step> folders "
            "of safetensors, or step-<step>.safetensors files"
        )
    for before, after in pairwise(found):
        if step_of(before) == step_of(after):
            raise OpdlabError(f"{before} and {after} are of one step: leave one, or give the checkpoints in order")
    return found


def default_out(measured: Path) -> Path:
    """Return the default folder for results; a checkpoint that has only a number gets its run's name too.

    >>> default_out(Path("/runs/sft/final")), default_out(Path("/runs/sft/checkpoint-500"))
    (PosixPath('geometry-final'), PosixPath('geometry-sft-checkpoint-500'))
    """
    measured = measured.resolve()
    name = measured.name.removesuffix(".safetensors")
    return Path(f"geometry-{name}" if step_of(measured) is None else f"geometry-{measured.parent.name}-{name}")
