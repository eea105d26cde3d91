"""Signals: heard whatever the main thread is in, before there is a run, in one, and twice."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import pytest

from attnres_train.supervise import signals
from attnres_train.supervise.signals import Stopped, StopSignals, heard, held_back, raised
from tests.tiny import command, environment, free_port, grid, write_config

# A worker as `train` has it: says where it is in a file, and sits in C.
SLEEPER = """
import ctypes, sys, pathlib
from attnres_train.supervise.signals import heard
with heard() as stop:
    if sys.argv[2] == "saves":
        stop.will_save()
    pathlib.Path(sys.argv[1]).touch()
    while sys.argv[2] != "saves" or not stop():
        ctypes.CDLL(None).usleep(50_000)
    print("saving", flush=True)
    if sys.argv[-1] == "slowly":
        while True:
            ctypes.PyDLL(None).usleep(1000)
"""


def wait_for(process: subprocess.Popen, file: Path) -> None:
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.02)


def sleeper(file: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(file), *words],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(process, file)
    return process


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_before_there_is_anything_to_save_a_worker_leaves_at_once(tmp_path, number):
    process = sleeper(tmp_path / "here", "starts")
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 0
    name = signal.Signals(number).name
    assert out == f"stopped by {name} before a step was made; the same command goes on\n"


def test_the_first_signal_is_noted_and_a_second_one_ends_at_once(tmp_path):
    process = sleeper(tmp_path / "here", "saves", "slowly")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "saving\n"
    while process.poll() is None:  # what comes at once is the same wish
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.returncode == 128 + signal.SIGTERM


def test_signals_that_come_together_are_one_wish():
    stop = StopSignals()
    stop.will_save()
    assert not stop()
    for now in (10.0, 10.5, 11.0):  # SLURM tells the tasks, its batch script tells them again
        stop.hear(signal.SIGTERM, now)
    assert stop()


def test_a_signal_from_before_the_handlers_waits_for_them(tmp_path):
    """The launcher starts its workers so."""
    text = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch(); sys.stdin.readline()\n"
    with held_back():
        process = subprocess.Popen(
            [sys.executable, "-c", text + SLEEPER, str(tmp_path / "here"), "starts"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    wait_for(process, tmp_path / "here")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate("\n")
    assert process.returncode == 0
    assert out.startswith("stopped by SIGUSR1 before a step was made")


def test_who_holds_signals_back_for_its_children_hears_them_itself():
    with raised(), held_back(), pytest.raises(Stopped, match="stopped by SIGUSR1"):
        os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            time.sleep(0.01)


class Told:
    """Tells its process to stop, when nothing holds it any more."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # the handler comes between two steps of the interpreter


def in_a_destructor() -> None:
    Told()


def in_a_callback_of_a_weak_reference() -> None:
    told = StopSignals()
    kept = weakref.ref(told, lambda _: Told().__del__())
    del told
    assert kept() is None


def in_a_callback_of_c() -> None:
    ctypes.CFUNCTYPE(None)(lambda: Told().__del__())()


@pytest.mark.parametrize(
    "where", [in_a_destructor, in_a_callback_of_a_weak_reference, in_a_callback_of_c]
)
def test_a_signal_whose_exception_python_passes_over_comes_again(where):
    with raised(), pytest.raises(Stopped, match="stopped by SIGTERM"):
        where()
        time.sleep(60)


def test_signals_that_are_passed_over_come_again_as_one():
    """What came after the first one was raised would find the handlers of before, which end us."""
    for _ in range(10):
        with raised(), pytest.raises(Stopped, match="stopped by SIGTERM"):
            for _ in range(5):
                in_a_destructor()
            time.sleep(60)
        time.sleep(2 * signals.AGAIN_SECONDS)


def test_a_signal_that_could_not_be_raised_goes_to_the_handlers_of_before():
    heard_late = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard_late.append(number))
    try:
        with raised():
            in_a_destructor()
        time.sleep(2 * signals.AGAIN_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard_late == [signal.SIGTERM]


def test_a_signal_in_a_hook_around_a_fork_comes_again():
    text = """if True:
        import os, signal, time
        from attnres_train.supervise.signals import Stopped, raised
        parent = os.getpid()
        os.register_at_fork(before=lambda: (os.kill(parent, signal.SIGTERM), time.sleep(0)))
        try:
            with raised():
                if os.fork() == 0:
                    os._exit(0)
                os.wait()
                time.sleep(60)
        except Stopped as stop:
            print(stop)
    """
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.stdout, done.stderr) == ("stopped by SIGTERM\n", "")


def test_what_else_python_passes_over_is_told_as_ever():
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    found = []
    with mock.patch.object(sys, "unraisablehook", found.append), raised():
        Broken()
    assert [type(one.exc_value) for one in found] == [ValueError]


def test_handlers_are_those_of_before_afterwards():
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    with heard() as stop, raised():
        stop.will_save()
    assert {number: signal.getsignal(number) for number in signals.STOP_SIGNALS} == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.STOP_SIGNALS)


def test_a_launcher_that_prepares_ends_with_the_signals_code(tmp_path):
    """A module of the user's that takes its time."""
    text = "import pathlib, time; pathlib.Path(__file__ + '.here').touch(); time.sleep(600)"
    (tmp_path / "slow.py").write_text(text)
    config = write_config(tmp_path)
    process = subprocess.Popen(
        command("train", config, "log.observers=[slow:Never]"),
        env=environment(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, tmp_path / "slow.py.here")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGUSR1, err
    assert err == "stopped by SIGUSR1\n"


def test_a_worker_that_waits_for_the_others_leaves_at_once(tmp_path):
    """Rank 0 of two; the other never comes."""
    port = free_port()
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        command("train", write_config(tmp_path), *grid(2, 1)),
        env=environment(LOCAL_RANK="0", **place),
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:  # until it listens for the other
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate()
    assert process.returncode == 0
    told = "stopped by SIGUSR1 before a step was made; the same command goes on"
    assert told in out.splitlines()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
@pytest.mark.nightly
def test_a_signal_to_the_launcher_while_its_workers_start_kills_none(tmp_path):
    process = subprocess.Popen(
        command("train", write_config(tmp_path), *grid(2, 1)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGUSR1, err
    assert "stopped by SIGUSR1" in err.splitlines()
    assert "Traceback" not in err and "User defined" not in err
    assert "stopped by SIGUSR1 before a step was made" in out or "saved" in out
