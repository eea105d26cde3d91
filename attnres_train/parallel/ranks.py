"""Where a process stands in the run: its device, its pipeline and its data-parallel replica."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from attnres_train.config.schema import RunConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.parameters import ParameterRule, parameter_rules
from attnres_train.model.parts import Place, one_of, whole
from attnres_train.parallel.meeting import Meeting
from attnres_train.parallel.megatron import build_groups, lay_out

WATCHDOG_SECONDS = 60.0
"""Time that a run's own watch has to notice a hang before NCCL's watchdog."""


@dataclass(frozen=True)
class Ranks:
    """This process's place. ``pipelines`` lists the global ranks of every pipeline by stage, the
    same on every process."""

    rank: int
    world_size: int
    device: torch.device
    pipeline: ProcessGroup
    tensor: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup
    shards: ProcessGroup
    stage: ProcessGroup
    experts: ProcessGroup
    expert_data: ProcessGroup
    """These are as in `parallel.megatron.Grid`."""
    pipelines: tuple[tuple[int, ...], ...]
    control: ProcessGroup
    """All processes, CPU-capable: checkpoints and other coordination beside training."""
    timeout: timedelta
    """How long a rank waits for another within a step (``pipeline.timeout_seconds``)."""

    @property
    def group_timeout(self) -> timedelta:
        """Of groups whose backend is the device's."""
        return group_timeout(backend_of(self.device), self.timeout)

    @property
    def pp_rank(self) -> int:
        return self.pipeline.rank()

    @property
    def own_pipeline(self) -> tuple[int, ...]:
        """The global ranks of this process's pipeline by stage."""
        return next(ranks for ranks in self.pipelines if self.rank in ranks)

    @property
    def dp_rank(self) -> int:
        return self.data.rank()

    @property
    def dp_size(self) -> int:
        return self.data.size()

    def replicas(self, rule: ParameterRule) -> ProcessGroup:
        """Who holds the replicas of a parameter. Its gradient is summed over them, and divided by
        `dp_size` whichever they are: ranks that share samples have parts of the same sum."""
        if rule.is_expert:
            return self.expert_data
        return self.stage if rule.split is None else self.shards

    def place(self, rule: ParameterRule, shape: Sequence[int]) -> Place:
        """Where this rank's part, of ``shape``, of a parameter that is no expert's lies in it."""
        if rule.split is None:
            return whole(shape)
        return one_of(shape, rule.split, self.tensor.rank(), self.tensor.size())

    @property
    def is_main(self) -> bool:
        """The one process that writes files and prints."""
        return self.rank == 0


def places_of(chunk: ModelChunk, ranks: Ranks) -> Iterator[tuple[str, Place]]:
    """The parameters of ``chunk``, but experts, and where what is here of each lies in it."""
    for name, rule in parameter_rules(chunk).items():
        if not rule.is_expert:
            yield name, ranks.place(rule, chunk.get_parameter(name).shape)


def choose_device(device: str) -> torch.device:
    """`train.device` resolved; on CUDA the local rank's card."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def backend_of(device: torch.device) -> str:
    """Of torch.distributed, for tensors on ``device``."""
    return "nccl" if device.type == "cuda" else "gloo"


def group_timeout(backend: str, limit: timedelta) -> timedelta:
    """The timeout of a group of ``backend`` whose ranks wait for each other up to ``limit``."""
    # gloo's raises in the call that waits, and says what was waited for. NCCL's is a watchdog that
    # ends the process, without a record of it: it is there for what our own watch
    # (`supervise.watch`: limit and a margin) does not see, and has to come after that.
    return limit if backend == "gloo" else limit + timedelta(seconds=WATCHDOG_SECONDS)


@contextmanager
def join_run(config: RunConfig, meeting: Meeting) -> Iterator[Ranks]:
    """Make the process groups of those who have met, and yield `Ranks`. To be called by all of them
    within ``pipeline.timeout_seconds``, which is every group's timeout (`group_timeout`).
    """
    device = choose_device(config.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = backend_of(device)
    timeout = timedelta(seconds=config.pipeline.timeout_seconds)
    meeting.store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=group_timeout(backend, timeout),
    )
    failed = True
    try:
        yield _place(config, device, timeout)
        dist.barrier()  # nobody closes the connections that another still uses
        failed = False
    finally:
        # After a failure others may be stuck: to take leave of them may last for ever (NCCL waits
        # for its kernels). The process ends instead.
        if not failed or dist.get_world_size() == 1:
            dist.destroy_process_group()


def _place(config: RunConfig, device: torch.device, timeout: timedelta) -> Ranks:
    grid = lay_out(config.parallel, dist.get_world_size())
    on_device = group_timeout(backend_of(device), timeout)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        **build_groups(grid, on_device)._asdict(),
        pipelines=tuple(map(tuple, grid.pipelines)),
        # NCCL moves nothing that lies in the CPU's memory.
        control=dist.new_group(backend="gloo", timeout=timeout),
        timeout=timeout,
    )
