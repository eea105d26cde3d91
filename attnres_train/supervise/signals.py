"""Signals that end a run: saved after the step at work, at once when told twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from attnres_train.supervise import failures

# Signals that end a run: the agent hands them to the workers, which save (see `train`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Seconds that a rank has to fail by itself after the failure of another.
LEAVE_SECONDS = 5.0


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a run here; one that the caller ignores (nohup) is not among them."""
    return tuple(s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN)


def catch_stop_signals(folder: Path) -> Callable[[], bool]:
    """From now on the first of `stop_signals` sets a flag; returns the function that reads it. The
    loop saves and leaves after the step in which any rank was told; a second signal ends the
    process at once.

    If another rank of the run in ``folder`` has failed, that step has no end. This one then gets
    some seconds to fail too.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        if failures.paths(folder):
            _leave_soon(folder, frame)

    for number in stop_signals():
        signal.signal(number, stop)
    return lambda: bool(received)


def _leave_soon(folder: Path, frame: FrameType | None) -> None:
    """Write down where this rank is, unless it has failed, and end it unless it does so by then."""
    here = failures.ended_in(int(os.environ.get("RANK", 0)), frame)
    if all(failure.rank != here.rank for failure in failures.read(folder)):
        failures.write(folder, here)
    # By default the kernel ends the process, even in a call that never comes back to Python.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end = threading.Timer(LEAVE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    end.start()
