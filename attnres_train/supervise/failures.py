"""Failures: what each rank leaves in the run folder when it fails.

`failures/rank_0003.json` holds the rank's error, the tensor that it waited for, if it did, and what
else was under way. A rank that is ended while it hangs leaves where it was, and `stacks_0003.txt`
has the stacks of all its threads.
"""

from __future__ import annotations

import faulthandler
import json
import traceback
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from attnres_train.pipeline.run.waits import Wait
from attnres_train.supervise.culprit import Failure


def stack_of(frame: FrameType | None) -> str:
    """Where a thread is, innermost call last."""
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "(not known)"


def write_stacks(folder: Path, rank: int) -> None:
    """Write down where every thread of this process is, innermost calls first."""
    with suppress(OSError):
        (folder / "failures").mkdir(parents=True, exist_ok=True)
        with open(folder / "failures" / f"stacks_{rank:04d}.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)


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
    for path in [*paths(folder), *(folder / "failures").glob("stacks_*.txt")]:
        path.unlink(missing_ok=True)


def _times(record: dict) -> list[tuple[dict, str]]:
    """Where a record has a time: in a file in ISO format, else in seconds since the epoch."""
    waits = [wait for wait in (record["waiting"], *record["pending"]) if wait]
    return [(record, "time"), *((wait, "since") for wait in waits)]
