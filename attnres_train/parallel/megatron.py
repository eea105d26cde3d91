"""The process grid, laid out as megatron-core does: replicas adjacent, the pipeline outermost."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from attnres_train.config.schema import ParallelConfig
from attnres_train.megatron import megatron_core

ORDER = "tp-cp-ep-dp-pp"
"""megatron-core's own: the first varies fastest from rank to rank."""


def lay_out(parallel: ParallelConfig, world_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """The global ranks of every pipeline by stage, and of every group of replicas of a stage."""
    # Imported here: it takes seconds.
    parallel_state = megatron_core("parallel_state")
    grid = parallel_state.RankGenerator(
        tp=parallel.tensor_model_parallel_size,
        ep=1,  # experts are dealt within the data-parallel ranks
        dp=world_size // parallel.model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        order=ORDER,
    )
    return grid.get_ranks("pp"), grid.get_ranks("dp")


def build_groups(
    pipelines: list[list[int]], replicas: list[list[int]], timeout: timedelta
) -> tuple[ProcessGroup, ProcessGroup]:
    """This rank's (pipeline, data-parallel) groups. To make one takes its own ranks alone:
    megatron-core's `initialize_model_parallel` makes all groups of all kinds on every rank, which
    grows with the square of their number."""
    rank = dist.get_rank()
    pipeline, data = (
        dist.new_group(
            next(ranks for ranks in groups if rank in ranks),
            timeout=timeout,
            use_local_synchronization=True,
            group_desc=name,
        )
        for groups, name in ((pipelines, "pipeline"), (replicas, "data-parallel"))
    )
    return pipeline, data
