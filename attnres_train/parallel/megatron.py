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
    """The global ranks of every group, by kind. A *stage* is all ranks with the same layers."""

    pipelines: list[list[int]]
    """By stage."""
    tensor: list[list[int]]
    """Who share the split tensors of a stage, and the same tokens."""
    context: list[list[int]]
    """Who share the tokens of the same samples."""
    data: list[list[int]]
    """Who have other samples, and otherwise the same place."""
    shards: list[list[int]]
    """Who hold the same part of split tensors: ``context`` x ``data``."""
    stages: list[list[int]]
    """Who hold what is neither split nor routed experts: ``tensor`` x ``context`` x ``data``."""
    experts: list[list[int]]
    """Who of a stage share the routed experts of a layer among them: consecutive ranks."""
    expert_data: list[list[int]]
    """Who of a stage hold the same routed experts."""


class Groups(NamedTuple):
    """A rank's groups, as in `Grid`. Those that have the same ranks are one object."""

    pipeline: ProcessGroup
    tensor: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup
    shards: ProcessGroup
    stage: ProcessGroup
    experts: ProcessGroup
    expert_data: ProcessGroup


def lay_out(parallel: ParallelConfig, world_size: int) -> Grid:
    """The grid of ``world_size`` processes."""
    # Imported here: it takes seconds.
    parallel_state = megatron_core("parallel_state")
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    grid = parallel_state.RankGenerator(
        tp=tensor,
        ep=1,  # experts are dealt within a stage, whatever else its ranks share
        dp=world_size // parallel.model_parallel_size,
        pp=stages,
        cp=parallel.context_parallel_size,
        order=ORDER,
    )
    shared = parallel.expert_model_parallel_size
    of_experts = parallel_state.RankGenerator(
        tp=1,
        ep=shared,
        dp=world_size // (stages * shared),
        pp=stages,
        cp=1,
        order=ORDER,
    )
    return Grid(
        pipelines=grid.get_ranks("pp"),
        tensor=grid.get_ranks("tp"),
        context=grid.get_ranks("cp"),
        data=grid.get_ranks("dp"),
        shards=grid.get_ranks("cp-dp"),
        stages=grid.get_ranks("tp-cp-dp"),
        experts=of_experts.get_ranks("ep"),
        expert_data=of_experts.get_ranks("dp"),
    )


def build_groups(grid: Grid, timeout: timedelta) -> Groups:
    """This rank's groups, each with ``timeout``. To make one takes its own ranks alone:
    megatron-core's `initialize_model_parallel` makes all groups of all kinds on every rank, which
    grows with the square of their number."""

    made: dict[tuple[int, ...], ProcessGroup] = {}

    def group(of_kind: list[list[int]], name: str) -> ProcessGroup:
        ranks = next(tuple(ranks) for ranks in of_kind if dist.get_rank() in ranks)
        if ranks not in made:
            new = dist.new_group(
                list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=name
            )
            assert isinstance(new, ProcessGroup)  # this rank is in it
            made[ranks] = new
        return made[ranks]

    return Groups(
        pipeline=group(grid.pipelines, "pipeline"),
        tensor=group(grid.tensor, "tensor-parallel"),
        context=group(grid.context, "context-parallel"),
        data=group(grid.data, "data-parallel"),
        shards=group(grid.shards, "shards"),
        stage=group(grid.stages, "stage"),
        experts=group(grid.experts, "expert-parallel"),
        expert_data=group(grid.expert_data, "expert-data"),
    )
