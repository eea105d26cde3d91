"""What a process prints, in a way that cannot end its run: a terminal may be closed, the reader of
a pipe leave, the disk of a log be full."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

# A full disk may have room again; nothing else that goes wrong with a stream mends itself.
PASSING = (errno.ENOSPC, errno.EDQUOT)


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> Exception | None:
    """Print ``text`` and ``end``, a line feed, on ``stream`` (default: stdout), at once. Returns
    why that failed, None where it did not.

    A stream that has failed for good leads nowhere from then on.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        if getattr(error, "errno", None) not in PASSING:
            _lead_nowhere(stream)
        return error
    return None


def complain(text: str) -> None:
    """`say` on stderr."""
    say(text, sys.stderr)


class Forgiving:
    """``stream``, for a progress bar: what it cannot take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def settle() -> None:
    """Write out what stdout and stderr hold, before the process ends. What cannot be written is
    given up: left to the interpreter it would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _lead_nowhere(stream)


def _lead_nowhere(stream: TextIO) -> None:
    """From now on what is written to ``stream`` is lost without an error, also what it holds back
    and what libraries in C write there."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # closed, or no file
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
