"""Failures: what each rank leaves in the run folder when it fails.

`failures/rank_0003.json` holds the rank's error, the tensor that it waited for, if it did, and what
else was under way. A rank that is ended while it hangs leaves where it was.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from attnres_train.errors import UserError
from attnres_train.pipeline.run.waits import PeerError, Wait
from attnres_train.supervise.culprit import Failure, explain

SETTLE_SECONDS = 3.0
"""Time that a rank whose peers are silent leaves the others to write down what they waited for."""


@contextmanager
def recorded(folder: Path, rank: int, pipeline: Sequence[int], world_size: int) -> Iterator[None]:
    """Write down the exception that leaves the context, for global rank ``rank`` in run folder
    ``folder``. ``pipeline`` lists the global ranks of its pipeline by stage.

    If the peers were silent, the exception gets a note that names the rank to blame.
    """
    try:
        yield
    except UserError:  # the worker tells it as it is; there is nothing to find out
        raise
    except Exception as error:
        failure = _failure(error, rank, pipeline)
        write(folder, failure)
        if failure.timed_out:  # else it is the cause itself, or its peer has left that
            _settle(folder, world_size)
            if stop := explain(read(folder), world_size):
                error.add_note(stop)
        raise


def ended_in(rank: int, frame: FrameType | None) -> Failure:
    """That ``rank`` is ended in ``frame`` because others have failed."""
    stack = "".join(traceback.format_stack(frame)).rstrip()
    return Failure(rank, time.time(), f"ended, since others have failed, in\n{stack}")


def write(folder: Path, failure: Failure) -> None:
    """Write, or replace, a rank's record. Nothing happens where that is impossible: there is an
    error to tell already."""
    record = asdict(failure)
    for part, key in _times(record):
        part[key] = datetime.fromtimestamp(part[key], UTC).isoformat()
    target = folder / "failures" / f"rank_{failure.rank:04d}.json"
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)  # in one step: other ranks read the folder meanwhile


def read(folder: Path) -> list[Failure]:
    """The records in run folder ``folder``, by rank."""
    failures = []
    for path in paths(folder):
        record = json.loads(path.read_text(encoding="utf-8"))
        for part, key in _times(record):
            part[key] = datetime.fromisoformat(part[key]).timestamp()
        record["waiting"] = record["waiting"] and Wait(**record["waiting"])
        record["pending"] = [Wait(**wait) for wait in record["pending"]]
        failures.append(Failure(**record))
    return failures


def paths(folder: Path) -> list[Path]:
    """The records' files."""
    return sorted((folder / "failures").glob("rank_*.json"))


def clear(folder: Path) -> None:
    """Remove the records of an earlier attempt."""
    for path in paths(folder):
        path.unlink(missing_ok=True)


def _failure(error: Exception, rank: int, pipeline: Sequence[int]) -> Failure:
    if not isinstance(error, PeerError):
        return Failure(rank, time.time(), f"{type(error).__name__}: {error}")
    # Its text numbers the ranks of the pipeline; all that it says is in the waits.
    waiting, *pending = (
        replace(wait, peer=pipeline[wait.peer]) for wait in (error.wait, *error.pending)
    )
    return Failure(rank, time.time(), f"PeerError: {error.__cause__}", waiting, pending)


def _settle(folder: Path, world_size: int) -> None:
    """Wait until all ranks but one have a record (one that hangs writes none), or
    `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while len(paths(folder)) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.2)


def _times(record: dict) -> list[tuple[dict, str]]:
    """Where a record has a time: in a file in ISO format, else in seconds since the epoch."""
    waits = [wait for wait in (record["waiting"], *record["pending"]) if wait]
    return [(record, "time"), *((wait, "since") for wait in waits)]
