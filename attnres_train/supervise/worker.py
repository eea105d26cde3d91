"""One process of a run: how its end, by whatever cause, is told once and leaves nobody waiting."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from attnres_train.errors import UserError
from attnres_train.screen import complain, say, settle

# An error on all ranks is told by rank 0. The others leave it this many seconds to do so, and to
# take them down with it.
RANK_0_FIRST_SECONDS = 5.0
# How a collective or point-to-point call ends when the process at its other end has died.
PEER_LOST = (
    "PeerError",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket Timeout",
    "Timed out",
    "remote process exited",
)


def run_worker(work: Callable[[], int]) -> int:
    """Run a worker's ``work``; returns its exit code.

    An exception ends the process, exit code 2 for a UserError, else 1. It is told once: a UserError
    here, by the lowest rank that has it; any other by the agent that started the process (the local
    launcher or torchrun), or here without one.
    """
    rank = os.environ.get("RANK", "0")
    try:
        return work()
    except UserError as error:
        _tell(f"error{'' if rank == '0' else f' on rank {rank}'}: {_noted(error)}")
        _leave(2)
    except BaseException as error:  # also SystemExit: a normal exit would wait for the peers
        tell(error)
        _leave(1)


def tell(error: BaseException) -> None:
    """Tell of ``error``, which ends this worker: to the agent that started it, or on the screen."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    elif is_lost_peer(error):
        _tell(f"rank {rank} stopped, a peer is gone: {_noted(error)}")
    elif isinstance(error, TimeoutError) and error.__traceback__ is None:  # of `watch`: it has all
        _tell(str(error))
    else:
        told = "".join(traceback.format_exception(error)).rstrip()
        _tell(f"rank {rank} failed: {type(error).__name__}: {error}\n{told}")


def _noted(error: BaseException) -> str:
    """The text of ``error`` and its notes, a line each."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _tell(what: str) -> None:
    """Print what ended this worker, unless rank 0 has the same to say and ends this process too."""
    if os.environ.get("RANK", "0") != "0":
        # To be ended in its sleep: the run's own handler would only take note of the signal.
        with suppress(ValueError):  # told by another than the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_FIRST_SECONDS)
    complain(what)
    if screen := getattr(sys.stderr, "screen", None):  # stderr is this rank's log (`rank_logs`)
        say(what, screen)


def _leave(code: int) -> NoReturn:
    """End the process at once: gloo's and NCCL's destructors may wait for the peers that wait for
    this process."""
    settle()
    os._exit(code)


def is_lost_peer(message: object) -> bool:
    """Whether ``message``, or its text, says that the process at the other end has died."""
    return any(text in str(message) for text in PEER_LOST)
