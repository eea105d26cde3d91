"""Local workers: what ends one of them is told once, with its rank, and ends the others."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from attnres_train.config.schema import RunConfig
from attnres_train.supervise import failures
from attnres_train.supervise.culprit import Failure
from attnres_train.supervise.launcher import by_cause, default_world_size
from attnres_train.supervise.signals import stop_signals
from tests.tiny import environment


def python(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_two(fault: str, rank: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "tests.supervise.worker", fault, rank, str(folder)]
    start = "from attnres_train.supervise.launcher import *; "
    start += f"raise SystemExit(launch({arguments}, 2, Path({str(folder)!r})))"
    return python("-c", start)


def told(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "[Gloo]" not in line]


@pytest.mark.parametrize(
    ("fault", "rank", "code", "first_line", "last_line"),
    [
        (
            "error",
            "1",
            1,
            "rank 1 failed:",
            "ValueError: the real cause",
        ),
        ("crash", "1", 1, "rank 1 was killed by SIGKILL (out of memory?)", None),
        ("user error", "1", 2, "error on rank 1: the user's fault", None),
    ],
)
def test_the_cause_alone_is_on_the_screen(fault, rank, code, first_line, last_line, tmp_path):
    """Of two workers one fails, and the other waits for it."""
    result = launch_two(fault, rank, tmp_path)
    assert result.returncode == code, result.stderr
    lines = told(result)
    assert lines[0] == (f"{first_line} {last_line}" if last_line else first_line), result.stderr
    assert lines[-1] == (last_line or first_line)
    assert result.stderr.count("Traceback") == (0 if last_line is None else 1)
    assert result.stderr.count(first_line) == 1
    assert "done" not in result.stdout


def test_a_rank_that_hangs_is_named_and_ended(tmp_path):
    result = launch_two("hang", "1", tmp_path)
    first, *stack, last = told(result)
    assert result.returncode == 1
    assert first.startswith("rank 1 stopped the run: rank 0 waited since ")
    assert stack[0] == "rank 1: ended, since others have failed, in"
    assert stack[-1].strip() == "time.sleep(self.seconds)"
    assert last == f"What every rank waited for: {tmp_path / 'failures'}"
    assert "Traceback" not in result.stderr


@pytest.mark.nightly
def test_a_rank_that_is_deaf_leaves_the_screen_to_the_cause(tmp_path):
    """Rank 1 sits in C and hears no signal, rank 0 fails."""
    result = launch_two("deaf", "0", tmp_path)
    assert result.returncode == 1
    lines = told(result)
    assert lines[0] == "rank 0 failed: ValueError: the real cause", result.stderr
    assert lines[-1] == "ValueError: the real cause"
    assert result.stderr.count("Traceback") == 1
    cause, echo = failures.read(tmp_path)
    assert cause.traceback.endswith("ValueError: the real cause") and not cause.ended
    assert echo.error.startswith("ended, since others have failed, in\n") and echo.ended
    assert "sleep_in_c" in echo.error
    stacks = (tmp_path / "failures" / "stacks_0001.txt").read_text()
    assert "sleep_in_c" in stacks and "in _run" in stacks, "all threads"


@pytest.mark.nightly
def test_ranks_that_get_on_no_more_say_so(tmp_path):
    """What a process group does not tell: both sit in C, rank 1 since earlier."""
    result = launch_two("stuck", "1", tmp_path)
    assert result.returncode == 1
    lines = told(result)
    assert lines[0] == "rank 1 stopped the run", result.stderr
    assert lines[1].startswith("rank 1: it got on no more: no pass ended in ")
    assert any("sleep_in_c" in line for line in lines)
    assert (tmp_path / "failures" / "stacks_0001.txt").exists()


def failed(exitcode: int, timestamp: int, message: str = "") -> ProcessFailure:
    failure = ProcessFailure(0, 1, exitcode, "none")
    failure.timestamp, failure.message = timestamp, message
    return failure


@pytest.mark.parametrize(
    ("first", "others"),
    [
        # The agent kills, in the end, who has not heard.
        (failed(1, 100, "ValueError: the cause"), [failed(-signal.SIGKILL, 130)]),
        (failed(-signal.SIGKILL, 100), [failed(1, 100, "Connection closed by peer")]),
        (failed(-signal.SIGKILL, 100), [failed(1, 101, "ValueError"), failed(-15, 99)]),
        (failed(-signal.SIGSEGV, 100), [failed(1, 100, "ValueError: what that has led to")]),
        (failed(2, 100), [failed(1, 99, "PeerError: timed out"), failed(-15, 99)]),
    ],
)
def test_causes_are_ordered_by_time_and_echoes_come_after_them(first, others):
    ranks = {0: others[0], 1: first, **dict(enumerate(others[1:], 2))}
    assert min(ranks, key=lambda rank: by_cause(rank, ranks[rank], {})) == 1


def test_the_ranks_own_clock_comes_before_the_agents():
    """It learns of an end when it looks."""
    ranks = {0: failed(1, 105, "ValueError: late"), 1: failed(1, 105, "ValueError: the cause")}
    records = {0: Failure(0, 104.0, "late"), 1: Failure(1, 101.0, "the cause")}
    assert min(ranks, key=lambda rank: by_cause(rank, ranks[rank], records)) == 1
    ended = {0: Failure(0, 100.0, "ended, since others have failed", ended=True)}
    assert min(ranks, key=lambda rank: by_cause(rank, ranks[rank], ended)) == 1


def run_worker_alone(failing: str, rank: str) -> subprocess.CompletedProcess[str]:
    """A worker that SLURM has started: nobody but itself tells what happened."""
    code = f"""
from attnres_train.errors import UserError
from attnres_train.supervise.worker import run_worker
def work():
    {failing}
run_worker(work)
"""
    return python("-c", code, RANK=rank, WORLD_SIZE="8")


@pytest.mark.parametrize(
    ("failing", "rank", "code", "first", "last"),
    [
        ("raise UserError('no data')", "0", 2, "error: no data", None),
        (
            "1 / 0",
            "0",
            1,
            "rank 0 failed:",
            "ZeroDivisionError: division by zero",
        ),
        ("raise SystemExit(7)", "0", 1, "rank 0 failed:", "SystemExit: 7"),
        (
            "1 / 0",
            "3",
            1,
            "rank 3 failed:",
            "ZeroDivisionError: division by zero",
        ),
        (
            "raise RuntimeError('x: Connection closed by peer')",
            "0",
            1,
            "rank 0 stopped, a peer is gone: x: Connection closed by peer",
            None,
        ),
    ],
)
def test_without_an_agent_a_worker_tells_itself(failing, rank, code, first, last):
    result = run_worker_alone(failing, rank)
    assert result.returncode == code
    lines = result.stderr.splitlines()
    assert (lines[0], lines[-1]) == ((f"{first} {last}", last) if last else (first, first))


def test_without_an_agent_the_note_of_the_rank_to_blame_is_told():
    failing = "error = RuntimeError('Timed out'); error.add_note('rank 2 stopped the run'); "
    result = run_worker_alone(failing + "raise error", "0")
    assert result.stderr == ("rank 0 stopped, a peer is gone: Timed out\nrank 2 stopped the run\n")


def test_a_rank_that_is_ended_by_the_others_adds_nothing():
    """All ranks have the same error: rank 0 tells it, and srun ends the others."""
    failing = "import os, signal, threading; signal.signal(15, lambda *_: None); "
    failing += "threading.Timer(1, os.kill, (os.getpid(), 15)).start(); raise UserError('no data')"
    result = run_worker_alone(failing, "3")
    assert result.returncode == -signal.SIGTERM
    assert result.stderr == ""


@pytest.fixture
def ignore_hangup() -> Iterator[None]:
    """What nohup does. (A shell that starts the tests in the background ignores SIGINT as well.)"""
    changes = {signal.SIGHUP: signal.SIG_IGN, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in changes.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal_stops_a_run_unless_nohup_says_otherwise(ignore_hangup):
    assert signal.SIGHUP not in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"} == {s.name for s in stop_signals()}


def test_default_number_of_processes_is_one_replica_on_cpu():
    config = RunConfig.model_validate(
        {
            "model": {"hidden_size": 32, "num_layers": 4, "vocab_size": 300},
            "parallel": {"pipeline_model_parallel_size": 2},
            "train": {"train_iters": 1, "seq_length": 8, "global_batch_size": 4, "device": "cpu"},
        }
    )
    assert default_world_size(config) == 2
    config.parallel.expert_model_parallel_size = 4  # which share the experts of a stage
    assert default_world_size(config) == 8
