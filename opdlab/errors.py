"""The exception that opdlab raises on bad input, and the exit status of its commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper


class OpdlabError(Exception):
    """Bad input: the message is one sentence that names the argument or file and the remedy.

    The command line prints only that sentence and exits with status 2; in a notebook it is the last line of the
    traceback. Earlier results are kept.
    """


def exit_status(program: str, work: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: its own or 0, 2 on bad input, 130 if interrupted.

    If the reader of its output has closed the pipe, as in ``opdlab plan | head``, the status is 141 and nothing is
    printed. An error message begins with the name of the program. What the output's encoding lacks, such as α in many
    of Windows, is written as ``\\u03b1``.

    >>> exit_status("opdlab", lambda: None)
    0
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except OpdlabError as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit.
        return 141
