"""The one exception that opdlab raises on bad input, and what a command makes of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class OpdlabError(Exception):
    """Bad input, said in one sentence that names the thing and the remedy.

    The command line prints the sentence alone and exits with status 2; in a notebook it is the last
    line of the traceback. Nothing that was computed before is removed.
    """


def exit_status(program: str, work: Callable[[], int | None]) -> int:
    """Do a command's work and return its exit status: the work's own or 0, 2 for bad input, 130 when interrupted.

    When whoever reads the output has gone, as in ``opdlab plan | head``, it ends without a word, with 141.

    >>> exit_status("opdlab", lambda: None)
    0
    """
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except OpdlabError as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; the same command goes on from what is done", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends.
        return 141
