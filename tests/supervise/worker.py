"""A worker for the launcher's tests: joins the others, fails as it is told to on one rank, and
leaves the rest in a collective operation that never ends by itself.

python -m tests.supervise.worker (error|user error|crash|hang|deaf|stuck) RANK FOLDER
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.supervise.board import Board, own_connection
from attnres_train.supervise.recorder import Recorder
from attnres_train.supervise.signals import heard
from attnres_train.supervise.watch import Pulse, Watch
from attnres_train.supervise.worker import run_worker


def work(fault: str, faulty_rank: str, folder: str) -> int:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()  # all are connected: torch logs it when one dies before
    rank, is_faulty = dist.get_rank(), str(dist.get_rank()) == faulty_rank
    board, pulse = Board(Path(folder), rank, own_connection()), Pulse()
    watch = Watch(Board(Path(folder), rank, own_connection()), pulse, limit=3)
    recorder = Recorder(board, range(dist.get_world_size()), dist.get_world_size(), watch.stop)
    with ExitStack() as stack:
        if fault in ("hang", "deaf", "stuck"):
            stop = stack.enter_context(heard())
            stop.will_save()
            stack.enter_context(recorder.recorded())
            stack.enter_context(watch.over())
        if fault == "hang":
            from tests.supervise.hanging import train_beside_a_sleeper

            train_beside_a_sleeper(int(faulty_rank), 600, Path(folder))
        if fault == "stuck":  # both, as under NCCL, whose groups do not tell of it: one is late
            dist.barrier()
            time.sleep(0 if is_faulty else 2)
            pulse.beat()
            sleep_in_c(600)
        if fault == "deaf" and not is_faulty:
            Path(folder, "deaf").touch()
            sleep_in_c(600)
        if is_faulty:
            while fault == "deaf" and not Path(folder, "deaf").exists():
                time.sleep(0.05)
            if fault in ("error", "deaf"):
                raise ValueError("the real cause")
            if fault == "user error":
                raise UserError("the user's fault")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
    print("done", flush=True)
    return 0


def sleep_in_c(seconds: int) -> None:
    """As in a call into CUDA: Python runs no handler in this thread, and its signals wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    left = seconds
    while left:
        left = ctypes.CDLL(None).sleep(left)


if __name__ == "__main__":
    sys.exit(run_worker(lambda: work(*sys.argv[1:])))
