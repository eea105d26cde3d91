"""The life of a run as its user sees it: a worker is killed, the machine wants its cores back,
the launcher is killed, and in the end it is done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.checkpoint.folders import find_latest
from attnres_train.checkpoint.manifest import read_manifest
from tests.tiny import (
    column,
    command,
    environment,
    free_port,
    grid,
    records,
    train_rank,
    write_config,
)

SECONDS = 300  # on a busy machine; a few are enough otherwise


class Launched:
    """`attnres-train train`, running in the background."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.process = subprocess.Popen(
            command("train", config, *grid(2, 2), "checkpoint.save_interval=2", *overrides),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def worker(self, rank: int) -> int:
        """Process id of a worker."""
        parent = self.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        wanted = f"RANK={rank}".encode()
        return next(int(p) for p in children if wanted in _environ(p))

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


def wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{process}/stat").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def newest_step(run: Path) -> int:
    return read_manifest(find_latest(run / "checkpoints")).step


def told(stderr: str) -> list[str]:
    """What stands on stderr, but what preparing the data tells, and gloo."""
    return [line for line in stderr.splitlines() if not re.match(r"data: |.*[Gg]loo", line)]


def _environ(pid: str) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds workers in /proc")
@pytest.mark.nightly
def test_killed_then_stopped_then_orphaned_then_finished(pool, tmp_path, capsys):
    config, run = write_config(tmp_path), tmp_path / "runs" / "tiny"

    first = Launched(config, "train.train_iters=5000")
    first.wait_until(lambda: len(records(run)) >= 5)
    os.kill(first.worker(rank=1), signal.SIGKILL)
    code, out, err = first.end()
    assert code == 1
    assert told(err) == ["rank 1 was killed by SIGKILL (out of memory?)"]
    saved = newest_step(run)
    logged = len(records(run))
    assert 4 <= saved <= logged

    second = Launched(config, "train.train_iters=5000")
    second.wait_until(lambda: len(records(run)) >= logged + 3)
    second.process.send_signal(signal.SIGTERM)
    code, out, err = second.end()
    assert code == 128 + signal.SIGTERM
    assert told(err) == ["stopped by SIGTERM"]
    assert f"checkpoints/step_{saved:08d}\n" in out.split("resumed from ")[1]
    stopped = newest_step(run)
    assert f"stopped after step {stopped}, saved; the same command resumes" in out
    assert column(run, "step") == list(range(1, stopped + 1))

    third = Launched(config, "train.train_iters=5000")
    third.wait_until(lambda: len(records(run)) >= stopped + 3)
    workers = [third.worker(rank=rank) for rank in (0, 1)]
    third.process.kill()
    third.process.wait()
    wait_until_gone(workers)  # nobody told them
    logged, stopped = len(records(run)), newest_step(run)
    assert column(run, "step") == list(range(1, stopped + 1))
    assert logged == stopped

    rest = [str(config), *grid(2, 2), f"train.train_iters={stopped + 2}"]
    out = pool.run(train_rank, 2, rest, free_port())[0]
    assert f"checkpoints/step_{stopped:08d}\n" in out.split("resumed from ")[1]
    assert column(run, "step") == list(range(1, stopped + 3))

    assert main(["report", str(run)]) == 0
    assert f"step {stopped + 2} of {stopped + 2}" in capsys.readouterr().out
