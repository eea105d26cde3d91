"""The process grid, laid out as megatron-core does: replicas adjacent, the pipeline outermost."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from attnres_train.config.schema import ParallelConfig
from attnres_train.megatron import megatron_core

ORDER = "tp-cp-ep-dp-pp"
"""megatron-core's own: the first varies fastest from rank to rank."""


class Grid(NamedTuple):
    """The global ranks of every group, by kind."""

    pipelines: list[list[int]]
    """By stage."""
    data: list[list[int]]
    """Who holds the same layers: replicas of all but the routed experts."""
    experts: list[list[int]]
    """Who of a ``data`` group share the routed experts of a layer among them: consecutive ranks."""
    expert_data: list[list[int]]
    """Who of a ``data`` group hold the same routed experts."""


class Groups(NamedTuple):
    """A rank's groups, as in `Grid`; ``expert_data`` is ``data`` itself where each rank has all
    experts."""

    pipeline: ProcessGroup
    data: ProcessGroup
    experts: ProcessGroup
    expert_data: ProcessGroup


def lay_out(parallel: ParallelConfig, world_size: int) -> Grid:
    """The grid of ``world_size`` processes."""
    # Imported here: it takes seconds.
    parallel_state = megatron_core("parallel_state")
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    grid = parallel_state.RankGenerator(
        tp=tensor,
        ep=1,  # experts are dealt within the data-parallel ranks
        dp=world_size // parallel.model_parallel_size,
        pp=stages,
        cp=parallel.context_parallel_size,
        order=ORDER,
    )
    shared = parallel.expert_model_parallel_size
    of_experts = parallel_state.RankGenerator(
        tp=tensor,
        ep=shared,
        dp=world_size // (tensor * stages * shared),
        pp=stages,
        cp=1,
        order=ORDER,
    )
    return Grid(
        pipelines=grid.get_ranks("pp"),
        data=grid.get_ranks("dp"),
        experts=of_experts.get_ranks("ep"),
        expert_data=of_experts.get_ranks("dp"),
    )


def build_groups(grid: Grid, timeout: timedelta) -> Groups:
    """This rank's groups, each with ``timeout``. To make one takes its own ranks alone:
    megatron-core's `initialize_model_parallel` makes all groups of all kinds on every rank, which
    grows with the square of their number."""

    def group(of_kind: list[list[int]], name: str) -> ProcessGroup:
        ranks = next(ranks for ranks in of_kind if dist.get_rank() in ranks)
        made = dist.new_group(
            ranks, timeout=timeout, use_local_synchronization=True, group_desc=name
        )
        assert isinstance(made, ProcessGroup)  # this rank is in it
        return made

    data, experts = group(grid.data, "data-parallel"), group(grid.experts, "expert-parallel")
    return Groups(
        pipeline=group(grid.pipelines, "pipeline"),
        data=data,
        experts=experts,
        expert_data=data if experts.size() == 1 else group(grid.expert_data, "expert-data"),
    )
