"""Where a run's metrics are kept: one flat record per step."""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

from attnres_train.observe.observer import Observer, Record
from attnres_train.screen import complain

METRICS = "metrics.jsonl"
ABANDONED = "history/abandoned.jsonl"
"""Of the run folder: records of steps that a roll-back has undone."""


class JsonLines(Observer):
    """One JSON object per step in ``metrics.jsonl``. Resuming drops the records of steps that the
    checkpoint does not hold, so that every step stands there once.

    Records that cannot be written are kept and tried again with every step: no line is lost to a
    disk that is full for a while, and none is left there in part.
    """

    def on_start(self, step: int) -> None:
        self.path = self.run.folder / METRICS
        self.waiting: list[bytes] = []
        self.told = False
        self.size: int | None = None
        """Of the file, in bytes, as far as it holds whole records; None: yet to be looked up."""
        self.step = step
        self.file: FileIO | None = None
        self._write()

    def on_step_end(self, record: Record) -> None:
        # JSON has no word for what is not finite.
        values = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self.waiting.append(json.dumps(values).encode() + b"\n")
        self._write()

    def on_roll_back(self, step: int) -> None:
        """Steps after ``step`` will stand here with their last values; those of now are moved to
        `ABANDONED`."""
        self._close()
        aside_path = self.run.folder / ABANDONED
        try:
            keep = _size_up_to(self.path, step)
            aside_path.parent.mkdir(exist_ok=True)
            with open(self.path, "rb") as file, open(aside_path, "ab") as aside:
                file.seek(keep)
                aside.write(file.read() + b"".join(self.waiting))
        except OSError as error:
            complain(f"{aside_path} cannot be written: {error}")
        self.waiting = [line for line in self.waiting if json.loads(line)["step"] <= step]
        self.step, self.size = step, None
        self._write()

    def on_end(self) -> None:
        self._write()
        self._close()
        if self.waiting:
            complain(f"{self.path}: the last {len(self.waiting)} steps are not in it")

    def _write(self) -> None:
        """Add what is waiting to the file, or leave that as it is."""
        text = b"".join(self.waiting)
        try:
            if self.size is None:
                self.size = _size_up_to(self.path, self.step)
            if self.file is None:
                self.file = self._open(self.size)
            if self.file.write(text) < len(text):  # what fits on the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.size = self.file.tell()
        except OSError as error:
            self._close()
            if not self.told:
                complain(f"{self.path} cannot be written: {error}; tried again with every step")
            self.told = True
            return
        if self.told:
            complain(f"{self.path} is written again, with all {len(self.waiting)} steps since")
        self.told, self.waiting = False, []

    def _open(self, size: int) -> FileIO:
        """The file, without what comes after ``size``."""
        file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (`_close` closes it)
        file.truncate(min(size, file.tell()))
        return file

    def _close(self) -> None:
        """Leave whole lines alone. A file system that comes back does not know files that were open
        when it went."""
        if self.file is not None:
            with suppress(OSError):
                self.file.truncate(self.size)
            with suppress(OSError):
                self.file.close()
        self.file = None


def _size_up_to(path: Path, step: int) -> int:
    """The bytes of ``path`` that hold the records up to ``step``, whole lines."""
    size = 0
    if step and path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except json.JSONDecodeError:
                break
            size += len(line)
    return size


def read_records(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``; a last line cut off by a crash is left out, and what
    was not finite is NaN."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                break
            records.append({k: math.nan if v is None else v for k, v in values.items()})
    return records
