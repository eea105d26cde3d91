"""Printing what is long enough to be looked through."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print ``text``; nothing happens if its reader (``| head``, ``| less``) has seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it exits, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
