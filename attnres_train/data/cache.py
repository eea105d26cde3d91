"""The data cache on disk: content keys, one writer at a time, folders published by rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnres_train.errors import UserError

# Free bytes of a disk that is taken to be full, where an error does not say.
NO_ROOM_BYTES = 1 << 16


def digest(value: Any) -> str:
    """Sixteen hex digits that stand for ``value``, which must be what JSON can hold."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the only write lock on ``folder``; a second run waits here until the first is done.

    The lock is the kernel's (flock): it is gone with the process that held it. Where the file
    system has none, that is told, and nothing is held: then no two runs may write at a time.
    Raises UserError when ``folder`` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
        file = open(folder / "lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"data.cache_dir {folder} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that prepares data in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(
                f"the file system of {folder} has no locks ({error.strerror}): let no other run or "
                "machine prepare data there now; `attnres-train data CONFIG` does it beforehand"
            )
        yield


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` in one rename when the block ends without an error.

    So ``folder`` is either absent or complete. What an interrupted run left is thrown away, and so
    is what does not fit: raises UserError where the disk is full.
    """
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except Exception as error:
        full = _is_full(error, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        if full:
            raise UserError(
                f"data.cache_dir: the disk is full, {folder} does not fit: make room, or choose "
                "another folder; what is there already is kept"
            ) from error
        raise


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether ``error`` is that of a disk without room: numpy and Rust do not give its number."""
    if isinstance(error, UserError):
        return False
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left" in str(error):
        return True
    here = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return isinstance(error, OSError) and shutil.disk_usage(here).free < NO_ROOM_BYTES


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, where readers see the old file or the new one, never a part."""
    scratch = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)
