"""Local workers: `attnres-train train` starts them itself where no launcher (torchrun, SLURM) has.

torch's elastic agent starts and watches the processes; this file decides how many, gives them an
environment that suits CPU training, and tells the one failure that matters from its echoes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError

# glibc returns freed activations to the kernel and faults them in again at every step; above these
# thresholds (bytes) it keeps them. Read by malloc when a process starts, hence set for the workers.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# How a collective or point-to-point call ends when the process at its other end has died.
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket Timeout",
    "remote process exited",
)


def default_world_size(config: RunConfig) -> int:
    """Processes for a run on this machine: one replica on CPU, as many as fit on its GPUs."""
    import torch

    replica = config.parallel.model_parallel_size
    if config.train.device == "cpu" or not torch.cuda.is_available():
        return replica
    return max(1, torch.cuda.device_count() // replica) * replica


def launch(arguments: list[str], world_size: int) -> int:
    """Run ``python -m attnres_train <arguments>`` as ``world_size`` local workers; returns the exit
    code. A worker that fails ends the others, and its traceback alone is printed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    defaults = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // world_size)), **MALLOC_ENVIRONMENT}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # The agent logs every signal it sends; what the user needs of that is reported below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="attnres-train-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=f"local-{os.getpid()}-{time.time_ns()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        command = ["-u", "-m", "attnres_train", *arguments]
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return _report_failure(error)
        except SignalException as stop:
            print(f"stopped by {signal.Signals(stop.sigval).name}", file=sys.stderr)
            return 128 + int(stop.sigval)
    return 0


def _report_failure(error) -> int:
    """Print the failure that came first by cause: a crash, then an error, then lost peers."""

    def order(item) -> tuple[int, float]:
        _, failure = item
        crashed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        lost = not crashed and any(text in str(failure.message) for text in PEER_LOST)
        return (0 if crashed else 2 if lost else 1), failure.timestamp

    rank, failure = min(error.failures.items(), key=order)
    if failure.exitcode == 2:
        return 2  # the worker itself has told the user what is wrong
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        print(f"rank {rank} was killed by {name}{hint}", file=sys.stderr)
    else:
        print(f"rank {rank} failed:\n{_traceback_of(failure)}", file=sys.stderr)
    return 1


def _traceback_of(failure) -> str:
    message = failure.message
    if isinstance(message, dict):
        message = message.get("extraInfo", {}).get("py_callstack") or message.get("message", "")
    return str(message).rstrip()


def run_worker(work: Callable[[], int]) -> int:
    """Run a worker's ``work``. An exception is handed to the agent that started the process (the
    local launcher or torchrun), which prints the cause once; without an agent it is printed here,
    with the rank."""
    rank = os.environ.get("RANK", "0")
    try:
        return work()
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            handler = get_error_handler()
            handler.initialize()
            handler.record_exception(error)
        elif any(text in str(error) for text in PEER_LOST):
            print(f"rank {rank}: stopped, a peer is gone: {error}", file=sys.stderr)
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        _leave(1)


def _leave(code: int) -> None:
    """End the process at once: gloo's and NCCL's destructors may wait for the peers that wait for
    this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_local(config: RunConfig) -> None:
    """What is done once, before any worker starts: data, and the checkpoint to resume from."""
    from attnres_train.checkpoint.folders import resolve_resume
    from attnres_train.data.prepare import prepare

    prepare(config)
    resolve_resume(config.checkpoint.resume, Path(config.run.dir) / config.run.name / "checkpoints")
