"""Ways to end a run that is at work, and what has to be true of its folder after any of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attnres_train.checkpoint.folders import find_latest, scan, step_of
from attnres_train.checkpoint.verify import verify
from tests.tiny import column, command, environment, grid

SECONDS = 600  # a guard against hanging
TRAIN = [*grid(2, 2), "train.train_iters=1000000", "train.eval_interval=0"]
SAVES = ["checkpoint.save_interval=3", "log.progress=off"]


class Attempt:
    """`attnres-train train` of one run on two ranks, in a process group of its own."""

    def __init__(self, config: Path, name: str, *overrides: str) -> None:
        self.process = subprocess.Popen(
            command("train", config, f"run.name={name}", *TRAIN, *SAVES, *overrides),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        parent = self.process.pid
        with suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            return [int(pid) for pid in children if b"\0RANK=" in _environment_of(pid)]
        return []

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Or until the process has ended."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None and not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def end(self) -> str:
        """Wait until all of it is gone; what it has printed."""
        try:
            out, _ = self.process.communicate(timeout=SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return out


def _environment_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def end_at_random(attempt: Attempt, rng: random.Random) -> str:
    """Kill or signal a part of the attempt; returns what was done."""
    workers, launcher = attempt.workers(), attempt.process.pid
    what = rng.choice(["a rank", "a rank", "the launcher", "the group", "SIGTERM", "SIGUSR1"])
    with suppress(ProcessLookupError):
        if what == "a rank" and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        elif what == "the launcher":
            os.kill(launcher, signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.5))
            _kill(workers)  # the next attempt would wait for what is left behind
        elif what.startswith("SIG"):
            os.kill(launcher, signal.Signals[what])
        else:
            _kill([launcher, *workers])
    return what


def _kill(processes: list[int]) -> None:
    for process in processes:  # workers are in groups of their own
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def newest_step(run: Path) -> int:
    newest = find_latest(run / "checkpoints")
    return step_of(newest) if newest else 0


def check(run: Path, least: int, told: str) -> int:
    """Every visible checkpoint is whole, none is lost, every step is logged once. Returns the
    newest step, which is ``least`` or later."""
    for entry in scan(run / "checkpoints"):
        assert entry.problem is None, f"{entry}\n{told}"
        assert verify(entry.path).problems == [], told
    assert not list((run / "checkpoints").glob("*.damaged*")), told
    steps = column(run, "step")
    assert steps == list(range(1, len(steps) + 1)), told
    newest = newest_step(run)
    assert least <= newest <= len(steps), told
    return newest
