"""A worker for the launcher's tests: joins the others, fails as it is told to on one rank, and
leaves the rest in a collective operation that never ends by itself.

python -m tests.supervise.worker (error|user error|crash|hang) RANK FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.supervise.worker import run_worker


def work(fault: str, faulty_rank: str, folder: str) -> int:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()  # all are connected: torch logs it when one dies before
    if fault == "hang":
        from attnres_train.supervise.signals import catch_stop_signals
        from tests.supervise.hanging import train_beside_a_sleeper

        catch_stop_signals(Path(folder))
        train_beside_a_sleeper(int(faulty_rank), 60, Path(folder))
    if str(dist.get_rank()) == faulty_rank:
        if fault == "error":
            raise ValueError("the real cause")
        if fault == "user error":
            raise UserError("the user's fault")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_worker(lambda: work(*sys.argv[1:])))
