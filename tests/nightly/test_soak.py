"""Runs that are killed, signalled and started again until nobody would believe that they end as one
that was never disturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.nightly.kills import Attempt, check, end_at_random, newest_step
from tests.tiny import column, saved_tensors, write_config

pytestmark = pytest.mark.nightly

SOAK_SECONDS = 20 * 60
KILLS = 200


def disturbed(config: Path, run: Path, rng: random.Random, go_on: Callable[[int], bool]) -> int:
    """Attempts of run "soak", each ended at random, while ``go_on(number)``; returns how many."""
    newest = number = 0
    while go_on(number):
        number += 1
        newest = one_attempt(config, run, rng, newest, number)
    return number


def one_attempt(config: Path, run: Path, rng: random.Random, newest: int, number: int) -> int:
    """Returns the newest step after it."""
    before, attempt = _starts(run), Attempt(config, "soak")
    # A step of its own is done.
    attempt.wait_until(lambda: _starts(run) > before and _steps(run) > newest)
    if rng.random() < 0.5:  # in the midst of a save
        last = newest_step(run)  # one may be too short to be seen
        attempt.wait_until(
            lambda: any((run / "checkpoints").glob("*.tmp-*")) or newest_step(run) > last + 6
        )
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 3))
    assert attempt.process.poll() is None, f"attempt {number} ended by itself:\n{attempt.end()}"
    what = end_at_random(attempt, rng)
    told = f"attempt {number}, {what}:\n{attempt.end()}"
    newest = check(run, newest, told)
    print(f"attempt {number}: {what}, newest checkpoint {newest}", flush=True)
    return newest


def _starts(run: Path) -> int:
    """Attempts that have got as far as their first step."""
    starts = run / "starts.jsonl"
    return len(starts.read_text(encoding="utf-8").splitlines()) if starts.exists() else 0


def _steps(run: Path) -> int:
    return len(column(run, "step"))


def assert_as_undisturbed(config: Path, run: Path) -> None:
    """Let the run go on for some steps, to its end, and compare it with one of no breaks."""
    end = newest_step(run) + 3
    for name in ("soak", "undisturbed"):
        attempt = Attempt(config, name, f"train.stop_after={end}")
        told = attempt.end()
        assert attempt.process.returncode == 0, told
    other = run.with_name("undisturbed")
    assert column(run, "step") == column(other, "step") == list(range(1, end + 1))
    assert column(run, "loss") == column(other, "loss")
    mine, others = saved_tensors(run, end), saved_tensors(other, end)
    assert mine.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())


def test_two_hundred_kills(tmp_path):
    config, run = write_config(tmp_path), tmp_path / "runs" / "soak"
    assert disturbed(config, run, random.Random(1), lambda number: number < KILLS) == KILLS
    assert_as_undisturbed(config, run)


def test_soak(tmp_path):
    config, run = write_config(tmp_path), tmp_path / "runs" / "soak"
    ends = time.monotonic() + SOAK_SECONDS
    assert disturbed(config, run, random.Random(2), lambda _: time.monotonic() < ends) > 1
    assert_as_undisturbed(config, run)
