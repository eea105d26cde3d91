"""One run at a time in a run folder, one study in a study's: two would overwrite each other's
metrics and checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from attnres_train.errors import UserError
from attnres_train.supervise import failures


@contextmanager
def run_lock(folder: Path, what: str = "run", key: str = "run.name") -> Iterator[None]:
    """Hold the folder ``folder`` of a ``what`` (run, study, corpus), which the user's ``key`` has
    named, made if it is missing, for as long as the context lasts.

    The kernel lets go of the lock when its process ends, however it ends, so that none is left
    behind; where the file system has no locks, nothing is held. Raises UserError where the folder
    cannot be made, and, naming the process, while another one holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{what}.dir: the {what} folder {folder} cannot be made: {error}"
        ) from error
    # Opened to append, since "w" would wipe the name of the holder before it is known that there is
    # none. The file stays: removed, it could be locked by one process and made anew by another.
    with open(folder / f"{what}.lock", "a+", encoding="utf-8") as file:
        if not locked(file):
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(
                f"{key}: {folder} is in use by {holder}. Stop that {what}, or choose another {key}"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def locked(file: IO[str]) -> bool:
    """Take the lock of ``file``; False while another process has it. Where the file system has no
    locks, nothing is taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a network file system without locks
    return True


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Rank 0 takes the run folder for this run alone, and clears it of earlier failures."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with run_lock(folder):
        failures.clear(folder)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process of this machine, or of one that shares its locks, has the run in
    ``folder`` under way. Nothing there is touched."""
    try:
        with open(folder / "run.lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock there, or none of this file system
    return False
