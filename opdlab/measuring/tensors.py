"""One program for every table: tensors are read one at a time, from files or from memory, and measured in parallel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from math import prod
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.geometry import Resolution, Svd, measure_matrix, measure_matrix_trajectory, measure_rows, svd
from opdlab.geometry.matrices import identity
from opdlab.measuring.sources import LeftOut, in_common, open_all
from opdlab.models.files import append_json, content_digest, load_tensors, save_tensors, write_json, write_text
from opdlab.models.pieces import Checkpoint
from opdlab.processes import GIVEN, cpu_threads, usable_device, workers

# Entries times smaller side, summed over the matrices, below which starting processes takes longer than measuring.
_SMALL = 1e9
# Entries of a tensor that are in memory at once where it is read some rows at a time.
_SOME_ROWS = 2**19


@dataclass
class Job:
    """All that a process needs to measure any tensor on the way from a base to the last of its checkpoints."""

    base: Checkpoint
    path: tuple[Checkpoint, ...]
    steps: tuple[float, ...]
    seed: int = 0  #: of the nulls
    nulls: bool = True
    blocks: Collection[str] | None = None  #: of the tensors to measure; by default all
    trajectory_blocks: Collection[str] | None = None  #: of those to follow; by default all, if there are several steps
    cache: Path | None = None
    device: str = "cpu"
    embeddings: bool = False  #: whether embeddings and output heads are decomposed too
    left_out: tuple[LeftOut, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Open what was given by its path, and keep what all checkpoints have."""
        origin, path = open_all(self.base, self.path)
        (self.base, *rest), left_out = in_common(origin, path)
        self.path, self.left_out = tuple(rest), tuple(left_out)

    def identity(self) -> dict:
        """Return what stopped work must share with this to be resumed: files and options."""
        places = [end.path for end in (self.base, *self.path) if isinstance(end.path, Path)]
        files = [file for path in places for file in sorted([path, *path.glob("*.safetensors"), *path.glob("*.json")])]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        asked = {"seed": self.seed, "nulls": self.nulls, "embeddings": self.embeddings}
        return {"opdlab": version("opdlab"), "files": stamps} | asked

    def measure(self, name: str) -> dict:
        """Measure one tensor: its row, and the rows of its trajectory where it is followed."""
        shape = self.base.pieces[name].shape
        who, at = identity(name, shape), Resolution.of(shape if len(shape) == 2 else (1, 1))
        if not self.decomposes(name):
            alphas = at.alphas if who["cols"] > 1 else ()
            before, after = self._rows(self.base, name), self._rows(self.path[-1], name)
            row = measure_rows(name, shape, before, after, alphas, self.seed, self.nulls)
            return {"row": who | row, "trajectory": []}
        origin, snapshots = (_Way(checkpoints, name, self.device) for checkpoints in ((self.base,), self.path))
        svd0 = base_svd(origin[0], at.vectors, self.cache)
        # Tensors are read where they are used, so that nothing here keeps them longer than that.
        row = who | measure_matrix(name, origin[0], snapshots[-1], at, self.seed, svd0, self.nulls)
        del svd0
        followed = len(self.path) > 1 if self.trajectory_blocks is None else who["block"] in self.trajectory_blocks
        columns = measure_matrix_trajectory(name, origin[0], snapshots, at, self.seed) if followed else {}
        lines = pd.DataFrame(columns).to_dict("records")
        return {"row": row, "trajectory": [{"step": self.steps[i]} | who | line for i, line in enumerate(lines)]}

    def decomposes(self, name: str) -> bool:
        """Return whether a tensor is measured as a matrix, with its directions."""
        who = identity(name, self.base.pieces[name].shape)
        return min(who["rows"], who["cols"]) > 1 and (self.embeddings or who["block"] not in ("embedding", "head"))

    def _rows(self, end: Checkpoint, name: str) -> Callable[[int, int], Tensor]:
        """Return what reads rows of a tensor; what has to be computed is computed once."""
        piece = end.pieces[name]
        if piece.shape and not piece.takes:
            return lambda start, stop: end.read(name, (start, stop)).to(self.device)
        whole = end.read(name).to(self.device)
        return lambda start, stop: whole[start:stop] if piece.shape else whole


@dataclass
class _Way(Sequence[Tensor]):
    """One tensor in several checkpoints, read when it is asked for."""

    checkpoints: tuple[Checkpoint, ...]
    name: str
    device: str

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody asks for a slice
        return self.checkpoints[index].read(self.name).to(self.device)


def base_svd(w0: Tensor, k: int, cache: Path | None) -> Svd:
    """Return the Svd of a base matrix with k vectors, from the cache if its content was decomposed before."""
    if cache is None:
        return svd(w0, k=k)
    kind = f"{str(w0.dtype).removeprefix('torch.')}-{'x'.join(map(str, w0.shape))}-k{k}-v{version('opdlab')}"
    file = cache / f"svd-{content_digest(w0)[:32]}-{kind}.safetensors"
    # The cache only saves time: what cannot be read is computed again, and what cannot be kept is not.
    with suppress(OpdlabError):
        tensors, _ = load_tensors(file)
        return Svd(**{part: tensor.to(w0.device) for part, tensor in tensors.items()})
    found = svd(w0, k=k)
    with suppress(OpdlabError):
        save_tensors(file, found._asdict())
    return found


@contextmanager
def measured(
    job: Job, *, processes: int | None = None, out: Path | None = None, progress: bool = False
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Measure the tensors of a job; the ``with`` block gets the table of the tensors and that of the trajectory.

    By default a small model is measured in this process, as are weights in memory and on a GPU; otherwise each
    processor has a process. What is finished is kept in the folder ``out``, to be resumed, until the block has ended.

    Raises:
        OpdlabError: on bad input, naming the tensor or file.
    """
    sizes = _sizes(job)
    matrices = [job.base.pieces[name].shape for name in sizes if job.decomposes(name)]
    small = sum(prod(shape) * min(shape) for shape in matrices) < _SMALL
    alone = usable_device(job.device).type != "cpu"  # a device has room for one process
    default = 1 if small else os.cpu_count() or 1
    count = 1 if alone else default if processes is None else processes
    ends = (job.base, *job.path)
    with (
        # Small matrices gain nothing from a second thread, and wait for it where the machine is busy.
        cpu_threads(1 if small else torch.get_num_threads()),
        resumable_map(job.measure, sizes, job.identity(), ends, out=out, processes=count, progress=progress) as found,
    ):
        in_order = [found[name] for name in job.base.pieces if name in found]
        rows = [tensor["row"] for tensor in in_order]
        # A matrix has all columns, in their order.
        table = pd.DataFrame(rows, columns=list(max(rows, key=len, default={})))
        trajectory = pd.DataFrame([line for tensor in in_order for line in tensor["trajectory"]])
        yield table, trajectory.sort_values("step", kind="stable", ignore_index=True) if len(trajectory) else trajectory


def _sizes(job: Job) -> dict[str, int]:
    """Return how many entries of each tensor to measure are in memory at once, largest tensor first."""
    shapes = {name: piece.shape for name, piece in job.base.pieces.items()}
    if job.blocks:
        shapes = {name: shape for name, shape in shapes.items() if identity(name, shape)["block"] in job.blocks}
    in_order = sorted(shapes, key=lambda name: -prod(shapes[name]))
    return {name: prod(shapes[name]) if job.decomposes(name) else _SOME_ROWS for name in in_order}


@contextmanager
def resumable_map(
    work: Callable[[str], dict],
    sizes: dict[str, int],
    key: dict,
    ends: Iterable[Checkpoint],
    *,
    out: Path | None = None,
    processes: int = 1,
    progress: bool = False,
) -> Iterator[dict[str, dict]]:
    """Map a function over tensors; the ``with`` block gets the results by name, and writes what comes of them.

    Each result is written to ``out`` as soon as it is known, so the same call after a stop does only what is left; when
    the block ends without an error, that log is deleted.

    Args:
        work: what to do with one tensor; it returns JSON values and, for several processes, can be pickled.
        sizes: the names of the tensors and their numbers of entries, largest first.
        key: what stopped work must share with this to be resumed, as JSON values.
        ends: the checkpoints. If one of them is in memory, the work stays in this process and cannot be resumed: its
            weights have no file to be told by, and every process would get a copy of them.
        out: folder of the results; without it nothing can be resumed.
        processes: how many at once, with one thread each; 1 stays in this process.
        progress: show a bar when a second has passed.

    Raises:
        OpdlabError: if the folder cannot be written or holds other work, a process was killed, or as ``work`` does.
    """
    if processes < 1:
        raise OpdlabError(f"processes is {processes}; expected 1 or more")
    if not all(isinstance(end.path, Path) for end in ends):
        out, processes = None, 1
    done = _resume(out, key) if out else {}
    left = {name: size for name, size in sizes.items() if name not in done}
    with tqdm(total=len(sizes), initial=len(sizes) - len(left), unit="tensor", delay=1, disable=not progress) as bar:
        for name, found in _in_parallel(work, left, processes):
            done[name] = found
            if out:
                append_json(out / "rows.jsonl", {"name": name, "found": found})
            bar.set_postfix_str(name[-40:], refresh=False)
            bar.update()
    yield done
    if out:
        (out / "rows.jsonl").unlink(missing_ok=True)


def _do(name: str) -> dict:
    # The work is given to a process once and not sent with each name: it names every tensor of several models.
    return GIVEN[0](name)


def _in_parallel(work: Callable[[str], dict], sizes: dict[str, int], processes: int) -> Iterator[tuple[str, dict]]:
    if processes == 1:
        yield from ((name, work(name)) for name in sizes)
        return
    # The memory needed is that of the largest tensor, however many processes there are: the tensors under way are
    # together hardly larger than that. Eight million entries more, half a gigabyte, leave room for the small ones.
    room, waiting = max(sizes.values(), default=0) + 8_000_000, dict(sizes)
    running: dict[Future[dict], str] = {}
    with workers(processes, work) as pool:
        try:
            while waiting or running:
                for name, size in list(waiting.items()):
                    if len(running) < 2 * processes and size + sum(sizes[other] for other in running.values()) <= room:
                        running[pool.submit(_do, name)] = name
                        del waiting[name]
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as problem:
            raise OpdlabError(
                "a measuring process was killed, perhaps for lack of memory: use fewer --processes; the same command "
                "goes on with the tensors that are left"
            ) from problem


def _resume(out: Path, key: dict) -> dict[str, dict]:
    """Return what an earlier, unfinished call for the same work found, and prepare the folder for the rest."""
    key, job, log = json.loads(json.dumps(key)), out / "job.json", out / "rows.jsonl"
    if job.is_file() and json.loads(job.read_text("utf-8")) != key:
        raise OpdlabError(f"the folder {out} holds another measurement: choose another with --out, or delete it")
    # A kill may have cut the last line, so only whole lines are kept.
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]
    write_json(job, key)
    write_text(log, "".join(lines))
    return {line["name"]: line["found"] for line in map(json.loads, lines)}
