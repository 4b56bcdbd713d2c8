"""Work that is done tensor by tensor: in parallel, within a memory bound, resumably."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.models.files import write_json, write_text
from opdlab.processes import workers


@contextmanager
def resumable_map(
    work: Callable[[str], dict],
    sizes: dict[str, int],
    identity: dict,
    *,
    out: Path | None = None,
    processes: int = 1,
    progress: bool = False,
) -> Iterator[dict[str, dict]]:
    """Map a function over tensors in parallel, within a memory bound, resumably.

    Inside ``with resumable_map(...) as found:``, write what comes of the results by name. Each result is written to
    ``out`` as soon as it is known, so the same call after a stop does only what is left; when the block ends without an
    error, that log is deleted.

    Args:
        work: what to do with one tensor; it returns JSON values and, for several processes, can be pickled.
        sizes: the names of the tensors and their numbers of entries, largest first.
        identity: what stopped work must share with this to be resumed, as JSON values.
        out: folder of the results; without it nothing is written, and nothing can be resumed.
        processes: how many at once, with one thread each; 1 stays in this process.
        progress: show a bar.

    Raises:
        OpdlabError: if the folder cannot be written or holds other work, a process was killed, or as ``work`` does.
    """
    done = _resume(out, identity) if out else {}
    left = {name: size for name, size in sizes.items() if name not in done}
    with (
        tqdm(total=len(sizes), initial=len(sizes) - len(left), unit="tensor", disable=not progress) as bar,
        open(out / "rows.jsonl", "a") if out else nullcontext() as log,
    ):
        for name, found in _in_parallel(work, left, processes):
            done[name] = found
            if log:
                _write_line(log, name=name, found=found)
            bar.set_postfix_str(name[-40:])
            bar.update()
    yield done
    if out:
        (out / "rows.jsonl").unlink(missing_ok=True)


def _write_line(log: TextIO, **line: object) -> None:
    try:
        log.write(json.dumps(line) + "\n")
        log.flush()
    except OSError as problem:
        raise OpdlabError(f"{log.name} cannot be written ({problem.strerror}); make room, run again") from problem


# What a worker process does with each tensor. It is sent there once, as it names every tensor of several models.
_WORK: list[Callable[[str], dict]] = []


def _take_up(work: Callable[[str], dict]) -> None:
    _WORK.append(work)


def _do(name: str) -> dict:
    return _WORK[-1](name)


def _in_parallel(work: Callable[[str], dict], sizes: dict[str, int], processes: int) -> Iterator[tuple[str, dict]]:
    if processes == 1:
        yield from ((name, work(name)) for name in sizes)
        return
    # The memory needed is that of the largest tensor, however many processes there are: the tensors under way are
    # together hardly larger than that. Eight million entries more, half a gigabyte, leave room for the small ones.
    room, waiting = max(sizes.values(), default=0) + 8_000_000, dict(sizes)
    running: dict[Future[dict], str] = {}
    with workers(processes, _take_up, work) as pool:
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


def _resume(out: Path, identity: dict) -> dict[str, dict]:
    """Return what an earlier, unfinished call for the same work found, and prepare the folder for the rest."""
    identity, log, lines = json.loads(json.dumps(identity)), out / "rows.jsonl", []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "job.json").is_file() and json.loads((out / "job.json").read_text()) != identity:
            raise OpdlabError(f"the folder {out} holds another measurement: choose another with --out, or delete it")
        if log.is_file():
            # A kill may have cut the last line, so only whole lines are kept.
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        done = {line["name"]: line["found"] for line in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise OpdlabError(f"the folder {out} cannot be used ({problem}): choose another with --out") from problem
    write_json(out / "job.json", identity)
    write_text(log, "".join(lines))
    return done
