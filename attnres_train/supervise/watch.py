"""A thread of each worker that sees what its main thread cannot: that another rank has failed,
while this one waits for it in a call that does not come back; and that this one gets on no more."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from attnres_train.screen import settle
from attnres_train.supervise import failures
from attnres_train.supervise.board import Board
from attnres_train.supervise.culprit import Failure
from attnres_train.supervise.worker import tell

POLL_SECONDS = 1.0
LEAVE_SECONDS = 5.0
"""Time that a rank has to fail by itself after the failure of another."""
MARGIN_SECONDS = 5.0
"""Time that the process group has to notice a hang first: it knows what is waited for."""


class Pulse:
    """When the main thread got on last: it beats with every pass of the pipeline, and rests where
    other limits hold. A call is two assignments."""

    def __init__(self) -> None:
        self.last: float | None = None
        """Seconds of `time.monotonic`, None at rest."""

    def beat(self) -> None:
        self.last = time.monotonic()

    def rest(self) -> None:
        self.last = None


class Watch:
    """Watches the thread that made it, of the rank of ``board``. If another rank has failed, this
    one gets `LEAVE_SECONDS` to fail by itself. If ``pulse`` has not beaten for ``limit`` seconds
    and a margin, it hangs. Either way it is written down where it was, with the stacks of all its
    threads, and the process ended."""

    def __init__(self, board: Board, pulse: Pulse, limit: float) -> None:
        self.board, self.pulse, self.limit = board, pulse, limit
        self._watched = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @contextmanager
    def over(self) -> Iterator[None]:
        """Watch while the context lasts, or until an error leaves it: then the rank ends itself."""
        self._thread.start()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """This rank ends by itself."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            last = self.pulse.last
            if self.board.failed() is not None:
                if not self._done.wait(LEAVE_SECONDS):
                    self._end("ended, since others have failed")
            elif last and (seconds := time.monotonic() - last) > self.limit + MARGIN_SECONDS:
                self._end(f"it got on no more: no pass ended in {seconds:.0f} s", seconds)

    def _end(self, why: str, stuck_seconds: float | None = None) -> None:
        folder, rank, now = self.board.folder, self.board.rank, time.time()
        stack = failures.stack_of(sys._current_frames().get(self._watched))
        failures.write_stacks(folder, rank)
        failure = Failure(rank, now, f"{why}, in\n{stack}", ended=stuck_seconds is None)
        if stuck_seconds is not None:
            failure = replace(failure, stuck_since=now - stuck_seconds)
        if all(failure.rank != rank for failure in failures.read(folder)):
            failures.write(folder, failure)
        self.board.post()
        if stuck_seconds is not None:
            tell(TimeoutError(f"rank {rank}: {failure.error}"))
        settle()
        os._exit(1)
