"""Signals that end a run: saved after the step at work, at once when told twice, or when there is
nothing to save yet."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from attnres_train.screen import complain

# Signals that end a run: the agent hands them to the workers, which save (see `train`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME_SECONDS = 1.0
"""What comes so soon after a signal is the same wish: SLURM tells the tasks and the batch script,
which tells the tasks."""
AGAIN_SECONDS = 0.05
"""After which a signal comes again whose exception was passed over."""
ASK_SECONDS = 1.0
"""How often a worker asks whether the agent that started it is still there."""


class Stopped(KeyboardInterrupt):
    """A process without work to save was told to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a run here; one that the caller ignores (nohup) is not among them."""
    return tuple(s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN)


class StopSignals:
    """Whether this process was told to stop, in a worker: ``stop()``.

    Signals are heard by a thread, whatever the main thread is in: a call into C or CUDA does not
    come back for a handler of Python's. Until `will_save` has been called there is nothing to
    save, and a signal ends the process with exit code 0, that of a run that is stopped and saved;
    from then on the first one is noted for the loop, and a second one, a moment later, ends the
    process at once.
    """

    def __init__(self, *, keeps_nothing: bool = False) -> None:
        """``keeps_nothing``: there will be nothing to save, nor to go on with, and a signal ends
        the process as it would any other."""
        self.keeps_nothing = keeps_nothing
        self._since: float | None = None
        self._saves = False
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        return self._since is not None

    def will_save(self) -> None:
        """From now on the loop asks, saves and leaves."""
        with self._lock:
            self._saves = True

    def hear(self, number: int, now: float) -> None:
        """Signal ``number`` has come, at ``now`` seconds."""
        with self._lock:
            if self.keeps_nothing:
                _leave(128 + number)
            if not self._saves:
                _leave(0, f"stopped by {signal.Signals(number).name} before a step was made")
            elif self._since is None:
                self._since = now
            elif now - self._since > SAME_SECONDS:
                _leave(128 + number)


def _leave(code: int, told: str = "") -> None:
    if told and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # not `say`: the main thread may be stuck in a print, with its lock
            os.write(1, f"{told}; the same command goes on\n".encode())
    os._exit(code)


@contextmanager
def heard(*, with_agent: bool = False, keeps_nothing: bool = False) -> Iterator[StopSignals]:
    """Hear `stop_signals` while the context lasts, also those that were held back before (by
    `held_back`, or ``env --block-signal``); ``with_agent``: the end of the agent that has started
    this process, our launcher or torchrun, too, for one that was killed tells nobody, and its
    workers would train on with no one to end them; ``keeps_nothing`` as in `StopSignals`. In the
    main thread only."""
    stop = StopSignals(keeps_nothing=keeps_nothing)
    here, there = socket.socketpair()
    there.setblocking(False)
    numbers = stop_signals()
    # The thread is told by Python's handler in C, at once; that in Python has nothing to do.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    agent = os.getppid() if with_agent and "TORCHELASTIC_RUN_ID" in os.environ else None
    thread = threading.Thread(target=_listen, args=(here, numbers, stop, agent), daemon=True)
    thread.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        there.close()  # ends the thread
        thread.join()
        here.close()


def _listen(
    here: socket.socket,
    numbers: tuple[signal.Signals, ...],
    stop: StopSignals,
    agent: int | None,
) -> None:
    here.settimeout(None if agent is None else ASK_SECONDS)
    while True:
        try:
            received = here.recv(64)
        except TimeoutError:
            if os.getppid() != agent:
                complain("the launcher is gone: this rank stops as if it had been told to")
                stop.hear(signal.SIGTERM, time.monotonic())
                here.settimeout(None)  # said once
            continue
        if not received:
            return
        for number in received:
            if number in numbers:
                stop.hear(number, time.monotonic())


@contextmanager
def raised() -> Iterator[None]:
    """In a process that prepares or launches, `stop_signals` raise Stopped.

    Python passes over what is raised in a hook around a fork, a destructor, a callback of a weak
    reference or of C: a signal that comes then comes again, a moment later. One that could not be
    raised before the context ends goes to the handlers of before.
    """
    raising, hook = _Raising(), sys.unraisablehook

    def passed_over(found: sys.UnraisableHookArgs) -> None:
        if (number := _number_of(found.exc_value)) is None:
            hook(found)
        else:
            raising.passed_over(number)

    before = {number: signal.signal(number, raising.hear) for number in stop_signals()}
    sys.unraisablehook = passed_over
    try:
        yield
    finally:
        raising.end()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
    if not raising.is_told:
        for left in raising.left:
            os.kill(os.getpid(), left)


class _Raising:
    """Raises Stopped for a signal, and sends it again where that was passed over and none has been
    raised since; after `end` it does neither, and keeps what comes in ``left``."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self._is_over = False
        self._told = 0  # raised and not passed over
        self._ending = threading.Condition()

    @property
    def is_told(self) -> bool:
        return self._told > 0

    def hear(self, number: int, _: FrameType | None) -> None:
        if self._is_over:
            self.left.append(number)
        else:
            self._told += 1
            raise Stopped(number)

    def passed_over(self, number: int) -> None:
        self._told -= 1
        self.left.append(number)
        threading.Thread(target=self._again, args=(number,), daemon=True).start()

    def _again(self, number: int) -> None:
        with self._ending:  # nothing is sent once `end` has had it
            ended = self._ending.wait_for(lambda: self._is_over, AGAIN_SECONDS)
            if not ended and not self.is_told:
                self.left.remove(number)
                os.kill(os.getpid(), number)

    def end(self) -> None:
        self._is_over = True  # first, so that no signal interrupts this
        with self._ending:
            self._ending.notify_all()


def _number_of(error: BaseException | None) -> int | None:
    """The signal for which ``error`` was raised, by us or by torch's agent; None for any other."""
    number = getattr(error, "number" if isinstance(error, Stopped) else "sigval", None)
    return None if number is None else int(number)


@contextmanager
def held_back() -> Iterator[None]:
    """Processes that the main thread starts begin with `STOP_SIGNALS` held back until they call
    `heard`: before it, one would kill them. This process takes them as ever, by another thread,
    whose mask has them."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done.set()
        thread.join()
