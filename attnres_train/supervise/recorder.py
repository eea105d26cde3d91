"""How a rank's own failure is written down, and told to the others, before anything else is done:
what is done afterwards may wait for ranks that are stuck."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.pipeline.run.waits import PeerError
from attnres_train.supervise.board import Board
from attnres_train.supervise.culprit import Failure, explain
from attnres_train.supervise.failures import paths, read, write, write_stacks

SETTLE_SECONDS = 3.0
"""Time that a rank whose peers are silent leaves the others to write down what they waited for."""


class Recorder:
    """Writes down, in the folder of ``board``, how its rank fails, and tells the others.

    ``pipeline`` lists the global ranks of its pipeline by stage; ``on_error`` is called first.
    """

    def __init__(
        self,
        board: Board,
        pipeline: Sequence[int],
        world_size: int,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self.board, self.pipeline, self.world_size = board, pipeline, world_size
        self._on_error = on_error
        self._known: BaseException | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write down the exception that leaves the context; of contexts within each other the inner
        one does. If the peers were silent, the exception gets a note that names the rank to blame.
        """
        try:
            yield
        except Exception as error:
            if error is not self._known:
                self._known = error
                self._on_error()
                if isinstance(error, UserError):  # the worker tells it; nothing is to be found out
                    self.board.post()
                else:
                    self._write(error)
            raise

    def _write(self, error: Exception) -> None:
        folder, rank = self.board.folder, self.board.rank
        failure = _failure(error, rank, self.pipeline)
        write(folder, failure)
        self.board.post()
        if failure.timed_out:  # else it is the cause itself, or its peer has left that
            write_stacks(folder, rank)
            _settle(folder, self.world_size)
            if stop := explain(read(folder), self.world_size):
                error.add_note(stop)


def _failure(error: Exception, rank: int, pipeline: Sequence[int]) -> Failure:
    now, told = time.time(), "".join(traceback.format_exception(error)).rstrip()
    if not isinstance(error, PeerError):
        return Failure(rank, now, f"{type(error).__name__}: {error}", traceback=told)
    # Its text numbers the ranks of the pipeline; all that it says is in the waits.
    waiting, *pending = (
        replace(wait, peer=pipeline[wait.peer]) for wait in (error.wait, *error.pending)
    )
    cause = f"PeerError: {error.__cause__}"
    return Failure(rank, now, cause, waiting, pending, traceback=told)


def _settle(folder: Path, world_size: int) -> None:
    """Wait until all ranks but one have a record (one that hangs writes none), or
    `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while len(paths(folder)) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.2)
