"""The process grid, laid out by megatron-core: replicas adjacent, the pipeline outermost."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from torch.distributed import ProcessGroup

from attnres_train.config.schema import ParallelConfig
from attnres_train.megatron import megatron_core


class Grid(NamedTuple):
    """A rank's groups."""

    pipeline: ProcessGroup
    data: ProcessGroup
    """Who holds the same layers: replicas of all but the routed experts."""
    experts: ProcessGroup
    """Who of ``data`` share the routed experts of a layer among them: consecutive ranks."""
    expert_data: ProcessGroup
    """Who of ``data`` hold the same routed experts; ``data`` itself where all hold all."""


def build_grid(parallel: ParallelConfig, timeout: timedelta) -> Grid:
    """This rank's groups of the default process group's grid, each with ``timeout``."""
    # Imported here: it takes seconds.
    parallel_state = megatron_core("parallel_state")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    data = parallel_state.get_data_parallel_group()
    experts = parallel_state.get_expert_model_parallel_group()
    expert_data = parallel_state.get_expert_data_parallel_group()
    return Grid(
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=data,
        experts=experts,
        expert_data=data if experts.size() == 1 else expert_data,
    )


def destroy_grid() -> None:
    """Forget the groups, so that another grid can be built in this process."""
    megatron_core("parallel_state").destroy_model_parallel()
