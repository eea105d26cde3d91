"""Worker processes in a ring of network namespaces, and the jobs that they do together."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chunks import keep_memory, sleep_precisely
from ring import Ring

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
PR_SET_PDEATHSIG = 1

Job = Callable[..., tuple[float, float]]
"""What a worker does when it is told to: returns when that began and ended."""


def work(
    ring: Ring,
    rank: int,
    store: str,
    make_job: Callable[[int, int], Job],
    computes: bool,
    connection: Connection,
) -> None:
    """A worker's life: jobs from the connection until None."""
    # The kernel ends it with its parent, however that ends: no worker is left over.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.environ["GLOO_SOCKET_IFNAME"] = ring.enter(rank)
    torch.set_num_threads(1)
    keep_memory()
    if not computes:  # one that computes all the time would take the cores from all others
        sleep_precisely()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ring.num_ranks), rank=rank, world_size=ring.num_ranks
    )
    job = make_job(rank, ring.num_ranks)
    while (arguments := connection.recv()) is not None:
        connection.send(job(*arguments))
    dist.destroy_process_group()


class Cluster:
    """Workers in a ring, for the length of a ``with`` block. ``make_job(rank, ranks)`` is called in
    each; ``computes``: whether they do so all the time, and sleep never."""

    def __init__(
        self, ranks: int, make_job: Callable[[int, int], Job], computes: bool = False
    ) -> None:
        self.ring, self.make_job, self.computes = Ring(ranks), make_job, computes
        self.workers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Cluster:
        self.folder = tempfile.TemporaryDirectory()
        try:
            self.ring.__enter__()
            for rank in range(self.ring.num_ranks):
                self._start(rank)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, rank: int) -> None:
        context = multiprocessing.get_context("fork")
        store = str(Path(self.folder.name) / "store")
        here, there = context.Pipe()
        arguments = self.ring, rank, store, self.make_job, self.computes, there
        process = context.Process(target=work, args=arguments, daemon=True)
        # What `stop` raises in one of Python's hooks around a fork would be lost, and a worker that
        # is not among ours yet would stay.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        process.start()
        there.close()
        self.workers.append((process, here))
        os.setpgid(process.pid, self.workers[0][0].pid)  # out of reach of the terminal's Ctrl-C
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __exit__(self, *_: object) -> None:
        handlers = {stop: signal.signal(stop, signal.SIG_IGN) for stop in STOP_SIGNALS}
        if self.workers:
            os.killpg(self.workers[0][0].pid, signal.SIGKILL)  # at once: none misses its peers
        for process, _ in self.workers:
            process.join()
        self.ring.__exit__()
        self.folder.cleanup()
        for stop, handler in handlers.items():
            signal.signal(stop, handler)

    def run(self, *arguments: Any) -> float:
        """Seconds that a job takes, over all ranks."""
        for _, connection in self.workers:
            connection.send(arguments)
        times = [connection.recv() for _, connection in self.workers]
        return max(end for _, end in times) - min(start for start, _ in times)


def stop(number: int, _: object) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def stop_on_signals() -> None:
    """Have the signals that stop a benchmark end it: one line, no process, no namespace."""
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
