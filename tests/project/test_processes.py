"""Workers do not outlive the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import os, time
from opdlab.processes import workers
with workers(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux which processes there are")
def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc", parent.stdout.readline().strip(), "status")
    assert worker.exists()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    # What is dead but not yet waited for by its new parent is a zombie.
    while worker.exists() and "\nState:\tZ" not in worker.read_text():
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)
