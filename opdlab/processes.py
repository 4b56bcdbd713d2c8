"""Worker processes side by side, for work on small matrices: two with one thread each beat one with two threads."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from threading import RLock, Thread

import torch
from tqdm import tqdm

# Spawned, as a fork of a process that has used several threads may hang.
CONTEXT = multiprocessing.get_context("spawn")


def _start(prepare: Callable | None, arguments: tuple) -> None:
    # Ctrl-C reaches the workers too: they may stop at once, as killed work loses nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # tqdm's own lock spans processes; in a killed one it would be reported as leaked.
    tqdm.set_lock(RLock())
    torch.set_num_threads(1)
    # Nobody would be left to hear of what a worker finds after its parent was killed.
    Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers wait for the end of their parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with ``count`` CPU threads, and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers(count: int, prepare: Callable | None = None, *arguments: object) -> Iterator[ProcessPoolExecutor]:
    """Open ``count`` processes of one thread each, and end them at once if anything goes wrong, Ctrl-C included.

    Args:
        count: how many.
        prepare: called in each of them with ``arguments`` before any work.
        arguments: of ``prepare``.
    """
    # glibc reads these when a worker starts. Without them it hands large tensors back to the system and gets them again
    # page by page: a tenth of the time of a training step, a quarter of that of a measurement. Above 32 MB it may,
    # or a worker would keep twice the memory that it needs.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**29))
    # SciPy's own BLAS knows nothing of PyTorch's number of threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(count, CONTEXT, _start, (prepare, arguments)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
