"""A stopped benchmark leaves one line, no namespace and no process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pipeline_step_time.py"


def namespaces(pid: int) -> list[str]:
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if line.startswith(f"attnres-{pid}-")]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(benchmarks, number):
    from ring import what_is_missing

    if missing := what_is_missing():
        pytest.skip(f"needs {missing}")
    command = [sys.executable, SCRIPT, "--rows", "2,1,64", "--units", "0"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        deadline = time.monotonic() + 60
        while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(namespaces(process.pid)) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}\n"
    assert not namespaces(process.pid)
    assert not any(Path("/proc", worker).exists() for worker in workers)
