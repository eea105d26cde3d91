"""A log for each rank, and a screen that shows rank 0 and what ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnres_train.supervise.rank_logs import Logged, log_path, logged

PRINTS = """
import os, sys, warnings
from pathlib import Path
from attnres_train.supervise.rank_logs import logged
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
print("before", flush=True)
try:
    with logged(folder, rank):
        print("printed", flush=True)
        warnings.warn("warned")
        os.write(2, b"in C\\n")
        print("the end", file=getattr(sys.stderr, "screen", None) or sys.stderr)
        print("a bar\\r", file=sys.stderr, end="", flush=True)
        assert not sys.stderr.isatty() and sys.stdout.fileno() == 1
        raise ValueError("failed")
except ValueError as error:
    print("after", error)
"""


def printed(folder: Path, rank: int) -> tuple[str, str, str]:
    """stdout, stderr and log, of two attempts."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, str(folder), str(rank)],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout, done.stderr, log_path(folder, rank).read_text()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_writes_down_what_it_prints(tmp_path, rank):
    out, err, log = printed(tmp_path, rank)
    assert log.count(f"UTC, rank {rank} on ") == 2, "an attempt goes on where the last one ended"
    for text in ("printed\n", "UserWarning: warned\n", "ValueError: failed\n"):
        assert log.count(text) == 2
    assert "a bar" not in log
    if rank == 0:
        assert out == "before\nprinted\nafter failed\n"
        assert "UserWarning: warned" in err and "in C\n" in err and "a bar" in err
    else:
        assert (out, err) == ("before\nafter failed\n", "the end\n")
        assert log.count("in C\n") == 2


def test_a_log_that_cannot_be_written_is_done_without(tmp_path, capsys):
    (tmp_path / "logs").touch()
    with logged(tmp_path, 0):
        print("goes on")
    assert capsys.readouterr().out == "goes on\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_on_a_full_disk_does_not_stop_what_is_shown(capsys):
    number = os.open("/dev/full", os.O_WRONLY)
    print("goes on", file=Logged(number, sys.stdout))
    print("goes nowhere", file=Logged(number, sys.stdout, screen=sys.stderr))
    os.close(number)
    assert capsys.readouterr().out == "goes on\n"
