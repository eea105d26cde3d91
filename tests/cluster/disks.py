"""A disk of a few bytes: a tmpfs in a mount namespace of its own, gone with what uses it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from tests.tiny import environment

UNSHARE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]


def why_not(folder: Path) -> str | None:
    """Why there is no such disk here; None where there is."""
    if not shutil.which("unshare"):
        return "unshare is not installed"
    done = on_disk(folder, 1 << 20, ["true"])
    return f"no permission to mount: {done.stderr.strip()}" if done.returncode else None


def on_disk(
    folder: Path, size: int, *commands: list[str], keep: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``commands``, one after another whatever becomes of them, where ``folder`` is an empty
    disk of ``size`` bytes; what is on it in the end is copied to ``keep``. Each's exit code is the
    last line of what it prints on stdout."""
    lines = [shlex.join(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)])]
    lines[0] += " || exit 1"
    for command in commands:
        lines.append(f"{shlex.join(command)}; echo $?")
    if keep:
        lines.append(shlex.join(["cp", "-r", str(folder), str(keep)]))
    return subprocess.run(
        [*UNSHARE, "\n".join(lines)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
