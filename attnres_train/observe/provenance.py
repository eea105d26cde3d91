"""Where a run comes from: the code of the working directory, the machine, the time."""

from __future__ import annotations

import os
import socket
import subprocess
from datetime import UTC, datetime
from typing import Any

# A repository on a slow file system must not hold up a run for long.
GIT_SECONDS = 10.0


def provenance() -> dict[str, Any]:
    """Of this process, which is about to train: ``started`` (ISO 8601, UTC), ``host``, ``folder``
    (the working directory) and ``git``, see `git_state`."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """The working directory's ``commit``, and whether it is ``dirty``: has changes of files that
    git knows. None where it is no repository, has no commit, or git cannot be asked."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if not commit or changed is None:
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    """What git prints; None where it fails."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],  # looks on, and writes nothing
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
