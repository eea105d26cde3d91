"""A stopped benchmark leaves one line, no namespace and no process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 300  # on a busy machine; a few are enough otherwise
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pipeline_step_time.py"


def namespaces(pid: int) -> list[str]:
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if line.startswith(f"attnres-{pid}-")]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # dead, though nobody has asked for its exit code


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM]
)
def test_a_signal_ends_it_cleanly(benchmarks, number):
    from ring import what_is_missing

    if missing := what_is_missing():
        pytest.skip(f"needs {missing}")
    command = [sys.executable, SCRIPT, "--rows", "2,1,64", "--units", "0"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        deadline = time.monotonic() + SECONDS
        while len(namespaces(process.pid)) < 2 or len(workers := children(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}\n"
    assert not namespaces(process.pid)
    deadline = time.monotonic() + SECONDS  # they end by themselves, once it is gone
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
