"""One pool of worker processes for a whole test session.

Starting a process that imports torch takes seconds, and cases with many ranks are many. Workers are
forked from a server that has imported torch and the model once, and are used again; each run gets a
fresh gloo process group.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "torch.distributed", "tests.parity.preloaded"]
GRACE_SECONDS = 3.0


class RankFailedError(RuntimeError):
    """A function raised on some rank; holds that rank's traceback."""


@dataclass
class _Worker:
    process: Any
    connection: Connection


@dataclass
class _Job:
    function: Callable
    args: tuple
    rank: int
    world_size: int
    store: str
    timeout: float


@dataclass
class _Outcome:
    result: Any = None
    traceback: str = ""
    is_echo: bool = False
    """Whether the failure is that of a peer, seen from here."""
    ended: float = 0.0
    """When the function failed, by the clock that all processes share."""


class WorkerPool:
    """Runs functions on up to as many ranks as asked for; processes start on demand."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[_Worker] = []

    def run(self, function: Callable, world_size: int, *args: Any, timeout: float = 300) -> list:
        """``function(*args)`` on ``world_size`` ranks of a gloo group; returns results by rank.

        ``function`` must be importable, arguments and results picklable. Raises RankFailedError
        with the traceback of the rank that failed first, or naming those that hang after
        ``timeout`` seconds; the processes of a failed run are ended.
        """
        self._start(world_size)
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, worker in enumerate(workers):
                job = pickle.dumps(_Job(function, args, rank, world_size, store, timeout))
                worker.connection.send_bytes(pickle.dumps((sys.path, job)))
            outcomes = self._collect(workers, time.monotonic() + timeout)
        failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.traceback}
        hanging = [rank for rank in range(world_size) if rank not in outcomes]
        if failed or hanging:
            self._end(workers)  # gloo does not always recover from a lost peer
        if failed:
            rank = min(failed, key=lambda rank: (failed[rank].is_echo, failed[rank].ended))
            raise RankFailedError(f"rank {rank} of {world_size}:\n{failed[rank].traceback}")
        if hanging:
            raise RankFailedError(f"ranks {hanging} of {world_size} took more than {timeout} s")
        return [outcomes[rank].result for rank in range(world_size)]

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append(_Worker(process, here))

    def _collect(self, workers: list[_Worker], deadline: float) -> dict[int, _Outcome]:
        """Outcomes by rank. Once one rank has failed the others get a few seconds to end too."""
        outcomes: dict[int, _Outcome] = {}
        waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    outcomes[rank] = _Outcome(traceback="the process died")
                if outcomes[rank].traceback:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes

    def _end(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)

    def close(self) -> None:
        """End all processes."""
        self._end(list(self._workers))


def _serve(connection: Connection) -> None:
    """A worker's life: run jobs until the connection closes."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is loaded needs no look after each job
    while True:
        try:
            sys.path[:], job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_outcome(job)))
        # A process group that a cycle holds has a thread, which wakes a hundred times a second.
        gc.collect()


def _outcome(pickled: bytes) -> _Outcome:
    import torch.distributed as dist

    from attnres_train.pipeline.run.waits import PeerError

    try:
        job = pickle.loads(pickled)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(job.store, job.world_size),
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout),
        )
        dist.barrier()  # one that is done at once would close connections that others still make
        return _Outcome(job.function(*job.args))
    except Exception as error:
        return _Outcome(
            traceback=traceback.format_exc(),
            is_echo=isinstance(error, PeerError),
            ended=time.monotonic(),
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
