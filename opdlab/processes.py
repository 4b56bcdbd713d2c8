"""Worker processes, threads and devices, and a record of the machine on which a result was computed.

Work on small matrices is spread over processes, because two processes of one thread are faster than one of two threads.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from threading import RLock, Thread
from types import ModuleType
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from opdlab.errors import OpdlabError


class _Worker(SpawnProcess):
    """A process that does not import the program it was started from, which would do again all that stands there."""

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    # Spawned, because forking a process that has used several threads may hang.
    Process = _Worker


CONTEXT = _Context()
#: In a worker process, what :func:`workers` gave to all of them.
GIVEN: list[Any] = []


def _start(given: tuple) -> None:
    # Ctrl-C reaches the workers too. They may stop at once, because interrupted work is simply done again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # tqdm's default lock spans processes, and would be reported as leaked when a worker is killed.
    tqdm.set_lock(RLock())
    torch.set_num_threads(1)
    # If the parent is killed, nothing is left to receive a worker's results.
    Thread(target=_end_with_parent, daemon=True).start()
    GIVEN.extend(given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker waits for its parent to end"
    parent.join()
    os._exit(1)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Use ``count`` CPU threads inside the ``with`` block, and restore the previous number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):  # of SciPy's BLAS, which PyTorch's number says nothing to
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers(count: int, *given: object) -> Iterator[ProcessPoolExecutor]:
    """Start ``count`` single-threaded worker processes, and end them at once on any exception, Ctrl-C included.

    Each process finds ``given`` in :data:`GIVEN`. It knows what modules define, and nothing of the calling script.
    """
    # glibc reads these when a worker starts. Without them it returns the memory of large tensors to the system and gets
    # it back page by page, which takes a tenth of a training step and a quarter of a measurement. Above 32 MB it still
    # may: otherwise a worker would hold twice the memory that it needs.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**29))
    # SciPy's BLAS does not follow PyTorch's number of threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(count, CONTEXT, _start, (given,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def find_device(gpu: bool = False) -> torch.device:
    """Return the device to train on: ``OPDLAB_DEVICE`` if set, else a GPU if ``gpu`` and one is there, else the CPU.

    Raises:
        OpdlabError: if the device cannot be used.
    """
    return usable_device(os.environ.get("OPDLAB_DEVICE") or ("cuda" if gpu and torch.cuda.is_available() else "cpu"))


def usable_device(name: str) -> torch.device:
    """Return the device of a name, or raise an OpdlabError if it cannot be used."""
    try:
        return torch.empty(0, dtype=torch.float64, device=name).device
    except (RuntimeError, AssertionError, TypeError) as problem:  # the last where there is no float64, as on "mps"
        raise OpdlabError(f"device {name!r} cannot be used here ({problem}): give cpu (OPDLAB_DEVICE=cpu)") from problem


def _cpu_fields() -> dict[str, str]:
    """Return what Linux says of the first processor; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        return dict(line.replace("\t", "").split(":", 1) for line in first.splitlines())
    except (OSError, ValueError):
        return {}


def computes_in_bfloat16() -> bool:
    """Tell whether the CPU multiplies matrices in bfloat16 at all, and faster than in float32, as Linux tells it."""
    return "avx512_bf16" in _cpu_fields().get("flags", "").split()


def processor() -> str:
    """Return the processor's name, and the kernels that PyTorch takes for it.

    The name has family and model on Linux; elsewhere it is whatever Python reports.
    """
    fields = _cpu_fields()
    name = platform.processor() or platform.machine()
    if {"model name", "cpu family", "model"} <= fields.keys():
        name = f"{fields['model name'].strip()} (family{fields['cpu family']}, model{fields['model']})"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def provenance(device: torch.device | None = None) -> dict:
    """Return what floating-point results depend on besides the configuration: versions, processor and device."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": version("numpy"),
        "device": "cpu",
        "processor": processor(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if device is None or device.type == "cpu":
        return found
    return found | {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
