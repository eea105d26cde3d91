"""How many runs at once, and which of the machine's cores or GPUs each of them has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError


@dataclass(frozen=True)
class Slots:
    environments: Sequence[Mapping[str, str]]
    """Of each run that is at work at a time, what its processes find besides the study's own."""
    told: str
    """In words."""


def make_slots(configs: Sequence[RunConfig], jobs: int | None) -> Slots:
    """Slots for runs of ``configs``, ``jobs`` of them, or (None) as many as have GPUs, else cores,
    of their own. Raises UserError for less than one job."""
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}: it must be at least 1")
    most = max(config.parallel.least_processes for config in configs)
    gpus = _gpus(configs)
    return _on_gpus(gpus, most, jobs) if gpus else _on_cores(most, jobs)


def _gpus(configs: Sequence[RunConfig]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that runs may take."""
    if all(config.train.device == "cpu" for config in configs):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()] or [
        str(number) for number in range(torch.cuda.device_count())
    ]


def _on_gpus(gpus: Sequence[str], most: int, jobs: int | None) -> Slots:
    jobs = jobs or max(1, len(gpus) // most)
    each = max(1, len(gpus) // jobs)
    shared = ", which they share" if jobs > len(gpus) // each else ""
    dealt = [[gpus[(job * each + n) % len(gpus)] for n in range(each)] for job in range(jobs)]
    environments = [{"CUDA_VISIBLE_DEVICES": ",".join(mine)} for mine in dealt]
    plural = "s" if each > 1 else ""
    return Slots(environments, f"{jobs} at once, each on {each} GPU{plural}{shared}")


def _on_cores(most: int, jobs: int | None) -> Slots:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    jobs = jobs or max(1, cores // most)
    threads = max(1, cores // (jobs * most))
    # The user's own number of threads is kept, as by the launcher.
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    return Slots([environment] * jobs, f"{jobs} at once, on {cores} cores")
