"""One log for each rank: `logs/rank_0003.log` in the run folder holds what that rank prints, warns
of and fails with, attempt after attempt. The screen shows rank 0, and what ends the run."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from attnres_train.screen import complain


def log_path(folder: Path, rank: int) -> Path:
    """Of ``rank``, in run folder ``folder``."""
    return folder / "logs" / f"rank_{rank:04d}.log"


@contextmanager
def logged(folder: Path, rank: int) -> Iterator[None]:
    """Inside of the context, write down what this process prints, as rank ``rank`` of the run in
    ``folder``. Rank 0 prints it too; of others also what libraries in C print goes to the log
    alone. A log that cannot be written is done without."""
    with ExitStack() as stack:
        try:
            log_path(folder, rank).parent.mkdir(parents=True, exist_ok=True)
            number = os.open(log_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            complain(f"rank {rank} keeps no log: {error}")
            yield
            return
        stack.callback(os.close, number)
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        _write(number, f"== {now}, rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
        screen = None if rank == 0 else stack.enter_context(_led_to(number, (1, 2)))
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            stack.enter_context(redirect(cast(TextIO, Logged(number, stream, screen))))
        try:
            yield
        except BaseException:
            _write(number, traceback.format_exc())
            raise


class Logged:
    """A text stream whose text goes into the file ``number``; errors of that are not raised. If
    there is no ``screen`` apart, it also goes to ``stream``, whose errors are."""

    def __init__(self, number: int, stream: TextIO, screen: TextIO | None = None) -> None:
        self._number, self._stream = number, stream
        self.screen = screen
        """Where what ends this rank is to be seen too, None where everything is."""

    def write(self, text: str) -> int:
        if "\r" not in text:  # a progress bar
            _write(self._number, text)
        return len(text) if self.screen else self._stream.write(text)

    def flush(self) -> None:
        if not self.screen:
            self._stream.flush()

    def isatty(self) -> bool:
        return not self.screen and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _write(number: int, text: str) -> None:
    with suppress(OSError):
        os.write(number, text.encode(errors="backslashreplace"))


@contextmanager
def _led_to(target: int, numbers: Sequence[int]) -> Iterator[TextIO]:
    """The file descriptors ``numbers`` lead to ``target`` until the context ends; yields a stream
    that leads to where the last of them did."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    kept = [(number, os.dup(number)) for number in numbers]
    try:
        for number in numbers:
            os.dup2(target, number)
        with open(kept[-1][1], "w", buffering=1, closefd=False) as screen:
            yield screen
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
