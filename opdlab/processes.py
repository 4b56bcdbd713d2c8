"""This machine: worker processes, threads and devices, and what a result was computed on.

Work on small matrices runs in processes side by side: two with one thread each beat one with two threads.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import RLock, Thread

import numpy
import torch
from tqdm import tqdm

from opdlab.errors import OpdlabError

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


def find_device(gpu: bool = False) -> torch.device:
    """Return the device to train on: ``OPDLAB_DEVICE``, or a GPU if ``gpu`` asks for one and there is one, or the CPU.

    Raises:
        OpdlabError: if there is no such device.
    """
    wanted = os.environ.get("OPDLAB_DEVICE") or ("cuda" if gpu and torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as problem:
        raise OpdlabError(f"the device {wanted!r} cannot be used ({problem}); set OPDLAB_DEVICE=cpu") from problem


def _processor() -> str:
    """Return the processor's name as Linux tells it, with family and model; elsewhere what Python knows."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        fields = dict(line.replace("\t", "").split(":", 1) for line in first.splitlines())
        return f"{fields['model name'].strip()} (family{fields['cpu family']}, model{fields['model']})"
    except (OSError, ValueError, KeyError):
        return platform.processor() or platform.machine()


def provenance(device: torch.device | None = None) -> dict:
    """Return what floating-point results depend on beside the configuration: versions, processor and device."""
    device = device or torch.device("cpu")
    gpu = {} if device.type == "cpu" else {"cuda": torch.version.cuda}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": numpy.__version__,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "machine": f"{platform.system()} {platform.machine()}",
    } | gpu
