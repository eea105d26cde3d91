"""Local workers: `attnres-train train` starts them itself where no launcher (torchrun, SLURM) has.

torch's elastic agent starts and watches the processes; this file decides how many, gives them an
environment that suits CPU training, and tells the one failure that matters from its echoes.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_train.config.schema import RunConfig
from attnres_train.screen import complain
from attnres_train.supervise import failures
from attnres_train.supervise.culprit import Failure, explain
from attnres_train.supervise.signals import held_back, stop_signals
from attnres_train.supervise.worker import is_lost_peer

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# glibc returns freed activations to the kernel and faults them in again at every step; above these
# thresholds (bytes) it keeps them. Read by malloc when a process starts, hence set for the workers.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# Seconds that workers have to finish their step and save after a signal; torch gives them 30.
SAVING_ENVIRONMENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


def default_world_size(config: RunConfig) -> int:
    """Processes for a run on this machine: as few as hold the model on CPU, as many as its GPUs."""
    import torch

    least = config.parallel.least_processes
    if config.train.device == "cpu" or not torch.cuda.is_available():
        return least
    return max(1, torch.cuda.device_count() // least) * least


def launch(
    command: list[str], world_size: int, folder: Path, told: Mapping[str, str] | None = None
) -> int:
    """Run ``python <command>`` as ``world_size`` local workers, in whose store is what they are
    ``told``; returns the exit code. A worker that fails ends the others, and its traceback alone is
    printed; if one hangs, which it is and who waited for it, from the records in run folder
    ``folder``."""
    code = _launch(command, world_size, folder, told or {})
    # The agent ends its timer when it is collected, which fails, with a traceback on the user's
    # screen, if it is the timer's own thread that happens to collect.
    gc.collect()
    return code


def _launch(command: list[str], world_size: int, folder: Path, told: Mapping[str, str]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from attnres_train.supervise import local_rendezvous

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // world_size))}
    # In this process, whose environment the workers inherit. The user's own settings are kept.
    for name, value in (threads | MALLOC_ENVIRONMENT | SAVING_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    # The agent logs every signal it sends; what the user needs of that is reported below.
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="attnres-train-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=f"attnres-train-local-{os.getpid()}-{time.time_ns()}",
            rdzv_backend=local_rendezvous.register(told),
            # The processes are all here: this machine's own name may lead nowhere.
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.2,
            signals_to_handle=",".join(s.name for s in stop_signals()),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            # -u: what a worker has printed is on the screen, however it is ended.
            with held_back():
                elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            return _report_failure(error, folder, world_size)
        except SignalException as stop:
            _pass_on(stop.sigval)
            complain(f"stopped by {signal.Signals(stop.sigval).name}")
            return 128 + int(stop.sigval)
    return 0


def _pass_on(number: signal.Signals) -> None:
    """Hand signal ``number`` to workers that are left, and wait for them: those that the agent was
    about to start when it was told to stop, of which it knows nothing."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:  # no Linux
        return
    workers = []
    for pid in children:
        with suppress(OSError):
            if b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, number)
                workers.append(pid)
    for pid in workers:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _report_failure(error: ChildFailedError, folder: Path, world_size: int) -> int:
    """Print the failure that came first by cause; returns the exit code."""
    records = {failure.rank: failure for failure in failures.read(folder)}
    if stop := explain(list(records.values()), world_size):
        complain(f"{stop}\nWhat every rank waited for: {folder / 'failures'}")
        return 1
    rank, failure = min(
        error.failures.items(), key=lambda item: by_cause(item[0], item[1], records)
    )
    if failure.exitcode == 2:
        return 2  # the worker itself has told the user what is wrong
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        complain(f"rank {rank} was killed by {name}{hint}")
    else:
        told = _traceback_of(failure, records.get(rank))
        complain(f"rank {rank} failed: {_sentence_of(failure)}\n{told}")
    return 1


def by_cause(
    rank: int, failure: ProcessFailure, records: Mapping[int, Failure]
) -> tuple[int, float, bool]:
    """What to sort failures by, the cause first: errors and crashes by time, then losses of a peer,
    then ranks that were ended because of those.

    A rank that the agent has killed, as it did not hear of the others' failure, comes after that.
    Of one second, which is all that the agent knows of a crash, the crash comes first.
    """
    record = records.get(rank)
    if failure.exitcode == -signal.SIGTERM or (record and record.ended):
        order = 2
    else:
        order = int(failure.exitcode > 0 and is_lost_peer(failure.message))
    return order, int(record.time if record else failure.timestamp), failure.exitcode > 0


def _sentence_of(failure: ProcessFailure) -> str:
    """Type and text of the error: before its traceback, lest it is looked for."""
    message: object = failure.message
    return message["message"] if isinstance(message, dict) else ""


def _traceback_of(failure: ProcessFailure, record: Failure | None) -> str:
    message: object = failure.message  # declared str, but a dict where the worker has left one
    if isinstance(message, dict):
        return message["extraInfo"]["py_callstack"].rstrip()
    if record and record.traceback:
        return record.traceback
    return f"exit code {failure.exitcode}, without a traceback"
